"""The backward pass with the vocabulary outermost: the gradient of all rows, C columns at a time.

With the statistics of the rows known, their gradient in any columns can be made by itself. So a
block of dW is finished in one product, in the dtype of the weight, and what is summed over blocks
is dX: (N, D) in float32 (float64 for float64) in place of (V, D), rounded once. Where rows
are left out or multiplied as zeros, `hidden` is copied first.
"""

from __future__ import annotations

from itertools import product

from torch import Tensor

from em_kernels.backends.interface import Backend, RowSpec, Saved, Upstream
from em_kernels.backends.specs import pick, select_rows, spec_of_slice, upstream_of_slice
from em_kernels.linear.chunking import column_blocks, width_of
from em_kernels.linear.gradients import BlockGradients
from em_kernels.linear.plan import Linear, Needs, Rows
from em_kernels.linear.workspace import BlockMemory, narrows


def grad(
    linear: Linear,
    spec: RowSpec,
    saved: Saved,
    upstream: Upstream,
    needs: Needs,
    backend: Backend,
    rows: Rows,
    kept: Tensor | None = None,
    into: Tensor | None = None,
) -> list[Tensor]:
    """[dX, dW, db] as `chunks.grad`; logits are multiplied in the pieces of `chunks.stats`."""
    sums = BlockGradients(linear, spec, upstream, needs, backend, rows, into=into)
    vocab, chunking = spec.valid_vocab, rows.chunking
    blocks = column_blocks(vocab, chunking.blocks, chunking.tile) if vocab else []
    held = rows.held(kept)
    room = _Room(linear, backend, rows, held, max(map(width_of, blocks), default=0))
    for chunks, columns in product(rows.groups(), blocks):
        first, count = chunks[0].start, chunks[-1].stop - chunks[0].start
        block_spec, given = _of_block(spec, sums.upstream, columns, backend.first_entry)
        gradient = room.gradient(count, width_of(columns))
        for own in chunks:
            part, out = rows.at(own), gradient[own.start - first : own.stop - first]
            logits = rows.kept_logits(kept, own, columns)
            if logits is None:
                logits = room.logits(out)
                low = None if sums.low is None else sums.low[own]
                linear.multiply(sums.x[own], low, columns, logits, backend)
            row_spec, row_saved = select_rows(block_spec, part), Saved(*(s[part] for s in saved))
            written = out if room.narrow else room.logits(out)
            backend.local.grad(logits[None], row_spec, row_saved, pick(given, part), written[None])
            if not room.narrow:
                out.copy_(written)
        sums.add(slice(first, first + count), columns, gradient)
    return sums.finish()


class _Room:
    """The memory that all blocks go through."""

    def __init__(
        self, linear: Linear, backend: Backend, rows: Rows, held: int, widest: int
    ) -> None:
        own, operand, like = linear.logits_dtype, linear.hidden.dtype, linear.hidden
        count = rows.chunking.chunk if rows.in_parts else rows.count
        self._gradient = BlockMemory(backend, count, widest, operand, like)
        # Whether the gradient can be written where the products read it.
        self.narrow = own == operand or narrows(operand, own, backend)
        self._logits = None  # in the place of their gradient
        if own != operand:
            chunk = 0 if self.narrow and held == rows.count else rows.chunking.chunk
            self._logits = BlockMemory(backend, chunk, widest, own, like)

    def gradient(self, count: int, width: int) -> Tensor:
        """(N, C), of the rows that take a block together."""
        return self._gradient.matrix(count, width)

    def logits(self, gradient: Tensor) -> Tensor:
        """Where those of a chunk go, whose gradient goes to `gradient`, (R, C)."""
        return gradient if self._logits is None else self._logits.matrix(*gradient.shape)


def _of_block(
    spec: RowSpec, upstream: Upstream, columns: slice, first_entry: int
) -> tuple[RowSpec, Upstream]:
    """Both as a backend is given them that sees these columns alone."""
    start, size = first_entry + columns.start, width_of(columns)
    bias = None if spec.bias is None else spec.bias[columns]
    own = spec_of_slice(spec, start, size)._replace(bias=bias, valid_vocab=size)
    return own, upstream_of_slice(spec, upstream, start, size)
