"""Options that the evaluator's commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from typing import Any

from em_kernels.evaluator.run import USUAL, EvalConfig
from em_kernels.lm.models import require_transformers
from em_kernels.lm.problems import find_source
from em_kernels.lm.setting_files import check_names, check_values, read_settings
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
    has_file = defaults is None
    if has_file:
        parser.add_argument(
            "--config",
            metavar="FILE",
            help="settings in a .yaml, .toml or .json file, or the eval.json of an evaluation to "
            "do again; flags go before them",
        )
    add_flags(parser, EvalConfig, only=names, defaults=defaults, required=not has_file)
    add_quiet(parser)


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """--quiet; and, where the command is interrupted, what to do."""
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(go_on=GO_ON)


def asking(arguments: argparse.Namespace, **settings) -> EvalConfig:
    """The EvalConfig of the options of `add_asking`, with `settings` on top."""
    path = getattr(arguments, "config", None)
    flags = {**given_settings(arguments, EvalConfig), **settings}
    given = {**(_from_file(path, settings) if path else {}), **flags}
    for name in ("model", "problems"):
        if given.get(name) is None:
            raise ValueError(f"--{name} must be given" + (f": it is not in {path}" if path else ""))
    if "temperatures" not in settings:
        given["temperatures"] = _temperatures(arguments, given)
    if path:
        check_values(path, {name: given[name] for name in given if name not in flags}, EvalConfig)
    return EvalConfig(**given)


def _from_file(path: str, settings: Collection[str]) -> dict[str, Any]:
    """The settings of a file; of an evaluation, what it was made with."""
    found = read_settings(path)
    own = {*settings, "output", "labelled"}
    if isinstance(found.get("config"), dict) and "version" in found:
        found = {name: value for name, value in found["config"].items() if name not in own}
    check_names(path, found, [name for name in settings_of(EvalConfig) if name not in own])
    return found


def _temperatures(arguments: argparse.Namespace, given: Mapping[str, Any]) -> tuple[float, ...]:
    """Greedy, on top of what is given or the preset's, else 1; those of a file as they are."""
    usual = find_source(given["problems"]).settings.get("temperature", USUAL["temperature"])
    told = given.get("temperatures")
    told = (told,) if isinstance(told, (int, float)) else told
    drawn = [t for t in ([usual] if told is None else told) if t != 0]
    is_file = told is not None and not hasattr(arguments, "temperatures")
    greedy = 0 in (told or ()) if is_file else True
    return tuple([0.0, *drawn] if greedy and not arguments.no_greedy else drawn)
