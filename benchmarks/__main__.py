"""Time every operator against its peers on the same inputs, and say what was wrong instead.

python -m benchmarks          the four main operators, 256 tokens, in less than 10 minutes
python -m benchmarks --full   all operators and tables, 1,024 tokens from hidden states
python -m benchmarks token_loss --n 64 --dtype bfloat16 --threads 2
python -m benchmarks --quick --out /tmp/results

A row is in benchmark-output/ when it is measured; --resume goes on where a run was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from importlib import import_module

import torch

from benchmarks.common import LEAST_REPEATS, REPEATS, Case, Sizes, environment, measure
from benchmarks.report import is_measured, newest, print_table, rows_to_resume, save, summary
from em_kernels import backends
from em_kernels.backends.availability import why_no_gpu

OPERATORS = (
    "softmax_stats",
    "token_loss",
    "linear_softmax_stats",
    "linear_entropy_loss",
    "operands",
    "truncated",
    "linear_divergence",
    "chosen_ids",
)
LOGITS_ROWS, HIDDEN_ROWS = 256, 1024
FEWER_ROWS = {"operands": 128, "chosen_ids": 64}  # those of many tables
# Without an operator, --full or --quick: what a first look needs.
DEFAULT, DEFAULT_HIDDEN_ROWS, DEFAULT_REPEATS = OPERATORS[:4], 256, 5
NOT_BY_DEFAULT = (
    "softmax_stats backward",
    "linear_softmax_stats backward",
    "linear_softmax_stats forward + backward of logprob, weight frozen",
)
# Minutes of both dtypes on two quiet cores of a Zen 4 server: (by default, in full). The saved
# rows' own times, the warm-up and the float64 truth beside, and 15 s a table for torch.compile.
MINUTES = {
    "softmax_stats": (1.5, 2.0),
    "token_loss": (1.0, 1.0),
    "linear_softmax_stats": (4.0, 19.0),
    "linear_entropy_loss": (2.5, 8.0),
    "operands": (0.0, 4.0),
    "truncated": (0.0, 4.0),
    "linear_divergence": (0.0, 30.0),
    "chosen_ids": (0.0, 12.0),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    options = parser.parse_args(arguments)
    unknown = set(options.op) - set(OPERATORS)
    if unknown:
        parser.error(f"op must be among {', '.join(OPERATORS)}, got {', '.join(sorted(unknown))}")
    for name in ("n", "v", "d", "threads"):
        if (number := getattr(options, name)) is not None and number < 1:
            parser.error(f"--{name} must be at least 1, got {number}")
    try:
        kind = torch.device(options.device).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got {options.device}")
    reason = why_no_gpu() if kind == "cuda" else None
    if reason is not None:
        parser.error(f"--device {options.device} needs a GPU, and none is visible{reason}")
    return options


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument(
        "op", nargs="*", help=f"any of {', '.join(OPERATORS)}; by default the first four, in short"
    )
    parser.add_argument("--full", action="store_true", help="all operators, as if each was named")
    parser.add_argument(
        "--n",
        type=int,
        help=f"tokens; default {LOGITS_ROWS} from logits, {HIDDEN_ROWS} from hidden states "
        f"({DEFAULT_HIDDEN_ROWS} where no operator is named), "
        + ", ".join(f"{rows} in {name}" for name, rows in FEWER_ROWS.items()),
    )
    parser.add_argument("--v", type=int, help="vocabulary; default 151936")
    parser.add_argument("--d", type=int, help="hidden size; default 896")
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=["float32", "bfloat16"],
        choices=["float32", "bfloat16", "float16", "float64"],
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's default if left out")
    parser.add_argument(
        "--out",
        default="benchmark-output",
        help="folder for <device>-<date>.json and .md (default %(default)s)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the newest rows in --out, measure the others"
    )
    parser.add_argument("--only", nargs="+", help="implementations by name; all by default")
    parser.add_argument("--rows", action="store_true", help="print rows as JSON when measured")
    parser.add_argument("--quick", action="store_true", help="small sizes, no torch.compile")
    return parser


def is_short(options: argparse.Namespace) -> bool:
    """Whether it is the run of less than 10 minutes."""
    return not (options.op or options.full or options.quick)


def operators(options: argparse.Namespace) -> list[str]:
    return options.op or list(DEFAULT if is_short(options) else OPERATORS)


def announcement(options: argparse.Namespace) -> str:
    """What will be measured, for how long, and where it will be."""
    chosen, where = operators(options), f"rows are in {options.out} when they are measured"
    said = f"{', '.join(chosen)}; {', '.join(options.dtype)}; {where}"
    usual = options.n is None and options.v is None and options.d is None
    if options.quick or options.device != "cpu" or not usual:
        return said
    minutes = sum(MINUTES[name][not is_short(options)] for name in chosen) * len(options.dtype) / 2
    return f"about {minutes:.0f} minutes on two quiet cores of a server, more on others: {said}"


def sizes_of(operator: str, options: argparse.Namespace) -> Sizes:
    rows = DEFAULT_HIDDEN_ROWS if is_short(options) else HIDDEN_ROWS
    rows = rows if operator.startswith("linear") else LOGITS_ROWS
    rows = FEWER_ROWS.get(operator, rows)
    n, v, d = (48, 3001, 64) if options.quick else (rows, 151936, 896)
    return Sizes(options.n or n, options.v or v, options.d or d)


def pick(case: Case, only: list[str] | None) -> Case:
    """The case with the implementations asked for; the names of variants begin with its name."""
    if only is None:
        return case
    kept = [
        {k: v for k, v in x.items() if is_asked(k, only)} for x in (case.contenders, case.left_out)
    ]
    return case._replace(contenders=kept[0], left_out=kept[1])


def is_asked(name: str, only: list[str]) -> bool:
    return any(f"{name} ".startswith(f"{wanted} ") for wanted in only)


def nowhere(only: list[str] | None, rows: list[dict]) -> dict[str, str]:
    """What was asked for and is in none of the tables -> why."""
    there = {row["implementation"] for row in rows}
    unusable = {f"em_kernels {k}": why for k, why in backends().items() if why != "available"}
    missing = [x for x in only or () if not any(is_asked(name, [x]) for name in there)]
    return {x: unusable.get(x, "no table has it") for x in missing}


def measure_operator(
    operator: str,
    dtype: torch.dtype,
    options: argparse.Namespace,
    rows: list[dict],
    found: Callable[[dict], object],
) -> None:
    """`found` gets the rows of all its tables; its tensors are free afterwards."""
    module = import_module(f"benchmarks.{operator}")
    sizes, short = sizes_of(operator, options), is_short(options)
    repeats = DEFAULT_REPEATS if short else LEAST_REPEATS if options.quick else REPEATS
    for case in module.cases(sizes, dtype, options.device, compiled=not options.quick):
        if short and case.name in NOT_BY_DEFAULT:
            continue
        case = pick(case, options.only)
        if not is_measured(case, rows):
            print_table(case, measure(case, repeats, found))


def main(arguments: list[str] | None = None) -> list[dict]:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    facts, start = environment(options.device), time.monotonic()
    rows: list[dict] = []
    paths: list[object] = []
    if options.resume:
        facts, rows = rows_to_resume(options.out, facts)
        print(f"{len(rows)} rows of {facts['date']} are there")

    def found(row: dict) -> None:
        """Saved at once: what is measured next may end this process."""
        rows[:] = newest([*rows, row])
        paths[:] = save(rows, options.out, facts)
        if options.rows:
            print(json.dumps(row), flush=True)

    print(announcement(options), flush=True)
    steps = [(operator, name) for operator in operators(options) for name in options.dtype]
    for number, (operator, name) in enumerate(steps, 1):
        measure_operator(operator, getattr(torch, name), options, rows, found)
        minutes = (time.monotonic() - start) / 60
        print(f"{number} of {len(steps)} after {minutes:.1f} min: {operator}, {name}", flush=True)
    for name, reason in nowhere(options.only, rows).items():
        print(f"{name} is left out: {reason}")
    print(f"\n{summary(rows)}\nsaved", *paths)
    return rows


if __name__ == "__main__":
    try:
        ours = [row for row in main() if row["implementation"].startswith("em_kernels")]
    except KeyboardInterrupt:
        sys.exit("stopped: the rows measured so far are kept, and --resume goes on after them")
    sys.exit(any(row["failure"] for row in ours))
