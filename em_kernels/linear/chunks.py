"""The chunk driver: row kernels over `hidden @ weight.T`, a bounded number of rows at a time.

Forward is one matrix product, backward three (the logits again, dX, dW); where the loss weights
are known before the forward pass, `loss` does all of it in three. Rows that are masked are taken
out before the first product, or multiplied as zeros where finding them would wait (`row_index`).
The gradient of a chunk takes the place of its logits: float32 logits of 16-bit operands are
narrowed there where the backend can, and the products read it from there. Where it makes fewer
chunks (`chunking`), the narrow gradient of a chunk of `loss` has memory of its own, and the logits
of some of its rows at a time lie where dW will be. dW and db are summed over chunks in float32
(float64 for float64) and rounded once; the terms of dW are the gradient rounded to the dtype of
`hidden`, and so are those of db where the gradient is narrowed (`plan.with_terms`). A backward pass
of several chunks has blocks of the vocabulary outermost where that pays, and sums dX instead:
`vocab_blocks`. So has the forward pass of a backend that goes through rows in parts:
`vocab_forward`.

The backward pass multiplies logits in the same pieces as the forward pass, since a matrix library
gives the same bits only for the same shapes: the maximum of a row must be found again to the last
bit, or the gradient of an entropy of 1e-9 is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels.backends.chosen_ids import ChosenIds
from em_kernels.backends.interface import (
    Backend,
    RowSpec,
    Saved,
    Upstream,
    accumulate_dtype,
    has_ids,
)
from em_kernels.backends.row_index import kept_rows
from em_kernels.backends.specs import pick, row_shape, select_rows
from em_kernels.backends.top_ids import top_logprobs as find_top
from em_kernels.linear import vocab_blocks, vocab_forward
from em_kernels.linear.chunking import LOGIT_BYTES, column_blocks, row_stride
from em_kernels.linear.gradients import ChunkGradients
from em_kernels.linear.half import ready_dtype
from em_kernels.linear.plan import Linear, Needs, Rows, kept_shape, pick_rows
from em_kernels.linear.results import empty_rows, put
from em_kernels.linear.workspace import lie_in, room_for_gradient


class Chunk(NamedTuple):
    """The rows whose gradient is multiplied at once, and the memory they go through."""

    rows: Tensor | slice
    x: Tensor  # (R, D), the hidden rows
    low: Tensor | None  # (R, r), of the low-rank part
    logits: Tensor  # (S, V), of some of the rows at a time
    gradient: Tensor  # (R, V), beside the logits or over them
    blocks: list[slice]  # of the vocabulary, one product for each; none where logits are there

    def parts(
        self, linear: Linear, spec: RowSpec, backend: Backend
    ) -> Iterator[tuple[Tensor | slice, Tensor, RowSpec, Tensor]]:
        """(rows, their logits, their spec, where their gradient goes), S rows at a time."""
        count = self.x.shape[0]
        for start in range(0, count, self.logits.shape[0]):
            own = slice(start, min(start + self.logits.shape[0], count))
            logits = self.logits[: own.stop - start]
            for columns in self.blocks:
                low = None if self.low is None else self.low[own]
                linear.multiply(self.x[own], low, columns, logits[:, columns], backend)
            rows = pick_rows(self.rows, own)
            yield rows, logits, select_rows(spec, rows), self.gradient[own]


def stats(
    linear: Linear,
    spec: RowSpec,
    outputs: tuple[str, ...],
    backend: Backend,
    needs: Needs | None = None,
    keep: int | None = 0,
) -> list[Tensor]:
    """[max, log1p_r, mean_d, *outputs], each (N,); one matrix product.

    `needs` are those of the `grad` that will follow, None where none will. Where one will, the last
    result is the logits that it need not multiply again, as many rows as `keep` bytes hold.
    """
    index, spec = kept_rows(spec, linear.hidden.shape[0])
    rows = Rows.counted(linear, index, backend, needs, True)
    results, kept = _empty_rows(linear, rows, spec, outputs), None
    if needs is not None:
        shape = kept_shape(linear, keep)
        kept = backend.empty(shape, linear.logits_dtype, linear.hidden.device)
        kept[:, linear.weight.shape[0] :] = 0
    if rows.in_parts:
        forward = vocab_forward.Pass.over(linear, spec, backend, rows)
        for own in rows.spans():
            put(results, rows.at(own), forward.stats(own, outputs, kept))
    else:
        for chunk in _chunks(linear, spec, rows, backend, kept=kept):
            for part, logits, row_spec, _ in chunk.parts(linear, spec, backend):
                put(results, part, backend.stats(logits[None], row_spec, outputs))
    return results if kept is None else [*results, kept]


def top_logprobs(linear: Linear, spec: RowSpec, k: int, backend: Backend) -> list[Tensor]:
    """[ids, logprob], each (N, k), of `top_ids.top_logprobs`; one matrix product."""
    index, spec = kept_rows(spec, linear.hidden.shape[0])
    around = ChosenIds(backend)  # as the statistics of ids have their chunks
    rows = Rows.counted(linear, index, around, None, True)
    shape, hidden = (linear.hidden.shape[0], k), linear.hidden
    ids = torch.zeros(shape, dtype=torch.int64, device=hidden.device)
    logprob = torch.zeros(shape, dtype=accumulate_dtype(hidden.dtype), device=hidden.device)
    for chunk in _chunks(linear, spec, rows, around):
        for part, logits, row_spec, _ in chunk.parts(linear, spec, backend):
            put([ids, logprob], part, list(find_top(backend, logits[None], row_spec, k)))
    return [ids, logprob]


def grad(
    linear: Linear,
    spec: RowSpec,
    saved: Saved,
    upstream: Upstream,
    needs: Needs,
    backend: Backend,
    kept: Tensor | None = None,
    into: Tensor | None = None,
) -> list[Tensor]:
    """[dX, dW, db] (empty where not needed) from per-row upstream gradients; three products, or two
    for rows whose logits are in `kept`, which stays as it is. With `into` dW is added to that. The
    gradients of a low-rank part follow."""
    index, spec = kept_rows(spec, linear.hidden.shape[0])
    rows = Rows.counted(linear, index, backend, needs, True)
    if rows.chunking.blocks > 1:
        return vocab_blocks.grad(linear, spec, saved, upstream, needs, backend, rows, kept, into)
    sums = ChunkGradients(linear, spec, upstream, needs, backend, rows, into=into)
    for chunk in _chunks(linear, spec, rows, backend, kept=kept, again=True):
        for part, logits, row_spec, out in chunk.parts(linear, spec, backend):
            part_saved = Saved(*(s[part] for s in saved))
            weights = pick(sums.upstream, part)
            backend.grad(logits[None], row_spec, part_saved, weights, out[None])
        sums.add(chunk.rows, chunk.x, chunk.gradient, chunk.low)
    return sums.finish()


def loss(
    linear: Linear,
    spec: RowSpec,
    upstream: Upstream,
    outputs: tuple[str, ...],
    needs: Needs,
    backend: Backend,
) -> list[Tensor]:
    """[max, log1p_r, mean_d, *outputs, dX, dW, db] with known per-row weights; three products, two
    where dX alone is wanted.

    A gradient of float16 is float32 here: backward multiplies it by the loss scale and rounds it.
    """
    index, spec = kept_rows(spec, linear.hidden.shape[0])
    frozen = needs == Needs(hidden=True) and vocab_forward.has_single_source(upstream)
    frozen = frozen and linear.low.x is None and not has_ids(spec)
    rows = Rows.counted(linear, index, backend, needs, in_parts=frozen)
    if rows.in_parts:
        forward = vocab_forward.Pass.over(linear, spec, backend, rows)
        return _loss_of_hidden(forward, upstream, outputs)
    results = _empty_rows(linear, rows, spec, outputs)
    sums = ChunkGradients(linear, spec, upstream, needs, backend, rows, ready_dtype)
    for chunk in _chunks(linear, spec, rows, backend, sums.rounded):
        for part, logits, row_spec, out in chunk.parts(linear, spec, backend):
            weights = pick(sums.upstream, part)
            put(results, part, backend.loss(logits[None], row_spec, weights, outputs, out[None]))
        sums.add(chunk.rows, chunk.x, chunk.gradient, chunk.low)
    return [*results, *sums.finish()]


def _loss_of_hidden(
    forward: vocab_forward.Pass, upstream: Upstream, outputs: tuple[str, ...]
) -> list[Tensor]:
    """`loss` with the vocabulary outermost, of which only dX is wanted."""
    hidden, rows = forward.linear.hidden, forward.rows
    results = _empty_rows(forward.linear, rows, forward.spec, outputs)
    out = hidden.new_zeros(hidden.shape, dtype=ready_dtype(hidden.dtype))
    for own in rows.spans():
        part = rows.at(own)
        *values, out[part] = forward.loss(own, upstream, outputs)
        put(results, part, values)
    none = hidden.new_zeros(0)
    return [*results, out, none, none.clone()]


def _chunks(
    linear: Linear,
    spec: RowSpec,
    rows: Rows,
    backend: Backend,
    spare: Tensor | None = None,
    kept: Tensor | None = None,
    again: bool = False,
) -> Iterator[Chunk]:
    """The chunks in turn, all in the same memory; that of `spare` may be used. The logits of the
    first rows are in `kept`: they go there, or `again` have gone there."""
    hidden, vocab, held = linear.hidden, spec.valid_vocab, rows.held(kept)
    chunking = rows.chunking
    width, blocks = row_stride(vocab), column_blocks(vocab, chunking.blocks, chunking.tile)
    least = 0 if held == rows.count and not again else rows.count
    shape = (min(chunking.logits, least), width)
    if spare is not None and shape[0] * width * LOGIT_BYTES <= spare.nbytes:
        logits = lie_in(spare, shape)
    else:
        logits = backend.empty(shape, linear.logits_dtype, hidden.device)
    logits = logits[:, :vocab]
    if chunking.logits < chunking.chunk:
        shape = (min(chunking.chunk, rows.count), width)
        gradient = backend.empty(shape, hidden.dtype, hidden.device)[:, :vocab]
    else:
        gradient = room_for_gradient(logits, hidden.dtype, backend)
    for own in rows.spans():
        part = rows.at(own)
        x, mask = hidden[part], None if spec.mask is None else spec.mask[part]
        if mask is not None:
            x = torch.where(mask[:, None], x, 0)
        room, unread = logits, blocks
        if kept is not None and own.stop <= held:
            room, unread = kept[own, :vocab], [] if again else blocks
        yield Chunk(part, x, linear.low_rows(part, mask), room, gradient[: x.shape[0]], unread)


def _empty_rows(
    linear: Linear, rows: Rows, spec: RowSpec, outputs: tuple[str, ...]
) -> list[Tensor]:
    hidden = linear.hidden
    shapes = [row_shape(name, spec, hidden.shape[:1]) for name in (*Saved._fields, *outputs)]
    return empty_rows(rows, shapes, accumulate_dtype(hidden.dtype), hidden)
