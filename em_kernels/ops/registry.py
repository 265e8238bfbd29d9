"""The operators, implemented and derived; `_schemas` has their arguments, `_fakes` their traces.

An operator flattens its arguments, has a backend chosen (`_choice.py`) and calls it.

Their derivatives live outside, in the modules that hold the public functions: those are built of
autograd functions that call an operator below autograd (`call`). The same functions serve an
operator that autograd meets by itself, as in an exported program (`differentiate`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from em_kernels.backends import entropy_control, row_index, vocab_parallel
from em_kernels.backends.choice import backend, serves, why_not
from em_kernels.backends.interface import (
    RowSpec,
    Saved,
    Upstream,
    accumulate_dtype,
    as_rows,
    flatten_spec,
)
from em_kernels.backends.vocab_parallel import VocabParallel
from em_kernels.linear import chunks
from em_kernels.linear.plan import Linear, Needs
from em_kernels.linear.workspace import empty
from em_kernels.ops import fakes
from em_kernels.ops.schemas import (
    CUT,
    LATER,
    LINEAR,
    NEEDS,
    SAVED,
    SPEC,
    UPSTREAM,
    take,
    take_later,
    take_needs,
    take_spec,
)


def _softmax_stats(logits: Tensor, *args) -> list[Tensor]:
    spec, (outputs, impl) = take_spec(args)
    module, spec = _serve(impl, logits, logits.shape[-1], spec, (outputs,))
    rows = module.stats(as_rows(logits), spec, tuple(outputs))
    return _shape_rows(rows, outputs, logits.shape[:-1])


def _softmax_grad(logits: Tensor, *args) -> list[Tensor]:
    spec, args = take_spec(args)
    saved, args = take(Saved, args)
    upstream, (impl,) = take(Upstream, args)
    module, spec = _serve(impl, logits, logits.shape[-1], spec, check=False)
    view, out = as_rows(logits), empty(module, logits.shape, logits.dtype, logits.device)
    module.grad(view, spec, _flat(saved), _flat(upstream), out.view(view.shape))
    return [out]


def _softmax_loss(logits: Tensor, *args) -> list[Tensor]:
    rows, out = _loss_rows(logits, as_rows(logits), args)
    return [*rows, out]


def _softmax_loss_inplace(logits: Tensor, rows: list[Tensor], *args) -> None:
    view = as_rows(logits)
    values, _ = _loss_rows(logits, view, args, out=view)
    for row, value in zip(rows, values, strict=True):
        row.copy_(value)
    if view.data_ptr() != logits.data_ptr():
        logits.copy_(view.view(logits.shape))


def _loss_rows(
    logits: Tensor, view: Tensor, args: tuple, out: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """The per-row results, and the gradient: in `out`, else of the shape of `logits`."""
    spec, args = take_spec(args)
    upstream, (outputs, impl) = take(Upstream, args)
    vocab = logits.shape[-1]
    module, spec = _serve(impl, logits, vocab, spec, (outputs,), loss_of=view)
    if out is None:
        out = empty(module, logits.shape, logits.dtype, logits.device)
    rows = module.loss(view, spec, _flat(upstream), tuple(outputs), out.view(view.shape))
    return _shape_rows(rows, outputs, logits.shape[:-1]), out


def _linear_stats(hidden: Tensor, weight: Tensor, *args) -> list[Tensor]:
    spec, (outputs, chunk, dtype, impl, *later) = take_spec(args)
    needs, keep = take_later(spec, later)
    options = (outputs, chunk, dtype)
    module, spec = _serve(impl, hidden, weight.shape[0], spec, options)
    linear = Linear.cut(hidden, weight, chunk, dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        rows = chunks.stats(linear, spec, tuple(outputs), module, needs, *keep)
    count = len(Saved._fields) + len(outputs)
    return [*_shape_rows(rows[:count], outputs, hidden.shape[:-1]), *rows[count:]]


def _linear_stats_fused(hidden: Tensor, weight: Tensor, *args) -> list[Tensor]:
    spec, (outputs,) = take_spec(args)
    reason = why_not("triton", hidden.device)
    if reason is not None:
        raise ValueError(f"fuse_product=True needs the Triton backend: {reason}")
    module = importlib.import_module("em_kernels.backends.triton.linear")
    rows = hidden.reshape(-1, hidden.shape[-1])
    rows = module.linear_stats(rows, weight, _checked(flatten_spec(spec)), tuple(outputs))
    return _shape_rows(rows, outputs, hidden.shape[:-1])


def _linear_grad(hidden: Tensor, weight: Tensor, *args) -> list[Tensor]:
    spec, args = take_spec(args)
    saved, args = take(Saved, args)
    upstream, args = take(Upstream, args)
    needs, (chunk, dtype, impl, *kept) = take_needs(spec, args)
    options = (needs.hidden, chunk, dtype)
    module, spec = _serve(impl, hidden, weight.shape[0], spec, options, check=False)
    linear = Linear.cut(hidden, weight, chunk, dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        grads = chunks.grad(linear, spec, _flat(saved), _flat(upstream), needs, module, *kept)
    return _shape_grads(grads, needs, hidden)


def _linear_loss(hidden: Tensor, weight: Tensor, *args) -> list[Tensor]:
    spec, args = take_spec(args)
    upstream, args = take(Upstream, args)
    needs, (outputs, chunk, dtype, impl) = take_needs(spec, args)
    options = (outputs, needs.hidden, chunk, dtype)
    module, spec = _serve(impl, hidden, weight.shape[0], spec, options)
    linear = Linear.cut(hidden, weight, chunk, dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        results = chunks.loss(linear, spec, _flat(upstream), tuple(outputs), needs, module)
    rows = _shape_rows(results[:-3], outputs, hidden.shape[:-1])
    return [*rows, *_shape_grads(results[-3:], needs, hidden)]


def _all_reduce(x: Tensor, group: str) -> list[Tensor]:
    return [vocab_parallel.all_reduce(x, group)]


def _scale_inplace(x: Tensor, factor: Tensor, impl: str) -> None:
    """x *= factor, one number. A CPU looks whether it is 1; on a GPU that is left to the kernel."""
    if row_index.is_free_to_look(x) and impl != "triton":
        if factor.item() != 1:
            x.mul_(factor)
    elif impl != "reference" and x.is_contiguous() and serves("triton", x.device):
        importlib.import_module("em_kernels.backends.triton").scale_(x, factor)
    else:  # expanded: torch rounds a factor without dimensions to the dtype of `x`
        x.mul_(factor.expand(x.shape))


def _entropy_temperature(logits: Tensor, *args) -> list[Tensor]:
    goal, (impl,) = take(entropy_control.Goal, args)
    module = backend(impl, logits.device)
    found = entropy_control.find_temperature(module, as_rows(logits), goal)
    return [torch.ops.aten._unsafe_view(found, logits.shape[:-1])]


def _entropy_descent(logits: Tensor, *args) -> list[Tensor]:
    descent, (impl,) = take(entropy_control.Descent, args)
    module = backend(impl, logits.device)
    wide, dense = accumulate_dtype(logits.dtype), torch.contiguous_format
    z = as_rows(logits.to(wide, copy=True, memory_format=dense))
    z = entropy_control.descend(module, z, descent)
    return [torch.ops.aten._unsafe_view(z, logits.shape)]


def _flat(rows: tuple) -> tuple:
    """The same NamedTuple with each per-row tensor flattened to (N,)."""
    return type(rows)(*(None if t is None else t.reshape(-1).contiguous() for t in rows))


def _shape_rows(rows: list[Tensor], outputs: list[str], shape: torch.Size) -> list[Tensor]:
    """Give per-row results the leading shape; `is_top1` becomes bool.

    A result is not a view, as autograd counts them: it can be changed in place.
    """
    names = (*Saved._fields, *outputs)
    rows = [row > 0 if name == "is_top1" else row for name, row in zip(names, rows, strict=True)]
    if len(shape) == 1:
        return rows
    return [torch.ops.aten._unsafe_view(row, shape) for row in rows]


def _shape_grads(grads: list[Tensor], needs: Needs, hidden: Tensor) -> list[Tensor]:
    grad_hidden, *rest = grads
    return [grad_hidden.view(hidden.shape), *rest] if needs.hidden else grads


def _serve(
    impl: str,
    x: Tensor,
    vocab: int,
    spec: RowSpec,
    options: tuple = (),
    check: bool = True,
    loss_of: Tensor | None = None,
) -> tuple[ModuleType | VocabParallel, RowSpec]:
    """The backend, and the spec flattened and its values checked.

    `loss_of` is given logits, (outer, inner, V), whose loss is wanted. With a group the backend and
    the spec are those of this rank's shard, `vocab` its size, and `options` what all ranks must
    have been given alike.
    """
    ready = _checked if check else flatten_spec
    if spec.group is None:
        kind = ("rows",) if loss_of is None else ("loss", _aligned(loss_of))
        return backend(impl, x.device, *kind), ready(spec)
    module = backend(impl, x.device)  # a loss there is statistics, and their gradient once merged
    options = (module.__name__, x.dtype, *options)
    shards = vocab_parallel.agree(flatten_spec(spec), vocab, x, options)
    spec = ready(spec._replace(valid_vocab=shards.ends[-1]))
    return VocabParallel(module, shards), spec._replace(valid_vocab=shards.size)


def _aligned(x: Tensor) -> bool:
    """Whether the rows of x (outer, inner, V), and those of a new tensor like it, begin at 16
    bytes."""
    steps = (*x.stride()[:2], x.shape[2])
    return x.data_ptr() % 16 == 0 and all(n * x.itemsize % 16 == 0 for n in steps)


def _checked(spec: RowSpec) -> RowSpec:
    """Flattened, its values checked. On a GPU, to spare a synchronisation, nothing is checked:
    the kernels answer a target out of range or a non-positive temperature with NaN."""
    spec = flatten_spec(spec)
    if spec.target is not None and row_index.is_free_to_look(spec.target):
        _check_rows(
            (spec.target >= 0) & (spec.target < spec.valid_vocab),
            spec,
            "target",
            f"in [0, {spec.valid_vocab}) or ignored (ignore_index, or a mask that is 0 there)",
        )
    if spec.temperature_rows is not None and row_index.is_free_to_look(spec.temperature_rows):
        rows = spec.temperature_rows
        _check_rows((rows > 0) & rows.isfinite(), spec, "temperature_rows", "positive and finite")
    return spec


def _check_rows(good: Tensor, spec: RowSpec, field: str, rule: str) -> None:
    bad = ~good if spec.mask is None else ~good & spec.mask
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        name, value = field.removesuffix("_rows"), getattr(spec, field)[row].item()
        raise ValueError(f"{name} must be {rule}, got {value} at token {row}")


# name -> (schema arguments, implementation, fake). Operators return a list of tensors; the one in
# place returns nothing, since torch.compile takes no mutating operator that returns a list.
_OPERATORS = {
    "softmax_stats": (
        f"Tensor logits, {SPEC}, str[] outputs, str impl",
        _softmax_stats,
        fakes.softmax_stats,
    ),
    "softmax_grad": (
        f"Tensor logits, {SPEC}, {SAVED}, {UPSTREAM}, str impl",
        _softmax_grad,
        fakes.softmax_grad,
    ),
    "softmax_loss": (
        f"Tensor logits, {SPEC}, {UPSTREAM}, str[] outputs, str impl",
        _softmax_loss,
        fakes.softmax_loss,
    ),
    "softmax_loss_": (
        f"Tensor(a!) logits, Tensor(b!)[] rows, {SPEC}, {UPSTREAM}, str[] outputs, str impl",
        _softmax_loss_inplace,
        fakes.softmax_loss_inplace,
    ),
    "linear_stats": (
        f"{LINEAR}, {SPEC}, str[] outputs, {CUT}, {LATER}",
        _linear_stats,
        fakes.linear_stats,
    ),
    "linear_stats_fused": (
        f"{LINEAR}, {SPEC}, str[] outputs",
        _linear_stats_fused,
        fakes.linear_stats_fused,
    ),
    "linear_grad": (
        f"{LINEAR}, {SPEC}, {SAVED}, {UPSTREAM}, {NEEDS}, {CUT}, Tensor? kept=None",
        _linear_grad,
        fakes.linear_grad,
    ),
    "linear_loss": (
        f"{LINEAR}, {SPEC}, {UPSTREAM}, {NEEDS}, str[] outputs, {CUT}",
        _linear_loss,
        fakes.linear_loss,
    ),
    "entropy_temperature": (
        "Tensor logits, float threshold, float ratio, float minimum, int iterations, str impl",
        _entropy_temperature,
        fakes.entropy_temperature,
    ),
    "entropy_descent": (
        "Tensor logits, float threshold, float learning_rate, int steps, str impl",
        _entropy_descent,
        fakes.entropy_descent,
    ),
    "all_reduce": ("Tensor x, str group", _all_reduce, fakes.all_reduce),
    "scale_": ("Tensor(a!) x, Tensor factor, str impl", _scale_inplace, fakes.scale_inplace),
}

_library = torch.library.Library("em_kernels", "DEF")


def call(name: str, *args):
    """The operator, for the inside of an autograd function: dispatched below autograd."""
    operator = getattr(torch.ops.em_kernels, name)
    if torch.compiler.is_compiling():  # traced below autograd already
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def differentiate(name: str, derive: Callable) -> None:
    """What autograd does with an operator that is called outside of the public functions.

    `derive`, given the operator's arguments, returns its results with their history.
    """
    operator = getattr(torch.ops.em_kernels, name).default

    def kernel(keyset, *args):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return derive(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


class _Underived(torch.autograd.Function):
    """An operator with no derivative: its results can be used, a backward pass through them not."""

    @staticmethod
    def forward(ctx, name, *args):
        ctx.name = name
        return tuple(call(name, *args))

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"em_kernels::{ctx.name} has no derivative; {_REMEDY}")


_REMEDY = "the functions of em_kernels have first derivatives; else call it under torch.no_grad()"


def _underived(name: str, *args) -> list[Tensor]:
    if name.endswith("_"):
        raise RuntimeError(f"em_kernels::{name} works in place and has no derivative; {_REMEDY}")
    return list(_Underived.apply(name, *args))


for _name, (_arguments, _implementation, _fake) in _OPERATORS.items():
    _returns = "()" if _name.endswith("_") else "Tensor[]"
    _library.define(f"{_name}({_arguments}) -> {_returns}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"em_kernels::{_name}", _fake)
    if _name not in ("softmax_stats", "linear_stats"):  # those have theirs in modules of that name
        differentiate(_name, partial(_underived, _name))
