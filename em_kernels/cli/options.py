"""Options that the evaluator's commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from em_kernels.evaluator.run import EvalConfig
from em_kernels.lm.judge.judges import JUDGES
from em_kernels.lm.models import DTYPES, require_transformers
from em_kernels.lm.problems import find_source

AddCommon = Callable[[argparse.ArgumentParser, Callable[[argparse.Namespace], int]], None]
GO_ON = "; what was done is kept, the same command goes on"


def quiet_transformers() -> None:
    """Its warnings and bars would tear up the progress bar; errors come through as exceptions."""
    logging = require_transformers().utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def add_asking(parser: argparse.ArgumentParser) -> None:
    """The options of whatever asks a model problems."""
    parser.add_argument("--limit", type=int, help="only the first so many problems")
    parser.add_argument("--top-p", type=float, help="nucleus of the sampling (default 1)")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer (default 2048)")
    parser.add_argument("--template", help="the prompt, with {problem} in it (default: only that)")
    parser.add_argument("--batch-size", type=int, help="answers generated at once")
    parser.add_argument("--judge", choices=JUDGES, default="auto", help="what decides an answer")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    add_model_options(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def asking(arguments: argparse.Namespace, **settings) -> EvalConfig:
    """The EvalConfig of the options of `add_asking`, with `settings` on top."""
    names = EvalConfig.__dataclass_fields__
    given = {name: value for name, value in vars(arguments).items() if name in names}
    return EvalConfig(**{**given, **settings})


def temperatures_of(arguments: argparse.Namespace) -> tuple[float, ...]:
    """Greedy, on top of what is given or the preset's, else 1."""
    usual = find_source(arguments.problems).settings.get("temperature", 1.0)
    drawn = [t for t in (arguments.temperatures or [usual]) if t != 0]
    return tuple(drawn if arguments.no_greedy else [0.0, *drawn])
