"""Text files that a stopped process leaves whole; long texts and other libraries' errors in a
message; digests."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

UTF8: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}
"""How texts are written, whatever is in them: half of a surrogate pair, which UTF-8 cannot hold,
becomes its escape, which JSON reads back."""


def write_text(path: Path, text: str) -> None:
    """Aside, then renamed: there is never half a file. Its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, **UTF8)
    aside.replace(path)


def check_can_be_file(path: Path) -> None:
    """Raise where `write_text` would find a folder, or a file above: before what is to be written
    is made."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, and must be a file or not there yet")
    check_can_be_folder(path.parent)


def check_can_be_folder(path: Path) -> None:
    """Raise where it is a file, or below one."""
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir():
        rule = "a folder or not there yet" if there == path else "a folder"
        raise NotADirectoryError(f"{there} is a file, and must be {rule}")


def check_folder(path: str | Path, kind: type[Exception] = FileNotFoundError) -> None:
    """Raise a `kind` where there is no folder."""
    if not Path(path).is_dir():
        there = Path(path).exists()
        raise kind(
            f"{path} is a file, and must be a folder" if there else f"no such folder: {path}"
        )


def repair_lines(path: Path) -> None:
    """Cut off what a crash left of an unfinished last line."""
    if not path.is_file():
        return
    whole = 0
    with path.open("rb+") as file:
        for line in file:
            whole += len(line) if line.endswith(b"\n") else 0
        file.truncate(whole)


def one_line(error: BaseException, most: int | None = 400) -> str:
    """Its text without line breaks, cut after `most` characters; its type where it says nothing.

    Long words, as paths are, are shortened, and so is the middle of a text that is still long.
    """
    text = shortened(" ".join(str(error).split()))
    return text[:most] or type(error).__name__


def shortened(text: str, word: int = 160, whole: int = 1600) -> str:
    """Without the middle of its long words, and of itself where it is still long."""
    text = re.sub(rf"\S{{{word + 1},}}", lambda found: _ends(found[0], word), text)
    return _ends(text, whole)


def _ends(text: str, most: int) -> str:
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def cut(text: str, most: int) -> str:
    """Its beginning, of at most so many characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def text_digest(text: str) -> str:
    """16 hexadecimal digits of SHA-256, which tell texts apart."""
    return hashlib.sha256(text.encode(**UTF8)).hexdigest()[:16]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about a word that is not `known`: "" where none is near."""
    near = get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""
