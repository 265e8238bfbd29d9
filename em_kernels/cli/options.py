"""Options that the evaluator's commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from typing import Any

from em_kernels.evaluator.run import USUAL, EvalConfig
from em_kernels.lm.models import require_transformers
from em_kernels.lm.problems import find_source
from em_kernels.lm.settings import add_flags, given_settings, settings_of

AddCommon = Callable[[argparse.ArgumentParser, Callable[[argparse.Namespace], int]], None]
GO_ON = "; what was done is kept, the same command goes on"


def quiet_transformers() -> None:
    """Its warnings and bars would tear up the progress bar; errors come through as exceptions."""
    logging = require_transformers().utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def add_asking(
    parser: argparse.ArgumentParser,
    without: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """The settings of an evaluation, --no-greedy and --quiet, without those of no use."""
    if "temperatures" not in without:
        parser.add_argument("--no-greedy", action="store_true", help="leave out greedy accuracy")
    names = [name for name in settings_of(EvalConfig) if name not in ("output", *without)]
    add_flags(parser, EvalConfig, only=names, defaults=defaults)
    add_quiet(parser)


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """--quiet; and, where the command is interrupted, what to do."""
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(go_on=GO_ON)


def asking(arguments: argparse.Namespace, **settings) -> EvalConfig:
    """The EvalConfig of the options of `add_asking`, with `settings` on top."""
    given = {**given_settings(arguments, EvalConfig), **settings}
    if "temperatures" not in settings:
        given["temperatures"] = _temperatures(arguments)
    return EvalConfig(**given)


def _temperatures(arguments: argparse.Namespace) -> tuple[float, ...]:
    """Greedy, on top of what is given or the preset's, else 1."""
    usual = find_source(arguments.problems).settings.get("temperature", USUAL["temperature"])
    drawn = [t for t in getattr(arguments, "temperatures", [usual]) if t != 0]
    return tuple(drawn if arguments.no_greedy else [0.0, *drawn])
