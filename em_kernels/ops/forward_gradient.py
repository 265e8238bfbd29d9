"""Autograd of the losses: the gradient is made in the forward pass, and handed over in backward."""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels.backends.interface import OUTPUTS, RowSpec, Upstream
from em_kernels.linear.half import scale_rows, upstream_scale
from em_kernels.ops.fakes import empty_rows
from em_kernels.ops.registry import call
from em_kernels.ops.second_order import Memory, compiled, differentiable, forgotten, grouped, wanted

_SPEC_LENGTH = len(RowSpec._fields)


def all_outputs(outputs: tuple[str, ...], weights: tuple) -> tuple[str, ...]:
    """What was asked for, and what the loss itself needs."""
    logprob_weight, entropy_weight, _ = weights
    needed = {"logprob": logprob_weight is not None, "entropy": entropy_weight is not None}
    return tuple(name for name in OUTPUTS if name in outputs or needed.get(name, False))


def _combine(stats: dict[str, Tensor], weights: tuple) -> Tensor:
    """sum_i w_i stat_i; a row without weight adds 0 even where its statistic is not finite."""
    first, *more = (
        torch.where(weight != 0, weight * stats[name], 0).sum()
        for name, weight in zip(("logprob", "entropy"), weights)
        if weight is not None
    )
    return sum(more, first)


def with_loss(outputs: tuple[str, ...], names: tuple[str, ...], rows, weights) -> tuple:
    """(loss, *outputs, detached) out of an operator's results.

    An exported program keeps just this, on top of the statistics, and its gradient is theirs.
    """
    stats = dict(zip(names, rows[3:]))
    return _combine(stats, weights), *(stats[name].detach() for name in outputs)


def _finish(ctx, impl: str, results: tuple[Tensor, ...], grads, inputs, scale=None):
    """(loss, *outputs, empty): all but the loss without gradient; `grads`, `scale` times those in
    `inputs`, are kept for backward.

    `empty` leads from the gradient back to this call, so that none can be differentiated unnoticed.
    """
    empty = inputs[0].new_empty(0)
    ctx.mark_non_differentiable(*results[1:])
    ctx.dtypes = [None if g is None else x.dtype for g, x in zip(grads, inputs)]
    ctx.impl, ctx.scaled = impl, scale is not None
    ctx.save_for_backward(empty, *(x for x in (*grads, scale) if x is not None))
    return *results, empty


def ready_gradients(node) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
    """(empty, the gradients, None where not needed, their scale) that the autograd node of a loss
    keeps: what its backward pass multiplies and rounds, float32 for float16 operands."""
    empty, *kept = node.saved_tensors  # checkpointing allows it once
    scale = kept.pop() if node.scaled else None
    left = iter(kept)
    return empty, [None if dtype is None else next(left) for dtype in node.dtypes], scale


# Whether the backward pass that is running leaves the graph for another.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def scaled(grad: Tensor, upstream: Tensor, impl: str) -> Tensor:
    """grad * upstream; in place, where the usual upstream of 1 costs nothing, if used only once."""
    if torch.compiler.is_compiling() or _keeps_graph():
        # Expanded: torch rounds a factor without dimensions to the dtype of `grad`.
        return torch.mul(grad, upstream.expand(grad.shape), out=torch.empty_like(grad))
    call("scale_", grad, upstream, impl)
    return grad


def remember(inputs, spec: RowSpec, weights: list, dtype: torch.dtype) -> Memory | None:
    if torch.compiler.is_compiling():
        return None
    return Memory(inputs, spec, Upstream(*weights), dtype)


def _gradients(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
    empty, grads, scale = ready_gradients(ctx)
    factor = upstream if scale is None else upstream / scale

    def compute():
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


class SoftmaxLoss(torch.autograd.Function):
    """(logits, *spec, *weights, outputs, impl, need, inplace, memory) -> (loss, *outputs, empty).

    `need`: the gradient of logits is wanted; `inplace`: in their memory.
    """

    @staticmethod
    def forward(ctx, logits, *args):
        spec, args = args[:_SPEC_LENGTH], args[_SPEC_LENGTH:]
        *weights, outputs, impl, need, inplace, ctx.memory = args
        names, grad = all_outputs(outputs, weights), None
        scale = upstream_scale(Upstream(*weights), RowSpec(*spec), logits.dtype) if need else None
        scaled_weights = scale_rows(Upstream(*weights), scale)
        if not need:
            rows = call("softmax_stats", logits, *spec, names, impl)
        elif inplace:
            rows = empty_rows(logits, names)
            call("softmax_loss_", logits, rows, *spec, *scaled_weights, names, impl)
            # Kernels write through raw pointers: tell autograd, in case an operation kept `logits`.
            torch.autograd.graph.increment_version(logits)
            grad = logits.detach()
        else:
            *rows, grad = call("softmax_loss", logits, *spec, *scaled_weights, names, impl)
        results = with_loss(outputs, names, rows, weights)
        return _finish(ctx, impl, results, (grad,), (logits,), scale)

    @staticmethod
    def backward(ctx, upstream, *_):
        return *_gradients(ctx, upstream), *[None] * (_SPEC_LENGTH + 8)


class LinearLoss(torch.autograd.Function):
    """(hidden, weight, *spec, *weights, needs, outputs, *cut, memory) -> as `SoftmaxLoss`."""

    @staticmethod
    def forward(ctx, hidden, weight, *args):
        spec, args = args[:_SPEC_LENGTH], args[_SPEC_LENGTH:]
        *weights, needs, outputs, chunk_tokens, logits_dtype, impl, ctx.memory = args
        cut = (chunk_tokens, logits_dtype, impl)
        names, grads = all_outputs(outputs, weights), (None,) * 3
        if any(needs[:3]):
            options = (*weights, *needs, names, *cut)
            results = call("linear_loss", hidden, weight, *spec, *options)
            rows, grads = results[:-3], results[-3:]
            grads = tuple(g if need else None for g, need in zip(grads, needs))
        else:
            rows = call("linear_stats", hidden, weight, *spec, names, *cut)
        results = with_loss(outputs, names, rows, weights)
        return _finish(ctx, impl, results, grads, (hidden, weight, spec[0]))

    @staticmethod
    def backward(ctx, upstream, *_):
        return *_gradients(ctx, upstream), *[None] * (_SPEC_LENGTH - 1 + 9)
