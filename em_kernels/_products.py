"""The matrix products of the chunk driver: 16-bit operands, float32 results and sums.

A GPU's product writes float32 out of 16-bit operands at full speed, and adds to a float32 matrix
on the way out. On a CPU the backend's own product does, or operands are cast a block at a time.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

CPU_BLOCK = 8192  # vocabulary rows
GPU_PIECE_BYTES = 64 << 20


def is_gpu(x: Tensor) -> bool:
    return x.is_cuda


def multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x @ weight.T in the dtype of `out`."""
    if out.dtype == x.dtype:
        torch.mm(x, weight.T, out=out)
    elif is_gpu(x):
        mm_wide(x, weight.T, out)
    else:
        wide = x.to(out.dtype)
        for part, rows in zip(out.split(CPU_BLOCK, dim=1), weight.split(CPU_BLOCK)):
            part.copy_(wide @ rows.to(out.dtype).T)


def pieces(grad_logits: Tensor, weight: Tensor) -> list[slice]:
    """The rows to give `back_multiply` at once: on a GPU its result is float32 first."""
    count = grad_logits.shape[0]
    step = _block_rows(weight.shape[1]) if is_gpu(weight) else max(1, count)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def back_multiply(grad_logits: Tensor, weight: Tensor) -> Tensor:
    """grad_logits @ weight, in the dtype of both.

    On a GPU the sum over the vocabulary may be cut between multiprocessors, and 16-bit results let
    the library round each part: ask for float32 and round once.
    """
    if weight.dtype.itemsize != 2 or not is_gpu(weight):
        return grad_logits @ weight
    out = weight.new_empty(grad_logits.shape[0], weight.shape[1], dtype=torch.float32)
    mm_wide(grad_logits, weight, out)
    return out.to(weight.dtype)


def accumulate(
    total: Tensor, grad_logits: Tensor, x: Tensor, add: bool, backend: ModuleType
) -> None:
    """total = (total if add) + grad_logits.T @ x; `total` may be wider than the operands."""
    if total.dtype == x.dtype:
        if add:
            total.addmm_(grad_logits.T, x)
        else:
            torch.mm(grad_logits.T, x, out=total)
    elif is_gpu(x):
        _accumulate_on_gpu(total, grad_logits, x, add)
    elif not (hasattr(backend, "add_product") and backend.add_product(total, grad_logits, x, add)):
        for part, columns in zip(total.split(CPU_BLOCK), grad_logits.split(CPU_BLOCK, dim=1)):
            product = columns.T @ x
            part.copy_(part + product if add else product)


def _accumulate_on_gpu(total: Tensor, grad_logits: Tensor, x: Tensor, add: bool) -> None:
    """One trip of `total` through memory, or, where products cannot add to it, one more in pieces.

    In neither case is anything rounded to 16 bits on the way.
    """
    if not add:
        mm_wide(grad_logits.T, x, total)
    elif adds_to_float32(x.device, x.dtype):
        addmm_wide(total, grad_logits.T, x)
    else:
        block = _block_rows(total.shape[1])
        piece = total.new_empty(min(block, total.shape[0]), total.shape[1])
        for part, columns in zip(total.split(block), grad_logits.split(block, dim=1)):
            product = piece[: part.shape[0]]
            mm_wide(columns.T, x, product)
            part += product


def _block_rows(width: int) -> int:
    """How many float32 rows of `width` make a piece."""
    return max(128, GPU_PIECE_BYTES // (4 * width) // 128 * 128)


def mm_wide(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b with `out` wider than the operands."""
    torch.mm(a, b, out_dtype=out.dtype, out=out)


def addmm_wide(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b with `total` wider than the operands."""
    torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


@cache
def adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `addmm_wide` works there: some versions of torch want `total` of 16 bits as well."""
    total = torch.zeros(16, 16, device=device)
    operand = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        addmm_wide(total, operand, operand)
    except RuntimeError:
        return False
    return True
