"""Builds the emulated CUDA kernels and binds the backend `Cuda` to them.

The kernels of csrc/cuda are compiled by the C++ compiler against emulated_device.h and run on CPU
tensors. The build is kept in build/cuda_emulator under a hash of its sources.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from em_kernels.backends.cuda import Cuda

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
CACHE = HERE.parents[1] / "build" / "cuda_emulator"
SOURCES = [*sorted(CSRC.glob("cuda/*.cu")), CSRC / "cuda/plan.cpp", HERE / "emulator.cpp"]
MODULE = CSRC / "cuda/bindings.cpp"
COMPILER = shutil.which("g++") or shutil.which("c++")
H200 = {
    "compute_capability": 90,
    "shared_per_block": 232448,
    "shared_per_multiprocessor": 233472,
    "largest_cluster": 8,
    "multiprocessors": 132,
}


def compile_cpp(to: Path, *arguments: str | Path) -> None:
    """Sources and objects made into a library, a program or, with -c, an object."""
    pybind11 = Path(torch.__file__).parent / "include"
    includes = ["-iquote", HERE, "-iquote", CSRC / "cuda", "-I", sysconfig.get_paths()["include"]]
    flags = ["-std=c++17", "-O2", "-g0", "-fPIC", "-ffp-contract=off"]
    flags += ["-fno-strict-aliasing", "-w"]  # rows are read as vectors, as nvcc allows
    defines = ["-DEM_EMULATED", "-DEM_MODULE_NAME=emulated_cuda"]
    command = [COMPILER, *flags, *defines, *includes, "-I", pybind11, *arguments, "-o", to]
    subprocess.run([str(word) for word in command], check=True)


@cache
def built() -> tuple[Path, list[Path]]:
    """The extension module, and the objects of its kernels, with which programs can be linked."""
    headers = [*CSRC.glob("*.h"), *CSRC.glob("cuda/*.h"), *HERE.glob("*.h")]
    made_of = sorted({*SOURCES, MODULE, *headers, Path(__file__)})
    text = b"".join(path.read_bytes() for path in made_of)
    key = hashlib.sha256(text + sys.version.encode() + torch.__version__.encode()).hexdigest()[:16]
    folder = CACHE / key
    folder.mkdir(parents=True, exist_ok=True)
    module, objects = folder / "emulated_cuda.so", [folder / f"{s.stem}.o" for s in SOURCES]
    with open(folder / "lock", "w") as lock:  # of several test processes one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not module.exists():
            _build(module, objects)
    return module, objects


def _build(module: Path, objects: list[Path]) -> None:
    """An interrupted build leaves nothing at `module`."""
    for source, to in zip(SOURCES, objects, strict=True):
        compile_cpp(to, "-c", "-x", "c++", source)
    with tempfile.TemporaryDirectory(dir=module.parent) as folder:
        to = Path(folder) / module.name
        compile_cpp(to, "-shared", "-x", "c++", MODULE, "-x", "none", *objects)
        os.replace(to, module)


@cache
def library() -> ModuleType:
    """The extension module of the emulated kernels."""
    return _load("emulated_cuda", built()[0])


class Emulated(Cuda):
    """On emulated kernels."""

    def __init__(self, seed: int, **limits: int):
        self._compiled = library()
        self._place = self._compiled.Device(**{**H200, **limits}), seed

    def _where(self, device: torch.device):
        return self._place


def backend(seed: int = 0, **limits: int) -> Emulated:
    """The CUDA backend on emulated kernels, whose threads take turns by `seed`.

    `limits` replaces what the emulated device, an H200, says of itself.
    """
    return Emulated(seed, **limits)


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
