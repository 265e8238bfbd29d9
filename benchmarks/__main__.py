"""Time every operator against its peers on the same inputs, and say what was wrong instead.

python -m benchmarks      all operators, float32 and bfloat16; saved in benchmark-output/
python -m benchmarks token_loss --n 64 --dtype bfloat16 --threads 2
python -m benchmarks --quick --out /tmp/results
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib import import_module

import torch

from benchmarks.common import (
    LEAST_REPEATS,
    REPEATS,
    Case,
    Sizes,
    environment,
    measure,
    newest,
    print_table,
    save,
)
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


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("op", nargs="*", help=f"any of {', '.join(OPERATORS)}; all by default")
    parser.add_argument(
        "--n",
        type=int,
        help=f"tokens; default {LOGITS_ROWS} from logits, {HIDDEN_ROWS} from hidden states, "
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
    parser.add_argument("--only", nargs="+", help="implementations by name; all by default")
    parser.add_argument("--rows", action="store_true", help="print rows as JSON when measured")
    parser.add_argument("--quick", action="store_true", help="small sizes, no torch.compile")
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


def sizes_of(operator: str, options: argparse.Namespace) -> Sizes:
    rows = HIDDEN_ROWS if operator.startswith("linear") else LOGITS_ROWS
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
    operator: str, dtype: torch.dtype, options: argparse.Namespace, found: Callable[[dict], object]
) -> None:
    """`found` gets the rows of all its tables; its tensors are free afterwards."""
    module = import_module(f"benchmarks.{operator}")
    sizes = sizes_of(operator, options)
    for case in module.cases(sizes, dtype, options.device, compiled=not options.quick):
        case = pick(case, options.only)
        rows = measure(case, LEAST_REPEATS if options.quick else REPEATS, found)
        print_table(case, rows)


def main(arguments: list[str] | None = None) -> list[dict]:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    rows, paths, facts = [], [], environment(options.device)

    def found(row: dict) -> None:
        """Saved at once: what is measured next may end this process."""
        rows[:] = newest([*rows, row])
        paths[:] = save(rows, options.out, facts)
        if options.rows:
            print(json.dumps(row), flush=True)

    for operator in options.op or OPERATORS:
        for name in options.dtype:
            measure_operator(operator, getattr(torch, name), options, found)
    for name, reason in nowhere(options.only, rows).items():
        print(f"{name} is left out: {reason}")
    print("saved", *paths)
    return rows


if __name__ == "__main__":
    ours = [row for row in main() if row["implementation"].startswith("em_kernels")]
    sys.exit(any(row["failure"] for row in ours))
