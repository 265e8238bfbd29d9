"""Two rows of logits that are compared, and what a `Backend` is told and asked of them.

p is the softmax of the first row, q of the other; `divergence` has the formulas.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

from torch import Tensor

from em_kernels.backends.interface import Argument, RowSpec

KINDS = ("forward_kl", "reverse_kl", "js")


class Divergence(NamedTuple):
    """Which one. `beta` is the weight of q in the mixture m of "js", and unread elsewhere."""

    kind: str = "forward_kl"
    beta: float = 0.5

    @property
    def mixed(self) -> float:
        """m = mixed q + (1 - mixed) p, of which forward KL(q || m) and reverse KL(p || m) are."""
        return {"forward_kl": 0.0, "reverse_kl": 1.0}.get(self.kind, self.beta)

    @property
    def weights(self) -> tuple[float, float]:
        """Of KL(p || m) and KL(q || m) in the divergence."""
        given = {"forward_kl": (0.0, 1.0), "reverse_kl": (1.0, 0.0)}
        return given.get(self.kind, (1 - self.beta, self.beta))


class OtherSpec(NamedTuple):
    """The `RowSpec` of the other row, where it may be another; the rest they share."""

    bias: Annotated[Tensor | None, Argument("other_bias")] = None
    temperature_rows: Annotated[Tensor | None, Argument("other_temperature_rows")] = None
    temperature: Annotated[float, Argument("other_temperature")] = 1.0
    softcap: Annotated[float, Argument("other_softcap")] = 0.0
    logit_scale: Annotated[float, Argument("other_logit_scale")] = 1.0
    numbers: Annotated[Tensor | None, Argument("other_numbers")] = None

    @classmethod
    def of(cls, spec: RowSpec) -> OtherSpec:
        return cls(*(getattr(spec, name) for name in cls._fields))

    def beside(self, spec: RowSpec) -> RowSpec:
        """The whole of it, `spec` being that of the first row."""
        return spec._replace(**self._asdict())


class Side(NamedTuple):
    """The rows of one of the two, (outer, inner, V) with unit last stride, and their spec."""

    logits: Tensor
    spec: RowSpec


class PairSaved(NamedTuple):
    """What the gradients need of a pair of rows, each (N,).

    max and other_max are in units of either row's u. `gap` is log1p_r less other_log1p_r, and
    better than the difference of the two: sum q = sum p holds with it.
    """

    max: Tensor
    log1p_r: Tensor
    other_max: Tensor
    other_log1p_r: Tensor
    gap: Tensor
    own_kl: Tensor  # KL(p || m)
    other_kl: Tensor  # KL(q || m)

    def value(self, divergence: Divergence) -> Tensor:
        """The divergence of each pair."""
        if divergence.kind == "forward_kl":
            return self.other_kl
        if divergence.kind == "reverse_kl":
            return self.own_kl
        own, other = divergence.weights
        return own * self.own_kl + other * self.other_kl


class PairWeights(NamedTuple):
    """The weight of each row's divergence, (N,), in either gradient; None where that is not
    wanted. They differ by the scales that float16 needs."""

    own: Tensor | None
    other: Tensor | None


class PairOut(NamedTuple):
    """Where the gradients go: of the shape of the logits, and maybe their memory."""

    own: Tensor | None
    other: Tensor | None
