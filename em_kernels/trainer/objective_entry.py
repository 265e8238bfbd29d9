"""What the trainer knows of an objective: a line of the table in `objective_table`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from em_kernels.backends.interface import TokenStats
from em_kernels.objectives._inputs import PolicyLoss
from em_kernels.trainer.batch import Tokens

if TYPE_CHECKING:
    from em_kernels.trainer.rewards import Answers
    from em_kernels.trainer.rl_config import RLConfig

SHARED = object()
"""Stands for a setting's default where an objective has none of its own."""


class OtherPolicy(NamedTuple):
    """What the loss has of a policy besides the current one and the one that sampled.

    setting: the setting that keeps a second model for it; None: there is none.
    divergence: of that model, at every token exactly: a kind of `linear_divergence`.
    is_sampler: the second model is a copy of the policy that samples, made anew in every update.
    stored: how many of the likeliest tokens of the policy that sampled are kept at every place,
        with their log-probabilities then (`label_ids`, `label_logprob` of `Tokens`) and, with
        their gradient, now (`label_current`).
    """

    setting: str | None = None
    divergence: str | None = None
    is_sampler: bool = False
    stored: int = 0


Loss = Callable[["RLConfig", str, TokenStats, Tokens], PolicyLoss]
"""(settings, objective, `outputs` of the current policy, micro-batch) -> (B, T), or (B / 2,) of
pairs."""
Selection = Callable[["RLConfig", str, Tokens, dict[str, Tensor]], Tokens]
"""(settings, objective, tokens of a step, `reads` of the current policy) -> the tokens with what
the loss needs to know of all of them together: `selected`, another `advantage`, ..."""


@dataclass(frozen=True)
class ObjectiveEntry:
    """An objective of the trainer.

    settings: those that it looks at besides what every run has, each with the objective's own
        default or `SHARED`; another that is given is refused, see `unused_settings`.
    loss: of a micro-batch, per token; None where the objective does without rewards and has an
        update of its own.
    outputs: the statistics of the current policy that the loss reads, with their gradient.
    select: what is done with all the tokens of an optimiser step before it is cut into
        micro-batches, from the statistics `reads` of the current policy, without gradient.
    reward: the reward unless one is given.
    resamples: problems whose answers are all right or all wrong make room for others; the reward
        must be 0 or 1.
    keeps: which answers are trained on, (N,) bool; they are then clustered by what they say.
    pairs: answers are compared in pairs, chosen and rejected, and the loss has one value a pair.
    other: what it has of another policy.
    """

    settings: Mapping[str, Any]
    loss: Loss | None = None
    outputs: tuple[str, ...] = ("logprob",)
    select: Selection | None = None
    reads: tuple[str, ...] = ("logprob", "entropy")
    reward: str = "verified"
    resamples: bool = False
    keeps: Callable[[RLConfig, Answers], Tensor] | None = None
    pairs: bool = False
    other: Callable[[RLConfig], OtherPolicy] = field(default=lambda config: OtherPolicy())

    @property
    def unit(self) -> int:
        """Rows that belong together: one answer, or a pair of them."""
        return 2 if self.pairs else 1

    @property
    def has_ratios(self) -> bool:
        """Whether the loss is of ratios between the current policy and the one that sampled."""
        return "rollout_support" in self.settings

    def default(self, name: str) -> Any:
        """Of a setting that is None until an objective says more."""
        own = self.settings.get(name, SHARED)
        return None if own is SHARED else own


def looks_at(*names: str, **own: Any) -> dict[str, Any]:
    """Settings by name: `names` with the default that all objectives share, `own` with its own."""
    return {**dict.fromkeys(names, SHARED), **own}
