"""Telling weights apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from em_kernels.ops.dtensor import is_dtensor


def digest(parameters: Iterable[tuple[str, Tensor]], settings: str = "") -> str:
    """Of names, shapes and the sum of every parameter's bits, as integers; and of `settings`.

    Integer sums are the same on every device, and training changes them.
    """
    found = hashlib.sha256(settings.encode())
    for name, parameter in (part for named in parameters for part in _parts(*named)):
        integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[
            parameter.element_size()
        ]
        total = parameter.detach().contiguous().view(integers).sum(dtype=torch.int64)
        found.update(f"{name} {tuple(parameter.shape)} {int(total)};".encode())
    return found.hexdigest()[:16]


def is_packed(parameter: Tensor) -> bool:
    """Whether it is made of other tensors, as torchao's quantised weights are; not a DTensor."""
    return hasattr(type(parameter), "__tensor_flatten__") and not is_dtensor(parameter)


def _parts(name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors that hold the bits of a parameter: itself, or those that it is made of."""
    if not is_packed(parameter):
        yield name, parameter
        return
    packed: Any = parameter
    for part in packed.__tensor_flatten__()[0]:
        yield from _parts(f"{name}.{part}", getattr(parameter, part))
