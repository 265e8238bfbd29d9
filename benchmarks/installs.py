"""Every way to install the library, on every Python that is found: what is there, that it runs.

    make installs                                    or: python -m benchmarks.installs
    python -m benchmarks.installs --python 3.12 --torch 2.13 --keep

For each Python it makes an environment of its own below .installs/, packs the tree there with
`python -m build`, and installs it in each of WAYS, one after the other. After each, in an empty
folder: the package is the installed one, with its types and the embedded models, the CPU kernels
are there or `backends()` says why not, and entropies are those of float64. Then comes a table, and
exit status 1 if a way failed. An environment is removed once its ways have been tried.

    python -m benchmarks.installs --show --out benchmarks/results/installs.md    runs nothing
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TextIO

from benchmarks.markdown import table_rows
from benchmarks.matrix import NEEDS, add_common, copy_tree, not_found, pythons, step

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".installs"
AVAILABLE = "available"
ISOLATED = "built without torch, as under pip's build isolation"
CHECK = """
import pathlib, sys, torch, em_kernels
from em_kernels import backends, softmax_stats
package = pathlib.Path(em_kernels.__file__).parent
assert package.is_relative_to(sys.prefix), f"imported from {package}"
models = {path.parent.name for path in package.glob("assets/*/model.safetensors")}
assert models == {"tiny-math", "tiny-math-habits"} and (package / "py.typed").exists(), models
logits = torch.randn(4, 1000) * 4
truth = torch.distributions.Categorical(logits=logits.double()).entropy()
torch.testing.assert_close(softmax_stats(logits).entropy.double(), truth, rtol=1e-5, atol=0)
print(torch.__version__, backends()["cpu"], sep="\\n")
"""


class Way(NamedTuple):
    """What pip is given, of the folder of one Python, and what the CPU kernels then say."""

    name: str
    arguments: tuple[str, ...]
    expected: str
    environment: Mapping[str, str] = {}


WAYS = (
    Way("wheel", ("wheel/*.whl",), AVAILABLE),
    Way("wheel, isolated build", ("isolated/*.whl",), ISOLATED),
    Way("sdist", ("--no-build-isolation", "isolated/*.tar.gz"), AVAILABLE),
    Way("sdist, isolated", ("isolated/*.tar.gz",), ISOLATED),
    Way(
        "sdist, no compiler",
        ("--no-build-isolation", "isolated/*.tar.gz"),
        "was left out of this build",
        {"CC": "no-compiler-here", "CXX": "no-compiler-here"},
    ),
    Way("wheel of a built tree without kernels", ("without/*.whl",), "EM_KERNELS_NO_EXTENSION=1"),
)


class Result(NamedTuple):
    python: str
    torch: str
    way: str
    passed: bool
    said: str  # of the CPU kernels, or the step that failed
    date: str


class Environment(NamedTuple):
    """One Python and its folder: src, venv, and what is packed."""

    python: str
    torch: str

    @property
    def folder(self) -> Path:
        return FOLDER / f"python-{self.python}"

    @property
    def results(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def own(self) -> str:
        return str(self.folder / "venv/bin/python")

    def pack(self, program: str) -> list[tuple[str, list[str], dict[str, str]]]:
        """(name, command, environment) that make the environment and what is installed in it."""
        build = [self.own, "-m", "build", "src", "--outdir"]
        pip = [self.own, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        none = {"EM_KERNELS_NO_EXTENSION": "1"}
        return [
            ("venv", [program, "-m", "venv", str(self.folder / "venv")], {}),
            ("torch", [*pip, f"torch=={self.torch}.*", "build", *NEEDS], {}),
            ("wheel", [*build, "wheel", "--wheel", "--no-isolation"], {}),
            ("isolated", [*build, "isolated"], {}),
            ("without", [*build, "without", "--wheel", "--no-isolation"], none),
        ]

    def install(self, way: Way) -> list[str]:
        pip = [self.own, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        given = [
            str(next(self.folder.glob(word), word)) if "/" in word else word
            for word in way.arguments
        ]
        return [*pip, "--no-deps", "--no-cache-dir", "--force-reinstall", *given]


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    there = pythons()
    found = [version for version in options.python if options.show or version in there]
    if not found:
        print(f"found none of Python {', '.join(options.python)}: install one, or name others")
        return 1
    environments = [Environment(version, options.torch) for version in found]
    for environment in () if options.show else environments:
        rows = try_all(environment, there[environment.python], options.keep)
        environment.results.write_text(json.dumps([row._asdict() for row in rows]))
    results = [
        Result(**row)
        for environment in environments
        if environment.results.exists()
        for row in json.loads(environment.results.read_text())
    ]
    tried = {row.python for row in results}
    text = table(results, [version for version in options.python if version not in tried])
    print("\n" + text)
    if options.out:
        options.out.write_text(f"# The ways to install\n\n{text}\n")
    return int(not all(result.passed for result in results))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", default="2.13", metavar="2.13")
    add_common(parser)
    return parser


def try_all(environment: Environment, program: str, keep: bool) -> list[Result]:
    """All ways on one Python; where nothing can be packed, that is the one result."""
    shutil.rmtree(environment.folder, ignore_errors=True)
    copy_tree(environment.folder / "src")
    with environment.log.open("w") as log:
        for name, command, variables in environment.pack(program):
            print(f"Python {environment.python}: {name} ...", flush=True)
            if not step(command, environment.folder, log, variables)[0]:
                return [result(environment, "all", False, f"{name} failed")]
        (environment.folder / "empty").mkdir()
        results = [try_way(environment, way, log) for way in WAYS]
    if not keep:
        shutil.rmtree(environment.folder, ignore_errors=True)
    return results


def try_way(environment: Environment, way: Way, log: TextIO) -> Result:
    print(f"Python {environment.python}: {way.name} ...", flush=True)
    installed, _ = step(environment.install(way), environment.folder, log, way.environment)
    if not installed:
        return result(environment, way.name, False, "not installed")
    ran, printed = step([environment.own, "-c", CHECK], environment.folder / "empty", log)
    if not ran:
        return result(environment, way.name, False, printed.splitlines()[-1])
    release, said = printed.splitlines()[-2:]
    return result(environment._replace(torch=release), way.name, way.expected in said, said)


def result(environment: Environment, way: str, passed: bool, said: str) -> Result:
    today = time.strftime("%Y-%m-%d")
    return Result(environment.python, environment.torch, way, passed, said, today)


def table(results: list[Result], missing: list[str]) -> str:
    """A way a line and a Python a column: passed, or what was said instead."""
    shown = sorted({row.python for row in results}, key=lambda it: tuple(map(int, it.split("."))))
    torches = ", ".join(sorted({row.torch for row in results}))
    dates = ", ".join(sorted({row.date for row in results}))
    lines = [["way", *shown, "the CPU kernels there"], ["---"] * (len(shown) + 2)]
    for way in dict.fromkeys(row.way for row in results):
        own = {row.python: row for row in results if row.way == way}
        expected = next((it.expected for it in WAYS if it.name == way), "-")
        cells = [verdict(own[it]) if it in own else "-" for it in shown]
        lines.append([way, *cells, expected])
    told = f"\ntorch {torches}; {dates}"
    return "\n".join([table_rows(lines), told, *not_found(missing)])


def verdict(row: Result) -> str:
    return "passed" if row.passed else "failed: " + " ".join(row.said.split())[:110]


if __name__ == "__main__":
    sys.exit(main())
