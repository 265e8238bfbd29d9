"""Messages name settings, as a caller in Python does; on the command line a setting is a flag."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from em_kernels.trainer.checkpoint import CONFIG_FILE

_WORD = r"[A-Za-z][A-Za-z0-9_]*"
_FLAG = r" \(--[\w-]+\)"  # where a message that is written to a file has both
_LIST = r"\[[^\]]*\]|\([^)]*\)"
_TOLD = rf"'[^']*'|\"[^\"]*\"|{_LIST}|-?[\w.+-]*\w"
_PLACES = (
    rf"(?<!\w)(?:'[^']*'|\"[^\"]*\")(?!\w)"  # what was received stays as it is
    rf"|`(?P<marked>{_WORD})`(?:{_FLAG})?"
    rf"|(?<![\w./-])(?P<told>{_WORD})=(?P<value>{_TOLD})"
    rf"|(?<![\w./'-])(?P<name>{_WORD})(?![\w/'-]|\.\w)(?:{_FLAG})?"
)
_RULE = r"\s(?:must|is for|cannot change|cannot be)\b"
_FIRST = re.compile(rf"{_RULE}|:\s")
_TYPED = rf"(?![\w=])(?!{_RULE})"  # else it is the setting of that name


def in_flags(text: str, flags: Mapping[str, str], typed: Iterable[str] = ()) -> str:
    """The message with the flags, by the names of settings, in the place of these.

    A name is one where it has an underscore, stands in `backticks`, has a value (name=value) or
    begins a sentence about what it must be; other words, what is quoted, and values that were
    `typed` (a folder may be called as a setting is) stay as they are.
    """
    own = "".join(
        rf"(?<![\w-]){re.escape(value)}{_TYPED}|" for value in sorted(typed, reverse=True)
    )

    def replaced(found: re.Match[str]) -> str:
        name = found["marked"] or found["told"] or found["name"]
        if name is None or name not in flags:
            return found[0]
        if found["told"]:
            return _given(flags[name], found["value"])
        begins = text[: found.start()].endswith(": ") or found.start() == 0
        is_first = begins and _FIRST.match(text, found.end())
        return flags[name] if found["marked"] or "_" in name or is_first else found[0]

    return re.sub(own + _PLACES, replaced, text)


def _given(flag: str, value: str) -> str:
    """--flag value, as one types it."""
    switch = {"True": flag, "False": f"--no-{flag[2:]}", "None": f"no {flag}"}
    words = value[1:-1].split(",") if re.fullmatch(_LIST, value) else [value]
    shown = " ".join(word.strip(" '\"") for word in words)
    return switch.get(value) or f"{flag} {shown}".rstrip()


def as_typed(text: str, arguments: argparse.Namespace) -> str:
    """The message in the flags of the command; of what a file of settings says, in those that were
    given on top of it."""
    flags = _flags(arguments.parser)
    if getattr(arguments, "prompt", None) is not None:  # `prompts` then are these
        flags["prompts"] = flags["prompt"]
    else:
        flags.pop("prompt", None)
    if text.startswith(tuple(_of_files(arguments))):
        flags = {name: f for name, f in flags.items() if getattr(arguments, name, None) is not None}
    return in_flags(text, flags, _words(arguments))


def help_in_flags(parser: argparse.ArgumentParser) -> None:
    """Settings are described for Python too."""
    flags = _flags(parser)
    for action in parser._actions:
        action.help = in_flags(action.help or "", flags) or None


def _flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """By the names of settings."""
    actions = parser._option_string_actions
    return {action.dest: flag for flag, action in reversed(actions.items())}


def _of_files(arguments: argparse.Namespace) -> list[str]:
    """How a message begins that is about what a file of settings says."""
    folder, file = (getattr(arguments, name, None) for name in ("resume", "config"))
    files = [] if folder is None else [str(Path(folder) / CONFIG_FILE)]
    files += [] if file is None else [file, f"with the settings of {file}"]
    return [f"{file}: " for file in files]


def _words(arguments: argparse.Namespace) -> set[str]:
    """Texts among the values that were typed, and as a path is shown: run/ is run."""
    values = vars(arguments).values()
    found = [v if isinstance(v, (list, tuple)) else [v] for v in values]
    texts = [one for several in found for one in several if isinstance(one, str) and one]
    return {shown for text in texts for shown in (text, str(Path(text)))}
