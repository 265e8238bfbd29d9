"""The choice of backend: which there are, which can serve a device, and why not."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import NamedTuple

import torch

from em_kernels.backends.availability import first_line
from em_kernels.backends.interface import Backend
from em_kernels.backends.reference import Reference


class Entry(NamedTuple):
    """A backend that may not be there, and where "auto" tries it.

    Its module can be imported everywhere and has `why_not`, as below for one backend, and `load`,
    which gives the `Backend`.
    """

    module: str
    on: str  # "cpu" or "gpu"
    reads_once_from: tuple[int, int] | None = None  # of aligned rows; capability where it is first
    fuses_product: bool = False  # its `linear_stats` serves fuse_product=True


# "auto" tries them in this order, and the reference last. Measured on an H200, bfloat16, V = 151936
# and from hidden states (benchmarks/results/gpu-nvidia-h200-2026-11-26.md), CUDA against Triton:
# the gradient takes the same 1.26 ms, and so does a loss from hidden states (1.12, 1.12, 1.09 times
# its products against 1.10, 1.12, 1.10). Statistics alone are 4 % faster, but must be made by what
# makes the gradient. A loss from logits takes CUDA 1.70 ms and Triton 1.82: from capability 9.0 on
# CUDA reads them once; where rows do not begin at 16 bytes (V = 151665) Triton was the faster.
OPTIONAL = {
    "cpu": Entry("em_kernels.backends.cpu", "cpu"),
    "triton": Entry("em_kernels.backends.triton", "gpu", fuses_product=True),
    "cuda": Entry("em_kernels.backends.cuda", "gpu", reads_once_from=(9, 0)),
}
REFERENCE = Reference()
IMPLS = ("auto", REFERENCE.name, *OPTIONAL)
NONE_FUSES = "a backend that multiplies by itself, and none here does; leave it out"


def why_not(impl: str, device: torch.device | None = None) -> str | None:
    """None if backend `impl` can serve tensors on `device`, else the reason and the remedy.

    Without a device the question is whether it can serve any tensor here. Never an exception: a
    driver or a library may raise anything when it is asked, and that is a reason too.
    """
    if impl == REFERENCE.name:
        return None
    if impl not in OPTIONAL:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}")
    try:
        reason: str | None = _module(impl).why_not(device)
    except Exception as error:
        return (
            f"asking for it failed ({first_line(error)}); see that nvidia-smi works, or reinstall"
        )
    return reason


@functools.cache
def backend(
    impl: str, device: torch.device, operation: str = "rows", aligned: bool = False
) -> Backend:
    """The backend `impl` for tensors on `device`; "auto" takes the fastest that can serve them.

    `operation` is "loss" for the loss of given logits, else "rows": statistics and the gradient
    made from them are one choice. `aligned`: each row of the logits begins at 16 bytes. Looked up
    once: what can serve a device is taken not to change.
    """
    if impl == "auto":
        order = _auto_order(device, operation == "loss" and aligned)
        impl = next(name for name in order if why_not(name, device) is None)
    elif (reason := why_not(impl, device)) is not None:
        raise ValueError(f"impl={impl!r} cannot be used: {reason}")
    return REFERENCE if impl == REFERENCE.name else _loaded(impl)


@functools.cache
def serving(device: torch.device) -> tuple[Backend, ...]:
    """All that can serve a device but the reference, which has nothing to lend to others."""
    return tuple(_loaded(name) for name in OPTIONAL if why_not(name, device) is None)


def fusing_names() -> tuple[str, ...]:
    """The backends that have a `linear_stats`, the first that can serve a device taken."""
    return tuple(name for name, entry in OPTIONAL.items() if entry.fuses_product)


def fusing(device: torch.device) -> Backend:
    """The backend for fuse_product=True and tensors on `device`; ValueError if there is none."""
    reasons = {name: why_not(name, device) for name in fusing_names()}
    for name, reason in reasons.items():
        if reason is None:
            return _loaded(name)
    said = "; or ".join(f"the {name.capitalize()} backend: {why}" for name, why in reasons.items())
    raise ValueError(f"fuse_product=True needs {said or NONE_FUSES}")


def backends() -> dict[str, str]:
    """What is built and usable here: backend name -> "available", or why not and the remedy."""
    return {name: why_not(name) or "available" for name in IMPLS if name != "auto"}


def _auto_order(device: torch.device, aligned_loss: bool) -> list[str]:
    on = "cpu" if device.type == "cpu" else "gpu"
    order = [name for name, entry in OPTIONAL.items() if entry.on == on]
    if aligned_loss:
        order.sort(key=lambda name: not _reads_once(OPTIONAL[name], device))
    return [*order, REFERENCE.name]


def _reads_once(entry: Entry, device: torch.device) -> bool:
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    if entry.reads_once_from is None or not nvidia:
        return False
    try:
        return torch.cuda.get_device_capability(device) >= entry.reads_once_from
    except Exception:  # `why_not` says of whom this is the end
        return False


@functools.cache
def _loaded(impl: str) -> Backend:
    made: Backend = _module(impl).load()
    return made


def _module(impl: str) -> ModuleType:
    return importlib.import_module(OPTIONAL[impl].module)
