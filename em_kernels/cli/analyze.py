"""The commands analyze tokens, analyze run, analyze law."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from em_kernels.analysis.law import entropy_law, points_of, predict_runs
from em_kernels.analysis.report import save, write_report
from em_kernels.analysis.run_curve import evaluate_run
from em_kernels.analysis.temperature import entropy_at_temperatures
from em_kernels.analysis.texts import Texts
from em_kernels.analysis.tokens import Base, TokenFile, read_tokens
from em_kernels.cli.options import AddCommon, add_asking, add_quiet, asking, quiet_transformers
from em_kernels.evaluator.asking import longest_prompt
from em_kernels.evaluator.records import SETTINGS, EvalError, read_settings
from em_kernels.evaluator.run import EvalConfig, run_eval
from em_kernels.lm.chat import Chat
from em_kernels.lm.models import load_model
from em_kernels.lm.settings import add_flags
from em_kernels.trainer.checkpoint import METRICS_FILE

MODEL = {"dtype": "float32", "device": "auto", "trust_remote_code": False}
CHAT = ("system", "chat_template_kwargs")
TEMPERATURES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def add_analyze(commands, add_common: AddCommon) -> None:
    parser = commands.add_parser(
        "analyze",
        help="entropies and logits of texts, of a run, of evaluations",
        description="What entropies and logits say about a model, beyond its accuracy.",
    )
    kinds = parser.add_subparsers(required=True, metavar="tokens | run | law")
    _add_tokens(kinds, add_common)
    _add_run(kinds, add_common)
    _add_law(kinds, add_common)


def _add_tokens(kinds, add_common: AddCommon) -> None:
    parser = kinds.add_parser(
        "tokens",
        help="forks, entropy against temperature, logits shift, drift",
        description="Read texts once through a model: entropy by token and the forks, entropy "
        "against temperature, moments of the logits; with --after, how these shift, and how far "
        "the distributions of the second model have drifted from those of the first.",
    )
    parser.add_argument(
        "source", help='folder of an evaluation, or JSON lines {"prompt", "response"}'
    )
    parser.add_argument("--model", help="default: the evaluation's")
    parser.add_argument(
        "--after", metavar="MODEL", help="a second model, to compare logits and distributions"
    )
    parser.add_argument(
        "--drift",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with --after: the exact divergences of the two models at every token, for which "
        "both are in memory at once; --no-drift holds one after the other",
    )
    parser.add_argument(
        "--temperatures",
        type=float,
        nargs="+",
        default=TEMPERATURES,
        metavar="T",
        help=f"of the entropies, above 0 (default {' '.join(map(str, TEMPERATURES))})",
    )
    parser.add_argument(
        "--ratio", type=float, default=0.2, help="share of tokens that are forks (default 0.2)"
    )
    parser.add_argument("--limit", type=int, help="only the first so many texts (default all)")
    parser.add_argument(
        "--drawn-at",
        type=float,
        metavar="T",
        help="only answers of this temperature, 0 is greedy (default all)",
    )
    parser.add_argument("--output", metavar="DIR", help="default: the evaluation's folder")
    add_flags(parser, EvalConfig, only=MODEL, defaults=MODEL)
    add_flags(parser, EvalConfig, only=CHAT)
    add_quiet(parser)
    add_common(parser, _tokens)


def _tokens(arguments: argparse.Namespace) -> int:
    # Imported where it is used: the command line starts without NumPy.
    from em_kernels.analysis.forks import forks

    quiet_transformers()
    is_evaluation = (Path(arguments.source) / SETTINGS).is_file()
    output, model = arguments.output, arguments.model
    if not Path(arguments.source).exists():
        raise FileNotFoundError(f"no such file or folder: {arguments.source}")
    if not is_evaluation and Path(arguments.source).is_dir():
        raise EvalError(f"{arguments.source} is not an evaluation: it has no {SETTINGS}")
    if is_evaluation:
        given = [name for name in CHAT if hasattr(arguments, name)]
        if given:
            raise ValueError(
                f"{given[0]} is for files of texts: an evaluation's prompts are put as it put them"
            )
        output = output or arguments.source
        model = model or read_settings(arguments.source)["config"]["model"]
    for name, value in (("output", output), ("model", model)):
        if value is None:
            raise ValueError(f"--{name} must be given where the texts are not an evaluation's")
    loaded = _load(arguments, model)
    base = Base(loaded.model, loaded.name) if arguments.after and arguments.drift else None
    path = Path(output) / "tokens.jsonl"
    options = dict(temperatures=arguments.temperatures, tokenizer=loaded.tokenizer)
    before, texts = _read(arguments, loaded, path, **options)
    del loaded
    results = {
        "forks": forks(before, texts.tokenizer, ratio=arguments.ratio),
        "temperature": entropy_at_temperatures(before),
        **_compared(arguments, before, texts, base),
    }
    return _done(output, {n: {**r, "left_out": dict(texts.left_out)} for n, r in results.items()})


def _compared(
    arguments: argparse.Namespace, before: TokenFile, texts: Texts, base: Base | None
) -> dict[str, dict]:
    """What there is to say of the model before alone, or against the one after."""
    from em_kernels.analysis.drift import drift
    from em_kernels.analysis.shift import logits_shift

    if not arguments.after:
        return {"shift": logits_shift(before)}
    loaded = _load(arguments, arguments.after, texts.tokenizer)
    path = before.path.with_name("tokens-after.jsonl")
    options = dict(tokenizer=texts.tokenizer, longest=texts.longest, base=base)
    after, _ = _read(arguments, loaded, path, **options)
    found = {"shift": logits_shift(before, after)}
    if base is not None:
        found["drift"] = drift(before, after, texts.tokenizer, ratio=arguments.ratio)
    return found


class _Loaded(NamedTuple):
    name: str
    model: Any
    tokenizer: Any


def _load(arguments: argparse.Namespace, name: str, tokenizer=None) -> _Loaded:
    """The model called `name`; `tokenizer` is that of the model before."""
    dtype, trust = getattr(torch, arguments.dtype), arguments.trust_remote_code
    model, own = load_model(name, arguments.device, dtype, trust)
    if tokenizer is not None and tokenizer.get_vocab() != own.get_vocab():
        raise ValueError(f"--after {name} has another vocabulary than the model before")
    return _Loaded(name, model, own)


def _read(
    arguments: argparse.Namespace,
    loaded: _Loaded,
    path: Path,
    *,
    tokenizer,
    temperatures: Sequence[float] = (),
    base: Base | None = None,
    longest: int | None = None,
) -> tuple[TokenFile, Texts]:
    """Read the texts through a model, in the tokens of the model before, and no longer ones."""
    room = longest_prompt(loaded.model)
    limits = [limit for limit in (longest, room and room + 1) if limit is not None]
    texts = Texts(
        arguments.source,
        tokenizer,
        longest=min(limits, default=None),
        limit=arguments.limit,
        drawn_at=arguments.drawn_at,
        chat=Chat(*(getattr(arguments, name, None) for name in CHAT)),
    )
    file = read_tokens(
        loaded.model,
        texts,
        path,
        name=loaded.name,
        temperatures=temperatures,
        base=base,
        progress=not arguments.quiet,
    )
    return file, texts


def _add_run(kinds, add_common: AddCommon) -> None:
    parser = kinds.add_parser(
        "run",
        help="accuracy and entropy of every checkpoint of a training run",
        description="Evaluate the model a run began with and each of its checkpoints: accuracy and "
        "entropy by update, over-confidence, and the fit R = -a exp(H) + b.",
    )
    parser.add_argument("run", help="folder of the run; evaluations go into it")
    add_asking(parser, without=["model"])
    add_common(parser, _run)


def _run(arguments: argparse.Namespace) -> int:
    quiet_transformers()

    def evaluate(model: str, folder: Path) -> dict:
        if not arguments.quiet:
            print(f"{folder.name}: {model}", flush=True)
        config = asking(arguments, model=model, output=folder)
        return run_eval(config, progress=not arguments.quiet)

    return _done(arguments.run, {"run": evaluate_run(arguments.run, evaluate)})


def _add_law(kinds, add_common: AddCommon) -> None:
    parser = kinds.add_parser(
        "law",
        help="fit R = -a exp(H) + b over evaluations or the updates of a run",
        description="Fit R = -a exp(H) + b: accuracy against mean entropy, a point for each "
        "evaluation and temperature above 0; or, of a training run, accuracy or reward against "
        "mean entropy, a point for each update.",
    )
    parser.add_argument("folders", nargs="+", help="of evaluations, or of training runs")
    parser.add_argument(
        "--first",
        dest="share",
        type=float,
        metavar="SHARE",
        help="of training runs: fit the first share of the updates too, such as 0.2, and predict "
        "the ceiling and the end of the run from it",
    )
    parser.add_argument("--output", metavar="DIR", help="default: the first folder")
    add_common(parser, _law)


def _law(arguments: argparse.Namespace) -> int:
    runs = {folder: points_of(folder) for folder in arguments.folders}
    if arguments.share is not None:
        for folder in arguments.folders:
            if not (Path(folder) / METRICS_FILE).is_file():
                raise ValueError(f"--first is for training runs, {folder} has no {METRICS_FILE}")
    points = [point for found in runs.values() for point in found.points]
    left_out = sum((Counter(found.left_out) for found in runs.values()), Counter())
    law = entropy_law(points, dict(left_out))
    if arguments.share is not None:
        known = {folder: found.points for folder, found in runs.items()}
        law["forecasts"] = predict_runs(known, arguments.share)
    return _done(arguments.output or arguments.folders[0], {"law": law})


def _done(folder: str | Path, results: dict[str, dict]) -> int:
    """Write and print what was found."""
    for name, result in results.items():
        save(folder, name, result)
    report = write_report(folder)
    for name in results:
        section = report.sections[name]
        print(*(table.text() for table in section.tables), *section.notes, sep="\n")
    print(f"report: {report.path}")
    return 0
