"""What the chunk driver is asked for, and how rows, vocabulary and memory are divided for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from em_kernels.backends.interface import Argument, Backend, RowSpec, accumulate_dtype
from em_kernels.linear import products
from em_kernels.linear.chunking import (
    GRADIENT_BYTES,
    ROW_ALIGN,
    Chunking,
    block_columns,
    chunk_rows,
    count_blocks,
    row_stride,
    single_chunk_in_place,
    spare_rows,
    workspace_bytes,
)
from em_kernels.linear.low_rank import LowRank, add_logits
from em_kernels.linear.workspace import narrows


class Needs(NamedTuple):
    """Which of the three gradients are wanted: a frozen input costs neither time nor memory.

    With `filter_eps`, columns of the vocabulary are left out of their products where every entry
    of a chunk's gradient is below filter_eps times the chunk's largest upstream weight.
    """

    hidden: Annotated[bool, Argument("need_hidden")] = False
    weight: Annotated[bool, Argument("need_weight")] = False
    bias: Annotated[bool, Argument("need_bias")] = False
    filter_eps: float | None = None

    @property
    def inputs(self) -> tuple[bool, bool, bool]:
        """Of hidden, weight and bias."""
        return self.hidden, self.weight, self.bias


class OtherNeeds(NamedTuple):
    """The same of the other of two heads."""

    hidden: Annotated[bool, Argument("need_other_hidden")] = False
    weight: Annotated[bool, Argument("need_other_weight")] = False
    bias: Annotated[bool, Argument("need_other_bias")] = False


class Linear(NamedTuple):
    """The product's operands and what the caller fixed of its chunks."""

    hidden: Tensor  # (N, D), of the dtype that products are in
    weight: Tensor  # (V, D), be it of another
    chunk_tokens: int | None
    logits_dtype: torch.dtype
    low: LowRank = LowRank()

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        chunk: int | None,
        dtype: torch.dtype | None,
        low: LowRank = LowRank(),  # noqa: B008  # it cannot be changed
    ) -> Linear:
        """Flatten the leading dimensions and fill in the dtype of the logits."""
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return cls(hidden, weight, chunk, dtype or default_logits_dtype(hidden), low.flat())

    def multiply(
        self, x: Tensor, low: Tensor | None, columns: slice, out: Tensor, backend: Backend
    ) -> None:
        """The logits of rows `x`, whose low-rank part is `low`, in some columns."""
        products.multiply(x, self.weight[columns], out, backend)
        if low is not None and self.low.weight is not None:
            add_logits(low, self.low.weight[columns], out)

    def low_rows(self, rows: Tensor | slice, mask: Tensor | None) -> Tensor | None:
        """Those of the low-rank part, 0 where `mask`, of the same rows, leaves one out."""
        if self.low.x is None:
            return None
        x = self.low.x[rows]
        return x if mask is None else torch.where(mask[:, None], x, 0)


@dataclass(frozen=True)
class Rows:
    """Which rows are computed, and how many at a time."""

    index: Tensor | None  # None is all of them
    count: int
    chunking: Chunking

    @classmethod
    def counted(
        cls,
        linear: Linear,
        index: Tensor | None,
        backend: Backend,
        needs: Needs | None = None,
        again: bool = False,
        in_parts: bool = False,
    ) -> Rows:
        """The rows of `index`, in chunks; `needs` is None for statistics alone.

        `again`: they come first and the gradient later. `in_parts`: a loss that may have blocks of
        the vocabulary in its forward pass.
        """
        count = linear.hidden.shape[0] if index is None else index.shape[0]
        rows_first = needs is not None and not (again or in_parts)
        return cls(index, count, _chunking(linear, count, backend, needs, again, rows_first))

    def spans(self) -> Iterator[slice]:
        """Where the chunks stand among the counted rows."""
        for start in range(0, self.count, self.chunking.chunk):
            yield slice(start, min(start + self.chunking.chunk, self.count))

    def groups(self) -> list[list[slice]]:
        """The chunks that take a block of the vocabulary together: each by itself, or all."""
        spans = list(self.spans())
        return [[own] for own in spans] if self.in_parts else [spans]

    def at(self, own: slice) -> Tensor | slice:
        """Those of the counted rows that stand at `own`."""
        return own if self.index is None else self.index[own]

    def operand(self, linear: Linear, mask: Tensor | None) -> Tensor:
        """The hidden rows that are counted, 0 where `mask` leaves one out nevertheless."""
        hidden = linear.hidden
        if mask is not None:
            return torch.where(mask[:, None], hidden, 0)
        return hidden if self.index is None else hidden[self.index]

    def low(self, linear: Linear, mask: Tensor | None) -> Tensor | None:
        """The same of the low-rank part."""
        return linear.low_rows(slice(None) if self.index is None else self.index, mask)

    @property
    def in_parts(self) -> bool:
        """Whether a chunk is multiplied with a block of the vocabulary at a time, in both passes,
        and the next one then."""
        return self.chunking.blocks > 1 and self.chunking.tile is not None

    def kept_logits(self, kept: Tensor | None, own: slice, columns: slice) -> Tensor | None:
        """Where the logits of a chunk and a block lie in `kept`, None where it has no room."""
        if kept is None:
            return None
        if not self.in_parts:
            return kept[own, columns] if own.stop <= self.held(kept) else None
        stride = kept.numel() // self.count // ROW_ALIGN * ROW_ALIGN
        if columns.stop > stride:
            return None
        return kept.view(-1)[: self.count * stride].view(self.count, stride)[own, columns]

    def held(self, kept: Tensor | None) -> int:
        """How many of the counted rows, the first ones, have their logits in `kept`: all, or whole
        chunks of them, since part of a chunk would be multiplied again with the rest of it."""
        room = 0 if kept is None else kept.shape[0]
        return (
            self.count if room >= self.count else room // self.chunking.chunk * self.chunking.chunk
        )


def default_logits_dtype(hidden: Tensor) -> torch.dtype:
    """float32 where the matrix product gives it at full speed, else the dtype of `hidden`."""
    wide = products.is_gpu(hidden) and hidden.dtype != torch.float64
    return torch.float32 if wide else hidden.dtype


def kept_shape(linear: Linear, keep: int | None) -> tuple[int, int]:
    """Rows and row length of the logits that `keep` bytes hold; None is what a chunk takes.

    From sizes alone, any of which may be symbolic: rows that are left out are not known here.
    """
    width = row_stride(linear.weight.shape[0])
    row = torch.sym_max(width * linear.logits_dtype.itemsize, 1)
    if keep is None and linear.chunk_tokens is not None:
        rows = linear.chunk_tokens
    else:
        memory = workspace_bytes(products.is_gpu(linear.hidden))
        # None rounds up: a block of columns may take all of the memory of a chunk.
        rows = -(-memory // row) if keep is None else keep // row
    return torch.sym_min(linear.hidden.shape[0], rows), width


def _chunking(
    linear: Linear,
    count: int,
    backend: Backend,
    needs: Needs | None,
    again: bool,
    rows_first: bool,
) -> Chunking:
    width, gpu = row_stride(widest(linear, backend)), products.is_gpu(linear.hidden)
    alone = needs is None and backend.widest_shard is None  # ranks chunk alike
    size = linear.logits_dtype.itemsize if alone else bytes_per_logit(linear, backend)
    spare = None if needs is None or again else _spare_rows(linear, backend, needs)
    half = linear.hidden.dtype == torch.float16
    asked = linear.chunk_tokens
    single = None if again else _single_in_place(linear, count, width, size, backend, needs)
    chunks = chunk_rows(count, width, size, gpu, spare, asked or single, half, alone)
    if rows_first or (needs is not None and needs.filter_eps is not None):
        return chunks
    memory = asked * width * size if asked else workspace_bytes(gpu)
    return _with_blocks(chunks, linear, count, backend, needs, memory)


def _with_blocks(
    chunks: Chunking,
    linear: Linear,
    count: int,
    backend: Backend,
    needs: Needs | None,
    memory: int,
) -> Chunking:
    """With the vocabulary outermost, in both passes or in backward alone, where that pays."""
    own, operand = linear.logits_dtype, linear.hidden.dtype
    width, gpu = row_stride(widest(linear, backend)), products.is_gpu(linear.hidden)
    if not (gpu or operand == accumulate_dtype(operand)):
        return chunks  # no product of a CPU adds 16-bit operands to a float32 dX
    tile = backend.part_entries
    if tile is not None and own == operand and not gpu and count > chunks.chunk:
        parts = block_columns(count, width, own.itemsize, memory, tile)
        if parts is not None and parts.blocks > 1:
            return parts
    if not (needs and needs.weight):
        return chunks
    beside = 0 if own == operand else own.itemsize
    blocks = count_blocks(count, width, chunks.chunk, operand.itemsize, beside, memory)
    return chunks._replace(blocks=blocks)


def _single_in_place(
    linear: Linear, count: int, width: int, size: int, backend: Backend, needs: Needs | None
) -> int | None:
    """All rows at once, where on a CPU that saves the float32 sum of a bfloat16 dW."""
    rounded = linear.hidden.dtype == linear.weight.dtype == torch.bfloat16
    if products.is_gpu(linear.hidden) or not (rounded and needs and _sums_weight(needs, backend)):
        return None
    return single_chunk_in_place(count, width, linear.weight.shape[1], size)


def _sums_weight(needs: Needs, backend: Backend) -> bool:
    """Ranks of a group may not all need dW, and chunk alike."""
    return needs.weight or backend.sums_weight


def with_terms(backend: Backend, heads: Sequence[tuple[Linear, RowSpec]]) -> Backend:
    """One that narrows no gradient whose terms are summed further, on a CPU: db and the gradients
    of low-rank factors are sums of as wide ones as there are. In a group none is, since its ranks
    chunk alike."""
    further = any(spec.bias is not None or linear.low.x is not None for linear, spec in heads)
    further = further or backend.widest_shard is not None
    if products.is_gpu(heads[0][0].hidden) or not (backend.narrows and further):
        return backend
    wide = copy(backend)
    wide.narrows = False
    return wide


def bytes_per_logit(linear: Linear, backend: Backend) -> int:
    """What a chunk holds of each logit: itself, in place its gradient, and a cast of that."""
    own, operand = linear.logits_dtype, linear.hidden.dtype
    cast = own != operand and not narrows(operand, own, backend)
    return own.itemsize + (operand.itemsize if cast else 0)


def _spare_rows(linear: Linear, backend: Backend, needs: Needs) -> int | None:
    """Rows of logits that fit where dW goes; None where that is not rounded to 16 bits at the end,
    the gradient cannot wait in 16 bits, or fewer chunks would save no trips of dW. A rank that has
    no room takes it elsewhere.
    """
    narrow = narrows(linear.hidden.dtype, linear.logits_dtype, backend)
    narrow = narrow and linear.weight.dtype.itemsize == GRADIENT_BYTES
    if not (narrow and _sums_weight(needs, backend) and products.is_gpu(linear.hidden)):
        return None
    return spare_rows(widest(linear, backend), linear.weight.shape[1])


def widest(linear: Linear, backend: Backend) -> int:
    """Entries of the vocabulary to plan for: all ranks of a group must chunk alike."""
    shard = backend.widest_shard
    return linear.weight.shape[0] if shard is None else shard


def pick_rows(rows: Tensor | slice, own: slice) -> Tensor | slice:
    """Those of `rows` that stand at `own`."""
    if isinstance(rows, slice):
        return slice(rows.start + own.start, rows.start + own.stop)
    return rows[own]
