"""A low-rank part of a head, as LoRA trains it: logits = hidden @ weight.T + x @ b.T.

x (N, r) is hidden @ A.T times its scaling, made outside, and b (V, r) has a row for each entry of
the vocabulary. The merged weight is never made: each piece of logits takes a second, small product,
and so does each piece of their gradient, twice. Those are in the wider of the dtypes of the two
factors; sums are in float32 (float64), rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from em_kernels.backends.interface import Argument, Backend, accumulate_dtype
from em_kernels.linear import products
from em_kernels.linear.half import unscaled


class LowRank(NamedTuple):
    """x and b, and which of their gradients are wanted."""

    x: Annotated[Tensor | None, Argument("low_hidden")] = None  # (..., r)
    weight: Annotated[Tensor | None, Argument("low_weight")] = None  # (V, r)
    need_x: Annotated[bool, Argument("need_low_hidden")] = False
    need_weight: Annotated[bool, Argument("need_low_weight")] = False

    def flat(self) -> LowRank:
        """The same with the leading dimensions of x flattened."""
        return self if self.x is None else self._replace(x=self.x.reshape(-1, self.x.shape[-1]))


def add_logits(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out += x @ weight.T, rounded once to the dtype of `out`."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if out.dtype == dtype == x.dtype:
        out.addmm_(x, weight.to(dtype).T)
        return
    if products.is_gpu(x) and x.dtype == weight.dtype and out.dtype == torch.float32:
        products.accumulate_on_gpu(out, x.T, weight.T, True)
        return
    dtype = torch.promote_types(dtype, out.dtype)
    x = x.to(dtype)
    for own in products.cast_pieces(out.T, dtype):
        out[:, own] += x @ weight[own].to(dtype).T


class LowRankSums:
    """The gradients of x and b, added up from those of pieces of the logits."""

    def __init__(self, low: LowRank, backend: Backend) -> None:
        self.low, self.backend = low, backend
        self.x, self.weight = (
            _zeros(tensor, need)
            for tensor, need in ((low.x, low.need_x), (low.weight, low.need_weight))
        )

    def add(self, rows: Tensor | slice, columns: slice, x: Tensor | None, gradient: Tensor) -> None:
        """Those of the logits at `rows` and `columns`; `x` has the rows, 0 where one is masked."""
        weight = self.low.weight
        if x is None or weight is None:
            return
        dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), gradient.dtype)
        x, weight, total = x.to(dtype), weight[columns], _zeros(x, self.low.need_x)
        for own in products.cast_pieces(gradient.T, dtype):
            part, factor = gradient[:, own].to(dtype), weight[own].to(dtype)
            if self.low.need_x:
                products.accumulate(total, part.T, factor, True, self.backend)
            if self.low.need_weight:
                products.accumulate(self.weight[columns][own], part, x, True, self.backend)
        if self.low.need_x:
            self.x[rows] += total

    def finish(
        self,
        scale: Tensor | None,
        mask: Tensor | None,
        result: Callable[[torch.dtype], torch.dtype],
    ) -> list[Tensor]:
        """[dx, db], none where there is no such part."""
        if self.low.x is None or self.low.weight is None:
            return []
        if mask is not None and self.low.need_x:
            self.x.masked_fill_(~mask[:, None], 0)  # in place of 0 times an inf of b
        made = ((self.x, self.low.x), (self.weight, self.low.weight))
        return [unscaled(total, scale).to(result(like.dtype)) for total, like in made]


def _zeros(like: Tensor | None, needed: bool) -> Tensor:
    if like is None:
        return torch.empty(0)
    return like.new_zeros(like.shape if needed else (0,), dtype=accumulate_dtype(like.dtype))
