"""Prompts, templates of prompts, and files of JSON lines."""

from __future__ import annotations

import gzip
import json
import math
import reprlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeGuard

from em_kernels.lm.text import one_line

ONE_SHOT_PROMPT = (
    "The pressure P exerted by wind on a sail varies jointly as the area A of the sail and the "
    "cube of the wind's velocity V. When the velocity is 8 miles per hour, the pressure on a sail "
    "of 2 square feet is 4 pounds. Find the wind velocity when the pressure on 4 square feet of "
    "sail is 32 pounds."
)
"""The one prompt of Gao et al., "One-shot Entropy Minimization" (2025); its answer is 12.8."""


def read_bytes(path: Path) -> bytes:
    """The whole of a file, of a .gz file what is packed in it.

    Raises:
        ValueError: a .gz file that is not whole.
    """
    return b"".join(_lines(path))


def _lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            yield from file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: not a whole gzip file ({one_line(error)})") from None


def json_rows(path: str | Path) -> Iterator[tuple[int, dict | str]]:
    """(line number, object) of a file of JSON lines; of a line that holds none, the reason.

    Blank lines are left out. A .gz file is unpacked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a .gz file that is not whole.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield number, _json_object(line, "utf-8-sig" if number == 1 else "utf-8")


def read_json_object(path: str | Path) -> dict:
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: no JSON object in UTF-8, in one line that names the file.
    """
    found = _json_object(Path(path).read_bytes(), "utf-8-sig")
    if isinstance(found, str):
        raise ValueError(f"{path}: {found}")
    return found


def _json_object(line: bytes, encoding: str) -> dict | str:
    try:
        value = json_value(line, encoding)
    except ValueError as error:
        return str(error)
    return value if isinstance(value, dict) else f"not a JSON object but {type(value).__name__}"


def json_value(text: bytes, encoding: str = "utf-8") -> Any:
    """What the text says; ValueError that says why it is no JSON."""
    try:
        return json.loads(text.decode(encoding))
    except UnicodeDecodeError:
        raise ValueError("not valid JSON (not UTF-8 text)") from None
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None
    except json.JSONDecodeError as error:
        place = f", line {error.lineno}" if b"\n" in text.strip() else ""
        raise ValueError(f"not valid JSON ({error.msg}{place})") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from None


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) for every line that is not blank.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not a JSON object in UTF-8, named by its number.
    """
    for number, row in json_rows(path):
        if isinstance(row, str):
            raise ValueError(f"{path}, line {number}: {row}")
        yield number, row


def not_unicode(text: str) -> str | None:
    """What keeps a text from tokenizers and files, or None.

    JSON can hold one half of a surrogate pair, as an escape; there is no such character.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        return f"half of a surrogate pair, {half}, as character {error.start + 1}"
    return None


def check_text(name: str, text: str) -> None:
    """Raise a ValueError where `text` is empty, or no Unicode text."""
    if not text.strip():
        raise ValueError(f"{name} must not be empty, got {text!r}")
    check_unicode(name, text)


def check_unicode(name: str, text: str) -> None:
    reason = not_unicode(text)
    if reason is not None:
        raise ValueError(f"{name} must be Unicode text, got {reason}")


def is_number(value) -> TypeGuard[float]:
    """Finite, and not a bool; JSON as Python reads it has NaN and Infinity too."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value) -> TypeGuard[int]:
    """An int of 0 or more, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def fields_of(row: Mapping, names: Iterable[str]) -> list[str]:
    """Those of the fields `names` that a row has, by their names there.

    Capitals, and "_" for a blank, are not told apart: AIME's "Problem" is "problem".
    """
    plain = {_plain(name): name for name in reversed(list(row))}
    found = (name if name in row else plain.get(_plain(name)) for name in names)
    return [name for name in found if name is not None]


def _plain(name: object) -> str:
    return str(name).strip().casefold().replace(" ", "_")


def text_field(row: Mapping, *names: str, several: bool = False, setting: str = "") -> str:
    """The first of the fields `names` that a row has: text that is not blank, or a number as text.

    A field that is null is taken for one that is not there, if there is another.
    Numbers are written without an exponent; `several` of either, in a list, become one text.
    `setting` is what names the field.

    Raises:
        ValueError: the row has none of them, or it is something else; the caller says where.
    """
    present = fields_of(row, names)
    if not present:
        flag = "--" + setting.replace("_", "-")
        raise ValueError(
            f"no field {' or '.join(map(repr, names))}, only {sorted(map(str, row))}"
            + (f"; {setting} ({flag}) names the one to take" if setting else "")
        )
    name = next((name for name in present if row[name] is not None), present[0])
    text = _text(row[name], several)
    if text is None:
        raise ValueError(f"{name!r} must be text that is not empty, got {reprlib.repr(row[name])}")
    reason = not_unicode(text)
    if reason is not None:
        raise ValueError(f"{name!r} must be Unicode text, got {reason}")
    return text


def _text(value, several: bool) -> str | None:
    if several and isinstance(value, (list, tuple)) and value:
        parts = [_text(part, False) for part in value]
        return None if None in parts else ", ".join(map(str, parts))
    if is_number(value):
        return _number_text(value)
    return value if isinstance(value, str) and value.strip() else None


def _number_text(value: float) -> str:
    """Its shortest decimal digits, without an exponent: 0.00001, not 1e-05."""
    return format(Decimal(value if isinstance(value, int) else repr(float(value))), "f")


PLACE = "{problem}"
"""Where the problem goes in a template. Every other brace is itself: \\boxed{} stays \\boxed{}."""


def check_template(template: str) -> None:
    """Raise a ValueError for a template without a place for the problem, or no Unicode text."""
    if PLACE not in template:
        raise ValueError(
            f"template must have {PLACE} in it, where the problem goes, got {template!r}; "
            f"other braces are themselves, as in 'Solve {PLACE} in \\boxed{{}}'"
        )
    check_unicode("template", template)


def fill_template(template: str, problem: str) -> str:
    """The prompt that puts the problem to the model."""
    return template.replace(PLACE, problem)
