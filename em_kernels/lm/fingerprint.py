"""Telling weights apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from em_kernels.lm.ranks import Ranks
from em_kernels.lm.text import text_digest
from em_kernels.ops.dtensor import is_dtensor


def digest(parameters: Iterable[tuple[str, Tensor]], settings: str = "") -> str:
    """Of names, shapes and the sum of every parameter's bits, as integers; and of `settings`.

    Integer sums are the same on every device, and training changes them.
    """
    parts = (part for named in parameters for part in _parts(*named))
    return text_digest(settings + "".join(_told(n, p, int(_bit_sum(p))) for n, p in parts))


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
    return text_digest("".join(_told(*named, v) for named, v in zip(held, total[1:].tolist())))


def _told(name: str, tensor: Tensor, bits: int) -> str:
    return f"{name} {tuple(tensor.shape)} {bits};"


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
