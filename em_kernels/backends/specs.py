"""Rows and their spec in other forms: flattened, of some rows, of a slice of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from em_kernels.backends.interface import OF_IDS, PADDING, Numbers, RowSpec, Spec, Upstream


def read_numbers(spec: Spec) -> Spec:
    """A spec, `RowSpec` or `OtherSpec`, with the values of `numbers` where they belong."""
    if spec.numbers is None:
        return spec
    given = Numbers(*spec.numbers.tolist())
    return spec._replace(
        temperature=given.temperature, softcap=given.softcap, logit_scale=given.logit_scale
    )


def row_tensors(spec: RowSpec) -> tuple[Tensor | None, ...]:
    """The tensors of a spec with an entry for each row."""
    rows = spec.target, spec.mask, spec.temperature_rows
    return *rows, spec.truncation, spec.kept_rows, spec.border


def with_row_tensors(spec: RowSpec, tensors: Iterable[Tensor | None]) -> RowSpec:
    """The same spec with others in the place of `row_tensors`."""
    target, mask, temperature_rows, truncation, kept_rows, border = tensors
    return spec._replace(
        target=target,
        mask=mask,
        temperature_rows=temperature_rows,
        truncation=truncation,
        kept_rows=kept_rows,
        border=border,
    )


def without_row_tensors(spec: RowSpec) -> RowSpec:
    return with_row_tensors(spec, (None,) * len(row_tensors(spec)))


def has_support(spec: RowSpec) -> bool:
    """Whether the rows are truncated."""
    return spec.truncation is not None or spec.kept_rows is not None


def without_support(spec: RowSpec) -> RowSpec:
    """The spec of the whole distribution."""
    return spec._replace(truncation=None, kept_ids=None, kept_rows=None, border=None)


def flatten_rows(rows: Tensor, lead: int) -> Tensor:
    """The first `lead` dimensions as one, contiguous."""
    return rows.reshape(rows.shape[:lead].numel(), *rows.shape[lead:]).contiguous()


def flatten_spec(spec: RowSpec, lead: int) -> RowSpec:
    """The same spec with its per-row tensors, of `lead` leading dimensions, flattened to (N,) and
    contiguous."""
    return with_row_tensors(
        spec, (None if t is None else flatten_rows(t, lead) for t in row_tensors(spec))
    )


def select_rows(spec: RowSpec, rows: Tensor | slice) -> RowSpec:
    """The spec of some of the rows of a flattened spec."""
    picked = (None if x is None else x[rows].contiguous() for x in row_tensors(spec))
    return with_row_tensors(spec, picked)


def pick(upstream: Upstream, rows: Tensor | slice) -> Upstream:
    """The upstream gradients of some of the rows."""
    return Upstream(*(None if g is None else g[rows] for g in upstream))


def spec_of_slice(spec: RowSpec, start: int, size: int) -> RowSpec:
    """The spec with ids counted from `start`, for the gradient in `size` entries from there.

    Targets that lie elsewhere become the first of these: see `upstream_of_slice`.
    """
    if start and spec.kept_ids is not None:
        spec = spec._replace(kept_ids=spec.kept_ids - start)
    if start and spec.border is not None:
        level, first, kept = spec.border.unbind(-1)
        spec = spec._replace(border=torch.stack([level, first - start, kept], -1))
    if spec.target is None:
        return spec
    target = spec.target - start
    return spec._replace(target=torch.where(_inside(target, size), target, 0))


def upstream_of_slice(spec: RowSpec, upstream: Upstream, start: int, size: int) -> Upstream:
    """d logprob / dz_v is 1[v = y] - p_v, and of that only -p_v, which is -d lse / dz_v, where the
    target lies outside of the slice."""
    if upstream.logprob is None or spec.target is None:
        return upstream
    owned = _inside(spec.target - start, size)
    elsewhere = torch.where(owned | (spec.target == PADDING), 0, upstream.logprob)
    if elsewhere.dim() == 2:
        elsewhere = elsewhere.sum(1)
    lse = -elsewhere if upstream.lse is None else upstream.lse - elsewhere
    return upstream._replace(logprob=torch.where(owned, upstream.logprob, 0), lse=lse)


def _inside(target: Tensor, size: int) -> Tensor:
    return (target >= 0) & (target < size)


def as_ids(target: Tensor) -> Tensor:
    """A flattened target as (N, K)."""
    return target if target.dim() == 2 else target[:, None]


def row_shape(name: str, spec: RowSpec, lead: Sequence[int]) -> Sequence[int]:
    """Of an output of rows of this leading shape, in which the spec is too."""
    return spec.target.shape if name in OF_IDS and spec.target is not None else lead


def as_rows(x: Tensor) -> Tensor:
    """View (..., V) as (outer, inner, V) with unit last stride; copies only where no view exists.

    Two leading dimensions are what `logits[:, :-1]` needs to be read in place.
    """
    vocab = x.shape[-1]
    if x.stride(-1) != 1 and vocab > 1:
        x = x.contiguous()
    if x.dim() == 3:
        return x
    if x.dim() == 1:
        return x.view(1, 1, vocab)
    if x.dim() == 2:
        return x.unsqueeze(0)
    for split in range(1, x.dim() - 1):
        try:
            return x.view(x.shape[:split].numel(), x.shape[split:-1].numel(), vocab)
        except RuntimeError:
            continue
    return x.contiguous().view(1, -1, vocab)
