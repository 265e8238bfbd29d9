"""80/20: the policy gradient of the highest-entropy tokens only."""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels.objectives._inputs import PolicyLoss, masked_mean
from em_kernels.objectives.grpo import grpo_loss
from em_kernels.ops.checks import count_mask


def high_entropy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    selected: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> PolicyLoss:
    """L_t = -1[H_t >= tau] min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A).

    The tokens left out stay in the mask, and so in the denominator of `aggregate_loss`.

    Args:
        selected: (..., T) bool, 1[H_t >= tau], from `em_kernels.high_entropy_mask` with the
            entropies of all the tokens of the update.
        All others: as in `grpo_loss`.

    Returns:
        PolicyLoss with the metrics of `grpo_loss` (over all masked tokens) and selected_fraction.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Wang et al., "Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective
    Reinforcement Learning for LLM Reasoning" (2025), arXiv:2506.01939.
    """
    loss, metrics = grpo_loss(
        logprob, old_logprob, advantage, mask, clip_low=clip_low, clip_high=clip_high
    )
    selected = count_mask(selected, logprob, "selected")
    fraction = masked_mean(selected.to(loss.dtype), count_mask(mask, logprob))
    return PolicyLoss(torch.where(selected, loss, 0), {**metrics, "selected_fraction": fraction})
