"""Measure what the claims need and is not measured yet; then renew their pictures and the page.

    make science                     or: python -m benchmarks.science
    make science ARGS="--claims overconfidence shift --seeds 10"

A run that was stopped goes on with the arms and seeds that it has: benchmarks/results/science holds
one file an arm. With the files that are committed nothing is left to measure; `--data DIR` measures
everything anew, into another folder, and leaves the page alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers.utils import logging

from benchmarks import tables
from benchmarks.science.claims import CLAIMS
from benchmarks.science.runs import Size, measured
from benchmarks.science.store import Store

DATA, PICTURES = tables.RESULTS / "science", tables.ROOT / "docs/images"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, default=list(CLAIMS))
    parser.add_argument("--seeds", type=int, help="of every arm; by default each arm's own number")
    parser.add_argument("--problems", type=int, default=Size().problems)
    parser.add_argument("--updates", type=int, help="the most an arm takes; its own by default")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the data files")
    given = parser.parse_args(arguments)
    logging.disable_progress_bar()
    store = Store(given.data)
    arms = dict.fromkeys(arm for name in given.claims for arm in CLAIMS[name].ARMS)
    measured(store, arms, Size(given.problems, given.seeds, given.updates), print)
    if given.updates is not None:
        return  # no claim is about so few
    own = given.data == DATA
    for name in given.claims:
        print(f"\n{name}\n\n{CLAIMS[name].text(store)}", flush=True)
        CLAIMS[name].draw(store, (PICTURES if own else given.data) / f"science_{name}.png")
    if own:
        tables.main([])


if __name__ == "__main__":
    main()
