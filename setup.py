"""Builds the compiled parts, em_kernels._C and em_kernels._cuda; the rest is in pyproject.toml.

Both are optional. Without a C++ compiler or torch's build tools there is no _C, without nvcc no
_cuda; a part that cannot be built is left out, with a warning that says why, and the package
installs without it. EM_KERNELS_NO_EXTENSION=1 in the environment leaves out both,
EM_KERNELS_NO_CUDA=1 the second. How _cuda is built is in cuda_build.py.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # build front ends do not put it there

import cuda_build  # noqa: E402

try:
    from torch.utils import cpp_extension
except ImportError as error:
    cpp_extension, no_torch = None, error

CPU, CUDA = "em_kernels._C", "em_kernels._cuda"
PARTS = {CPU: "compiled CPU kernels", CUDA: "CUDA kernels"}


def warn(name: str, reason: object) -> None:
    print(
        f"em_kernels: WARNING: installing without the {PARTS[name]}: {reason}\n"
        "em_kernels: everything else works; em_kernels.backends() shows what is active",
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


class OptionalBuild(cpp_extension.BuildExtension if cpp_extension else build_ext):
    """A part that fails is left out of the package, an older build of it too."""

    def run(self) -> None:
        self.failed: list[Extension] = []
        in_place = self.inplace
        try:
            super().run()
        except Exception as error:  # there is no compiler at all
            for part in self.extensions:
                self.leave_out(part, error)
        self.extensions = [part for part in self.extensions if part not in self.failed]
        for part in self.failed if in_place else ():
            (ROOT / "em_kernels" / self.file_of(part).name).unlink(missing_ok=True)

    def build_extension(self, part: Extension) -> None:
        try:
            if part.name == CUDA:
                cuda_build.build_module(self.file_of(part))
            else:
                super().build_extension(part)
        except Exception as error:  # whatever a missing or broken toolchain raises
            self.leave_out(part, error)

    def leave_out(self, part: Extension, reason: object) -> None:
        warn(part.name, reason)
        self.file_of(part).unlink(missing_ok=True)
        self.failed.append(part)

    def file_of(self, part: Extension) -> Path:
        return Path(self.get_ext_fullpath(part.name))


def cpu_part() -> Extension | None:
    if cpp_extension is None:
        return warn(CPU, f"{no_torch}; install torch, then pip install --no-build-isolation .")
    sources = [ROOT / "csrc/bindings.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cpu").glob("*.h")]
    return cpp_extension.CppExtension(
        CPU,
        [str(path.relative_to(ROOT)) for path in sources],
        depends=[str(path.relative_to(ROOT)) for path in headers],
        extra_compile_args=compile_flags(),
        optional=True,
    )


def cuda_part() -> Extension | None:
    """Without sources: torch's build_ext would ask a .cu for its own build of CUDA."""
    if os.environ.get("EM_KERNELS_NO_CUDA") == "1":
        return warn(CUDA, "EM_KERNELS_NO_CUDA=1")
    return Extension(CUDA, [], optional=True)


def parts() -> list[Extension]:
    if os.environ.get("EM_KERNELS_NO_EXTENSION") == "1":
        for name in PARTS:
            warn(name, "EM_KERNELS_NO_EXTENSION=1")
        return []
    return [part for part in (cpu_part(), cuda_part()) if part is not None]


setup(ext_modules=parts(), cmdclass={"build_ext": OptionalBuild})
