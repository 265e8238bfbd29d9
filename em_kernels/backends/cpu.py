"""The C++ backend: `stats`, `grad` and `loss` of `em_kernels.reference`, vectorised and threaded.

One pass for the statistics, one for the gradient; `loss` does both to a row while it is in cache.
The instruction set is chosen at run time; `set_isa` chooses another, for tests and measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from em_kernels.backends import availability
from em_kernels.backends.interface import Backend, RowSpec, Saved, Upstream
from em_kernels.backends.pair import Divergence, PairOut, PairSaved, PairWeights, Side


def why_not(device: torch.device | None) -> str | None:
    if device is not None and device.type != "cpu":
        return f"it serves tensors on the CPU, not on {device.type}"
    found = availability.load("the compiled part", "em_kernels._C", "install a C++ compiler")
    return found if isinstance(found, str) else None


RowArguments: TypeAlias = (
    "tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float, float, float, int]"
)


class Cpu(Backend):
    """The compiled part, `em_kernels._C`; ImportError where that is not built."""

    name = "cpu"
    narrows = counts = True

    def __init__(self) -> None:
        from em_kernels import _C

        self._compiled = _C
        self.part_entries = _C.BLOCK

    def stats(self, logits: Tensor, spec: RowSpec, outputs: tuple[str, ...]) -> list[Tensor]:
        return self._compiled.stats(logits, *_row_arguments(spec), outputs, None, 0)

    def grad(
        self, logits: Tensor, spec: RowSpec, saved: Saved, upstream: Upstream, out: Tensor
    ) -> None:
        self._compiled.grad(logits, *_row_arguments(spec), *saved, *upstream, out)

    def loss(
        self,
        logits: Tensor,
        spec: RowSpec,
        upstream: Upstream,
        outputs: tuple[str, ...],
        out: Tensor,
    ) -> list[Tensor]:
        return self._compiled.loss(logits, *_row_arguments(spec), *upstream, outputs, out)

    def divergence_sums(
        self, own: Side, other: Side, saved: PairSaved, divergence: Divergence
    ) -> Tensor:
        return self._compiled.divergence_sums(*_pair(own, other, divergence), list(saved))

    def divergence_grad(
        self,
        own: Side,
        other: Side,
        saved: PairSaved,
        divergence: Divergence,
        weights: PairWeights,
        out: PairOut,
    ) -> bool:
        pair = _pair(own, other, divergence)
        self._compiled.divergence_grad(*pair, list(saved), *weights, *out)
        return True

    def divergence_loss(
        self,
        own: Side,
        other: Side,
        divergence: Divergence,
        weights: PairWeights,
        out: PairOut,
        outputs: tuple[str, ...],
        other_outputs: tuple[str, ...],
    ) -> list[Tensor]:
        pair = _pair(own, other, divergence)
        return self._compiled.divergence_loss(*pair, *weights, *out, outputs, other_outputs)

    def new_parts(self, rows: int) -> Tensor:
        return self._compiled.new_parts(rows)

    def part_stats(
        self, logits: Tensor, spec: RowSpec, outputs: tuple[str, ...], parts: Tensor, first: int
    ) -> list[Tensor]:
        return self._compiled.stats(logits, *_row_arguments(spec), outputs, parts, first)

    def above(
        self,
        logits: Tensor,
        spec: RowSpec,
        levels: Tensor,
        top: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        return self._compiled.above(logits, *_row_arguments(spec), levels, top, ids)

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None
    ) -> Tensor:
        """Uninitialised and contiguous, for gradients and chunks of logits.

        The memory of a large one is kept, when the tensor is freed, for the next: pages that were
        in use before need no page faults. At most three blocks are kept, until `release_memory`: as
        many as a step has, of logits kept for the backward pass, of a chunk and of dW; each until
        sixteen others have been freed after it.
        """
        return self._compiled.empty(shape, dtype)

    def release_memory(self) -> None:
        """Give the blocks kept by `empty` back to the system."""
        self._compiled.release_memory()

    def add_product(self, total: Tensor, grad_logits: Tensor, x: Tensor, add: bool) -> bool:
        """Of bfloat16 operands that are not empty, where the processor can do it fast."""
        if grad_logits.numel() == 0:
            return False
        return self._compiled.add_product(total, grad_logits, x, add)

    def product(self, out: Tensor, x: Tensor, weight: Tensor) -> bool:
        """Of 16-bit operands of an even width, where the processor can do it fast."""
        return self._compiled.product(out, x, weight)

    def isa_levels(self) -> list[str]:
        """Instruction sets compiled and usable here, best first."""
        return self._compiled.isa_levels()

    def get_isa(self) -> str:
        """The one in use."""
        return self._compiled.get_isa()

    def set_isa(self, name: str) -> None:
        """Use another; ValueError if it is none of `isa_levels`."""
        self._compiled.set_isa(name)

    def build_info(self) -> dict[str, object]:
        """Compiler, the instruction sets usable here and the one in use."""
        built: dict[str, object] = {"compiler": self._compiled.compiler()}
        return built | {"isa_levels": self.isa_levels(), "isa": self.get_isa()}


def _row_arguments(spec: RowSpec) -> RowArguments:
    return (
        *(spec.bias, spec.target, spec.mask, spec.temperature_rows),
        *(spec.temperature, spec.softcap, spec.logit_scale, spec.valid_vocab),
    )


def _pair(
    own: Side, other: Side, divergence: Divergence
) -> tuple[Tensor, RowArguments, Tensor, RowArguments, str, float]:
    mine, theirs = _row_arguments(own.spec), _row_arguments(other.spec)
    return own.logits, mine, other.logits, theirs, divergence.kind, divergence.mixed


def load() -> Cpu:
    return Cpu()


def release_memory() -> None:
    """Give the memory that the CPU kernels keep between calls back to the system.

    ImportError where they are not built.
    """
    Cpu().release_memory()
