"""The operators, implemented and derived; `schemas` has their arguments, `fakes` their traces.

An operator flattens its arguments, has a backend chosen (`backends/choice.py`) and calls it.

Their derivatives live outside, in the modules that hold the public functions: those are built of
autograd functions that call an operator below autograd (`call`). The same functions serve an
operator that autograd meets by itself, as in an exported program (`differentiate`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from em_kernels.backends import entropy_control, row_index, vocab_parallel
from em_kernels.backends.choice import REFERENCE, backend, fusing, serving
from em_kernels.backends.interface import Saved, Upstream, accumulate_dtype
from em_kernels.backends.specs import as_rows, flatten_rows
from em_kernels.backends.support import kept_upstream
from em_kernels.linear import chunks
from em_kernels.ops import fakes, ranks
from em_kernels.ops.records import given, schema, unflat
from em_kernels.ops.schemas import (
    AllReduce,
    CountTokens,
    EntropyDescent,
    EntropyTemperature,
    GatherAlike,
    LinearGrad,
    LinearGradInto,
    LinearLoss,
    LinearStats,
    LinearStatsFused,
    ScaleInplace,
    SoftmaxGrad,
    SoftmaxLoss,
    SoftmaxLossInplace,
    SoftmaxStats,
    with_numbers,
)
from em_kernels.ops.serve import checked, serve, serve_linear, shape_rows

_Rows = TypeVar("_Rows", Saved, Upstream)


def _softmax_stats(call: SoftmaxStats) -> list[Tensor]:
    logits, outputs = call.logits, call.outputs
    vocab = logits.shape[-1]
    module, spec = serve(call.impl, logits, vocab, call.spec, outputs, (outputs,))
    rows = module.stats(as_rows(logits), spec, tuple(outputs))
    return shape_rows(rows, outputs, logits.shape[:-1])


def _softmax_grad(call: SoftmaxGrad) -> list[Tensor]:
    logits = call.logits
    module, spec = serve(call.impl, logits, logits.shape[-1], call.spec, check=False)
    view, out = as_rows(logits), module.empty(logits.shape, logits.dtype, logits.device)
    saved, upstream = _flat(call.saved, logits), kept_upstream(spec, _flat(call.upstream, logits))
    module.grad(view, spec, saved, upstream, out.view(view.shape))
    return [out]


def _softmax_loss(call: SoftmaxLoss) -> list[Tensor]:
    rows, out = _loss_rows(call, as_rows(call.logits))
    return [*rows, out]


def _softmax_loss_inplace(call: SoftmaxLossInplace) -> None:
    logits = call.logits
    view = as_rows(logits)
    values, _ = _loss_rows(call, view, out=view)
    for row, value in zip(call.rows, values, strict=True):
        row.copy_(value)
    if view.data_ptr() != logits.data_ptr():
        logits.copy_(view.view(logits.shape))


def _loss_rows(
    call: SoftmaxLoss | SoftmaxLossInplace, view: Tensor, out: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """The per-row results, and the gradient: in `out`, else of the shape of the logits."""
    logits, outputs = call.logits, call.outputs
    vocab = logits.shape[-1]
    module, spec = serve(call.impl, logits, vocab, call.spec, outputs, (outputs,), loss_of=view)
    if out is None:
        out = module.empty(logits.shape, logits.dtype, logits.device)
    upstream = _flat(call.upstream, logits)
    rows = module.loss(view, spec, upstream, tuple(outputs), out.view(view.shape))
    return shape_rows(rows, outputs, logits.shape[:-1]), out


def _linear_stats(call: LinearStats) -> list[Tensor]:
    hidden, outputs = call.hidden, call.outputs
    needs = call.needs if any(wanted_of(call)) else None
    module, spec, linear = serve_linear(call, outputs, (outputs,))
    with torch.autocast(hidden.device.type, enabled=False):
        results = chunks.stats(linear, spec, tuple(outputs), module, needs, call.keep_logits)
    kept = [] if needs is None else [results.pop()]
    return [*shape_rows(results, outputs, hidden.shape[:-1]), *kept]


def _linear_stats_fused(call: LinearStatsFused) -> list[Tensor]:
    hidden, outputs = call.hidden, call.outputs
    module, x = fusing(hidden.device), hidden.reshape(-1, hidden.shape[-1])
    rows = module.linear_stats(x, call.weight, checked(call.spec, hidden.dim() - 1), tuple(outputs))
    return shape_rows(rows, outputs, hidden.shape[:-1])


def _linear_grad(call: LinearGrad) -> list[Tensor]:
    return _linear_gradients(call, None)


def _linear_grad_into(call: LinearGradInto) -> None:
    gradients, wanted = _linear_gradients(call, call.into), list(wanted_of(call))
    wanted[1] = False  # it is added
    made = [g for g, need in zip(gradients, wanted) if need]
    for result, gradient in zip(call.results, made, strict=True):
        result.copy_(gradient)


def _linear_gradients(call: LinearGrad | LinearGradInto, into: Tensor | None) -> list[Tensor]:
    hidden, needs = call.hidden, call.needs
    module, spec, linear = serve_linear(call, (), (needs.hidden,), check=False)
    saved, upstream = _flat(call.saved, hidden), kept_upstream(spec, _flat(call.upstream, hidden))
    with torch.autocast(hidden.device.type, enabled=False):
        grads = chunks.grad(linear, spec, saved, upstream, needs, module, call.kept, into)
    return _shape_grads(grads, call)


def _linear_loss(call: LinearLoss) -> list[Tensor]:
    hidden, outputs, needs = call.hidden, call.outputs, call.needs
    module, spec, linear = serve_linear(call, outputs, (outputs, needs.hidden))
    upstream = _flat(call.upstream, hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        results = chunks.loss(linear, spec, upstream, tuple(outputs), needs, module)
    count = len(Saved._fields) + len(outputs)
    grads = _shape_grads(results[count:], call)
    return [*shape_rows(results[:count], outputs, hidden.shape[:-1]), *grads]


def _all_reduce(call: AllReduce) -> list[Tensor]:
    return [vocab_parallel.all_reduce(call.x, call.group)]


def _count_tokens(call: CountTokens) -> list[Tensor]:
    return ranks.count_tokens(*call)


def _gather_alike(call: GatherAlike) -> list[Tensor]:
    return ranks.gather_alike(*call)


def _scale_inplace(call: ScaleInplace) -> None:
    """x *= factor, one number. A CPU looks whether it is 1; on a GPU that is left to a kernel, of
    any backend that has one."""
    x, factor, impl = call
    own, looks = backend(impl, x.device), row_index.is_free_to_look(x)
    others = () if looks or own is REFERENCE else serving(x.device)
    if any(able.scale_(x, factor) for able in (own, *others)):
        return
    if not looks:  # expanded: torch rounds a factor without dimensions to the dtype of `x`
        x.mul_(factor.expand(x.shape))
    elif factor.item() != 1:
        x.mul_(factor)


def _entropy_temperature(call: EntropyTemperature) -> list[Tensor]:
    logits = call.logits
    module = backend(call.impl, logits.device)
    found = entropy_control.find_temperature(module, as_rows(logits), call.goal)
    return [torch.ops.aten._unsafe_view(found, logits.shape[:-1])]


def _entropy_descent(call: EntropyDescent) -> list[Tensor]:
    logits = call.logits
    module = backend(call.impl, logits.device)
    wide, dense = accumulate_dtype(logits.dtype), torch.contiguous_format
    z = as_rows(logits.to(wide, copy=True, memory_format=dense))
    z = entropy_control.descend(module, z, call.descent)
    return [torch.ops.aten._unsafe_view(z, logits.shape)]


def _flat(rows: _Rows, x: Tensor) -> _Rows:
    """The same NamedTuple with each per-row tensor flattened to (N,); x is (..., D)."""
    lead = x.dim() - 1
    flattened: Any = (None if t is None else flatten_rows(t, lead) for t in rows)
    return type(rows)(*flattened)


def wanted_of(call: LinearStats | LinearGrad | LinearGradInto | LinearLoss) -> tuple[bool, ...]:
    """Which gradients: of hidden, weight and bias, and of the two of the low-rank part."""
    return *call.needs.inputs, call.low.need_x, call.low.need_weight


def _shape_grads(
    grads: list[Tensor], call: LinearGrad | LinearGradInto | LinearLoss
) -> list[Tensor]:
    """With the leading shape of hidden where a gradient has rows."""
    shape, low = call.hidden.shape, call.low
    if call.needs.hidden:
        grads[0] = grads[0].view(shape)
    if low.x is not None and low.need_x:
        grads[3] = grads[3].view(low.x.shape)
    return grads


class Operator(NamedTuple):
    """What an operator does with its arguments, and with tensors without values in their place."""

    arguments: type[tuple[Any, ...]]
    implementation: Callable[[Any], list[Tensor] | None]
    fake: Callable[[Any], list[Tensor] | None]

    def run(self, *args: Any) -> list[Tensor] | None:
        call = unflat(self.arguments, args)
        return self.implementation(with_numbers(call) if hasattr(call, "spec") else call)

    def trace(self, *args: Any) -> list[Tensor] | None:
        return self.fake(unflat(self.arguments, args))


# Operators return a list of tensors; those in place return nothing, since torch.compile takes no
# mutating operator that returns a list.
OPERATORS = {
    "softmax_stats": Operator(SoftmaxStats, _softmax_stats, fakes.softmax_stats),
    "softmax_grad": Operator(SoftmaxGrad, _softmax_grad, fakes.softmax_grad),
    "softmax_loss": Operator(SoftmaxLoss, _softmax_loss, fakes.softmax_loss),
    "softmax_loss_": Operator(SoftmaxLossInplace, _softmax_loss_inplace, fakes.nothing),
    "linear_stats": Operator(LinearStats, _linear_stats, fakes.linear_stats),
    "linear_stats_fused": Operator(LinearStatsFused, _linear_stats_fused, fakes.linear_stats_fused),
    "linear_grad": Operator(LinearGrad, _linear_grad, fakes.linear_grad),
    "linear_grad_": Operator(LinearGradInto, _linear_grad_into, fakes.nothing),
    "linear_loss": Operator(LinearLoss, _linear_loss, fakes.linear_loss),
    "entropy_temperature": Operator(
        EntropyTemperature, _entropy_temperature, fakes.entropy_temperature
    ),
    "entropy_descent": Operator(EntropyDescent, _entropy_descent, fakes.entropy_descent),
    "all_reduce": Operator(AllReduce, _all_reduce, fakes.all_reduce),
    "scale_": Operator(ScaleInplace, _scale_inplace, fakes.nothing),
    "count_tokens": Operator(CountTokens, _count_tokens, fakes.count_tokens),
    "gather_alike": Operator(GatherAlike, _gather_alike, fakes.gather_alike),
}

_library = torch.library.Library("em_kernels", "DEF")


_NAMES: dict[type[tuple[Any, ...]], str] = {}


def record(arguments: tuple[Any, ...]) -> list[Tensor]:
    """The operator of these arguments, as a program that is exported keeps it."""
    operator: Callable[..., list[Tensor]]
    operator = getattr(torch.ops.em_kernels, _NAMES[type(arguments)])
    return operator(*given(arguments))


def call(arguments: tuple[Any, ...]) -> list[Tensor]:
    """The operator of these arguments, for the inside of an autograd function."""
    if torch.compiler.is_compiling():  # traced below autograd already
        return record(arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return record(arguments)


def differentiate(name: str, derive: Callable[..., list[Tensor]]) -> None:
    """What autograd does with an operator that is called outside of the public functions.

    `derive`, given the operator's arguments, returns its results with their history.
    """
    operator = getattr(torch.ops.em_kernels, name).default

    def kernel(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return derive(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


class _Underived(torch.autograd.Function):
    """An operator with no derivative: its results can be used, a backward pass through them not."""

    @staticmethod
    def forward(ctx: Any, name: str, *args: Any) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(call(unflat(OPERATORS[name].arguments, args)))

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"em_kernels::{ctx.name} has no derivative; {_REMEDY}")


_REMEDY = "the functions of em_kernels have first derivatives; else call it under torch.no_grad()"


def _underived(name: str, *args: Any) -> list[Tensor]:
    if name.endswith("_"):
        raise RuntimeError(f"em_kernels::{name} works in place and has no derivative; {_REMEDY}")
    apply: Any = _Underived.apply
    return list(apply(name, *args))


def define(name: str, operator: Operator, derived: bool = False) -> None:
    """Make an operator known to torch; `derived`: its module calls `differentiate` itself."""
    returns = "()" if name.endswith("_") else "Tensor[]"
    declared = f"{name}({schema(operator.arguments)}) -> {returns}"
    _library.define(declared, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, operator.run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"em_kernels::{name}", operator.trace)
    OPERATORS[name], _NAMES[operator.arguments] = operator, name
    if not derived:
        differentiate(name, partial(_underived, name))


for _name, _operator in list(OPERATORS.items()):
    define(_name, _operator, derived=_name in ("softmax_stats", "linear_stats"))
