"""Derivatives of gradients: through the definition, `em_kernels.reference`, in plain PyTorch.

`torch.autograd.function.once_differentiable` looks at the upstream gradient alone: where that is a
constant, as the 1 of a loss is, the second derivative would be missing and nothing would say so.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from em_kernels.backends import reference
from em_kernels.backends.interface import DIFFERENTIABLE, RowSpec, Saved, Upstream, accumulate_dtype
from em_kernels.backends.specs import (
    flatten_rows,
    flatten_spec,
    read_numbers,
    row_tensors,
    select_rows,
    with_row_tensors,
    without_row_tensors,
)

_UPSTREAM_LENGTH = len(Upstream._fields)


def weighted_sum(inputs: tuple[Any, ...], spec: RowSpec, upstream: Upstream) -> Tensor:
    """sum_i upstream_i statistic_i of (logits, None, None, None, None) or of (hidden, weight, bias,
    and the low-rank part's two or None), differentiable."""
    if spec.group is not None:
        grouped()
    x, weight, bias, low, low_weight = inputs
    lead = x.dim() - 1
    spec = flatten_spec(read_numbers(spec), lead)
    x = x.reshape(-1, x.shape[-1])
    low = None if low is None else low.reshape(-1, low.shape[-1])
    rows = Upstream(*(None if g is None else flatten_rows(g, lead) for g in upstream))
    if spec.mask is not None:
        kept = spec.mask.nonzero()[:, 0]
        low = None if low is None else low[kept]
        x, spec = x[kept], select_rows(spec._replace(mask=None), kept)
        rows = Upstream(*(None if g is None else g[kept] for g in rows))
    if weight is not None:
        wide = accumulate_dtype(x.dtype)
        x, spec = x.to(wide) @ weight.to(x.dtype).to(wide).T, spec._replace(bias=bias)
        x = x if low is None else x + low.to(wide) @ low_weight.to(wide).T
    given = {name: g for name, g in zip(DIFFERENTIABLE, rows) if g is not None}
    values = reference.stats(x, spec, tuple(given))[len(Saved._fields) :]
    first, *more = ((g * value).sum() for g, value in zip(given.values(), values, strict=True))
    return sum(more, first)


def wanted() -> bool:
    """Whether the gradient that is being computed may be differentiated again."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def statistic_sum(spec: RowSpec) -> Callable[[tuple[Any, ...], tuple[Any, ...]], Tensor]:
    """`weighted_sum` as `differentiable` wants it, rest being (*upstream, *row_tensors(spec))."""
    common = without_row_tensors(spec._replace(bias=None))

    def value(inputs: tuple[Tensor | None, ...], rest: tuple[Tensor | None, ...]) -> Tensor:
        upstream, rows = rest[:_UPSTREAM_LENGTH], rest[_UPSTREAM_LENGTH:]
        return weighted_sum(inputs, with_row_tensors(common, rows), Upstream(*upstream))

    return value


def differentiable(
    compute: Callable[[], tuple[Tensor | None, ...]],
    value: Callable[[tuple[Any, ...], tuple[Any, ...]], Tensor],
    inputs: tuple[Tensor | None, ...],
    rest: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """`compute()`, the gradients of `value(inputs, rest)` in `inputs`, None where not needed.

    With create_graph=True they can be differentiated again, at the cost of a few arrays of the size
    of the logits, and only when it is done.
    """
    if not wanted():
        return compute()
    apply: Any = _Gradient.apply
    grads: tuple[Tensor | None, ...] = apply(compute, value, len(inputs), *inputs, *rest)
    return grads


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Any, value: Any, count: int, *tensors: Any) -> Any:
        grads = compute()
        ctx.value, ctx.count = value, count
        ctx.wanted = [i for i, g in enumerate(grads) if g is not None]
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return grads

    @staticmethod
    def backward(ctx: Any, *given: Any) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()
        wanted = [i for i in ctx.wanted if given[i] is not None]
        if not wanted:
            return None, None, None, *(None for _ in ctx.saved_tensors)
        with torch.enable_grad():
            own: list[Any] = [_own(x, again) for x in ctx.saved_tensors]
            value = ctx.value(tuple(own[: ctx.count]), tuple(own[ctx.count :]))
            first = torch.autograd.grad(value, [own[i] for i in wanted], create_graph=True)
            total = sum((g * given[i]).sum() for i, g in zip(wanted, first))
        places = [i for i, x in enumerate(own) if x is not None and x.requires_grad]
        second = torch.autograd.grad(
            total, [own[i] for i in places], create_graph=again, allow_unused=True
        )
        found = dict(zip(places, second))
        return None, None, None, *(found.get(i) for i in range(len(own)))


def _own(x: Tensor | None, again: bool) -> Tensor | None:
    """The same numbers to differentiate by; `again` keeps them in the graph."""
    if x is None or not x.requires_grad:
        return x
    return x.view_as(x) if again else x.detach().requires_grad_()


class Memory:
    """What a loss was given, for a derivative of its gradient: its inputs by weak references, since
    a loss keeps neither logits nor hidden states alive, and its rows.

    `inputs` are the caller's own; autocast's copies, of `dtype` but for the bias, are made again.
    """

    def __init__(
        self,
        inputs: tuple[Tensor | None, ...],
        spec: RowSpec,
        weights: Upstream,
        dtype: torch.dtype,
        low: tuple[Tensor | None, ...] = (None, None),
    ):
        self.inputs = tuple(None if x is None else weakref.ref(x) for x in inputs)
        self.group, self.rows = spec.group, (*weights, *row_tensors(spec))
        self.dtype, self.low = dtype, low  # x of it is made for the call, and small
        self.sum, self.versions = statistic_sum(spec), self._versions(inputs)

    def recall(self) -> tuple[Tensor | None, ...]:
        """The inputs; none if one is gone, or anything was changed in place."""
        inputs = tuple(None if x is None else x() for x in self.inputs)
        if self._versions(inputs) != self.versions:
            return ()
        *operands, bias = inputs
        return *(x if x is None else x.to(self.dtype) for x in operands), bias, *self.low

    def value(self, inputs: tuple[Any, ...], rest: tuple[Any, ...]) -> Tensor:
        upstream, *rows = rest
        total: Tensor = upstream * self.sum(inputs, tuple(rows))
        return total

    def _versions(self, inputs: tuple[Tensor | None, ...]) -> list[int | None]:
        """Inference tensors count no changes: 0."""
        every = (*inputs, *self.low, *self.rows)
        return [None if x is None else 0 if x.is_inference() else x._version for x in every]


def grouped(*_: Any) -> Tensor:
    raise RuntimeError(
        "em_kernels: with a group there is no second derivative: detach the gradient to take it as "
        "a constant"
    )


def forgotten(*_: Any) -> Tensor:
    raise RuntimeError(
        "em_kernels: the second derivative of a loss needs what the loss was given, which is gone "
        "or was changed in place: keep the logits, or hidden, weight and bias, until then; or take "
        "it from softmax_stats or linear_softmax_stats; or detach the gradient to take it as a "
        "constant"
    )


def compiled() -> None:
    raise RuntimeError(
        "em_kernels: compiled autograd has no second derivative of a loss: call the backward pass "
        "outside of it, or without create_graph=True"
    )
