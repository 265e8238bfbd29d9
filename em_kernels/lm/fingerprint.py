"""Telling weights apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from em_kernels.lm.ranks import Ranks
from em_kernels.ops.dtensor import is_dtensor


def digest(parameters: Iterable[tuple[str, Tensor]], settings: str = "") -> str:
    """Of names, shapes and the sum of every parameter's bits, as integers; and of `settings`.

    Integer sums are the same on every device, and training changes them.
    """
    found = hashlib.sha256(settings.encode())
    for name, parameter in (part for named in parameters for part in _parts(*named)):
        found.update(f"{name} {tuple(parameter.shape)} {int(_bit_sum(parameter))};".encode())
    return found.hexdigest()[:16]


def digest_over_ranks(tensors: Iterable[tuple[str, Tensor]], ranks: Ranks) -> str:
    """`digest` of tensors of which each rank may hold its share (DTensor); on every rank.

    The sums of the shares add up to those of the whole, modulo 2^64.
    """
    held = [part for named in tensors for part in _parts(*named)]
    shares = [(t.to_local() if is_dtensor(t) else t, is_dtensor(t)) for _, t in held]
    sums = [_bit_sum(t) * int(cut or ranks.is_first) for t, cut in shares]
    total = torch.stack([torch.zeros((), dtype=torch.int64), *(s.cpu() for s in sums)])
    total = total.to(ranks.device or "cpu")
    ranks.sum_tensor(total)
    found = hashlib.sha256()
    for (name, tensor), value in zip(held, total[1:].tolist()):
        found.update(f"{name} {tuple(tensor.shape)} {value};".encode())
    return found.hexdigest()[:16]


def _bit_sum(tensor: Tensor) -> Tensor:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[
        tensor.element_size()
    ]
    return tensor.detach().contiguous().view(integers).sum(dtype=torch.int64)


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
