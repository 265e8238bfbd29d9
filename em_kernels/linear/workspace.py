"""The memory a chunk of logits goes through, and what of it can be used twice."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor


def empty(
    backend: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """torch.empty, from memory that the backend keeps for it where it does."""
    if hasattr(backend, "empty"):
        return backend.empty(tuple(shape), dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def narrows(linear_dtype: torch.dtype, logits_dtype: torch.dtype, backend: ModuleType) -> bool:
    """Whether the gradient of the logits is written in the operands' 16 bits at once."""
    narrower = logits_dtype == torch.float32 and linear_dtype.itemsize == 2
    return narrower and getattr(backend, "narrows", False)


def room_for_gradient(logits: Tensor, dtype: torch.dtype, backend: ModuleType) -> Tensor:
    """Where the gradient of `logits` goes: their memory, or the first half of each row of it."""
    if narrows(dtype, logits.dtype, backend):
        return logits.view(dtype)[:, : logits.shape[1]]
    return logits


def lie_in(memory: Tensor, shape: tuple[int, int]) -> Tensor:
    """A float32 matrix at the beginning of a 16-bit one."""
    return memory.view(-1)[: 2 * shape[0] * shape[1]].view(torch.float32).view(shape)
