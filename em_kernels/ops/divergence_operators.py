"""The operators of divergences: what they do, and what they return as tensors without values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from em_kernels.backends import divergence as definition
from em_kernels.backends.interface import RESULT_DTYPES, Backend, RowSpec, accumulate_dtype
from em_kernels.backends.pair import OtherSpec, PairOut, PairSaved, PairWeights, Side
from em_kernels.backends.specs import as_rows
from em_kernels.linear import pairs
from em_kernels.linear.half import ready_dtype
from em_kernels.linear.plan import Linear, Needs, OtherNeeds, default_logits_dtype, with_terms
from em_kernels.ops.registry import Operator, define
from em_kernels.ops.schemas import (
    DivergenceGrad,
    DivergenceLoss,
    DivergenceStats,
    LinearDivergenceGrad,
    LinearDivergenceLoss,
    LinearDivergenceStats,
)
from em_kernels.ops.serve import checked, serve, shape_rows

_OfLogits = DivergenceStats | DivergenceGrad | DivergenceLoss
_OfHidden = LinearDivergenceStats | LinearDivergenceGrad | LinearDivergenceLoss


def _stats(call: DivergenceStats) -> list[Tensor]:
    backend, sides = _serve_logits(call)
    names = tuple(call.outputs), tuple(call.other_outputs)
    return _rows(definition.stats(backend, *sides, call.divergence, *names), call, call.logits)


def _grad(call: DivergenceGrad) -> list[Tensor]:
    backend, sides = _serve_logits(call, check=False)
    weights, out = _weights(call), _outs(call, backend, sides)
    saved = PairSaved(*(row.reshape(-1).contiguous() for row in call.saved))
    definition.grad(backend, *sides, saved, call.divergence, weights, out)
    return _gradients(call, out)


def _loss(call: DivergenceLoss) -> list[Tensor]:
    backend, sides = _serve_logits(call)
    weights, out = _weights(call), _outs(call, backend, sides)
    names = tuple(call.outputs), tuple(call.other_outputs)
    rows = definition.loss(backend, *sides, call.divergence, weights, out, *names)
    return [*_rows(rows, call, call.logits), *_gradients(call, out)]


def _linear_stats(call: LinearDivergenceStats) -> list[Tensor]:
    backend, heads = _serve_heads(call)
    names = tuple(call.outputs), tuple(call.other_outputs)
    with torch.autocast(call.hidden.device.type, enabled=False):
        rows = pairs.stats(heads, call.divergence, *names, backend)
    return _rows(rows, call, call.hidden)


def _linear_grad(call: LinearDivergenceGrad) -> list[Tensor]:
    backend, heads = _serve_heads(call, check=False)
    saved = PairSaved(*(row.reshape(-1).contiguous() for row in call.saved))
    needs = call.needs, Needs(*call.other_needs)
    with torch.autocast(call.hidden.device.type, enabled=False):
        grads = pairs.grad(heads, saved, call.divergence, call.upstream.reshape(-1), needs, backend)
    return _shape_gradients(grads, call)


def _linear_loss(call: LinearDivergenceLoss) -> list[Tensor]:
    backend, heads = _serve_heads(call)
    needs, weights = (call.needs, Needs(*call.other_needs)), call.upstream.reshape(-1)
    names = tuple(call.outputs), tuple(call.other_outputs)
    with torch.autocast(call.hidden.device.type, enabled=False):
        results = pairs.loss(heads, call.divergence, weights, needs, *names, backend)
    rows, grads = results[:-6], results[-6:]
    return [*_rows(rows, call, call.hidden), *_shape_gradients(grads, call)]


def _serve_logits(call: _OfLogits, check: bool = True) -> tuple[Backend, tuple[Side, Side]]:
    """The backend and both sides, in one dtype."""
    dtype = _common(call.logits.dtype, call.other_logits.dtype)
    backend, spec, other = _serve_pair(call, call.logits, call.logits.shape[-1], check)
    logits, other_logits = (as_rows(x.to(dtype)) for x in (call.logits, call.other_logits))
    return backend, (Side(logits, spec), Side(_alike(other_logits, logits), other))


def _alike(x: Tensor, y: Tensor) -> Tensor:
    """`x` (outer, inner, V) cut in its leading dimensions as `y` is."""
    if x.shape[:2] == y.shape[:2]:
        return x
    return x.reshape(*y.shape[:2], x.shape[-1])


def _serve_heads(call: _OfHidden, check: bool = True) -> tuple[Backend, pairs.Heads]:
    backend, spec, other = _serve_pair(call, call.hidden, call.weight.shape[0], check)
    own, its = call.hidden, call.other_hidden
    dtype = logits_dtype(own, its, call.logits_dtype)
    heads = pairs.Heads(
        pairs.Head(Linear.of(own, call.weight, call.chunk_tokens, dtype), spec),
        pairs.Head(Linear.of(its, call.other_weight, call.chunk_tokens, dtype), other),
    )
    return with_terms(backend, heads), heads


def logits_dtype(own: Tensor, other: Tensor, asked: torch.dtype | None) -> torch.dtype:
    """Of the logits of both heads, which their backend wants to be one."""
    if asked is not None and asked == own.dtype == other.dtype:
        return asked
    dtypes = [default_logits_dtype(x) for x in (own, other)] if asked is None else [asked]
    return _common(*dtypes, own.dtype, other.dtype)


def _common(*dtypes: torch.dtype) -> torch.dtype:
    first, *more = dtypes
    for dtype in more:
        first = torch.promote_types(first, dtype)
    return first


def _serve_pair(call: Any, x: Tensor, vocab: int, check: bool) -> tuple[Backend, RowSpec, RowSpec]:
    """The backend, and the specs of both rows."""
    names = (*getattr(call, "outputs", ()), *getattr(call, "other_outputs", ()))
    backend, spec = serve(call.impl, x, vocab, call.spec, names, _shared_options(call), check)
    rows = call.other.temperature_rows
    own = call.other._replace(temperature_rows=None if rows is None else rows.reshape(-1))
    other = own.beside(spec)
    if check:
        checked(other._replace(target=None), 1, "other_")
    return backend, spec, other


def _shared_options(call: Any) -> tuple[Any, ...]:
    """What all ranks of a group must have been given alike."""
    other = call.other.temperature, call.other.softcap, call.other.logit_scale
    names = "outputs", "other_outputs", "chunk_tokens", "logits_dtype"
    given = tuple(getattr(call, name) for name in names if hasattr(call, name))
    frozen = (call.needs.hidden, call.other_needs.hidden) if hasattr(call, "needs") else ()
    names = "weight", "other_hidden", "other_weight", "other_logits"
    dtypes = [getattr(call, name).dtype for name in names if hasattr(call, name)]
    return (*call.divergence, *other, *given, *frozen, *dtypes)


def _weights(call: DivergenceGrad | DivergenceLoss) -> PairWeights:
    given = (call.upstream, call.other_upstream)
    return PairWeights(*(None if g is None else g.reshape(-1).contiguous() for g in given))


def _outs(
    call: DivergenceGrad | DivergenceLoss, backend: Backend, sides: tuple[Side, Side]
) -> PairOut:
    given = (call.upstream, call.other_upstream)
    return PairOut(
        *(
            None if g is None else backend.empty(x.shape, x.dtype, x.device)
            for g, (x, _) in zip(given, sides, strict=True)
        )
    )


def _gradients(call: DivergenceGrad | DivergenceLoss, out: PairOut) -> list[Tensor]:
    given = (call.logits, call.other_logits)
    return [
        x.new_empty(0) if g is None else torch.ops.aten._unsafe_view(g, x.shape).to(x.dtype)
        for g, x in zip(out, given, strict=True)
    ]


def _rows(rows: list[Tensor], call: Any, x: Tensor) -> list[Tensor]:
    count = len(PairSaved._fields)
    saved = PairSaved(*rows[:count])
    value = saved.value(call.divergence)
    value = value.clone() if any(value is row for row in saved) else value
    # `shape_rows` names the first three, and what is a truth value.
    names = (*PairSaved._fields[3:], "divergence", *call.outputs, *call.other_outputs)
    return shape_rows([*saved, value, *rows[count:]], names, x.shape[:-1])


def _shape_gradients(grads: list[Tensor], call: _OfHidden) -> list[Tensor]:
    shaped = list(grads)
    for place, hidden in ((0, call.hidden), (3, call.other_hidden)):
        if shaped[place].numel() == hidden.numel():
            shaped[place] = shaped[place].view(hidden.shape)
    return shaped


def _fake_rows(call: Any, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    names = (*PairSaved._fields, "divergence", *call.outputs, *call.other_outputs)
    wide = accumulate_dtype(dtype)
    return [x.new_empty(x.shape[:-1], dtype=RESULT_DTYPES.get(name, wide)) for name in names]


def _fake_stats(call: DivergenceStats) -> list[Tensor]:
    return _fake_rows(call, call.logits, _common(call.logits.dtype, call.other_logits.dtype))


def _fake_grad(call: DivergenceGrad | DivergenceLoss) -> list[Tensor]:
    given = ((call.logits, call.upstream), (call.other_logits, call.other_upstream))
    return [x.new_empty(0 if g is None else x.shape) for x, g in given]


def _fake_loss(call: DivergenceLoss) -> list[Tensor]:
    dtype = _common(call.logits.dtype, call.other_logits.dtype)
    return [*_fake_rows(call, call.logits, dtype), *_fake_grad(call)]


def _fake_linear_stats(call: LinearDivergenceStats | LinearDivergenceLoss) -> list[Tensor]:
    dtype = logits_dtype(call.hidden, call.other_hidden, call.logits_dtype)
    return _fake_rows(call, call.hidden, dtype)


def _fake_linear_grad(call: LinearDivergenceGrad) -> list[Tensor]:
    return _fake_gradients(call, lambda dtype: dtype)


def _fake_linear_loss(call: LinearDivergenceLoss) -> list[Tensor]:
    return [*_fake_linear_stats(call), *_fake_gradients(call, ready_dtype)]


def _fake_gradients(call: LinearDivergenceGrad | LinearDivergenceLoss, result: Any) -> list[Tensor]:
    heads: Sequence[tuple[Tensor, Tensor, RowSpec | OtherSpec, Needs | OtherNeeds]] = (
        (call.hidden, call.weight, call.spec, call.needs),
        (call.other_hidden, call.other_weight, call.other, call.other_needs),
    )
    made = []
    for hidden, weight, spec, needs in heads:
        inputs = (hidden, weight, weight if spec.bias is None else spec.bias)
        sizes = (hidden.shape, weight.shape, weight.shape[:1])
        for x, size, need in zip(inputs, sizes, needs[:3], strict=True):
            made.append(x.new_empty(size if need else 0, dtype=result(x.dtype)))
    return made


define("divergence_stats", Operator(DivergenceStats, _stats, _fake_stats), derived=True)
define("divergence_grad", Operator(DivergenceGrad, _grad, _fake_grad))
define("divergence_loss", Operator(DivergenceLoss, _loss, _fake_loss))
define(
    "linear_divergence_stats",
    Operator(LinearDivergenceStats, _linear_stats, _fake_linear_stats),
    derived=True,
)
define("linear_divergence_grad", Operator(LinearDivergenceGrad, _linear_grad, _fake_linear_grad))
define("linear_divergence_loss", Operator(LinearDivergenceLoss, _linear_loss, _fake_linear_loss))
