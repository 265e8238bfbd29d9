"""The memory a chunk of logits goes through, and what of it can be used twice."""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels.backends.interface import Backend
from em_kernels.linear import products
from em_kernels.linear.chunking import block_stride


class BlockMemory:
    """Room for a block of columns of some rows, which all blocks go through."""

    def __init__(
        self, backend: Backend, rows: int, widest: int, dtype: torch.dtype, like: Tensor
    ) -> None:
        self._gpu = products.is_gpu(like)
        self._memory = backend.empty((rows * block_stride(widest, self._gpu),), dtype, like.device)

    def matrix(self, rows: int, width: int) -> Tensor:
        """(rows, width), at the beginning of the memory."""
        stride = block_stride(width, self._gpu)
        return self._memory[: rows * stride].view(rows, stride)[:, :width]


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
