"""ConciseR, first stage: GRPO with clip-higher, dynamic sampling and an entropy bonus."""

from __future__ import annotations

from torch import Tensor

from em_kernels.objectives._inputs import Groups, PolicyLoss, masked_mean
from em_kernels.objectives.bonus import entropy_bonus
from em_kernels.objectives.grpo import grpo_loss
from em_kernels.ops.checks import check_tensor, count_mask


def grpo_plus_plus_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    entropy: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    entropy_coef: float = 1e-3,
) -> PolicyLoss:
    """L_t = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) - entropy_coef H_t.

    Over the answers that `dynamic_sampling_mask` keeps. The clip bounds are DAPO's.

    Args:
        entropy: (..., T), of the current policy, with its gradient, in nats.
        entropy_coef: weight of the entropy bonus, loss units per nat.
        All others: as in `grpo_loss`.

    Returns:
        PolicyLoss, with the metrics of `grpo_loss` and entropy (mean, nats).

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Song and Zheng, "Walk Before You Run! Concise LLM Reasoning via Reinforcement Learning"
    (2025), GRPO++; Yu et al., "DAPO" (2025), sections 3.1-3.2.
    """
    loss, metrics = grpo_loss(
        logprob, old_logprob, advantage, mask, clip_low=clip_low, clip_high=clip_high
    )
    loss = entropy_bonus(loss, entropy, mask, coef=entropy_coef)
    return PolicyLoss(loss, {**metrics, "entropy": masked_mean(entropy, count_mask(mask, logprob))})


def dynamic_sampling_mask(correct: Tensor, prompt: Tensor) -> Tensor:
    """True for the answers of a prompt that was neither always nor never answered correctly.

    The others have no advantage: drop their rows, and draw new prompts in their place.

    Args:
        correct: (N,) bool or numeric, non-zero where the answer is right.
        prompt: (N,) integer id of each answer's prompt.

    Returns:
        (N,) bool; a group of one answer is dropped.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Yu et al., "DAPO" (2025), dynamic sampling.
    """
    check_tensor("correct", correct)
    groups, right = Groups(prompt, correct), correct != 0
    return ~groups.all(right) & ~groups.all(~right)
