"""Autograd of the losses: the gradient is made in the forward pass, and handed over in backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from em_kernels.backends.interface import OUTPUTS, RowSpec, Upstream
from em_kernels.backends.specs import has_support
from em_kernels.ops.records import arguments, flat, nothing, unflat
from em_kernels.ops.registry import call
from em_kernels.ops.schemas import ScaleInplace
from em_kernels.ops.second_order import Memory, compiled, differentiable, forgotten, grouped, wanted
from em_kernels.ops.sources import NO_LOW, Gradients, Low, Source
from em_kernels.ops.statistics import gradients_of, results_of


def all_outputs(outputs: Sequence[str], weights: Upstream) -> tuple[str, ...]:
    """What was asked for, and what the loss itself needs."""
    needed = [name for name, weight in zip(weights._fields, weights) if weight is not None]
    return tuple(name for name in OUTPUTS if name in outputs or name in needed)


def _combine(stats: dict[str, Tensor], weights: Upstream, truncated: bool) -> Tensor:
    """sum_i w_i stat_i; a row without weight adds 0 even where its statistic is not finite, and so
    does the logprob of a target that a sampler left out."""
    if truncated and weights.logprob is not None:
        logprob = stats["logprob"]
        stats = {**stats, "logprob": torch.where(logprob == -torch.inf, 0, logprob)}
    first, *more = (
        torch.where(weight != 0, weight * stats[name], 0).sum()
        for name, weight in zip(weights._fields, weights)
        if weight is not None
    )
    return sum(more, first)


def with_loss(
    outputs: Sequence[str],
    names: Sequence[str],
    rows: Sequence[Tensor],
    weights: Upstream,
    spec: RowSpec,
) -> tuple[Tensor, ...]:
    """(loss, *outputs, detached) out of an operator's results.

    An exported program keeps just this, on top of the statistics, and its gradient is theirs.
    """
    stats = results_of(names, rows).stats
    return _combine(stats, weights, has_support(spec)), *(stats[name].detach() for name in outputs)


def _finish(
    ctx: Any,
    impl: str,
    results: tuple[Tensor, ...],
    grads: Gradients,
    inputs: tuple[Any, ...],
    scale: Tensor | None,
) -> tuple[Tensor, ...]:
    """(loss, *outputs, empty): all but the loss without gradient; `grads`, `scale` times those in
    `inputs`, are kept for backward.

    `empty` leads from the gradient back to this call, so that none can be differentiated unnoticed.
    """
    empty = inputs[0].new_empty(0)
    ctx.mark_non_differentiable(*results[1:])
    ctx.dtypes = [None if g is None else x.dtype for g, x in zip(grads, inputs, strict=True)]
    ctx.impl, ctx.scaled = impl, scale is not None
    ctx.save_for_backward(empty, *(x for x in (*grads, scale) if x is not None))
    return *results, empty


def ready_gradients(node: Any) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
    """(empty, the gradients, None where not needed, their scale) that the autograd node of a loss
    keeps: what its backward pass multiplies and rounds, float32 for float16 operands."""
    empty, *kept = node.saved_tensors  # checkpointing allows it once
    left = iter(kept[:-1] if node.scaled else kept)
    scale = kept[-1] if node.scaled else None
    return empty, [None if dtype is None else next(left) for dtype in node.dtypes], scale


# Whether the backward pass that is running leaves the graph for another.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def scaled(grad: Tensor, upstream: Tensor, impl: str) -> Tensor:
    """grad * upstream; in place, where the usual upstream of 1 costs nothing, if used only once."""
    if torch.compiler.is_compiling() or _keeps_graph():
        # Expanded: torch rounds a factor without dimensions to the dtype of `grad`.
        return torch.mul(grad, upstream.expand(grad.shape), out=torch.empty_like(grad))
    call(ScaleInplace(grad, upstream, impl))
    return grad


def remember(
    inputs: tuple[Tensor | None, ...],
    spec: RowSpec,
    weights: Upstream,
    dtype: torch.dtype,
    low: Low = NO_LOW,
) -> Memory | None:
    return None if torch.compiler.is_compiling() else Memory(inputs, spec, weights, dtype, low)


def _gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    empty, grads, scale = ready_gradients(ctx)
    factor = upstream if scale is None else upstream / scale

    def compute() -> tuple[Tensor | None, ...]:
        return tuple(
            None if g is None else scaled(g, factor, ctx.impl).to(dtype)
            for g, dtype in zip(grads, ctx.dtypes)
        )

    if not wanted():
        if torch.is_grad_enabled():
            compiled()
        return compute()
    memory, inputs = ctx.memory, ctx.memory.recall()
    if memory.group is not None or not inputs:
        refusal = forgotten if memory.group is None else grouped
        return differentiable(compute, refusal, (empty,), (upstream,))
    return differentiable(compute, memory.value, inputs, (upstream, *memory.rows))


@arguments
class Call(NamedTuple):
    """What `Loss` is applied to; `source` answers for x and weight."""

    x: Tensor
    weight: Tensor | None
    spec: RowSpec
    weights: Upstream
    outputs: Sequence[str]
    source: Source
    memory: Memory | None
    low: Low = NO_LOW


def loss(call: Call) -> tuple[Tensor, ...]:
    """(loss, *outputs), the loss with its gradient."""
    apply: Any = Loss.apply
    *results, _ = apply(*flat(call))
    return tuple(results)


class Loss(torch.autograd.Function):
    """The arguments of a `Call`, in a row -> (loss, *outputs, empty)."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        x, weight, spec, weights, outputs, source, ctx.memory, low = unflat(Call, args)
        names = all_outputs(outputs, weights)
        rows, grads, scale = source.loss(x, weight, spec, weights, names, low)
        results = with_loss(outputs, names, rows, weights, spec)
        return _finish(ctx, source.impl, results, grads, (x, weight, spec.bias, *low), scale)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return gradients_of(nothing(Call), _gradients(ctx, upstream))
