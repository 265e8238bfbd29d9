"""What serves an operator: its backend, its rows checked, its results in their shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from em_kernels.backends import row_index, vocab_parallel
from em_kernels.backends.choice import backend
from em_kernels.backends.chosen_ids import ChosenIds
from em_kernels.backends.interface import (
    PADDING,
    RESULT_DTYPES,
    Backend,
    RowSpec,
    Saved,
    has_ids,
    row_kernels_make,
)
from em_kernels.backends.specs import flatten_spec, has_support
from em_kernels.backends.support import Support
from em_kernels.backends.vocab_parallel import VocabParallel
from em_kernels.linear.plan import Linear, Needs, with_terms
from em_kernels.ops import truncate
from em_kernels.ops.schemas import (
    LinearGrad,
    LinearGradInto,
    LinearLoss,
    LinearStats,
    LinearTopCall,
)


def serve_linear(
    call: LinearStats | LinearGrad | LinearGradInto | LinearLoss | LinearTopCall,
    outputs: Sequence[str],
    options: tuple[Any, ...],
    check: bool = True,
) -> tuple[Backend, RowSpec, Linear]:
    """`serve`, and the product that makes the rows."""
    chunk, dtype = call.chunk_tokens, call.logits_dtype
    low = call.low if call.low.x is None else (call.low.x.shape[-1], *call.low[2:])
    vocab, options = call.weight.shape[0], (*options, chunk, dtype, call.weight.dtype, low)
    given = (outputs, options, check, None, True, getattr(call, "needs", Needs()).weight)
    module, spec = serve(call.impl, call.hidden, vocab, call.spec, *given)
    linear = Linear.of(call.hidden, call.weight, chunk, dtype, call.low)
    return with_terms(module, [(linear, spec)]), spec, linear


def serve(
    impl: str,
    x: Tensor,
    vocab: int,
    spec: RowSpec,
    outputs: Sequence[str] = (),
    options: tuple[Any, ...] = (),
    check: bool = True,
    loss_of: Tensor | None = None,
    owned: bool = False,
    needs_weight: bool = False,
) -> tuple[Backend, RowSpec]:
    """The backend, and the spec flattened and its values checked.

    `loss_of` is given logits, (outer, inner, V), whose loss is wanted. With a group the backend and
    the spec are those of this rank's shard, `vocab` its size, and `options` what all ranks must
    have been given alike.
    """
    ready, lead = checked if check else flatten_spec, x.dim() - 1
    if spec.group is None:
        kind = ("rows",) if loss_of is None else ("loss", _aligned(loss_of))
        spec = ready(spec, lead)
        return extended(backend(impl, x.device, *kind), spec, outputs, owned), spec
    module = backend(impl, x.device)  # a loss there is statistics, and their gradient once merged
    options = (module.name, x.dtype, *options)
    shards = vocab_parallel.agree(flatten_spec(spec, lead), vocab, x, options, needs_weight)
    spec = ready(spec._replace(valid_vocab=shards.ends[-1]), lead)
    spec = spec._replace(valid_vocab=shards.size)
    return extended(VocabParallel(module, shards), spec, outputs, owned), spec


def extended(module: Backend, spec: RowSpec, outputs: Sequence[str], owned: bool) -> Backend:
    """The backend with what the spec and the outputs ask for beyond its own, around it.

    `owned`: the logits will lie in memory of ours. Both passes over rows must come to the same:
    where only the forward pass knows of an output that is not a row kernel's, `spec.whole` is set.
    """
    if "rank" in outputs or has_ids(spec):
        module = ChosenIds(module)
    if has_support(spec) or spec.whole or not row_kernels_make(outputs):
        module = Support(module, owned)
    return module


def _aligned(x: Tensor) -> bool:
    """Whether the rows of x (outer, inner, V), and those of a new tensor like it, begin at 16
    bytes."""
    steps = (*x.stride()[:2], x.shape[2])
    return x.data_ptr() % 16 == 0 and all(n * x.itemsize % 16 == 0 for n in steps)


def checked(spec: RowSpec, lead: int, prefix: str = "") -> RowSpec:
    """Flattened, its values checked. On a GPU, to spare a synchronisation, nothing is checked:
    the kernels answer a target out of range or a non-positive temperature with NaN. `prefix` is
    that of the caller's names."""
    spec = flatten_spec(spec, lead)
    if spec.target is not None and row_index.is_free_to_look(spec.target):
        good = (spec.target >= 0) & (spec.target < spec.valid_vocab)
        if has_ids(spec):
            good |= spec.target == PADDING
        rule = f"in [0, {spec.valid_vocab}) or ignored (ignore_index, or a mask that is 0 there)"
        _check_rows(good, spec, "target", rule)
    if spec.temperature_rows is not None and row_index.is_free_to_look(spec.temperature_rows):
        _check_temperatures(spec, spec.temperature_rows, prefix)
    truncate.check_values(spec)
    return spec


def _check_temperatures(spec: RowSpec, rows: Tensor, prefix: str) -> None:
    least, scale = torch.finfo(rows.dtype).tiny, abs(spec.logit_scale)
    good = (rows >= max(1, scale) * least) & (rows <= min(1, scale) / least)
    if good.all():
        return
    positive = (rows > 0) & rows.isfinite()
    _check_rows(positive, spec, "temperature_rows", "positive and finite", prefix)
    rule = f"such that {rows.dtype} holds logit_scale / temperature and its inverse"
    _check_rows(good, spec, "temperature_rows", rule, prefix)


def _check_rows(good: Tensor, spec: RowSpec, field: str, rule: str, prefix: str = "") -> None:
    bad = ~good
    if spec.mask is not None:
        bad &= spec.mask if bad.dim() == 1 else spec.mask[:, None]
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        name, value = prefix + field.removesuffix("_rows"), getattr(spec, field)[first].item()
        raise ValueError(f"{name} must be {rule}, got {value} at token {first[0]}")


def shape_rows(rows: list[Tensor], outputs: Sequence[str], shape: torch.Size) -> list[Tensor]:
    """Give per-row results the leading shape, and those that are no numbers of kernels their dtype.

    A result is not a view, as autograd counts them: it can be changed in place.
    """
    names = (*Saved._fields, *outputs)
    rows = [_as_result(name, row) for name, row in zip(names, rows, strict=True)]
    if len(shape) == 1:
        return rows
    return [torch.ops.aten._unsafe_view(row, (*shape, *row.shape[1:])) for row in rows]


def _as_result(name: str, row: Tensor) -> Tensor:
    dtype = RESULT_DTYPES.get(name)
    if dtype == torch.bool:
        return row > 0
    return row if dtype is None else row.nan_to_num(nan=-1).to(dtype)
