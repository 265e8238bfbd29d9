"""The two sources of rows: logits that were given, or hidden states times the weight of a head.

Both answer the same questions, in the operators of their own: the statistics of the rows, the
gradient of statistics, and a loss with its gradient. What they are asked of comes as tensors, (x,
weight), x being the logits, and weight None, or the hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from em_kernels.backends.interface import RowSpec, Saved, Upstream, accumulate_dtype
from em_kernels.backends.row_index import with_index
from em_kernels.linear.half import scale_rows, upstream_scale
from em_kernels.linear.low_rank import LowRank
from em_kernels.linear.plan import Needs
from em_kernels.ops.fakes import empty_rows
from em_kernels.ops.registry import call
from em_kernels.ops.schemas import (
    AllReduce,
    LinearGrad,
    LinearGradInto,
    LinearLoss,
    LinearStats,
    LinearStatsFused,
    SoftmaxGrad,
    SoftmaxLoss,
    SoftmaxLossInplace,
    SoftmaxStats,
)


class Gradients(NamedTuple):
    """Those of a source's tensors."""

    x: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    low: Tensor | None = None
    low_weight: Tensor | None = None


class Low(NamedTuple):
    """The low-rank part of a head: (..., r) and (V, r), whose product is added to the logits."""

    x: Tensor | None = None
    weight: Tensor | None = None


NO_LOW = Low()


class Loss(NamedTuple):
    """A source's answer to a loss."""

    rows: list[Tensor]  # as the operators of statistics return them
    gradients: Gradients = Gradients()
    scale: Tensor | None = None  # what the gradients are too large by


@dataclass(frozen=True)
class FromLogits:
    """Rows that were given."""

    impl: str
    needed: bool = True  # a loss is to make the gradient
    inplace: bool = False  # where the logits are

    @property
    def accumulates(self) -> bool:
        return False

    def looked_through(self, spec: RowSpec) -> RowSpec:
        return spec

    def differentiable(self, outputs: Sequence[str]) -> Sequence[str]:
        return outputs

    def stats(
        self,
        x: Tensor,
        weight: Tensor | None,
        spec: RowSpec,
        outputs: Sequence[str],
        low: Low = NO_LOW,
    ) -> tuple[list[Tensor], Tensor | None]:
        return call(SoftmaxStats(x, spec, outputs, self.impl)), None

    def grad(
        self,
        x: Tensor,
        weight: Tensor | None,
        spec: RowSpec,
        saved: Saved,
        upstream: Upstream,
        kept: Tensor | None,
        low: Low = NO_LOW,
    ) -> Gradients:
        (grad,) = call(SoftmaxGrad(x, spec, saved, upstream, self.impl))
        return Gradients(grad)

    def loss(
        self,
        x: Tensor,
        weight: Tensor | None,
        spec: RowSpec,
        weights: Upstream,
        outputs: Sequence[str],
        low: Low = NO_LOW,
    ) -> Loss:
        if not self.needed:
            return Loss(self.stats(x, None, spec, outputs)[0])
        scale = upstream_scale(weights, spec, x.dtype, x.dim() - 1)
        weights = scale_rows(weights, scale)
        if self.inplace:
            rows = empty_rows(x, outputs, spec)
            call(SoftmaxLossInplace(x, rows, spec, weights, outputs, self.impl))
            # Kernels write through raw pointers: tell autograd, in case an operation kept `x`.
            torch.autograd.graph.increment_version(x)
            return Loss(rows, Gradients(x.detach()), scale)
        *rows, grad = call(SoftmaxLoss(x, spec, weights, outputs, self.impl))
        return Loss(rows, Gradients(grad), scale)


class Into(NamedTuple):
    """Where dW is added, in place of a gradient that autograd is handed."""

    total: Tensor  # (V, D)
    weight: Tensor  # the caller's own, a leaf

    def is_wanted(self) -> bool:
        """Whether the backward pass that is running is one for the weight: torch.autograd.grad may
        ask for others alone."""
        node = torch.autograd.graph.get_gradient_edge(self.weight).node
        try:
            return bool(torch._C._will_engine_execute_node(node))
        except RuntimeError:  # torch.autograd.grad asks for the weight: it will be told None
            return True

    def mark(self) -> None:
        """Tell Megatron, whose hooks add `weight.grad` to `main_grad` where this is False."""
        if hasattr(self.weight, "grad_added_to_main_grad"):
            self.weight.grad_added_to_main_grad = True


@dataclass(frozen=True)
class FromHidden:
    """Rows of hidden @ weight.T, a chunk at a time."""

    needs: Needs
    chunk_tokens: int | None
    logits_dtype: torch.dtype | None
    impl: str
    keep_logits: int | None = 0
    fused: bool = False
    # The one output that a gradient comes for, where it is of hidden alone: dX_i = g_i u_i, g_i the
    # gradient that comes, u_i that of a loss in which the output has the weight 1, which the
    # forward pass makes.
    single: str | None = None
    into: Into | None = None
    low_needs: tuple[bool, bool] = (False, False)

    @property
    def accumulates(self) -> bool:
        """Whether a backward pass changes something: it cannot be differentiated."""
        return self.into is not None

    @property
    def product(self) -> tuple[int | None, torch.dtype | None, str]:
        """What the operators take of it, in a row."""
        return self.chunk_tokens, self.logits_dtype, self.impl

    def looked_through(self, spec: RowSpec) -> RowSpec:
        """The spec for both passes."""
        return with_index(spec)

    def differentiable(self, outputs: Sequence[str]) -> Sequence[str]:
        return outputs if self.single is None else (self.single,)

    def stats(
        self,
        x: Tensor,
        weight: Tensor,
        spec: RowSpec,
        outputs: Sequence[str],
        low: Low = NO_LOW,
    ) -> tuple[list[Tensor], Tensor | None]:
        """(rows, the logits or the gradient of a weight 1 that `grad` will want)."""
        if self.fused:
            return call(LinearStatsFused(x, weight, spec, outputs)), None
        if self.single is not None:
            one = x.new_ones(x.shape[:-1], dtype=accumulate_dtype(x.dtype))
            rows, gradients, _ = self.loss(x, weight, spec, Upstream(**{self.single: one}), outputs)
            return rows, gradients[0]
        ahead = self.needs, self.keep_logits, self._low(low)
        results = call(LinearStats(x, weight, spec, outputs, *self.product, *ahead))
        if not self._needed:
            return results, None
        *rows, kept = results
        return rows, kept

    def grad(
        self,
        x: Tensor,
        weight: Tensor,
        spec: RowSpec,
        saved: Saved,
        upstream: Upstream,
        kept: Tensor | None,
        low: Low = NO_LOW,
    ) -> Gradients:
        if self.single is not None:
            given = getattr(upstream, self.single)
            counted = given if spec.mask is None else torch.where(spec.mask, given, 0)
            unit: Any = kept
            return Gradients((unit * counted[..., None]).to(x.dtype))
        needs = self.needs
        if self.into is not None and needs.weight:
            if self.into.is_wanted():
                rest = upstream, needs, *self.product, kept, self._low(low)
                return self._add(self.into, x, weight, spec, saved, *rest)
            needs = needs._replace(weight=False)
        rest = upstream, needs, *self.product, kept, self._low(low)
        return self._wanted(call(LinearGrad(x, weight, spec, saved, *rest)), needs)

    def _add(self, into: Into, x: Tensor, weight: Tensor, spec: RowSpec, *rest: Any) -> Gradients:
        """`grad` with dW added to `into`."""
        low: LowRank = rest[-1]
        places = (x, spec.bias, low.x, low.weight)
        asked = (self.needs.hidden, self.needs.bias, *self.low_needs)
        made = [
            torch.empty_like(place, memory_format=torch.contiguous_format)
            if place is not None and need
            else None
            for place, need in zip(places, asked, strict=True)
        ]
        results = [g for g in made if g is not None]
        call(LinearGradInto(into.total, results, x, weight, spec, *rest))
        into.mark()
        return Gradients(made[0], None, *made[1:])

    def loss(
        self,
        x: Tensor,
        weight: Any,
        spec: RowSpec,
        weights: Upstream,
        outputs: Sequence[str],
        low: Low = NO_LOW,
    ) -> Loss:
        part = self._low(low)
        if not self._needed:
            return Loss(call(LinearStats(x, weight, spec, outputs, *self.product, low=part)))
        rest = self.needs, outputs, *self.product, part
        results = call(LinearLoss(x, weight, spec, weights, *rest))
        count = len(Saved._fields) + len(outputs)
        return Loss(results[:count], self._wanted(results[count:], self.needs))

    @property
    def _needed(self) -> bool:
        return any((*self.needs.inputs, *self.low_needs))

    def _low(self, low: Low) -> LowRank:
        return LowRank(*low, *self.low_needs)

    def _wanted(self, gradients: Sequence[Tensor], needs: Needs) -> Gradients:
        asked = (*needs.inputs, *self.low_needs)
        return Gradients(*(g if need else None for g, need in zip(gradients, asked)))


Source = FromLogits | FromHidden


def copy_to_ranks(hidden: Tensor, group: str | None) -> Tensor:
    """`hidden`, the same on every rank of the group; backward sums its gradient over them."""
    apply: Any = _CopyToRanks.apply
    return hidden if group is None else apply(hidden, group)


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: str) -> Tensor:
        ctx.group = group
        ctx.set_materialize_grads(False)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        apply: Any = _SumOverRanks.apply
        return None if grad is None else apply(grad, ctx.group), None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, group: str) -> Tensor:
        ctx.group = group
        (total,) = call(AllReduce(grad, group))
        return total

    @staticmethod
    def backward(ctx: Any, again: Tensor) -> tuple[Tensor, None]:
        return copy_to_ranks(again, ctx.group), None
