"""`setup.py build_ext` of the CPU kernels with a sanitizer's flags: build.py NAME."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Distribution  # before distutils, whose place it takes

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from distutils.core import run_setup  # noqa: E402

from sanitizers.__main__ import FOLDER, SANITIZERS  # noqa: E402


def build(name: str) -> None:
    sanitizer, folder = SANITIZERS[name], FOLDER / name
    os.environ["EM_KERNELS_NO_CUDA"] = "1"
    where = ["--build-lib", str(folder), "--build-temp", str(folder / "objects")]
    setup: Distribution = run_setup(str(ROOT / "setup.py"), ["build_ext", *where], "commandline")
    for part in setup.ext_modules:
        part.sources += [os.path.relpath(source, ROOT) for source in sanitizer.sources]
        # The last of two flags counts: setup.py's own come first.
        part.extra_compile_args += ["-O1", "-g1", *sanitizer.flags]
        part.extra_link_args += [*sanitizer.flags, "-fopenmp"]
        part.optional = False
    setup.run_commands()


if __name__ == "__main__":
    build(sys.argv[1])
