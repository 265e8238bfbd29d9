"""tests/fuzz on other random examples each round, until the time is over.

    make fuzz                                    20 minutes, from a seed that is printed
    make fuzz ARGS="--minutes 2 --seed 7"        rounds of the seeds 7, 8, ...
    make fuzz ARGS="--seed 7 --rounds 1 -- -x"   one round again; what follows -- is pytest's

A round that fails ends it: hypothesis has then printed the falsifying example, and the line to
repeat the round stands below. Exit code 1.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    at = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="make fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="no round begins after them")
    parser.add_argument("--rounds", type=int, help="at most so many")
    parser.add_argument("--seed", type=int, help="of the first round (default: any)")
    parser.add_argument("--times", type=int, default=10, help="as many examples as in make test")
    given = parser.parse_args(words[:at])
    first = random.randrange(10**6) if given.seed is None else given.seed
    return run(first, given, words[at + 1 :])


def run(first: int, given: argparse.Namespace, pytest_arguments: Sequence[str]) -> int:
    until, seed = time.monotonic() + 60 * given.minutes, first
    while time.monotonic() < until and (given.rounds is None or seed < first + given.rounds):
        print(f"fuzz: round of seed {seed}", flush=True)
        if round_fails(seed, given.times, pytest_arguments):
            rest = " ".join(["", "--", *pytest_arguments]) if pytest_arguments else ""
            told = f"--seed {seed} --rounds 1 --times {given.times}{rest}"
            print(f'fuzz: seed {seed} fails; again: make fuzz ARGS="{told}"', flush=True)
            return 1
        seed += 1
    print(f"fuzz: {seed - first} rounds passed, from seed {first}")
    return 0


def round_fails(seed: int, times: int, pytest_arguments: Sequence[str]) -> bool:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__).parent)]
    command += ["--hypothesis-profile=fuzz", f"--hypothesis-seed={seed}", *pytest_arguments]
    environment = {**os.environ, "EM_KERNELS_FUZZ": str(times)}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode != 0


if __name__ == "__main__":
    sys.exit(main())
