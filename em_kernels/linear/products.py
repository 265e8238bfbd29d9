"""The matrix products of the chunk driver: 16-bit operands, float32 results and sums.

A GPU's product writes float32 out of 16-bit operands at full speed, and adds to a float32 matrix
on the way out. On a CPU the backend's own product does, or operands are cast a block at a time. So
they are on a GPU whose products refuse that. No sum over rows or over the vocabulary is ever
rounded to float16, whose range it may leave.

Products are in the dtype of the hidden states, and so is the gradient of the logits. A weight of
another is cast a piece at a time, here, so that no copy of it ever exists.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, update_wrapper

import torch
from torch import Tensor

from em_kernels.backends.interface import Backend, accumulate_dtype

BLOCK = 8192  # vocabulary rows that are cast at once
GPU_PIECE_BYTES, CPU_PIECE_BYTES = 64 << 20, 16 << 20


def is_gpu(x: Tensor) -> bool:
    return x.is_cuda


def multiply(x: Tensor, weight: Tensor, out: Tensor, backend: Backend) -> None:
    """out = x @ weight.T in the dtype of `out`."""
    if weight.dtype != x.dtype:
        for own in cast_pieces(weight, x.dtype):
            multiply(x, weight[own].to(x.dtype), out[:, own], backend)
    elif out.dtype == x.dtype:
        torch.mm(x, weight.T, out=out)
    elif is_gpu(x):
        mm_wide(x, weight.T, out)
    elif not backend.product(out, x, weight):
        wide = x.to(out.dtype)
        for part, rows in zip(out.split(BLOCK, dim=1), weight.split(BLOCK)):
            part.copy_(wide @ rows.to(out.dtype).T)


def pieces(grad_logits: Tensor, weight: Tensor) -> list[slice]:
    """The rows to give `back_multiply` at once: on a GPU its result is float32 first."""
    count = grad_logits.shape[0]
    step = _block_rows(weight.shape[1]) if is_gpu(weight) else max(1, count)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def cast_pieces(x: Tensor, dtype: torch.dtype) -> list[slice]:
    """The rows of `x` to cast to `dtype` at once; one piece, be it empty, at least."""
    memory = GPU_PIECE_BYTES if is_gpu(x) else CPU_PIECE_BYTES
    count, step = x.shape[0], max(128, memory // (dtype.itemsize * x.shape[1]) // 128 * 128)
    return [slice(start, min(start + step, count)) for start in range(0, max(1, count), step)]


def back_multiply(grad_logits: Tensor, weight: Tensor, backend: Backend) -> Tensor:
    """grad_logits @ weight, in the dtype of the first, but float32 for float16.

    On a GPU the sum over the vocabulary may be cut between multiprocessors, and 16-bit results let
    the library round each part: ask for float32 and round once. So are the sums of several pieces.
    """
    half, gpu = grad_logits.dtype == torch.float16, is_gpu(weight)
    if weight.dtype != grad_logits.dtype:
        size, wide = (grad_logits.shape[0], weight.shape[1]), accumulate_dtype(grad_logits.dtype)
        total = weight.new_empty(size, dtype=wide)
        accumulate(total, grad_logits.T, weight, False, backend)
        return total if half else total.to(grad_logits.dtype)
    if not half and (weight.dtype.itemsize != 2 or not gpu):
        return grad_logits @ weight
    out = weight.new_empty(grad_logits.shape[0], weight.shape[1], dtype=torch.float32)
    (mm_wide if gpu else mm_of_casts)(grad_logits, weight, out)
    return out if half else out.to(weight.dtype)


def accumulate(total: Tensor, grad_logits: Tensor, x: Tensor, add: bool, backend: Backend) -> None:
    """total = (total if add) + grad_logits.T @ x; `total` may be wider than the operands.

    Where it is narrower it is rounded here. `x` may have another dtype than the gradient if `total`
    is wide: its rows, over which the sum is, are cast a piece at a time.
    """
    if x.dtype != grad_logits.dtype:
        for own in cast_pieces(x, grad_logits.dtype):
            piece = x[own].to(grad_logits.dtype)
            accumulate(total, grad_logits[own], piece, add or own.start > 0, backend)
    elif total.dtype == x.dtype:
        if add:
            total.addmm_(grad_logits.T, x)
        else:
            torch.mm(grad_logits.T, x, out=total)
    elif is_gpu(x) and total.dtype == torch.float32 and x.dtype.itemsize == 2:
        accumulate_on_gpu(total, grad_logits, x, add)
    elif is_gpu(x) or not backend.add_product(total, grad_logits, x, add):
        if x.dtype == torch.float16:
            x = x.to(total.dtype)
        block = _block_rows(total.shape[1]) if is_gpu(x) else BLOCK
        for part, columns in zip(total.split(block), grad_logits.split(block, dim=1)):
            product = columns.T.to(x.dtype) @ x
            part.copy_(part + product if add else product)


def add_to(
    total: Tensor, grad_logits: Tensor, x: Tensor, scale: Tensor | None, backend: Backend
) -> None:
    """total += grad_logits.T @ x / scale, rounded to the dtype of `total`, any, and nowhere else.

    What the products cannot add themselves is made in float32 (float64), a piece at a time.
    """
    wide = accumulate_dtype(x.dtype)
    if scale is None and (total.dtype == x.dtype or (total.dtype == wide and is_gpu(x))):
        accumulate(total, grad_logits, x, True, backend)
        return
    adds = scale is None and total.dtype == wide and not is_gpu(x)
    if adds and backend.add_product(total, grad_logits, x, True):
        return
    for own in cast_pieces(total, wide):
        product = torch.empty_like(total[own], dtype=wide)
        _multiply_wide(product, grad_logits[:, own], x, backend)
        total[own] += product if scale is None else product.mul_(scale.reciprocal())


def _multiply_wide(out: Tensor, grad_logits: Tensor, x: Tensor, backend: Backend) -> None:
    """out = grad_logits.T @ x, wide: nothing is rounded to 16 bits, on any device."""
    if is_gpu(x) or x.dtype == out.dtype:
        accumulate(out, grad_logits, x, False, backend)
    elif not backend.add_product(out, grad_logits, x, False):
        mm_of_casts(grad_logits.T, x, out)


def accumulate_on_gpu(total: Tensor, grad_logits: Tensor, x: Tensor, add: bool) -> None:
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
    if multiplies_to_float32(a.device, a.dtype):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        mm_of_casts(a, b, out)


def mm_of_casts(a: Tensor, b: Tensor, out: Tensor) -> None:
    """The same out of casts of the operands, a block of their longest dimension at a time."""
    rows, inner, columns = *a.shape, b.shape[1]
    if inner >= max(rows, columns):
        out.zero_()
        for left, right in zip(a.split(BLOCK, dim=1), b.split(BLOCK)):
            out.addmm_(left.to(out.dtype), right.to(out.dtype))
    elif rows >= columns:
        right = b.to(out.dtype)
        for part, left in zip(out.split(BLOCK), a.split(BLOCK)):
            part.copy_(left.to(out.dtype) @ right)
    else:
        left = a.to(out.dtype)
        for part, right in zip(out.split(BLOCK, dim=1), b.split(BLOCK, dim=1)):
            part.copy_(left @ right.to(out.dtype))


def addmm_wide(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b with `total` wider than the operands."""
    torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


class TriedOnce:
    """Whether a product, (total, operand) -> None, works on a device for a dtype.

    Tried anew only where torch's setting that makes its products refuse float32 sums is another.
    """

    def __init__(self, product: Callable[[Tensor, Tensor], None]) -> None:
        self._product, self._works = product, cache(self._try)
        self.cache_clear = self._works.cache_clear
        update_wrapper(self, product)

    def __call__(self, device: torch.device, dtype: torch.dtype) -> bool:
        return self._works(torch.backends.cuda.matmul.allow_fp16_accumulation, device, dtype)

    def _try(self, in_float16: bool, device: torch.device, dtype: torch.dtype) -> bool:
        total = torch.zeros(16, 16, device=device)
        try:
            self._product(total, torch.zeros(16, 16, dtype=dtype, device=device))
        except RuntimeError:
            return False
        return True


@TriedOnce
def adds_to_float32(total: Tensor, operand: Tensor) -> None:
    """Whether `addmm_wide` works there: some versions of torch want `total` of 16 bits as well."""
    addmm_wide(total, operand, operand)


@TriedOnce
def multiplies_to_float32(total: Tensor, operand: Tensor) -> None:
    """Whether `torch.mm` does: not with allow_fp16_accumulation, nor in every build of torch."""
    torch.mm(operand, operand, out_dtype=total.dtype, out=total)
