"""Autograd of the statistics, from either source: the gradient is made in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from em_kernels.backends.interface import (
    BORDER,
    DIFFERENTIABLE,
    RowSpec,
    Saved,
    TokenStats,
    Upstream,
    row_kernels_make,
)
from em_kernels.backends.specs import has_support, row_tensors
from em_kernels.linear.plan import Needs
from em_kernels.ops.chosen import Form
from em_kernels.ops.records import arguments, flat, nothing, unflat
from em_kernels.ops.registry import differentiate
from em_kernels.ops.schemas import LinearStats, SoftmaxStats
from em_kernels.ops.second_order import differentiable, statistic_sum
from em_kernels.ops.sources import NO_LOW, FromHidden, FromLogits, Low, Source, copy_to_ranks


class Results(NamedTuple):
    """The rows that an operator returns."""

    saved: Saved
    stats: dict[str, Tensor]


def results_of(outputs: Sequence[str], rows: Sequence[Tensor]) -> Results:
    count = len(Saved._fields)
    return Results(Saved(*rows[:count]), dict(zip(outputs, rows[count:])))


def pack_stats(
    outputs: Sequence[str],
    rows: Sequence[Tensor],
    form: Form,
    entropy_requires_grad: bool = True,
) -> TokenStats:
    stats = results_of(outputs, rows).stats
    if "entropy" in stats and not entropy_requires_grad:
        stats["entropy"] = stats["entropy"].detach()
    return form.results(stats)


def differentiable_outputs(outputs: Sequence[str], entropy_requires_grad: bool) -> list[str]:
    """Those of the outputs that a gradient may come for."""
    left_out = () if entropy_requires_grad else ("entropy",)
    return [name for name in outputs if name in DIFFERENTIABLE and name not in left_out]


def wanted_gradients(sources: Sequence[str], *inputs: Tensor | None) -> tuple[bool, ...]:
    """Which of the inputs a backward pass will want the gradient of."""
    recording = torch.is_grad_enabled() and bool(sources)
    return tuple(recording and x is not None and x.requires_grad for x in inputs)


def low_needs(sources: Sequence[str], low: Low) -> tuple[bool, bool]:
    """The same of the low-rank part."""
    of_x, of_weight = wanted_gradients(sources, *low)
    return of_x, of_weight


@arguments
class Call(NamedTuple):
    """What `Statistics` is applied to; `source` answers for x and weight."""

    x: Tensor
    weight: Tensor | None
    spec: RowSpec
    outputs: Sequence[str]
    source: Source
    low: Low = NO_LOW


@arguments
class _Kept(NamedTuple):
    """The tensors of a call for its backward pass."""

    x: Tensor
    weight: Tensor | None
    made: Tensor | None  # by the source, beside the rows
    saved: Saved
    spec: RowSpec  # its tensors alone
    low: Low
    border: Tensor | None  # of truncated rows: for the gradient alone, not for its derivatives


def statistics(call: Call) -> Sequence[Tensor]:
    """The rows, `Saved` and then the outputs, with their history."""
    apply: Any = Statistics.apply
    rows: Sequence[Tensor] = apply(*flat(call))
    return rows


class Statistics(torch.autograd.Function):
    """The arguments of a `Call`, in a row -> the rows of its statistics."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        x, weight, spec, ctx.outputs, ctx.source, low = unflat(Call, args)
        if not row_kernels_make(ctx.outputs):
            spec = spec._replace(whole=True)
        spec = ctx.source.looked_through(spec)
        names = (*ctx.outputs, *_noted(spec, ctx.outputs))
        rows, made = ctx.source.stats(x, weight, spec, names, low)
        saved, stats = results_of(names, rows)
        rows, border = rows[: len(saved) + len(ctx.outputs)], _border(stats)
        wanted = differentiable_outputs(ctx.source.differentiable(ctx.outputs), True)
        constant = [stats[name] for name in ctx.outputs if name not in wanted]
        ctx.mark_non_differentiable(*saved, *constant)
        ctx.set_materialize_grads(False)
        ctx.spec, tensors = _without_tensors(spec)
        ctx.save_for_backward(*flat(_Kept(x, weight, made, saved, tensors, low, border)))
        return tuple(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = dict(zip(ctx.outputs, grads[len(Saved._fields) :]))
        upstream = Upstream(*(given.get(name) for name in Upstream._fields))
        none: Any = nothing(Call)
        if all(g is None for g in upstream):
            return tuple(flat(none))
        if ctx.source.accumulates and torch.is_grad_enabled():
            raise RuntimeError(
                "em_kernels: with accumulate_into the gradient of weight is added where it belongs "
                "and has no derivative: leave accumulate_into out where create_graph=True"
            )
        x, weight, made, saved, tensors, low, border = unflat(_Kept, ctx.saved_tensors)
        spec = _with_tensors(ctx.spec, tensors)

        def compute() -> Any:
            known = spec if border is None else spec._replace(border=border)
            return ctx.source.grad(x, weight, known, saved, upstream, made, low)

        inputs, rest = (x, weight, spec.bias, *low), (*upstream, *row_tensors(spec))
        return gradients_of(none, differentiable(compute, statistic_sum(spec), inputs, rest))


def gradients_of(none: Any, found: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """What the backward pass of a call returns: `none`, its record of None, and `Gradients`."""
    of_x, of_weight, of_bias, *of_low = found
    spec = none.spec._replace(bias=of_bias)
    return tuple(flat(none._replace(x=of_x, weight=of_weight, spec=spec, low=Low(*of_low))))


def _noted(spec: RowSpec, outputs: Sequence[str]) -> tuple[str, ...]:
    """What the backward pass over truncated rows must know of them, beside the outputs."""
    if not has_support(spec):
        return ()
    kept = spec.target is not None and "is_kept" not in outputs
    return (*BORDER, "is_kept") if kept else BORDER


def _border(stats: dict[str, Tensor]) -> Tensor | None:
    """`RowSpec.border`"""
    if BORDER[0] not in stats:
        return None
    level, first = (stats[name].to(torch.float64) for name in BORDER)
    kept = stats["is_kept"].to(torch.float64) if "is_kept" in stats else torch.ones_like(level)
    return torch.stack([level, first, kept], -1)


_TENSORS = [name for name, hint in get_type_hints(RowSpec).items() if hint == Tensor | None]
_NO_TENSORS: dict[str, Any] = dict.fromkeys(_TENSORS)
_TENSORS_ALONE: dict[str, Any] = {n: None for n in RowSpec._fields if n not in _TENSORS}


def _without_tensors(spec: RowSpec) -> tuple[RowSpec, RowSpec]:
    """(what is no tensor, the tensors): None where the other has a value."""
    return spec._replace(**_NO_TENSORS), spec._replace(**_TENSORS_ALONE)


def _with_tensors(spec: RowSpec, tensors: RowSpec) -> RowSpec:
    given: dict[str, Any] = {name: getattr(tensors, name) for name in _TENSORS}
    return spec._replace(**given)


def _derive_softmax_stats(*args: Any) -> list[Tensor]:
    logits, spec, outputs, impl = unflat(SoftmaxStats, args)
    return list(statistics(Call(logits, None, spec, outputs, FromLogits(impl))))


def _derive_linear_stats(*args: Any) -> list[Tensor]:
    call = unflat(LinearStats, args)
    hidden, weight, spec = call.hidden, call.weight, call.spec
    hidden = copy_to_ranks(hidden, spec.group)
    sources = differentiable_outputs(call.outputs, True)
    needs = Needs(*wanted_gradients(sources, hidden, weight, spec.bias))
    low = Low(call.low.x, call.low.weight)
    low = low if low.x is None else low._replace(x=copy_to_ranks(low.x, spec.group))
    product = call.chunk_tokens, call.logits_dtype, call.impl
    source = FromHidden(needs, *product, low_needs=low_needs(sources, low))
    return list(statistics(Call(hidden, weight, spec, call.outputs, source, low)))


differentiate("softmax_stats", _derive_softmax_stats)
differentiate("linear_stats", _derive_linear_stats)
