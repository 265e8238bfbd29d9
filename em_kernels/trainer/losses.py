"""The loss of one optimiser step of reinforcement learning, by the name of the objective.

In two phases, however the step is cut into micro-batches: `select_tokens` chooses among all the
tokens of the step at once, then `step_loss` is called for each micro-batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from em_kernels.objectives._inputs import PolicyLoss
from em_kernels.objectives.aggregation import aggregate_loss, aggregation_denominator
from em_kernels.objectives.bonus import entropy_bonus
from em_kernels.objectives.clip_cov import clip_cov_loss, clip_cov_selection
from em_kernels.objectives.grpo import grpo_loss
from em_kernels.objectives.high_entropy import high_entropy_loss
from em_kernels.objectives.kl_cov import kl_cov_loss, kl_cov_selection
from em_kernels.objectives.ppl import ppl_loss, pseudo_label_kl
from em_kernels.ops.covariance import high_entropy_mask
from em_kernels.trainer.batch import Tokens
from em_kernels.trainer.rl_config import RLConfig

SELECTING = ("clip_cov", "kl_cov", "high_entropy")


class StepLoss(NamedTuple):
    """The loss of a micro-batch, as a part of that of its step, and sums over its tokens."""

    loss: Tensor
    sums: dict[str, float]


def select_tokens(
    config: RLConfig, objective: str, tokens: Tokens, logprob: Tensor, entropy: Tensor
) -> Tensor:
    """First phase: what an objective of `SELECTING` takes of all the tokens of a step, (B, T) bool.

    Args:
        logprob, entropy: (B, T) under the current policy.
    """
    ratio = config.setting("ratio", objective)
    inputs = (tokens.advantage, tokens.loss_mask)
    match objective:
        case "clip_cov":
            return clip_cov_selection(
                logprob,
                tokens.old_logprob,
                *inputs,
                ratio=ratio,
                lower=config.cov_lower,
                upper=config.cov_upper,
                **_clip(config, objective),
            )
        case "kl_cov":
            return kl_cov_selection(logprob, *inputs, ratio=ratio)
        case "high_entropy":
            return high_entropy_mask(entropy, tokens.loss_mask, ratio=ratio)
        case _:
            raise ValueError(f"objective must be one of {SELECTING}, got {objective!r}")


def step_size(config: RLConfig, objective: str, tokens: Tokens) -> Tensor:
    """What the loss of a step is divided by: its tokens, answers or pairs; 0-d."""
    if objective == "ppl":
        return tokens.loss_mask.any(1).sum().clamp(min=2) / 2
    return aggregation_denominator(tokens.loss_mask, mode=config.reduction)


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
    if objective == "ppl":
        return _pair_loss(config, stats, part, size)
    loss, metrics = _policy_loss(config, objective, stats.logprob, part)
    if entropy_coef:
        loss = entropy_bonus(loss, stats.entropy, part.loss_mask, coef=entropy_coef)
    count = int(part.loss_mask.sum())
    sums = {name: float(value) * count for name, value in metrics.items()}
    whole = aggregate_loss(loss, part.loss_mask, mode=config.reduction, denominator=size)
    return StepLoss(whole, {**sums, "tokens": count})


def _policy_loss(config: RLConfig, objective: str, logprob: Tensor, part: Tokens) -> PolicyLoss:
    inputs = (logprob, part.old_logprob, part.advantage, part.loss_mask)
    clip = _clip(config, objective)
    match objective:
        case "clip_cov":
            return clip_cov_loss(*inputs, part.selected, **clip)
        case "kl_cov":
            return kl_cov_loss(*inputs, part.selected, kl_coef=config.kl_cov_coef)
        case "high_entropy":
            return high_entropy_loss(*inputs, part.selected, **clip)
        case _:
            return grpo_loss(
                *inputs,
                ref_logprob=part.ref_logprob,
                ref_kl=part.ref_kl,
                kl_coef=config.ref_kl,
                kl_estimator=config.kl_estimator,
                **clip,
            )


def _clip(config: RLConfig, objective: str) -> dict[str, Any]:
    return {name: config.setting(name, objective) for name in ("clip_low", "clip_high")}


def _pair_loss(config: RLConfig, stats, part: Tokens, size: Tensor) -> StepLoss:
    """Rows take turns: chosen, rejected, chosen, ..."""
    logprob, mask = stats.logprob, part.loss_mask
    kl = pseudo_label_kl(logprob) if config.ppl_label == "pseudo" else part.ref_kl
    options: dict[str, Any] = dict(gamma=config.gamma, alpha=config.alpha, length_normalize=True)
    if kl is not None:
        options |= dict(chosen_kl=kl[0::2], rejected_kl=kl[1::2])
    loss, metrics = ppl_loss(logprob[0::2], logprob[1::2], mask[0::2], mask[1::2], **options)
    counted = mask.any(1)[0::2]
    count = int(counted.sum())
    sums = {f"pair_{name}": float(value) * count for name, value in metrics.items()}
    return StepLoss((loss * counted).sum() / size, {**sums, "tokens": count})
