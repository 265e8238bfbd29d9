"""Builds the compiled parts, em_kernels._C and em_kernels._cuda; the rest is in pyproject.toml.

Both are optional. Without a C++ compiler or torch's build tools there is no _C, without nvcc no
_cuda; a part that cannot be built is left out, with a warning that says why, and the package
installs without it. EM_KERNELS_NO_EXTENSION=1 in the environment leaves out both,
EM_KERNELS_NO_CUDA=1 the second. How _cuda is built is in cuda_build.py. Beside the parts lies
_build.json, which keeps for `em_kernels.backends()` why one was left out.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
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
RECORD = "_build.json"
left_out: dict[str, str] = {}


def leave_out(name: str, reason: object) -> None:
    left_out[name] = " ".join(str(reason).split())[:300]
    print(
        f"em_kernels: WARNING: installing without the {PARTS[name]}: {reason}\n"
        "em_kernels: everything else works; em_kernels.backends() shows what is active\n"
        "em_kernels: `pip install --no-build-isolation .` builds with the torch that is installed",
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


class CleanBuild(build):
    """Packs what this run makes, and nothing that an earlier one left in build/lib."""

    def get_sub_commands(self) -> list[str]:
        """build_ext also where there is nothing for it to build: it writes down why."""
        return list(dict.fromkeys([*super().get_sub_commands(), "build_ext"]))

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib) / "em_kernels", ignore_errors=True)
        super().run()


class OptionalBuild(cpp_extension.BuildExtension if cpp_extension else build_ext):
    """A part that is not built is left out of the package, an older build of it too."""

    def finalize_options(self) -> None:
        """What lies there may be of another torch: it is never up to date; its objects may be."""
        super().finalize_options()
        self.force = True

    def run(self) -> None:
        folder = (ROOT if self.inplace else Path(self.build_lib)) / "em_kernels"
        try:
            super().run()
        except Exception as error:  # there is no compiler at all
            for part in self.extensions:
                leave_out(part.name, error)
        self.extensions = [part for part in self.extensions if part.name not in left_out]
        for name in left_out:
            (folder / self.file_of(name).name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(json.dumps(left_out), encoding="utf-8")

    def build_extension(self, part: Extension) -> None:
        try:
            if part.name == CUDA:
                cuda_build.build_module(self.file_of(part.name))
            else:
                super().build_extension(part)
        except Exception as error:  # whatever a missing or broken toolchain raises
            leave_out(part.name, error)
            self.file_of(part.name).unlink(missing_ok=True)

    def file_of(self, name: str) -> Path:
        return Path(self.get_ext_fullpath(name))


def cpu_part() -> Extension | None:
    if cpp_extension is None:
        return leave_out(CPU, f"built without torch, as under pip's build isolation: {no_torch}")
    sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cpu").glob("*.h")]
    return cpp_extension.CppExtension(
        CPU,
        [str(path.relative_to(ROOT)) for path in sources],
        depends=[str(path.relative_to(ROOT)) for path in headers],
        define_macros=[("EM_BUILT_FOR_TORCH", version("torch"))],  # another: compiled again
        extra_compile_args=compile_flags(),
        optional=True,
    )


def cuda_part() -> Extension | None:
    """Without sources: torch's build_ext would ask a .cu for its own build of CUDA."""
    if os.environ.get("EM_KERNELS_NO_CUDA") == "1":
        return leave_out(CUDA, "EM_KERNELS_NO_CUDA=1")
    return Extension(CUDA, [], optional=True)


def parts() -> list[Extension]:
    if os.environ.get("EM_KERNELS_NO_EXTENSION") == "1":
        for name in PARTS:
            leave_out(name, "EM_KERNELS_NO_EXTENSION=1")
        return []
    return [part for part in (cpu_part(), cuda_part()) if part is not None]


setup(ext_modules=parts(), cmdclass={"build": CleanBuild, "build_ext": OptionalBuild})
