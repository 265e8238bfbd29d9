"""Relative errors of H, logprob and their gradients, from almost certain rows to uniform ones.

    python -m benchmarks.accuracy            4 minutes on a quiet core; writes accuracy-output/
    python -m benchmarks.accuracy --drawn    the verdicts and the picture of rows that are there

H from 1e-12 to log V at four temperatures, in float32, bfloat16 and float16, from logits and from
hidden states, of every backend that runs here and every peer that can be imported. The rows are in
accuracy.csv as soon as they are measured; --resume goes on after them. The truth is float64 on the
same rounded inputs.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch

from benchmarks.accuracy.picture import draw
from benchmarks.accuracy.rows import load
from benchmarks.accuracy.study import run
from benchmarks.accuracy.verdicts import verdicts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("accuracy-output"))
    parser.add_argument("--picture", type=Path, help="default: accuracy.png in --out")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="16 cells of a small vocabulary")
    parser.add_argument("--resume", action="store_true", help="measure what accuracy.csv lacks")
    parser.add_argument("--drawn", action="store_true", help="measure nothing: read accuracy.csv")
    given = parser.parse_args(arguments)
    path, start = given.out / "accuracy.csv", time.time()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
        torch.set_num_threads(1)
    rows = load(path) if given.drawn else run(path, given.quick, given.device, given.resume)
    print(verdicts(rows))
    draw(rows, given.picture or given.out / "accuracy.png")
    print(f"{path}: {len(rows)} rows, {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
