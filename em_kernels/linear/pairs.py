"""The chunk driver for the divergence of two heads: two logits buffers, a chunk of rows at a time.

Forward is a matrix product for each head. Where the weights of the rows are known, `loss` makes the
gradients on the way: two products more for each head that wants both dX and dW. Rows are left out,
and float16 is scaled, as in `chunks`; both buffers together take the workspace of one head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels.backends import divergence as definition
from em_kernels.backends.interface import Backend, RowSpec, Upstream, accumulate_dtype
from em_kernels.backends.pair import Divergence, PairOut, PairSaved, PairWeights, Side
from em_kernels.backends.row_index import kept_rows
from em_kernels.backends.specs import select_rows
from em_kernels.linear import products
from em_kernels.linear.chunking import Chunking, default_chunk_tokens, row_stride
from em_kernels.linear.gradients import ChunkGradients
from em_kernels.linear.half import ready_dtype
from em_kernels.linear.plan import Linear, Needs, Rows, bytes_per_logit, widest
from em_kernels.linear.results import empty_rows, put
from em_kernels.linear.workspace import room_for_gradient

# |dD / dz| may reach half of the largest |log p - log q|, where `half` allows for 5: up to 320.
STEEP = 32.0


class Head(NamedTuple):
    """One of the two: its product, and the spec of its rows."""

    linear: Linear
    spec: RowSpec


class Heads(NamedTuple):
    own: Head
    other: Head


class _Part(NamedTuple):
    """One head's share of a chunk."""

    x: Tensor  # (R, D)
    side: Side  # of logits (1, R, V)
    gradient: Tensor  # (R, V), over the logits


def stats(
    heads: Heads,
    divergence: Divergence,
    outputs: tuple[str, ...],
    other_outputs: tuple[str, ...],
    backend: Backend,
) -> list[Tensor]:
    """[*`PairSaved`, *outputs, *other_outputs], each (N,); two matrix products."""
    heads, rows = _counted(heads, backend, alone=True)
    results = _empty_rows(heads, rows, len(outputs) + len(other_outputs))
    for part, own, other in _chunks(heads, rows, backend):
        names = outputs, other_outputs
        put(results, part, definition.stats(backend, own.side, other.side, divergence, *names))
    return results


def grad(
    heads: Heads,
    saved: PairSaved,
    divergence: Divergence,
    weights: Tensor,
    needs: tuple[Needs, Needs],
    backend: Backend,
) -> list[Tensor]:
    """[dX, dW, db] of the first head and of the other (empty where not needed)."""
    heads, rows = _counted(heads, backend)
    sums = _Sums(heads, weights, needs, backend, rows)
    for part, own, other in _chunks(heads, rows, backend):
        known, given = PairSaved(*(row[part] for row in saved)), sums.weights(part)
        out = sums.places(own, other)
        definition.grad(backend, own.side, other.side, known, divergence, given, out)
        sums.add(part, own, other)
    return sums.finish()


def loss(
    heads: Heads,
    divergence: Divergence,
    weights: Tensor,
    needs: tuple[Needs, Needs],
    outputs: tuple[str, ...],
    other_outputs: tuple[str, ...],
    backend: Backend,
) -> list[Tensor]:
    """`stats`, then `grad` with known weights; gradients of float16 are float32 here."""
    heads, rows = _counted(heads, backend)
    results = _empty_rows(heads, rows, len(outputs) + len(other_outputs))
    sums = _Sums(heads, weights, needs, backend, rows, ready=True)
    for part, own, other in _chunks(heads, rows, backend):
        sides, given = (own.side, other.side), sums.weights(part)
        out = sums.places(own, other)
        values = definition.loss(backend, *sides, divergence, given, out, outputs, other_outputs)
        put(results, part, values)
        sums.add(part, own, other)
    return [*results, *sums.finish()]


class _Sums:
    """The gradients of both heads, summed over chunks."""

    def __init__(
        self,
        heads: Heads,
        weights: Tensor,
        needs: tuple[Needs, Needs],
        backend: Backend,
        rows: Rows,
        ready: bool = False,
    ) -> None:
        self._weights = weights
        self._wanted = [any(need.inputs) for need in needs]
        steep = Upstream(entropy=weights * STEEP)
        result = (ready_dtype,) if ready else ()
        self._sums = [
            ChunkGradients(*head, steep, need, backend, rows, *result)
            for head, need in zip(heads, needs, strict=True)
        ]

    def weights(self, part: Tensor | slice) -> PairWeights:
        """Of the rows of a chunk, scaled for either head."""
        scales = (
            None if not wanted else 1.0 if total.scale is None else total.scale
            for total, wanted in zip(self._sums, self._wanted, strict=True)
        )
        given = self._weights[part]
        return PairWeights(*(None if scale is None else given * scale for scale in scales))

    def places(self, *parts: _Part) -> PairOut:
        return PairOut(
            *(
                part.gradient[None] if wanted else None
                for part, wanted in zip(parts, self._wanted, strict=True)
            )
        )

    def add(self, rows: Tensor | slice, *parts: _Part) -> None:
        for total, part, wanted in zip(self._sums, parts, self._wanted, strict=True):
            if wanted:
                total.add(rows, part.x, part.gradient)

    def finish(self) -> list[Tensor]:
        return [gradient for total in self._sums for gradient in total.finish()]


def _counted(heads: Heads, backend: Backend, alone: bool = False) -> tuple[Heads, Rows]:
    """The heads and the rows to multiply; what is left of a mask is in the specs."""
    linear = heads.own.linear
    index, spec = kept_rows(heads.own.spec, linear.hidden.shape[0])
    count = linear.hidden.shape[0] if index is None else index.shape[0]
    width, gpu = row_stride(widest(linear, backend)), products.is_gpu(linear.hidden)
    size = sum(bytes_per_logit(head.linear, backend) for head in heads)
    alone = alone and backend.widest_shard is None  # ranks chunk alike
    chunk = linear.chunk_tokens or default_chunk_tokens(count, width, size, gpu, alone)
    heads = Heads(*(head._replace(spec=head.spec._replace(mask=spec.mask)) for head in heads))
    return heads, Rows(index, count, Chunking(chunk, chunk))


def _chunks(
    heads: Heads, rows: Rows, backend: Backend
) -> Iterator[tuple[Tensor | slice, _Part, _Part]]:
    """(rows, the part of either head), all chunks in the same memory."""
    memory = [_memory(head, rows, backend) for head in heads]
    for own in rows.spans():
        part = rows.at(own)
        both = zip(heads, memory, strict=True)
        first, other = (_multiplied(*given, part, backend) for given in both)
        yield part, first, other


def _memory(head: Head, rows: Rows, backend: Backend) -> tuple[Tensor, Tensor]:
    """(logits, their gradient)"""
    linear, vocab = head.linear, head.spec.valid_vocab
    shape = (min(rows.chunking.chunk, rows.count), row_stride(vocab))
    logits = backend.empty(shape, linear.logits_dtype, linear.hidden.device)[:, :vocab]
    return logits, room_for_gradient(logits, linear.hidden.dtype, backend)


def _multiplied(
    head: Head, memory: tuple[Tensor, Tensor], part: Tensor | slice, backend: Backend
) -> _Part:
    linear, spec = head.linear, head.spec
    x = linear.hidden[part]
    if spec.mask is not None:
        x = torch.where(spec.mask[part, None], x, 0)
    logits, gradient = (room[: x.shape[0]] for room in memory)
    products.multiply(x, linear.weight[: spec.valid_vocab], logits, backend)
    return _Part(x, Side(logits[None], select_rows(spec, part)), gradient)


def _empty_rows(heads: Heads, rows: Rows, more: int) -> list[Tensor]:
    hidden, dtype = heads.own.linear.hidden, accumulate_dtype(heads.own.linear.logits_dtype)
    shapes = [hidden.shape[:1]] * (len(PairSaved._fields) + more)
    return empty_rows(rows, shapes, dtype, hidden)
