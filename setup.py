"""Builds the compiled part, em_kernels._C; everything else is in pyproject.toml.

The compiled part is optional: without torch's build tools or a C++ compiler, or with
EM_KERNELS_NO_EXTENSION=1 in the environment, the package installs without it and says so.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def warn(reason: object) -> None:
    print(
        f"em_kernels: WARNING: installing without the compiled CPU kernels: {reason}\n"
        "em_kernels: everything works, more slowly; em_kernels.backends() shows what is active",
        file=sys.stderr,
    )


def compile_flags() -> list[str]:
    """No contraction: x * s - m must be exactly 0 at the maximum. No -ffast-math: NaN matters."""
    if os.name == "nt":
        return ["/O2", "/fp:precise", "/std:c++20"]
    flags = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-g0"]
    flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # gcc 12's own AVX-512 headers
    # Only the pragmas: the runtime is the one torch has loaded, so nothing is linked.
    return flags if platform.system() == "Darwin" else [*flags, "-fopenmp"]


def extension() -> dict:
    """setup() arguments for the compiled part; none where it cannot be built."""
    if os.environ.get("EM_KERNELS_NO_EXTENSION") == "1":
        warn("EM_KERNELS_NO_EXTENSION=1")
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        warn(f"{error}; install torch first and use pip install --no-build-isolation")
        return {}

    class OptionalBuild(BuildExtension):
        """A build that fails leaves the package without its compiled part."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # whatever a missing or broken toolchain raises
                warn(error)
                self.extensions = []

    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp"))
    headers = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h"))
    module = CppExtension(
        "em_kernels._C", sources, depends=headers, extra_compile_args=compile_flags()
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": OptionalBuild}}


setup(**extension())
