"""The chunk driver: row kernels over `hidden @ weight.T`, a bounded number of rows at a time.

Forward is one matrix product, backward three (the logits again, dX, dW); where the loss weights
are known before the forward pass, `loss` does all of it in three. Rows that are masked are taken
out before the first product. dW is accumulated over chunks in float32 (float64 for float64) and
rounded once; where the device has no product of 16-bit operands that adds to a float32 matrix, the
product of each chunk is rounded to 16 bits before it is added.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels._spec import RowSpec, Saved, Upstream, accumulate_dtype, select_rows

CPU_WORKSPACE_BYTES = 160 << 20
GPU_WORKSPACE_BYTES = 1 << 30


class Needs(NamedTuple):
    """Which of the three gradients are wanted: a frozen input costs neither time nor memory."""

    hidden: bool
    weight: bool
    bias: bool


class Linear(NamedTuple):
    """The product's operands and how to cut it."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    chunk_tokens: int
    logits_dtype: torch.dtype

    @classmethod
    def cut(
        cls,
        hidden: Tensor,
        weight: Tensor,
        chunk: int | None,
        dtype: torch.dtype | None,
        backend: ModuleType,
    ) -> Linear:
        """Flatten the leading dimensions and fill in what the caller left open."""
        hidden = hidden.reshape(-1, hidden.shape[-1])
        dtype = dtype or default_logits_dtype(hidden)
        # All ranks of a group must cut alike.
        vocab = getattr(backend, "widest_shard", weight.shape[0])
        return cls(hidden, weight, chunk or default_chunk_tokens(hidden, vocab, dtype), dtype)


def default_logits_dtype(hidden: Tensor) -> torch.dtype:
    """float32 where the matrix product gives it at full speed, else the dtype of `hidden`."""
    return torch.float32 if hidden.is_cuda and hidden.dtype != torch.float64 else hidden.dtype


def default_chunk_tokens(hidden: Tensor, vocab: int, logits_dtype: torch.dtype) -> int:
    """As many rows as the workspace budget holds, a multiple of 16, at least 16."""
    budget = GPU_WORKSPACE_BYTES if hidden.is_cuda else CPU_WORKSPACE_BYTES
    return max(16, budget // (vocab * logits_dtype.itemsize) // 16 * 16)


def stats(
    linear: Linear, spec: RowSpec, outputs: tuple[str, ...], backend: ModuleType
) -> list[Tensor]:
    """[max, log1p_r, mean_d, *outputs], each (N,); one matrix product."""
    results = _empty_rows(linear, spec, 3 + len(outputs))
    for rows, x, logits, row_spec in _chunks(linear, spec, backend):
        _multiply(x, linear.weight[: spec.valid_vocab], logits)
        for result, value in zip(results, backend.stats(logits[None], row_spec, outputs)):
            result[rows] = value
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
    sums = _Gradients(linear, spec, needs, backend)
    for rows, x, logits, row_spec in _chunks(linear, spec, backend):
        _multiply(x, linear.weight[: spec.valid_vocab], logits)
        chunk_saved = Saved(*(s[rows] for s in saved))
        backend.grad(logits[None], row_spec, chunk_saved, _pick(upstream, rows), logits[None])
        sums.add(rows, x, logits)
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
    results = _empty_rows(linear, spec, 3 + len(outputs))
    sums = _Gradients(linear, spec, needs, backend)
    for rows, x, logits, row_spec in _chunks(linear, spec, backend):
        _multiply(x, linear.weight[: spec.valid_vocab], logits)
        values = backend.loss(logits[None], row_spec, _pick(upstream, rows), outputs, logits[None])
        for result, value in zip(results, values):
            result[rows] = value
        sums.add(rows, x, logits)
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

    def __init__(self, linear: Linear, spec: RowSpec, needs: Needs, backend: ModuleType):
        self.linear, self.spec, self.needs, self.backend = linear, spec, needs, backend
        hidden, weight = linear.hidden, linear.weight
        wide = accumulate_dtype(hidden.dtype)
        rows = _count_rows(linear, spec)
        several = rows > linear.chunk_tokens
        # The first chunk overwrites it: zeros would only cost the page faults.
        make = torch.empty if rows else torch.zeros
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
        self.started = False

    def add(self, rows: Tensor | slice, x: Tensor, grad_logits: Tensor) -> None:
        valid = self.spec.valid_vocab
        operand = grad_logits.to(x.dtype)
        if self.needs.hidden:
            self.hidden[rows] = operand @ self.linear.weight[:valid]
        if self.needs.weight:
            _accumulate(self.weight[:valid], operand, x, self.started, self.backend)
            self.started = True
        if self.needs.bias:
            self.bias[:valid] += grad_logits.sum(0, dtype=self.bias.dtype) / self.spec.logit_scale

    def finish(self) -> list[Tensor]:
        weight = self.weight.to(self.linear.weight.dtype)
        bias = self.bias if self.spec.bias is None else self.bias.to(self.spec.bias.dtype)
        return [self.hidden, weight, bias]


def _chunks(
    linear: Linear, spec: RowSpec, backend: ModuleType
) -> Iterator[tuple[Tensor | slice, Tensor, Tensor, RowSpec]]:
    """(rows, hidden rows, a logits buffer to fill, their spec); the buffer is reused."""
    hidden, size = linear.hidden, linear.chunk_tokens
    index = None
    if spec.mask is not None and not bool(spec.mask.all()):
        index = spec.mask.nonzero()[:, 0]
    count = hidden.shape[0] if index is None else index.shape[0]
    shape = (min(size, count), spec.valid_vocab)
    buffer = empty(backend, shape, linear.logits_dtype, hidden.device)
    spec = spec._replace(mask=None) if index is None else spec
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count)) if index is None else index[start:][:size]
        row_spec = select_rows(spec, rows)._replace(mask=None)
        x = hidden[rows]
        yield rows, x, buffer[: x.shape[0]], row_spec


def _multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x @ weight.T in the dtype of `out`."""
    if out.dtype == x.dtype:
        torch.mm(x, weight.T, out=out)
    elif x.is_cuda:
        torch.mm(x, weight.T, out_dtype=out.dtype, out=out)
    else:
        wide = x.to(out.dtype)
        for part, rows in zip(out.split(8192, dim=1), weight.split(8192)):
            part.copy_(wide @ rows.to(out.dtype).T)


def _accumulate(
    total: Tensor, grad_logits: Tensor, x: Tensor, add: bool, backend: ModuleType
) -> None:
    """total = (total if add) + grad_logits.T @ x; `total` may be wider than the operands."""
    if total.dtype == x.dtype:
        if add:
            total.addmm_(grad_logits.T, x)
        else:
            torch.mm(grad_logits.T, x, out=total)
        return
    if hasattr(backend, "add_product") and backend.add_product(total, grad_logits, x, add):
        return
    for part, columns in zip(total.split(8192), grad_logits.split(8192, dim=1)):
        product = columns.T @ x
        part.copy_(part + product if add else product)


def _count_rows(linear: Linear, spec: RowSpec) -> int:
    return linear.hidden.shape[0] if spec.mask is None else int(spec.mask.sum())


def _empty_rows(linear: Linear, spec: RowSpec, count: int) -> list[Tensor]:
    """Zeros: what a masked row reports."""
    hidden = linear.hidden
    dtype = accumulate_dtype(hidden.dtype)
    make = torch.empty if spec.mask is None else torch.zeros
    return [make(hidden.shape[0], dtype=dtype, device=hidden.device) for _ in range(count)]


def _pick(upstream: Upstream, rows: Tensor | slice) -> Upstream:
    return Upstream(*(None if g is None else g[rows] for g in upstream))
