"""dX, dW and db, added up from the gradients of pieces of the logits: chunks of rows or blocks of
the vocabulary.

Those of float16 operands are made of weights that are scaled as `half` says, summed in float32 and
divided by the scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from em_kernels.backends import row_index
from em_kernels.backends.interface import Backend, RowSpec, Upstream, accumulate_dtype, where_rows
from em_kernels.backends.specs import pick
from em_kernels.linear import products
from em_kernels.linear.columns import BLOCK, kept_columns
from em_kernels.linear.half import rows_scale, scale_rows, unscaled
from em_kernels.linear.low_rank import LowRankSums
from em_kernels.linear.plan import Linear, Needs, Rows, pick_rows


def same_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype


@dataclass(eq=False)
class Gradients:
    """What both orders have in common: the scale, db, and what is left out.

    `result` says which dtype the gradient of a tensor of a dtype has. With `into`, (V, D), dW is
    added to that, and returned as an empty tensor.
    """

    linear: Linear
    spec: RowSpec
    upstream: Upstream
    needs: Needs
    backend: Backend
    rows: Rows
    result: Callable[[torch.dtype], torch.dtype] = same_dtype
    into: Tensor | None = None

    def __post_init__(self) -> None:
        linear = self.linear
        self.scale = rows_scale(self.upstream, self.spec, self.rows.index, linear.hidden.dtype)
        self.upstream = scale_rows(self.upstream, self.scale)
        self.wide = accumulate_dtype(linear.hidden.dtype)
        self.low_sums = LowRankSums(linear.low, self.backend)
        size = linear.weight.shape[0] if self.needs.bias else 0
        self.bias = torch.zeros(size, dtype=self.wide, device=linear.weight.device)

    def weight_shape(self) -> tuple[int, ...]:
        made = self.needs.weight and self.into is None
        return tuple(self.linear.weight.shape) if made else (0,)

    def add_bias(self, columns: slice, gradient: Tensor) -> None:
        if self.needs.bias:
            total = gradient.sum(0, dtype=self.wide)
            self.bias[columns] += total / self.spec.logit_scale

    def finished_bias(self) -> Tensor:
        bias, given = unscaled(self.bias, self.scale), self.spec.bias
        if given is None and self.needs.bias:
            return bias
        return bias.to(self.result((self.linear.weight if given is None else given).dtype))

    def finished_low(self) -> list[Tensor]:
        return self.low_sums.finish(self.scale, self.spec.mask, self.result)

    def clear_masked(self, hidden: Tensor) -> None:
        """In place of 0 times an inf of the weight."""
        if self.spec.mask is not None and self.needs.hidden:
            hidden.masked_fill_(~self.spec.mask[:, None], 0)


class ChunkGradients(Gradients):
    """dX a chunk of rows at a time, dW and db summed over chunks."""

    def __post_init__(self) -> None:
        self.upstream = _counted(self.upstream, self.spec.mask)
        super().__post_init__()
        linear, spec, needs, rows = self.linear, self.spec, self.needs, self.rows
        # Finding the columns waits for the device: a captured graph multiplies them all.
        self.filter_eps = None if row_index.is_capturing(linear.hidden) else needs.filter_eps
        hidden, weight, chunking = linear.hidden, linear.weight, rows.chunking
        several, half = rows.count > chunking.chunk, self.scale is not None
        early = several and needs.weight and chunking.logits < chunking.chunk
        # Until `finish` the logits lie there.
        self.rounded = weight.new_empty(weight.shape) if early else None
        # The first chunk overwrites it: zeros would only cost the page faults.
        self.started = self.filter_eps is not None
        # Not zeros_like: the operator's result is contiguous whatever the strides of `hidden`.
        shape = tuple(hidden.shape) if needs.hidden else (0,)
        self.hidden = hidden.new_zeros(shape, dtype=self.result(hidden.dtype))
        dtype = self.wide if several or half else self.result(weight.dtype)
        self.weight = self.backend.empty(self.weight_shape(), dtype, weight.device)
        self.weight[spec.valid_vocab if rows.count and not self.started else 0 :] = 0

    def add(
        self, rows: Tensor | slice, x: Tensor, gradient: Tensor, low: Tensor | None = None
    ) -> None:
        """Those of a chunk: its rows, their hidden states, the gradient of their logits, and their
        low-rank part."""
        valid, kept = self.spec.valid_vocab, None
        self.add_bias(slice(0, valid), gradient)
        self.low_sums.add(rows, slice(0, valid), low, gradient)
        if self.filter_eps is not None:
            kept = kept_columns(gradient, pick(self.upstream, rows), self.filter_eps)
        if kept is None:
            self._add_all(rows, x, gradient.to(x.dtype), self.linear.weight[:valid])
        elif len(kept):
            self._add_columns(rows, x, gradient, kept)

    def _add_all(self, rows: Tensor | slice, x: Tensor, gradient: Tensor, weight: Tensor) -> None:
        if self.needs.hidden:
            for own in products.pieces(gradient, weight):
                product = products.back_multiply(gradient[own], weight, self.backend)
                product = unscaled(product, self.scale)
                self.hidden[pick_rows(rows, own)] = product.to(self.hidden.dtype)
        if self.into is not None:
            products.add_to(self.into[: weight.shape[0]], gradient, x, self.scale, self.backend)
        elif self.needs.weight:
            total = self.weight[: weight.shape[0]]
            products.accumulate(total, gradient, x, self.started, self.backend)
            self.started = True

    def _add_columns(self, rows: Tensor | slice, x: Tensor, gradient: Tensor, kept: Tensor) -> None:
        """The same for some of the columns, gathered a block at a time."""
        wide = x.new_zeros(x.shape, dtype=self.wide)
        for columns in torch.split(kept, BLOCK):
            part = gradient[:, columns].to(x.dtype)
            if self.needs.hidden:
                weight = self.linear.weight[columns]
                products.accumulate(wide, part.T, weight, True, self.backend)
            if self.needs.weight:
                self._add_weight(columns, part, x)
        if self.needs.hidden:
            self.hidden[rows] = unscaled(wide, self.scale).to(self.hidden.dtype)

    def _add_weight(self, columns: Tensor, gradient: Tensor, x: Tensor) -> None:
        if self.into is None:
            product = self.weight.new_empty(len(columns), x.shape[1])
            products.accumulate(product, gradient, x, False, self.backend)
            self.weight.index_add_(0, columns, product)
        else:
            rows = self.into[columns]
            products.add_to(rows, gradient, x, self.scale, self.backend)
            self.into.index_copy_(0, columns, rows)

    def finish(self) -> list[Tensor]:
        self.clear_masked(self.hidden)
        return [self.hidden, self._rounded(), self.finished_bias(), *self.finished_low()]

    def _rounded(self) -> Tensor:
        """dW in the dtype that is asked for; to 16 bits in one pass, from `rounded` on if given."""
        dtype = self.result(self.linear.weight.dtype)
        if self.scale is None:
            rounded = self.rounded
            return self.weight.to(dtype) if rounded is None else rounded.copy_(self.weight)
        out = self.weight
        if out.dtype != dtype:
            out = torch.empty_like(out, dtype=dtype) if self.rounded is None else self.rounded
        return torch.mul(self.weight, self.scale.reciprocal(), out=out)


class BlockGradients(Gradients):
    """dX summed over blocks of the vocabulary, dW and db a block at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        linear, spec, needs = self.linear, self.spec, self.needs
        self.x = self.rows.operand(linear, spec.mask)
        self.low = self.rows.low(linear, spec.mask)
        make = torch.empty if spec.valid_vocab else torch.zeros
        shape = tuple(self.x.shape) if needs.hidden else (0,)
        self.hidden = make(shape, dtype=self.wide, device=linear.hidden.device)
        weight, dtype = linear.weight, linear.weight.dtype
        if self.rows.in_parts and self.rows.count > self.rows.chunking.chunk:
            dtype = torch.promote_types(dtype, self.wide)  # every chunk adds to each block
        self.weight = self.backend.empty(self.weight_shape(), dtype, weight.device)
        self.weight[spec.valid_vocab :] = 0

    def add(self, own: slice, columns: slice, gradient: Tensor) -> None:
        """Those of the rows `own`, which come after all before them."""
        self.add_bias(columns, gradient)
        if self.low is not None:
            self.low_sums.add(self.rows.at(own), columns, self.low[own], gradient)
        if self.needs.hidden:
            weight, add = self.linear.weight[columns], columns.start > 0
            products.accumulate(self.hidden[own], gradient.T, weight, add, self.backend)
        if self.into is not None:
            x = self.x[own]
            products.add_to(self.into[columns], gradient, x, self.scale, self.backend)
        elif self.needs.weight:
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
        hidden = unscaled(self.hidden, self.scale)
        self.clear_masked(hidden)
        spread = self._spread(hidden) if self.needs.hidden else hidden
        weight = self.weight.to(self.linear.weight.dtype)
        return [spread, weight, self.finished_bias(), *self.finished_low()]

    def _spread(self, hidden: Tensor) -> Tensor:
        """dX of all rows, 0 where one was left out."""
        given, index = self.linear.hidden, self.rows.index
        if index is None:
            return hidden.to(given.dtype)
        return given.new_zeros(given.shape).index_copy_(0, index, hidden.to(given.dtype))


def _counted(upstream: Upstream, mask: Tensor | None) -> Upstream:
    """0 where the mask is."""
    if mask is None:
        return upstream
    return Upstream(*(None if g is None else where_rows(mask, g) for g in upstream))
