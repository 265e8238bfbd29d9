"""A backend with something more, around another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from em_kernels.backends.interface import Backend, RowSpec, Saved, Upstream, row_kernels_make
from em_kernels.backends.pair import Divergence, PairOut, PairSaved, PairWeights, Side


class Around(Backend):
    """What it does not make itself is the other's; but rows are not gone through in parts."""

    def __init__(self, inner: Backend):
        self._inner = inner
        self.name, self.narrows, self.counts = inner.name, inner.narrows, inner.counts
        self.first_entry, self.widest_shard = inner.first_entry, inner.widest_shard
        self.entries, self.sums_weight = inner.entries, inner.sums_weight

    @property
    def local(self) -> Backend:
        return self._inner.local

    def total(self, x: Tensor) -> Tensor:
        return self._inner.total(x)

    def gathered(self, x: Tensor) -> Tensor:
        return self._inner.gathered(x)

    def stats(self, logits: Tensor, spec: RowSpec, outputs: tuple[str, ...]) -> list[Tensor]:
        return self._inner.stats(logits, spec, outputs)

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
        """`stats`, then `grad`: of the whole rows, the logits still in memory."""
        rows = self.stats(logits, spec, outputs)
        self.grad(logits, spec, Saved(*rows[:3]), upstream, out)
        return rows

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

    def product(self, out: Tensor, x: Tensor, weight: Tensor) -> bool:
        return self._inner.product(out, x, weight)

    def divergence_sums(
        self, own: Side, other: Side, saved: PairSaved, divergence: Divergence
    ) -> Tensor | None:
        return self._inner.divergence_sums(own, other, saved, divergence)

    def divergence_grad(
        self,
        own: Side,
        other: Side,
        saved: PairSaved,
        divergence: Divergence,
        weights: PairWeights,
        out: PairOut,
    ) -> bool:
        return self._inner.divergence_grad(own, other, saved, divergence, weights, out)

    def divergence_loss(
        self,
        own: Side,
        other: Side,
        divergence: Divergence,
        weights: PairWeights,
        out: PairOut,
        outputs: tuple[str, ...],
        other_outputs: tuple[str, ...],
    ) -> list[Tensor] | None:
        if not row_kernels_make((*outputs, *other_outputs)):
            return None
        given = divergence, weights, out, outputs, other_outputs
        return self._inner.divergence_loss(own, other, *given)
