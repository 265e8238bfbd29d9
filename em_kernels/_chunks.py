"""The chunk driver: row kernels over `hidden @ weight.T`, a bounded number of rows at a time.

Forward is one matrix product, backward three (the logits again, dX, dW); where the loss weights
are known before the forward pass, `loss` does all of it in three. Rows that are masked are taken
out before the first product. The gradient of a chunk takes the place of its logits: float32 logits
of 16-bit operands are narrowed there where the backend can, and the products read it from there.
dW and db are summed over chunks in float32 (float64 for float64) and rounded once; the terms of
both are the gradient rounded to the dtype of `hidden`.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels import _products
from em_kernels._columns import BLOCK, kept_columns
from em_kernels._spec import RowSpec, Saved, Upstream, accumulate_dtype, select_rows

CPU_WORKSPACE_BYTES = 160 << 20
GPU_WORKSPACE_BYTES = 1 << 30
CPU_TILE_ROWS, GPU_TILE_ROWS = 16, 128
GPU_ROW_ALIGN = 8  # entries: rows of logits, and of their 16-bit gradient, start at 16 bytes


class Needs(NamedTuple):
    """Which of the three gradients are wanted: a frozen input costs neither time nor memory.

    With `filter_eps`, columns of the vocabulary are left out of their products where every entry
    of a chunk's gradient is below filter_eps times the chunk's largest upstream weight.
    """

    hidden: bool
    weight: bool
    bias: bool
    filter_eps: float | None = None


class Linear(NamedTuple):
    """The product's operands and what the caller fixed of how it is cut."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    chunk_tokens: int | None
    logits_dtype: torch.dtype

    @classmethod
    def cut(
        cls, hidden: Tensor, weight: Tensor, chunk: int | None, dtype: torch.dtype | None
    ) -> Linear:
        """Flatten the leading dimensions and fill in the dtype of the logits."""
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return cls(hidden, weight, chunk, dtype or default_logits_dtype(hidden))


class Rows(NamedTuple):
    """Which rows are computed, and how many at a time."""

    index: Tensor | None  # None is all of them
    count: int
    chunk: int

    @classmethod
    def counted(
        cls, linear: Linear, mask: Tensor | None, bytes_per_logit: int, backend: ModuleType
    ) -> Rows:
        """The rows where `mask` is set; finding their number waits for the device, once a call."""
        index, count = None, linear.hidden.shape[0]
        if mask is not None:
            kept = mask.nonzero()[:, 0]
            if kept.shape[0] < count:
                index, count = kept, kept.shape[0]
        # All ranks of a group must cut alike.
        vocab = getattr(backend, "widest_shard", linear.weight.shape[0])
        gpu = _products.is_gpu(linear.hidden)
        chunk = default_chunk_tokens(count, vocab, bytes_per_logit, gpu)
        return cls(index, count, linear.chunk_tokens or chunk)

    def chunks(self) -> Iterator[Tensor | slice]:
        for start in range(0, self.count, self.chunk):
            part = slice(start, min(start + self.chunk, self.count))
            yield part if self.index is None else self.index[part]


def default_logits_dtype(hidden: Tensor) -> torch.dtype:
    """float32 where the matrix product gives it at full speed, else the dtype of `hidden`."""
    wide = _products.is_gpu(hidden) and hidden.dtype != torch.float64
    return torch.float32 if wide else hidden.dtype


def default_chunk_tokens(count: int, vocab: int, bytes_per_logit: int, gpu: bool) -> int:
    """Rows per chunk: as few chunks as the workspace budget allows, all of one size.

    Every chunk but the first reads and writes the float32 dW once more, 2 x 4 x V x D bytes: at
    V = 131072, D = 4096 that is 4.3 GB, a millisecond on an H200 beside the 8.6 ms of the chunk's
    three products over 2048 rows. So the chunks are as large as the budget holds, and since a
    short last one would pay the same, `count` rows are divided evenly and rounded up to the tile
    height of the products.
    """
    limit = (GPU_WORKSPACE_BYTES if gpu else CPU_WORKSPACE_BYTES) // (vocab * bytes_per_logit)
    tile = GPU_TILE_ROWS if gpu and limit >= GPU_TILE_ROWS else CPU_TILE_ROWS
    limit = max(tile, limit // tile * tile)
    count = max(1, count)
    chunks = -(-count // limit)
    return min(limit, -(-count // (chunks * tile)) * tile)


def stats(
    linear: Linear, spec: RowSpec, outputs: tuple[str, ...], backend: ModuleType
) -> list[Tensor]:
    """[max, log1p_r, mean_d, *outputs], each (N,); one matrix product."""
    rows = Rows.counted(linear, spec.mask, linear.logits_dtype.itemsize, backend)
    results = _empty_rows(linear, rows, 3 + len(outputs))
    for part, _, logits, row_spec in _chunks(linear, spec, rows, backend):
        for result, value in zip(results, backend.stats(logits[None], row_spec, outputs)):
            result[part] = value
    return results


def grad(
    linear: Linear,
    spec: RowSpec,
    saved: Saved,
    upstream: Upstream,
    needs: Needs,
    backend: ModuleType,
) -> list[Tensor]:
    """[dX, dW, db] (empty where not needed) from per-row upstream gradients; three products."""
    rows = Rows.counted(linear, spec.mask, _bytes_per_logit(linear, backend), backend)
    sums = _Gradients(linear, spec, needs, backend, rows)
    for part, x, logits, row_spec in _chunks(linear, spec, rows, backend):
        out = _room_for_gradient(logits, x.dtype, backend)
        chunk_saved = Saved(*(s[part] for s in saved))
        weights = _pick(upstream, part)
        backend.grad(logits[None], row_spec, chunk_saved, weights, out[None])
        sums.add(part, x, out, weights)
    return sums.finish()


def loss(
    linear: Linear,
    spec: RowSpec,
    upstream: Upstream,
    outputs: tuple[str, ...],
    needs: Needs,
    backend: ModuleType,
) -> list[Tensor]:
    """[max, log1p_r, mean_d, *outputs, dX, dW, db] with known per-row weights; three products."""
    rows = Rows.counted(linear, spec.mask, _bytes_per_logit(linear, backend), backend)
    results = _empty_rows(linear, rows, 3 + len(outputs))
    sums = _Gradients(linear, spec, needs, backend, rows)
    for part, x, logits, row_spec in _chunks(linear, spec, rows, backend):
        out = _room_for_gradient(logits, x.dtype, backend)
        weights = _pick(upstream, part)
        values = backend.loss(logits[None], row_spec, weights, outputs, out[None])
        for result, value in zip(results, values):
            result[part] = value
        sums.add(part, x, out, weights)
    return [*results, *sums.finish()]


def empty(
    backend: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """torch.empty, from memory that the backend keeps for it where it does."""
    if hasattr(backend, "empty"):
        return backend.empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)


class _Gradients:
    """dX, dW and db, summed over chunks."""

    def __init__(
        self, linear: Linear, spec: RowSpec, needs: Needs, backend: ModuleType, rows: Rows
    ):
        self.linear, self.spec, self.needs, self.backend = linear, spec, needs, backend
        hidden, weight = linear.hidden, linear.weight
        wide = accumulate_dtype(hidden.dtype)
        several = rows.count > rows.chunk
        # The first chunk overwrites it: zeros would only cost the page faults.
        self.started = needs.filter_eps is not None
        make = torch.empty if rows.count and not self.started else torch.zeros
        self.hidden = torch.zeros_like(hidden) if needs.hidden else hidden.new_empty(0)
        self.weight = make(
            weight.shape if needs.weight else 0,
            dtype=wide if several else weight.dtype,
            device=weight.device,
        )
        self.weight[spec.valid_vocab :] = 0
        self.bias = torch.zeros(
            weight.shape[0] if needs.bias else 0, dtype=wide, device=weight.device
        )

    def add(self, rows: Tensor | slice, x: Tensor, grad_logits: Tensor, upstream: Upstream) -> None:
        valid, kept = self.spec.valid_vocab, None
        if self.needs.bias:
            self.bias[:valid] += grad_logits.sum(0, dtype=self.bias.dtype) / self.spec.logit_scale
        if self.needs.filter_eps is not None:
            kept = kept_columns(grad_logits, upstream, self.needs.filter_eps)
        if kept is None:
            self._add_all(rows, x, grad_logits.to(x.dtype), self.linear.weight[:valid])
        else:
            self._add_columns(rows, x, grad_logits, kept)

    def _add_all(
        self, rows: Tensor | slice, x: Tensor, grad_logits: Tensor, weight: Tensor
    ) -> None:
        if self.needs.hidden:
            self.hidden[rows] = _products.back_multiply(grad_logits, weight)
        if self.needs.weight:
            total = self.weight[: weight.shape[0]]
            _products.accumulate(total, grad_logits, x, self.started, self.backend)
            self.started = True

    def _add_columns(
        self, rows: Tensor | slice, x: Tensor, grad_logits: Tensor, kept: Tensor
    ) -> None:
        """The same for some of the columns, gathered a block at a time."""
        wide = x.new_zeros(x.shape, dtype=accumulate_dtype(x.dtype))
        for columns in kept.split(BLOCK):
            part = grad_logits[:, columns].to(x.dtype)
            if self.needs.hidden:
                weight = self.linear.weight[columns]
                _products.accumulate(wide, part.T, weight, True, self.backend)
            if self.needs.weight:
                product = self.weight.new_empty(len(columns), x.shape[1])
                _products.accumulate(product, part, x, False, self.backend)
                self.weight.index_add_(0, columns, product)
        if self.needs.hidden:
            self.hidden[rows] = wide.to(x.dtype)

    def finish(self) -> list[Tensor]:
        weight = self.weight.to(self.linear.weight.dtype)
        bias = self.bias if self.spec.bias is None else self.bias.to(self.spec.bias.dtype)
        return [self.hidden, weight, bias]


def _chunks(
    linear: Linear, spec: RowSpec, rows: Rows, backend: ModuleType
) -> Iterator[tuple[Tensor | slice, Tensor, Tensor, RowSpec]]:
    """(rows, hidden rows, their logits, their spec); the memory of the logits is reused."""
    hidden, vocab = linear.hidden, spec.valid_vocab
    width = _row_stride(vocab) if _products.is_gpu(hidden) else vocab
    shape = (min(rows.chunk, rows.count), width)
    buffer = empty(backend, shape, linear.logits_dtype, hidden.device)
    spec = spec._replace(mask=None)
    for part in rows.chunks():
        x = hidden[part]
        logits = buffer[: x.shape[0], :vocab]
        _products.multiply(x, linear.weight[:vocab], logits)
        yield part, x, logits, select_rows(spec, part)


def _row_stride(vocab: int) -> int:
    """Matrix products are slow where rows do not start at 16 bytes."""
    return -(-vocab // GPU_ROW_ALIGN) * GPU_ROW_ALIGN


def _narrows(linear_dtype: torch.dtype, logits_dtype: torch.dtype, backend: ModuleType) -> bool:
    """Whether the gradient of the logits is written in the operands' 16 bits at once."""
    narrower = logits_dtype == torch.float32 and linear_dtype.itemsize == 2
    return narrower and getattr(backend, "narrows", False)


def _room_for_gradient(logits: Tensor, dtype: torch.dtype, backend: ModuleType) -> Tensor:
    """Where the gradient of `logits` goes: their memory, or the first half of each row of it."""
    if _narrows(dtype, logits.dtype, backend):
        return logits.view(dtype)[:, : logits.shape[1]]
    return logits


def _bytes_per_logit(linear: Linear, backend: ModuleType) -> int:
    """What a chunk holds of each logit: itself, in place its gradient, and a cast of that."""
    own, operand = linear.logits_dtype, linear.hidden.dtype
    cast = own != operand and not _narrows(operand, own, backend)
    return own.itemsize + (operand.itemsize if cast else 0)


def _empty_rows(linear: Linear, rows: Rows, count: int) -> list[Tensor]:
    """Zeros where a row is left out: what a masked row reports."""
    hidden = linear.hidden
    dtype = accumulate_dtype(hidden.dtype)
    make = torch.empty if rows.index is None else torch.zeros
    return [make(hidden.shape[0], dtype=dtype, device=hidden.device) for _ in range(count)]


def _pick(upstream: Upstream, rows: Tensor | slice) -> Upstream:
    return Upstream(*(None if g is None else g[rows] for g in upstream))
