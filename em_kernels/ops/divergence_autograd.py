"""Autograd of divergences, from logits or from hidden states: per token, and as a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from em_kernels.backends import divergence as definition
from em_kernels.backends.interface import RowSpec, Upstream, accumulate_dtype
from em_kernels.backends.pair import Divergence, OtherSpec, PairSaved, Side
from em_kernels.backends.row_index import with_index
from em_kernels.backends.specs import (
    flatten_spec,
    read_numbers,
    row_tensors,
    select_rows,
    with_row_tensors,
    without_row_tensors,
)
from em_kernels.linear.half import scale_rows, upstream_scale
from em_kernels.linear.pairs import STEEP
from em_kernels.linear.plan import Needs, OtherNeeds
from em_kernels.ops import divergence_operators  # noqa: F401  # which defines them
from em_kernels.ops.forward_gradient import scaled
from em_kernels.ops.records import arguments, flat, nothing, unflat
from em_kernels.ops.registry import call, differentiate
from em_kernels.ops.schemas import (
    DivergenceGrad,
    DivergenceLoss,
    DivergenceStats,
    LinearDivergenceGrad,
    LinearDivergenceLoss,
    LinearDivergenceStats,
)
from em_kernels.ops.second_order import compiled, differentiable, grouped, wanted
from em_kernels.ops.sources import copy_to_ranks

_SAVED = len(PairSaved._fields)


class Operands(NamedTuple):
    """(x, weight) of both rows: the logits and None, or hidden states and the weight of a head."""

    x: Tensor
    weight: Tensor | None
    other_x: Tensor
    other_weight: Tensor | None


class Inputs(NamedTuple):
    """What a gradient may be wanted of."""

    x: Any = None
    weight: Any = None
    bias: Any = None
    other_x: Any = None
    other_weight: Any = None
    other_bias: Any = None


class Asked(NamedTuple):
    """What is asked of a pair of rows."""

    spec: RowSpec
    other: OtherSpec
    divergence: Divergence
    outputs: Sequence[str]
    other_outputs: Sequence[str]


class Made(NamedTuple):
    """A loss with its gradients, each too large by the scale of its side."""

    rows: list[Tensor]
    gradients: Inputs
    scales: tuple[Tensor | None, Tensor | None] = (None, None)


@dataclass(frozen=True)
class LogitPairs:
    """Rows that were given."""

    needs: tuple[bool, bool]
    impl: str

    def looked_through(self, spec: RowSpec) -> RowSpec:
        return spec

    def statistics(self, operands: Operands, asked: Asked) -> DivergenceStats:
        return DivergenceStats(operands.x, operands.other_x, *asked, self.impl)

    def grad(self, operands: Operands, asked: Asked, saved: PairSaved, upstream: Tensor) -> Inputs:
        wanted = (upstream if need else None for need in self.needs)
        own: Any = (operands.x, operands.other_x, *asked[:3], saved, *wanted, self.impl)
        x, other_x = call(DivergenceGrad(*own))
        return self._wanted(x, other_x)

    def loss(self, operands: Operands, asked: Asked, weights: Tensor) -> Made:
        if not any(self.needs):
            return Made(call(self.statistics(operands, asked)), Inputs())
        specs = asked.spec, asked.other.beside(asked.spec)
        pair, scales = (operands.x, operands.other_x), []
        given: list[Tensor | None] = []
        for need, spec, x in zip(self.needs, specs, pair, strict=True):
            steep = Upstream(entropy=weights * STEEP)
            scale = upstream_scale(steep, spec, x.dtype, x.dim() - 1)
            row = scale_rows(Upstream(entropy=weights), scale).entropy
            given.append(row if need else None)
            scales.append(scale if need else None)
        own: Any = (*pair, *asked[:3], *given, asked.outputs, asked.other_outputs, self.impl)
        results = call(DivergenceLoss(*own))
        return Made(results[:-2], self._wanted(*results[-2:]), (scales[0], scales[1]))

    def _wanted(self, x: Tensor, other_x: Tensor) -> Inputs:
        own, other = self.needs
        return Inputs(x=x if own else None, other_x=other_x if other else None)


@dataclass(frozen=True)
class HeadPairs:
    """Rows of hidden @ weight.T of two heads, a chunk at a time."""

    needs: tuple[Needs, Needs]
    chunk_tokens: int | None
    logits_dtype: torch.dtype | None
    impl: str

    @property
    def _product(self) -> tuple[int | None, torch.dtype | None, str]:
        return self.chunk_tokens, self.logits_dtype, self.impl

    @property
    def _needs(self) -> tuple[Needs, OtherNeeds]:
        own, other = self.needs
        return own, OtherNeeds(*other.inputs)

    def looked_through(self, spec: RowSpec) -> RowSpec:
        return with_index(spec)

    def statistics(self, operands: Any, asked: Asked) -> LinearDivergenceStats:
        given: Any = (*operands, *asked, *self._product)
        return LinearDivergenceStats(*given)

    def grad(self, operands: Any, asked: Asked, saved: PairSaved, upstream: Tensor) -> Inputs:
        given: Any = (*operands, *asked[:3], saved, upstream, *self._needs, *self._product)
        return self._wanted(call(LinearDivergenceGrad(*given)))

    def loss(self, operands: Any, asked: Asked, weights: Tensor) -> Made:
        if not any(need for needs in self.needs for need in needs.inputs):
            return Made(call(self.statistics(operands, asked)), Inputs())
        names = asked.outputs, asked.other_outputs
        own: Any = (*operands, *asked[:3], weights, *self._needs, *names, *self._product)
        results = call(LinearDivergenceLoss(*own))
        return Made(results[:-6], self._wanted(results[-6:]))

    def _wanted(self, gradients: Sequence[Tensor]) -> Inputs:
        needs = (need for needs in self.needs for need in needs.inputs)
        return Inputs(*(g if need else None for g, need in zip(gradients, needs, strict=True)))


PairSource = LogitPairs | HeadPairs


@arguments
class Pairs(NamedTuple):
    """What `_PerToken` is applied to, and with weights `_Weighted`."""

    operands: Operands
    spec: RowSpec
    other: OtherSpec
    divergence: Divergence
    outputs: Sequence[str]
    other_outputs: Sequence[str]
    source: PairSource
    weights: Any = None

    def asked(self) -> Asked:
        return Asked(*self[1:6])


def per_token(given: Pairs) -> list[Tensor]:
    """[*`PairSaved`, divergence, *outputs, *other_outputs], the divergence with its history."""
    apply: Any = _PerToken.apply
    return list(apply(*flat(given)))


def weighted(given: Pairs) -> list[Tensor]:
    """[sum_i weight_i D_i, divergence, *outputs, *other_outputs], the first with its gradient."""
    apply: Any = _Weighted.apply
    results: Sequence[Tensor] = apply(*flat(given))
    return list(results[:-1])


def weighted_sum(value: Tensor, weights: Tensor) -> Tensor:
    """A row without weight adds 0 even where its divergence is not finite."""
    return torch.where(weights != 0, weights * value, 0).sum()


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        given = unflat(Pairs, args)
        given = given._replace(spec=given.source.looked_through(given.spec))
        rows = call(given.source.statistics(given.operands, given.asked()))
        ctx.mark_non_differentiable(*rows[:_SAVED], *rows[_SAVED + 1 :])
        ctx.set_materialize_grads(False)
        values = flat(given)
        ctx.places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
        ctx.values = [None if isinstance(value, Tensor) else value for value in values]
        ctx.save_for_backward(*(values[i] for i in ctx.places), *rows[:_SAVED])
        return tuple(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream = grads[_SAVED]
        if upstream is None:
            return (None,) * len(ctx.values)
        tensors, values = ctx.saved_tensors, list(ctx.values)
        for place, tensor in zip(ctx.places, tensors):
            values[place] = tensor
        given = unflat(Pairs, values)
        saved = PairSaved(*tensors[len(ctx.places) :])

        def compute() -> Any:
            return given.source.grad(given.operands, given.asked(), saved, upstream)

        found = differentiable(compute, _value_of(given), _inputs(given), _rest(given, upstream))
        return _arguments(Inputs(*found))


class _Weighted(torch.autograd.Function):
    """The last result leads from the gradient back to this call: it cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        given = unflat(Pairs, args)
        rows, gradients, scales = given.source.loss(given.operands, given.asked(), given.weights)
        results = weighted_sum(rows[_SAVED], given.weights), *rows[_SAVED:]
        empty = given.operands.x.new_empty(0)
        ctx.mark_non_differentiable(*results[1:])
        ctx.dtypes = [
            None if g is None else x.dtype for g, x in zip(gradients, _inputs(given), strict=True)
        ]
        ctx.impl, ctx.scaled = given.source.impl, [scale is not None for scale in scales]
        kept = (*gradients, *scales)
        ctx.save_for_backward(empty, *(x for x in kept if x is not None))
        return *results, empty

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        empty, *kept = ctx.saved_tensors
        left = iter(kept)
        grads = [None if dtype is None else next(left) for dtype in ctx.dtypes]
        scales = [next(left) if given else None for given in ctx.scaled]

        def compute() -> tuple[Tensor | None, ...]:
            factors = [upstream if scale is None else upstream / scale for scale in scales]
            return tuple(
                None if g is None else scaled(g, factors[i // 3], ctx.impl).to(dtype)
                for i, (g, dtype) in enumerate(zip(grads, ctx.dtypes, strict=True))
            )

        if torch.is_grad_enabled() and not wanted():
            compiled()
        found = differentiable(compute, _no_second, (empty,), (upstream,))
        return _arguments(Inputs(*found))


def _no_second(*_: Any) -> Tensor:
    raise RuntimeError(
        "em_kernels: the gradient of divergence_loss and linear_divergence_loss is made in the "
        "forward pass and has no derivative: take it from (weight * divergence(...)).sum() or "
        "linear_divergence, or detach the gradient to take it as a constant"
    )


def _arguments(found: Inputs) -> tuple[Tensor | None, ...]:
    """The gradients in the places of the arguments."""
    none: Any = nothing(Pairs)
    operands = Operands(found.x, found.weight, found.other_x, found.other_weight)
    given = none._replace(
        operands=operands,
        spec=none.spec._replace(bias=found.bias),
        other=none.other._replace(bias=found.other_bias),
    )
    return tuple(flat(given))


def _inputs(given: Pairs) -> Inputs:
    x, weight, other_x, other_weight = given.operands
    return Inputs(x, weight, given.spec.bias, other_x, other_weight, given.other.bias)


def _rest(given: Pairs, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return upstream, *row_tensors(given.spec), given.other.temperature_rows


def _value_of(given: Pairs) -> Any:
    """sum_i upstream_i D_i of `_inputs` and `_rest`, differentiable any number of times."""
    common = without_row_tensors(given.spec._replace(bias=None))
    beside, divergence = given.other._replace(bias=None, temperature_rows=None), given.divergence

    def value(inputs: tuple[Any, ...], rest: tuple[Any, ...]) -> Tensor:
        if common.group is not None:
            grouped()
        upstream, *rows, other_rows = rest
        spec = with_row_tensors(common, rows)
        own = _definition_side(inputs[:3], read_numbers(spec))
        other = read_numbers(beside._replace(temperature_rows=other_rows)).beside(spec)
        its, upstream = _definition_side(inputs[3:], other), upstream.reshape(-1)
        if own.spec.mask is not None:
            kept = own.spec.mask.nonzero()[:, 0]
            upstream = upstream[kept]
            own, its = (
                Side(x[:, kept], select_rows(s._replace(mask=None), kept)) for x, s in (own, its)
            )
        total: Tensor = (upstream * definition.values(own, its, divergence)).sum()
        return total

    return value


def _definition_side(inputs: tuple[Any, ...], spec: RowSpec) -> Side:
    x, weight, bias = inputs
    spec, wide = flatten_spec(spec, x.dim() - 1), accumulate_dtype(x.dtype)
    rows = x.reshape(-1, x.shape[-1]).to(wide)
    if weight is not None:
        rows, spec = rows @ weight.to(x.dtype).to(wide).T, spec._replace(bias=bias)
    return Side(rows[None], spec)


def _derive_stats(*args: Any) -> list[Tensor]:
    given = unflat(DivergenceStats, args)
    operands = Operands(given.logits, None, given.other_logits, None)
    needs = given.logits.requires_grad, given.other_logits.requires_grad
    return per_token(Pairs(operands, *given[2:-1], LogitPairs(needs, given.impl)))


def _derive_linear_stats(*args: Any) -> list[Tensor]:
    given = unflat(LinearDivergenceStats, args)
    group = given.spec.group
    hidden, other = (copy_to_ranks(x, group) for x in (given.hidden, given.other_hidden))
    operands = Operands(hidden, given.weight, other, given.other_weight)
    inputs = (hidden, given.weight, given.spec.bias)
    its = (other, given.other_weight, given.other.bias)
    needs = needs_of(inputs), needs_of(its)
    source = HeadPairs(needs, *given[-3:])
    return per_token(Pairs(operands, *given[4:-3], source))


def needs_of(inputs: Sequence[Tensor | None]) -> Needs:
    """Which of (hidden, weight, bias) a backward pass will want the gradient of."""
    recording = torch.is_grad_enabled()
    return Needs(*(recording and x is not None and x.requires_grad for x in inputs))


differentiate("divergence_stats", _derive_stats)
differentiate("linear_divergence_stats", _derive_linear_stats)
