"""The choice of backend: which there are, which can serve a device, and why not.

A backend is a module with the three functions of `em_kernels.reference`: `stats`, `grad` and `loss`
over rows of logits.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from em_kernels.backends import reference

IMPLS = ("auto", "reference", "cpu", "triton", "cuda")
# What "auto" tries in turn. Measured on an H200, bfloat16, V = 151936 and from hidden states
# (benchmarks/results/gpu-nvidia-h200-2026-11-26.md), CUDA against Triton: the gradient takes the
# same 1.26 ms, and so does a loss from hidden states (1.12, 1.12, 1.09 times its products against
# 1.10, 1.12, 1.10). Statistics alone are 4 % faster, but must be made by what makes the gradient.
AUTO_ON_CPU, AUTO_ON_GPU = ("cpu", "reference"), ("triton", "cuda", "reference")
# Measured there too: a loss from logits takes CUDA 1.70 ms and Triton 1.82. From capability 9.0 on
# CUDA reads them once; where rows do not begin at 16 bytes (V = 151665) Triton was the faster.
AUTO_LOSS_ON_GPU, READS_ONCE_FROM = ("cuda", "triton", "reference"), (9, 0)

BUILD_RECORD = Path(__file__).parents[1] / "_build.json"  # module -> why it was left out


def why_not(impl: str, device: torch.device | None = None) -> str | None:
    """None if backend `impl` can serve tensors on `device`, else the reason and the remedy.

    Without a device the question is whether it can serve any tensor here. Never an exception: a
    driver or a library may raise anything when it is asked, and that is a reason too.
    """
    if impl not in WHY_NOT:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}")
    try:
        return WHY_NOT[impl](device)
    except Exception as error:
        return f"asking for it failed ({_said(error)}); see that nvidia-smi works, or reinstall"


@functools.cache
def backend(
    impl: str, device: torch.device, operation: str = "rows", aligned: bool = False
) -> ModuleType:
    """The module that serves `impl` on `device`; "auto" takes the fastest that can.

    `operation` is "loss" for the loss of given logits, else "rows": statistics and the gradient
    made from them are one choice. `aligned`: each row of the logits begins at 16 bytes. Looked up
    once: what can serve a device is taken not to change.
    """
    if impl == "auto":
        order = _auto_order(device, operation, aligned)
        impl = next(name for name in order if why_not(name, device) is None)
    elif (reason := why_not(impl, device)) is not None:
        raise ValueError(f"impl={impl!r} cannot be used: {reason}")
    match impl:
        case "cpu":
            return importlib.import_module("em_kernels.backends.cpu")
        case "triton" | "cuda":
            return importlib.import_module(f"em_kernels.backends.{impl}")
        case _:
            return reference


def _auto_order(device: torch.device, operation: str, aligned: bool) -> tuple[str, ...]:
    if device.type == "cpu":
        return AUTO_ON_CPU
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    if operation == "loss" and aligned and nvidia:
        try:
            capable = torch.cuda.get_device_capability(device) >= READS_ONCE_FROM
        except Exception:  # `why_not` says of whom this is the end
            capable = False
        return AUTO_LOSS_ON_GPU if capable else AUTO_ON_GPU
    return AUTO_ON_GPU


@functools.cache
def serves(impl: str, device: torch.device) -> bool:
    """Whether `backend` gives that backend; looked up once, as there."""
    return why_not(impl, device) is None


def backends() -> dict[str, str]:
    """What is built and usable here: backend name -> "available", or why not and the remedy."""
    return {name: why_not(name) or "available" for name in IMPLS if name != "auto"}


def _said(error: Exception) -> str:
    """Its first line, with its type."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


def _load(part: str, module: str, remedy: str) -> ModuleType | str:
    """The compiled module, or why it is not there: what setup.py wrote down, else what importing
    it says. One that is there may be of another torch or Python, or miss a library of its own."""
    again = "reinstall with `pip install --no-build-isolation .`"
    try:
        return importlib.import_module(module)
    except Exception as error:
        reason = _left_out_because(module)
        if reason is not None:
            return f"{part} was left out of this build ({reason}); change that and {again}"
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            return f"{part} is missing ({error}); {remedy} and {again}"
        return f"{part} cannot be loaded ({_said(error)}); {again}"


def _left_out_because(module: str) -> str | None:
    try:
        return dict(json.loads(BUILD_RECORD.read_text(encoding="utf-8"))).get(module)
    except (OSError, ValueError, TypeError):
        return None


def why_no_gpu() -> str | None:
    """None if torch sees a GPU, else what more there is to say of that, or ""."""
    try:
        if torch.cuda.is_available():
            return None
        if torch.backends.cuda.is_built():
            torch.cuda.init()  # raises, and so tells of a driver that is missing or too old
        elif torch.version.cuda is None:
            return f": torch {torch.__version__} is built without CUDA"
    except Exception as error:
        return f": {_said(error)}"
    return ""


def _why_not_compiled(device: torch.device | None) -> str | None:
    if device is not None and device.type != "cpu":
        return f"it serves tensors on the CPU, not on {device.type}"
    found = _load("the compiled part", "em_kernels._C", "install a C++ compiler")
    return found if isinstance(found, str) else None


def _why_not_triton(device: torch.device | None) -> str | None:
    try:
        interpreted = importlib.import_module("em_kernels.backends.triton").interpreted
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        remedy = "`pip install triton`" + ("" if missing else " of the version torch asks for")
        return f"it cannot be imported ({_said(error)}); {remedy}"
    if interpreted:
        return None
    on_cpu = "TRITON_INTERPRET=1 runs it on the CPU"
    if device is not None and device.type == "cpu":
        return f"its tensors must be on a GPU ({on_cpu})"
    if device is None and (said := why_no_gpu()) is not None:
        return f"no GPU is visible{said} ({on_cpu})"
    return _no_launcher()


def _why_not_cuda(device: torch.device | None) -> str | None:
    module = _load("the CUDA part", "em_kernels._cuda", "install the CUDA toolkit")
    if isinstance(module, str):
        return module
    said = why_no_gpu()
    if said is not None or torch.version.cuda is None:
        return f"no NVIDIA GPU is visible to torch{said or ''}"
    if device is not None and device.type != "cuda":
        return f"its tensors must be on a GPU, not on {device.type}"
    refusal = module.why_no_driver()
    if refusal:
        return f"CUDA refuses it ({refusal}); update the driver or reinstall with an older toolkit"
    built, capability = module.architectures, torch.cuda.get_device_capability(device)
    if not _runs_on(built, capability):
        number = "{}.{}".format(*capability)
        remedy = f"reinstall with TORCH_CUDA_ARCH_LIST={number}"
        return f"it is built for {built}, and this GPU has compute capability {number}; " + (
            remedy if capability >= (8, 0) else "8.0 is the least it can serve"
        )
    return None


WHY_NOT: dict[str, Callable[[torch.device | None], str | None]] = {
    "reference": lambda device: None,
    "cpu": _why_not_compiled,
    "triton": _why_not_triton,
    "cuda": _why_not_cuda,
}


def _no_launcher() -> str | None:
    """Why Triton cannot build the launcher of its first kernel: it is C, and includes Python.h."""
    compiler = os.environ.get("CC")
    if compiler is None and not (shutil.which("gcc") or shutil.which("clang")):
        return "it builds its launcher with a C compiler; install gcc or clang, or set CC"
    if compiler is not None and not shutil.which(compiler):
        return (
            f"it builds its launcher with a C compiler, and there is no CC={compiler!r}; unset CC"
        )
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton
    folder = sysconfig.get_path("include", scheme)
    if not Path(folder, "Python.h").exists():
        return f"its launcher needs Python.h, which is not in {folder}; install python3-dev"
    return None


def _runs_on(built: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU has code among `built`, such as "sm_80 sm_90a compute_100": machine code serves
    its major version from its minor one on, that of an "a" exactly one, PTX all that are newer."""
    for kind, major, minor, only in re.findall(r"(sm|compute)_(\d+)(\d)([af]?)", built):
        least = (int(major), int(minor))
        same = capability == least if only == "a" else capability[0] == least[0]
        if least <= capability and (same or (kind == "compute" and not only)):
            return True
    return False
