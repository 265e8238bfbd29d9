"""What is said of chosen ids of a row beside its statistics, on top of any backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from em_kernels.backends import divergence as pairs
from em_kernels.backends.above import above, counting
from em_kernels.backends.interface import (
    Backend,
    RowSpec,
    Saved,
    Upstream,
    accumulate_dtype,
)
from em_kernels.backends.pair import Divergence, PairOut, PairSaved, PairWeights, Side


class ChosenIds(Backend):
    """A backend that also makes `rank`, around another."""

    def __init__(self, inner: Backend):
        self._inner = inner
        self.name, self.narrows, self.counts = inner.name, inner.narrows, inner.counts
        self.first_entry, self.widest_shard = inner.first_entry, inner.widest_shard

    @property
    def local(self) -> Backend:
        return self._inner.local

    def stats(self, logits: Tensor, spec: RowSpec, outputs: tuple[str, ...]) -> list[Tensor]:
        asked = tuple(name for name in outputs if name != "rank")
        rows = self._inner.stats(logits, spec, asked)
        if asked == outputs:
            return rows
        return _with_rank(rows, self._rank(logits, spec), outputs)

    def grad(
        self, logits: Tensor, spec: RowSpec, saved: Saved, upstream: Upstream, out: Tensor
    ) -> None:
        self._inner.grad(logits, spec, saved, upstream, out)

    def loss(
        self,
        logits: Tensor,
        spec: RowSpec,
        upstream: Upstream,
        outputs: tuple[str, ...],
        out: Tensor,
    ) -> list[Tensor]:
        asked = tuple(name for name in outputs if name != "rank")
        # Before the gradient takes the place of the logits.
        rank = None if asked == outputs else self._rank(logits, spec)
        rows = self._inner.loss(logits, spec, upstream, asked, out)
        return rows if rank is None else _with_rank(rows, rank, outputs)

    def above(
        self,
        logits: Tensor,
        spec: RowSpec,
        levels: Tensor,
        top: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        return self._inner.above(logits, spec, levels, top, ids)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._inner.empty(shape, dtype, device)

    def add_product(self, total: Tensor, grad_logits: Tensor, x: Tensor, add: bool) -> bool:
        return self._inner.add_product(total, grad_logits, x, add)

    def divergence_sums(
        self, own: Side, other: Side, saved: PairSaved, divergence: Divergence
    ) -> Tensor:
        return pairs.sums(self._inner, own, other, saved, divergence)

    def divergence_grad(
        self,
        own: Side,
        other: Side,
        saved: PairSaved,
        divergence: Divergence,
        weights: PairWeights,
        out: PairOut,
    ) -> bool:
        pairs.grad(self._inner, own, other, saved, divergence, weights, out)
        return True

    def _rank(self, logits: Tensor, spec: RowSpec) -> Tensor:
        """(N,)"""
        assert spec.target is not None
        ids = spec.target[:, None]
        level = _z_at(counting(self._inner.local, logits.device), self._inner, logits, spec, ids)
        counts, _ = above(self._inner, logits, spec, level)
        return counts[:, 0]


def _with_rank(rows: list[Tensor], rank: Tensor, outputs: tuple[str, ...]) -> list[Tensor]:
    """`rank` where it belongs, NaN where the row is."""
    place = len(Saved._fields) + outputs.index("rank")
    return [*rows[:place], rank + (rows[0] - rows[0]), *rows[place:]]


def _z_at(able: Backend, whole: Backend, logits: Tensor, spec: RowSpec, ids: Tensor) -> Tensor:
    """z at ids (N, K) as `able` has it, of the rows of `whole`; NaN where no entry is."""
    own = ids - whole.first_entry
    here = (own >= 0) & (own < spec.valid_vocab)
    z = torch.zeros(ids.shape, dtype=accumulate_dtype(logits.dtype), device=logits.device)
    if spec.valid_vocab:
        z = torch.where(here, z_of_entries(able, logits, spec, torch.where(here, own, 0)), 0)
    both = whole.total(torch.stack([z, here.to(z.dtype)]))
    return both[0].masked_fill(both[1] == 0, torch.nan)


def z_of_entries(backend: Backend, logits: Tensor, spec: RowSpec, ids: Tensor) -> Tensor:
    """z at ids (N, K), with the very bits of a backend's kernels: as the maximum of rows of one
    entry. -inf where there is none, as where it is NaN or +inf."""
    inner, count = logits.shape[1], ids.shape[1]
    row = torch.arange(len(ids), device=ids.device)[:, None]
    x = logits[row // inner, row % inner, ids]
    one = RowSpec(temperature=spec.temperature, softcap=spec.softcap, valid_vocab=1)
    if spec.bias is None:
        one = one._replace(logit_scale=spec.logit_scale)
    else:  # as the kernels do it, rounded twice
        x = x.to(accumulate_dtype(x.dtype)) * spec.logit_scale
        x = x + spec.bias[ids].to(x.dtype)
    if spec.temperature_rows is not None:
        one = one._replace(temperature_rows=spec.temperature_rows.repeat_interleave(count))
    z: Tensor = backend.stats(x.reshape(1, -1, 1), one, ())[0]
    return z.nan_to_num(nan=-torch.inf).view(ids.shape)
