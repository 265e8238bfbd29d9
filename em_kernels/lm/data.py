"""Prompts and JSON-lines files."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator
from pathlib import Path

ONE_SHOT_PROMPT = (
    "The pressure P exerted by wind on a sail varies jointly as the area A of the sail and the "
    "cube of the wind's velocity V. When the velocity is 8 miles per hour, the pressure on a sail "
    "of 2 square feet is 4 pounds. Find the wind velocity when the pressure on 4 square feet of "
    "sail is 32 pounds."
)
"""The one prompt of Gao et al., "One-shot Entropy Minimization" (2025); its answer is 12.8."""


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) for every line that is not blank.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not a JSON object in UTF-8, named by its number.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = parse_line(line, number)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            if not isinstance(value, dict):
                kind = type(value).__name__
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {kind}")
            yield number, value


def parse_line(line: bytes, number: int):
    """The value in line `number` of a file of JSON lines.

    Raises:
        ValueError: there is none; only the reason, for the caller to say where.
    """
    try:
        return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not valid JSON (not UTF-8 text)") from None
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON ({getattr(error, 'msg', error)})") from None


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


def is_number(value) -> bool:
    """Finite, and not a bool; JSON as Python reads it has NaN and Infinity too."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def text_field(path: str | Path, number: int, line: dict, *names: str) -> str:
    """The first of `names` that the line has: text that is not blank, or a number as text.

    Raises:
        ValueError: it has none of them, or it is something else; names file and line.
    """
    present = [name for name in names if name in line]
    expected = " or ".join(map(repr, names))
    if not present:
        raise ValueError(f"{path}, line {number}: no field {expected}, got {sorted(line)}")
    value = line[present[0]]
    if is_number(value):
        return str(value)
    where = f"{path}, line {number}: {present[0]!r} must be"
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where} text that is not empty, got {reprlib.repr(value)}")
    reason = not_unicode(value)
    if reason is not None:
        raise ValueError(f"{where} Unicode text, got {reason}")
    return value


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """The prompts of a file of lines {"prompt": ...} or {"problem": ...}."""
    lines = read_jsonl(path)
    prompts = tuple(text_field(path, number, line, "prompt", "problem") for number, line in lines)
    if not prompts:
        raise ValueError(f"{path}: no prompts in the file")
    return prompts


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids of the prompt as the user's turn of the chat template, ready for an answer.

    A tokenizer without a chat template encodes the bare text.
    """
    check_text("prompt", prompt)
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise ValueError(f"prompt must have at least one token, got none from {prompt!r}")
    return list(ids)
