"""argparse as the command line uses it: the error first and in one line, no abbreviated flags."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from em_kernels.cli.messages import help_in_flags
from em_kernels.lm.text import did_you_mean, one_line

FAILED = 2


class Parser(argparse.ArgumentParser):
    """A flag is written in full: one that is added later must not change what a script means."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **{**options, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        print(f"em-kernels: error: {message}", file=sys.stderr)
        print(f"usage: {self.prog} --help shows how it is used", file=sys.stderr)
        raise SystemExit(FAILED)

    def format_help(self) -> str:
        help_in_flags(self)
        return super().format_help()

    def refuse_unknown(self, words: Sequence[str]) -> NoReturn:
        """What no flag and no argument of the command is."""
        flags = [word.partition("=")[0] for word in words if word.startswith("-")]
        near = did_you_mean(flags[0], self._option_string_actions) if flags else ""
        self.error(f"unrecognized arguments: {' '.join(words)}{near}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), map(str, action.choices or ()))
            raise


@contextmanager
def short_warnings(shown: Callable[[str], str] = str) -> Iterator[None]:
    """A warning is one line, like an error, without the place in the code that gave it; `shown` is
    what becomes of the text."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: (
        f"em-kernels: warning: {shown(one_line(Warning(message), None))}\n"
    )
    try:
        yield
    finally:
        warnings.formatwarning = before
