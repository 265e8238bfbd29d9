"""The backward pass with the vocabulary outermost: the gradient of all rows, C columns at a time.

With the statistics of the rows known, their gradient in any columns can be made by itself. So a
block of dW is finished in one product, in the dtype of the weight, and what is summed over blocks
is dX: (N, D) in float32 (float64 for float64) in place of (V, D), rounded once. Where rows
are left out or multiplied as zeros, `hidden` is copied first.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from em_kernels.backends.interface import (
    Backend,
    RowSpec,
    Saved,
    Upstream,
    accumulate_dtype,
    pick,
    select_rows,
    spec_of_slice,
    upstream_of_slice,
)
from em_kernels.linear import products
from em_kernels.linear.cut import block_stride, column_blocks, width_of
from em_kernels.linear.half import rows_scale, scale_rows, unscaled
from em_kernels.linear.plan import Linear, Needs, Rows
from em_kernels.linear.workspace import narrows


def grad(
    linear: Linear,
    spec: RowSpec,
    saved: Saved,
    upstream: Upstream,
    needs: Needs,
    backend: Backend,
    rows: Rows,
    kept: Tensor | None = None,
) -> list[Tensor]:
    """[dX, dW, db] as `_chunks.grad`; logits are multiplied in the pieces of `_chunks.stats`."""
    scale = rows_scale(upstream, spec, rows.index, linear.hidden.dtype)
    upstream = scale_rows(upstream, scale)
    sums = _Gradients(linear, spec, needs, backend, rows, scale)
    vocab, cut = spec.valid_vocab, rows.cut
    blocks = column_blocks(vocab, cut.blocks, cut.tile) if vocab else []
    held = rows.held(kept)
    room = _Room(linear, backend, rows, held, max(map(width_of, blocks), default=0))
    for chunks, columns in product(rows.groups(), blocks):
        first, count = chunks[0].start, chunks[-1].stop - chunks[0].start
        block_spec, given = _of_block(spec, upstream, columns, backend.first_entry)
        gradient = room.gradient(count, width_of(columns))
        for own in chunks:
            part, out = rows.at(own), gradient[own.start - first : own.stop - first]
            logits = rows.kept_logits(kept, own, columns)
            if logits is None:
                logits = room.logits(out)
                products.multiply(sums.x[own], linear.weight[columns], logits)
            row_spec, row_saved = select_rows(block_spec, part), Saved(*(s[part] for s in saved))
            written = out if room.narrow else room.logits(out)
            backend.local.grad(logits[None], row_spec, row_saved, pick(given, part), written[None])
            if not room.narrow:
                out.copy_(written)
        sums.add(slice(first, first + count), columns, gradient)
    return sums.finish()


class _Room:
    """The memory that all blocks go through."""

    def __init__(self, linear: Linear, backend: Backend, rows: Rows, held: int, widest: int):
        own, operand = linear.logits_dtype, linear.hidden.dtype
        device, self.gpu = linear.hidden.device, products.is_gpu(linear.hidden)
        stride = self._stride(widest)
        count = rows.cut.chunk if rows.in_parts else rows.count
        self.together = backend.empty((count * stride,), operand, device)
        self.in_place = own == operand
        # Whether the gradient can be written where the products read it.
        self.narrow = self.in_place or narrows(operand, own, backend)
        if not self.in_place:
            chunk = 0 if self.narrow and held == rows.count else rows.cut.chunk
            self.scratch = backend.empty((chunk * stride,), own, device)

    def gradient(self, count: int, width: int) -> Tensor:
        """(N, C), of the rows that take a block together."""
        return self._matrix(self.together, count, width)

    def logits(self, gradient: Tensor) -> Tensor:
        """Where those of a chunk go, whose gradient goes to `gradient`, (R, C)."""
        return gradient if self.in_place else self._matrix(self.scratch, *gradient.shape)

    def _matrix(self, memory: Tensor, count: int, width: int) -> Tensor:
        stride = self._stride(width)
        return memory[: count * stride].view(count, stride)[:, :width]

    def _stride(self, width: int) -> int:
        return block_stride(width, self.gpu)


class _Gradients:
    """dX, summed over blocks, and the blocks of dW and db."""

    def __init__(
        self,
        linear: Linear,
        spec: RowSpec,
        needs: Needs,
        backend: Backend,
        rows: Rows,
        scale: Tensor | None,
    ):
        self.linear, self.spec, self.needs, self.backend = linear, spec, needs, backend
        self.rows, self.scale = rows, scale
        hidden, weight = linear.hidden, linear.weight
        self.x = rows.operand(linear, spec.mask)
        wide = accumulate_dtype(hidden.dtype)
        make = torch.empty if spec.valid_vocab else torch.zeros
        shape = self.x.shape if needs.hidden else 0
        self.hidden = make(shape, dtype=wide, device=hidden.device)
        shape = weight.shape if needs.weight else (0,)
        self.weight = backend.empty(shape, weight.dtype, weight.device)
        self.weight[spec.valid_vocab :] = 0
        size = weight.shape[0] if needs.bias else 0
        self.bias = torch.zeros(size, dtype=wide, device=weight.device)

    def add(self, own: slice, columns: slice, gradient: Tensor) -> None:
        """Those of the rows `own`, which come after all before them."""
        if self.needs.bias:
            total = gradient.sum(0, dtype=self.bias.dtype)
            self.bias[columns] += total / self.spec.logit_scale
        if self.needs.hidden:
            weight, add = self.linear.weight[columns], columns.start > 0
            products.accumulate(self.hidden[own], gradient.T, weight, add, self.backend)
        if self.needs.weight:
            self._add_weight(self.weight[columns], own, gradient)

    def _add_weight(self, out: Tensor, own: slice, gradient: Tensor) -> None:
        """The block of dW; in float16, which may not hold the scaled one, by way of float32."""
        if self.scale is None:
            products.accumulate(out, gradient, self.x[own], own.start > 0, self.backend)
            return
        for piece in products.pieces(gradient.T, self.x):
            part = torch.empty_like(out[piece], dtype=torch.float32)
            products.accumulate(part, gradient[:, piece], self.x, False, self.backend)
            torch.mul(part, self.scale.reciprocal(), out=out[piece])

    def finish(self) -> list[Tensor]:
        self.hidden = unscaled(self.hidden, self.scale)
        bias = unscaled(self.bias, self.scale)
        if self.spec.bias is not None:
            bias = bias.to(self.spec.bias.dtype)
        return [self._spread() if self.needs.hidden else self.hidden, self.weight, bias]

    def _spread(self) -> Tensor:
        """dX of all rows, 0 where one was left out."""
        hidden, index = self.linear.hidden, self.rows.index
        if self.spec.mask is not None:
            self.hidden.masked_fill_(~self.spec.mask[:, None], 0)  # 0 times an inf of the weight
        if index is None:
            return self.hidden.to(hidden.dtype)
        return hidden.new_zeros(hidden.shape).index_copy_(0, index, self.hidden.to(hidden.dtype))


def _of_block(
    spec: RowSpec, upstream: Upstream, columns: slice, first_entry: int
) -> tuple[RowSpec, Upstream]:
    """Both as a backend is given them that sees these columns alone."""
    start, size = first_entry + columns.start, width_of(columns)
    bias = None if spec.bias is None else spec.bias[columns]
    own = spec_of_slice(spec, start, size)._replace(bias=bias, valid_vocab=size)
    return own, upstream_of_slice(spec, upstream, start, size)
