"""The Triton kernels as a backend."""

from __future__ import annotations

from torch import Tensor

from em_kernels.backends.interface import Backend, Descent, Goal, RowSpec, Saved, Upstream
from em_kernels.backends.pair import Divergence, PairOut, PairSaved, PairWeights, Side
from em_kernels.backends.triton import above, control, launch, linear, presence, scale
from em_kernels.backends.triton import divergence as pairs
from em_kernels.backends.triton.elementary import INTERPRETED

interpreted = bool(INTERPRETED.value)
"""Whether the kernels run in Triton's interpreter: what TRITON_INTERPRET said, as Triton reads it,
when they were imported."""


class Triton(Backend):
    """For tensors on a GPU, and in the interpreter on the CPU."""

    name = "triton"
    narrows = True
    counts = True

    def stats(self, logits: Tensor, spec: RowSpec, outputs: tuple[str, ...]) -> list[Tensor]:
        return launch.stats(logits, spec, outputs)

    def grad(
        self, logits: Tensor, spec: RowSpec, saved: Saved, upstream: Upstream, out: Tensor
    ) -> None:
        launch.grad(logits, spec, saved, upstream, out)

    def loss(
        self,
        logits: Tensor,
        spec: RowSpec,
        upstream: Upstream,
        outputs: tuple[str, ...],
        out: Tensor,
    ) -> list[Tensor]:
        return launch.loss(logits, spec, upstream, outputs, out)

    def linear_stats(
        self, hidden: Tensor, weight: Tensor, spec: RowSpec, outputs: tuple[str, ...]
    ) -> list[Tensor]:
        return linear.linear_stats(hidden, weight, spec, outputs)

    def scale_(self, x: Tensor, factor: Tensor) -> bool:
        """Where x is contiguous."""
        if not x.is_contiguous():
            return False
        scale.scale_(x, factor)
        return True

    def count_present(self, logits: Tensor, spec: RowSpec, top: Tensor | None) -> Tensor:
        return presence.count_present(logits, spec, top)

    def above(
        self,
        logits: Tensor,
        spec: RowSpec,
        levels: Tensor,
        top: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        return above.above(logits, spec, levels, top, ids)

    def find_temperature(self, logits: Tensor, goal: Goal) -> Tensor:
        return control.find_temperature(logits, goal)

    def descend(self, z: Tensor, descent: Descent) -> Tensor:
        return control.descend(z, descent)

    def divergence_sums(
        self, own: Side, other: Side, saved: PairSaved, divergence: Divergence
    ) -> Tensor:
        return pairs.sums(own, other, saved, divergence)

    def divergence_grad(
        self,
        own: Side,
        other: Side,
        saved: PairSaved,
        divergence: Divergence,
        weights: PairWeights,
        out: PairOut,
    ) -> bool:
        pairs.grad(own, other, saved, divergence, weights, out)
        return True
