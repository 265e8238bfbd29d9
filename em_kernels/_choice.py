"""The choice of backend: which there are, which can serve a device, and why not.

A backend is a module with the three functions of `em_kernels.reference`: `stats`, `grad` and
`loss` over rows of logits.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import shutil
from pathlib import Path
from types import ModuleType

import torch

from em_kernels import reference

IMPLS = ("auto", "reference", "cpu", "triton", "cuda")
# What "auto" tries in turn. Measured on an H200, bfloat16, V = 151936 and from hidden states
# (benchmarks/results/gpu-nvidia-h200-2026-11-26.md), CUDA against Triton: the gradient takes the
# same 1.26 ms, and so does a loss from hidden states (1.12, 1.12, 1.09 times its products against
# 1.10, 1.12, 1.10). Statistics alone are 4 % faster, but must be made by what makes the gradient.
AUTO_ON_CPU, AUTO_ON_GPU = ("cpu", "reference"), ("triton", "cuda", "reference")
# Measured there too: a loss from logits takes CUDA 1.70 ms and Triton 1.82. From capability 9.0 on
# CUDA reads them once; where rows do not begin at 16 bytes (V = 151665) Triton was the faster.
AUTO_LOSS_ON_GPU, READS_ONCE_FROM = ("cuda", "triton", "reference"), (9, 0)

BUILD_RECORD = Path(__file__).with_name("_build.json")  # module -> why it was left out


def why_not(impl: str, device: torch.device | None = None) -> str | None:
    """None if backend `impl` can serve tensors on `device`, else the reason and the remedy.

    Without a device the question is whether it can serve any tensor here.
    """
    match impl:
        case "reference":
            return None
        case "cpu":
            if device is not None and device.type != "cpu":
                return f"it serves tensors on the CPU, not on {device.type}"
            return _why_not_compiled()
        case "triton":
            return _why_not_triton(device)
        case "cuda":
            return _why_not_cuda(device)
    raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}")


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
            return importlib.import_module("em_kernels.cpu")
        case "triton" | "cuda":
            return importlib.import_module(f"em_kernels.{impl}")
        case _:
            return reference


def _auto_order(device: torch.device, operation: str, aligned: bool) -> tuple[str, ...]:
    if device.type == "cpu":
        return AUTO_ON_CPU
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    if operation == "loss" and aligned and nvidia:
        capable = torch.cuda.get_device_capability(device) >= READS_ONCE_FROM
        return AUTO_LOSS_ON_GPU if capable else AUTO_ON_GPU
    return AUTO_ON_GPU


@functools.cache
def serves(impl: str, device: torch.device) -> bool:
    """Whether `backend` gives that backend; looked up once, as there."""
    return why_not(impl, device) is None


def backends() -> dict[str, str]:
    """What is built and usable here: backend name -> "available", or why not and the remedy."""
    return {name: why_not(name) or "available" for name in IMPLS if name != "auto"}


def _missing(part: str, module: str, error: ImportError, remedy: str) -> str:
    """Why a part is not there: what setup.py wrote down, else what importing it says."""
    again = "and reinstall with `pip install --no-build-isolation .`"
    try:
        left_out = dict(json.loads(BUILD_RECORD.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        left_out = {}
    reason = left_out.get(module)
    if reason is None:
        return f"{part} is missing ({error}); {remedy} {again}"
    return f"{part} was left out of this build ({reason}); change that {again}"


def _why_not_compiled() -> str | None:
    try:
        importlib.import_module("em_kernels._C")
    except ImportError as error:
        return _missing("the compiled part", "em_kernels._C", error, "install a C++ compiler")
    return None


def _why_not_triton(device: torch.device | None) -> str | None:
    try:
        interpreted = importlib.import_module("em_kernels.triton").interpreted
    except ImportError as error:
        return f"it cannot be imported ({error}); `pip install triton`"
    if device is None:
        usable = interpreted or torch.cuda.is_available()
        if not usable:
            return "no GPU is visible (TRITON_INTERPRET=1 runs it on the CPU)"
    elif device.type == "cpu" and not interpreted:
        return "its tensors must be on a GPU (TRITON_INTERPRET=1 runs it on the CPU)"
    if not interpreted and not _has_c_compiler():
        return "it builds its launcher with a C compiler; install gcc or clang, or set CC"
    return None


def _has_c_compiler() -> bool:
    """What Triton looks for when it first launches a kernel."""
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


def _why_not_cuda(device: torch.device | None) -> str | None:
    try:
        module = importlib.import_module("em_kernels._cuda")
    except ImportError as error:
        return _missing("the CUDA part", "em_kernels._cuda", error, "install the CUDA toolkit")
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "no NVIDIA GPU is visible to torch"
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


def _runs_on(built: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU has code among `built`, such as "sm_80 sm_90a compute_100": machine code serves
    its major version from its minor one on, that of an "a" exactly one, PTX all that are newer."""
    for kind, major, minor, only in re.findall(r"(sm|compute)_(\d+)(\d)([af]?)", built):
        least = (int(major), int(minor))
        same = capability == least if only == "a" else capability[0] == least[0]
        if least <= capability and (same or (kind == "compute" and not only)):
            return True
    return False
