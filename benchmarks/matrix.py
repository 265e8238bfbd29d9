"""The core tests on every torch and every Python: which of them the library runs on.

    make matrix                                      or: python -m benchmarks.matrix
    python -m benchmarks.matrix --torch 2.11 2.14 --python 3.10 --keep
    python -m benchmarks.matrix --cover              each torch and each Python once

For each pair it makes an environment of its own below .matrix/, with torch as pip gives it, copies
the tree there, builds the CPU kernels and runs the tests of backends, linear and ops without those
of Triton and CUDA. Then come a table, and exit status 1 if a pair failed. An environment is removed
once its tests have run, for torch as pip gives it may bring CUDA, 5 GB; the log and the result
stay. Newer releases than those of TORCH are tried with --torch.

    python -m benchmarks.matrix --show --out benchmarks/results/matrix.md      runs nothing
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, TextIO

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".matrix"
TORCH = ("2.11", "2.12", "2.13")
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TESTS = ("tests/backends", "tests/linear", "tests/ops")
LEFT_OUT = ("tests/backends/test_triton*", "tests/backends/test_cuda*")
NEEDS = (
    "setuptools>=77",
    "wheel",
    "ninja",
    "pybind11",
    "pytest",
    "pytest-timeout",
    "hypothesis",
    "numpy",
)
SETTINGS = {"EM_KERNELS_NO_CUDA": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}


class Pair(NamedTuple):
    """A minor version of torch, and one of Python."""

    torch: str
    python: str

    @property
    def folder(self) -> Path:
        return FOLDER / f"torch-{self.torch}-python-{self.python}"

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def result(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.json")


class Result(NamedTuple):
    torch: str  # the release that pip chose
    python: str
    passed: bool
    said: str  # the line of pytest's counts, or the step that failed
    date: str


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    there = pythons()
    versions = [version for version in options.python if version in there]
    if not versions:
        print(f"found none of Python {', '.join(options.python)}: install one, or name others")
        return 1
    pairs = pairs_of(options.torch, versions, options.cover)
    for number, pair in enumerate([] if options.show else pairs, 1):
        print(f"[{number}/{len(pairs)}] torch {pair.torch}, Python {pair.python} ...", flush=True)
        result = run(pair, there[pair.python], options.tests, options.keep)
        pair.result.write_text(json.dumps(result._asdict()))
        print(f"    {result.said}", flush=True)
    results = [Result(**json.loads(p.result.read_text())) for p in pairs if p.result.exists()]
    missing = [version for version in options.python if version not in there]
    print("\n" + table(results, missing))
    if options.out:
        options.out.write_text(f"# The core tests\n\n{table(results, missing)}\n")
    return int(not all(result.passed for result in results))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", nargs="+", default=TORCH, metavar="2.11")
    parser.add_argument("--cover", action="store_true", help="each torch and each Python once")
    add_common(parser)
    parser.add_argument(
        "--tests", nargs="+", default=TESTS, metavar="PATH", help="what pytest runs"
    )
    return parser


def add_common(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that makes environments."""
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="3.10")
    parser.add_argument("--keep", action="store_true", help="keep the environments, 5 GB each")
    parser.add_argument("--show", action="store_true", help="only the table of what has been run")
    parser.add_argument("--out", type=Path, help="file for the table")


def pairs_of(torches: list[str], versions: list[str], cover: bool) -> list[Pair]:
    if not cover:
        return [Pair(torch, python) for torch in torches for python in versions]
    last = {"torch": torches[-1], "python": versions[-1]}
    return [
        Pair(torch or last["torch"], python or last["python"])
        for torch, python in zip_longest(torches, versions)
    ]


def pythons() -> dict[str, str]:
    """Minor version -> interpreter, from PATH and from pyenv's folder; each is asked what it is."""
    kept = sorted(Path.home().glob(".pyenv/versions/3.*/bin/python"))
    candidates = [*(f"python{version}" for version in PYTHONS), sys.executable, *map(str, kept)]
    found: dict[str, str] = {}
    for candidate in candidates:
        program = shutil.which(candidate)
        asked = "import sys; print('%d.%d' % sys.version_info[:2])"
        if program is None:
            continue
        done = subprocess.run([program, "-c", asked], capture_output=True, text=True)
        if done.returncode == 0:
            found.setdefault(done.stdout.strip(), program)
    return found


def run(pair: Pair, python: str, tests: list[str], keep: bool) -> Result:
    """The steps of a pair in order; one that fails is the result."""
    shutil.rmtree(pair.folder, ignore_errors=True)
    copy_tree(pair.folder / "src")
    passed, said, release = True, "", pair.torch
    with pair.log.open("w") as log:
        for name, command in steps(pair, python, tests):
            passed, printed = step(command, pair.folder / "src", log)
            said = counts(printed) or f"{name} failed: {pair.log.relative_to(ROOT)}"
            if name == "versions" and passed:
                release = printed.split()[-1]
            if not passed:
                break
    if not keep:
        shutil.rmtree(pair.folder, ignore_errors=True)
    return Result(release, pair.python, passed, said, time.strftime("%Y-%m-%d"))


def step(
    command: list[str], folder: Path, log: TextIO, variables: Mapping[str, str] | None = None
) -> tuple[bool, str]:
    """Whether the command went well, and what it printed, which the log keeps."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **SETTINGS, **(variables or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log.write(f"$ {' '.join(command)}\n{done.stdout}\n")
    log.flush()
    return done.returncode == 0, done.stdout


def counts(printed: str) -> str:
    """pytest's last line of counts, without its time; empty where there is none."""
    lines = re.findall(r"^=* ?(\d+ (?:passed|failed|error)[^\n]*?) in ", printed, re.MULTILINE)
    return lines[-1] if lines else ""


def steps(pair: Pair, python: str, tests: list[str]) -> list[tuple[str, list[str]]]:
    """(name, command) of all that is done for a pair, in the copy of the tree."""
    own = str(pair.folder / "venv/bin/python")
    pip = [own, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    ignored = [f"--ignore-glob={glob}" for glob in LEFT_OUT]
    return [
        ("venv", [python, "-m", "venv", str(pair.folder / "venv")]),
        ("torch", [*pip, f"torch=={pair.torch}.*", *NEEDS]),
        ("without triton", [own, "-m", "pip", "uninstall", "-q", "-y", "triton"]),
        ("build", [*pip, "--no-build-isolation", "--no-deps", "-e", "."]),
        ("kernels", [own, "-c", "from em_kernels import _C"]),
        ("versions", [own, "-c", "import torch; print(torch.__version__)"]),
        ("tests", [own, "-m", "pytest", "-p", "no:cacheprovider", *ignored, *tests]),
    ]


def copy_tree(folder: Path) -> None:
    """What git tracks, or would, as it is now: no build of another torch."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def table(results: list[Result], missing: list[str]) -> str:
    lines = ["| torch | Python | | tests | date |", "|---|---|---|---|---|"]
    for result in results:
        verdict = "passed" if result.passed else "failed"
        cells = (result.torch, result.python, verdict, result.said, result.date)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *not_found(missing)])


def not_found(missing: list[str]) -> list[str]:
    return [f"\nNot found here: Python {', '.join(missing)}."] if missing else []


if __name__ == "__main__":
    sys.exit(main())
