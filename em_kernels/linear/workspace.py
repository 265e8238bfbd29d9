"""The memory a chunk of logits goes through, and what of it can be used twice."""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels.backends.interface import Backend


def narrows(linear_dtype: torch.dtype, logits_dtype: torch.dtype, backend: Backend) -> bool:
    """Whether the gradient of the logits is written in the operands' 16 bits at once."""
    narrower = logits_dtype == torch.float32 and linear_dtype.itemsize == 2
    return narrower and backend.narrows


def room_for_gradient(logits: Tensor, dtype: torch.dtype, backend: Backend) -> Tensor:
    """Where the gradient of `logits` goes: their memory, or the first half of each row of it."""
    if narrows(dtype, logits.dtype, backend):
        return logits.view(dtype)[:, : logits.shape[1]]
    return logits


def lie_in(memory: Tensor, shape: tuple[int, int]) -> Tensor:
    """A float32 matrix at the beginning of a 16-bit one."""
    return memory.view(-1)[: 2 * shape[0] * shape[1]].view(torch.float32).view(shape)
