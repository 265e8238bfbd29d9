"""Clip-Cov: no gradient for a few tokens of high log-probability/advantage covariance."""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels.objectives._inputs import (
    MAX_EXPONENT,
    PolicyLoss,
    log_ratio,
    policy_metrics,
    policy_tokens,
)
from em_kernels.objectives.grpo import clipped_surrogate
from em_kernels.ops.checks import count_mask
from em_kernels.ops.covariance import clip_cov_mask, token_covariance


@torch.no_grad()
def clip_cov_selection(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    ratio: float = 2e-4,
    lower: float = 1.0,
    upper: float = 5.0,
    clip_low: float = 1.0,
    clip_high: float = 1.0,
    generator: torch.Generator | None = None,
    group=None,
) -> Tensor:
    """The tokens whose loss Clip-Cov drops: `clip_cov_mask` of those PPO has not clipped.

    Call it once with all the tokens of an optimiser update, then take slices for micro-batches.

    Args:
        logprob, old_logprob, advantage, mask, clip_low, clip_high: as in `clip_cov_loss`.
        ratio, lower, upper, generator, group: as in `clip_cov_mask`.

    Returns:
        (..., T) bool.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Cui et al., "The Entropy Mechanism of Reinforcement Learning for Reasoning Language
    Models" (2025), arXiv:2505.22617, Clip-Cov.
    """
    tokens = policy_tokens(logprob, old_logprob, advantage, mask)
    _, clipped = clipped_surrogate(
        log_ratio(tokens, MAX_EXPONENT).exp(), tokens.advantage, clip_low, clip_high
    )
    cov = token_covariance(tokens.logprob, tokens.advantage, tokens.counted, group=group)
    bounds = dict(ratio=ratio, lower=lower, upper=upper)
    return clip_cov_mask(
        cov, tokens.counted, exclude=clipped, generator=generator, group=group, **bounds
    )


def clip_cov_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    selected: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 1.0,
) -> PolicyLoss:
    """L_t = 0 for the selected tokens, -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) else.

    The selected tokens stay in the mask, and so in the denominator of `aggregate_loss`.

    Args:
        selected: (..., T) bool from `clip_cov_selection` of the whole update.
        clip_low, clip_high: 1 and 1 in the method's recipes, which all but turn clipping off.
        All others: as in `grpo_loss`.

    Returns:
        PolicyLoss with metrics clip_fraction (by PPO), selected_fraction and policy_kl (nats). The
        log-ratio is not held, as in verl, up to what overflows: 80, without gradient above.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Cui et al. (2025), arXiv:2505.22617, Clip-Cov.
    """
    tokens = policy_tokens(logprob, old_logprob, advantage, mask)
    selected = count_mask(selected, logprob, "selected")
    loss, clipped = clipped_surrogate(
        log_ratio(tokens, MAX_EXPONENT).exp(), tokens.advantage, clip_low, clip_high
    )
    metrics = policy_metrics(tokens, clip_fraction=clipped, selected_fraction=selected)
    return PolicyLoss(torch.where(selected, 0, loss), metrics)
