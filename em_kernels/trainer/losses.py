"""The loss of one optimiser step of reinforcement learning, by the name of the objective.

In two phases, however the step is cut into micro-batches: `select_tokens` looks at all the tokens
of the step at once, then `step_loss` is called for each micro-batch.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from em_kernels.objectives.aggregation import aggregate_loss, aggregation_denominator
from em_kernels.objectives.bonus import entropy_bonus
from em_kernels.trainer.batch import Tokens
from em_kernels.trainer.objective_table import TABLE
from em_kernels.trainer.rl_config import RLConfig


class StepLoss(NamedTuple):
    """The loss of a micro-batch, as a part of that of its step, and sums over its tokens."""

    loss: Tensor
    sums: dict[str, float]


def select_tokens(
    config: RLConfig, objective: str, tokens: Tokens, current: dict[str, Tensor]
) -> Tokens:
    """First phase: the tokens of a step with what the loss needs to know of all of them.

    Args:
        current: (B, T) each, what the objective `reads` of the current policy.
    """
    select = TABLE[objective].select
    return tokens if select is None else select(config, objective, tokens, current)


def step_size(config: RLConfig, objective: str, tokens: Tokens) -> Tensor:
    """What the loss of a step is divided by: its tokens, answers or pairs; 0-d."""
    if TABLE[objective].pairs:
        return tokens.loss_mask.any(1).sum().clamp(min=2) / 2
    return aggregation_denominator(tokens.loss_mask, **config.aggregation(objective))


def step_loss(
    config: RLConfig,
    objective: str,
    stats,
    part: Tokens,
    *,
    size: Tensor,
    entropy_coef: float,
) -> StepLoss:
    """Second phase: the loss of a micro-batch from its `token_stats`; the parts of a step add up.

    Args:
        size: `step_size` of the whole step.
        entropy_coef: of the entropy bonus; below zero it minimises entropy.
    """
    entry, mask = TABLE[objective], part.loss_mask
    assert entry.loss is not None
    loss, metrics = entry.loss(config, objective, stats, part)
    if entry.pairs:
        counted = mask.any(1)[0::2]
        count, whole = int(counted.sum()), (loss * counted).sum() / size
        if entropy_coef:
            whole = whole + _pair_bonus(stats.entropy, mask, entropy_coef, size)
    else:
        if part.rollout_weight is not None:
            loss = loss * part.rollout_weight
        if entropy_coef:
            loss = entropy_bonus(loss, stats.entropy, mask, coef=entropy_coef)
        count = int(mask.sum())
        mode = config.setting("reduction", objective)
        whole = aggregate_loss(loss, mask, mode=mode, denominator=size)
    sums = {name: float(value) * count for name, value in metrics.items()}
    return StepLoss(whole, {**sums, "tokens": count})


def _pair_bonus(entropy: Tensor, mask: Tensor, coef: float, size: Tensor) -> Tensor:
    """Of the mean over answers of each one's mean entropy, as regrets are means over tokens."""
    return -coef * aggregate_loss(entropy, mask, mode="sequence_mean", denominator=2 * size)
