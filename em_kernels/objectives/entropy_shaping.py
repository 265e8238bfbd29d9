"""Entropy in the advantage: tokens where the policy was unsure gain more, or lose less."""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels.objectives._inputs import masked, token_advantage
from em_kernels.ops.checks import check_floating, check_number, count_mask


@torch.no_grad()
def entropy_advantage(
    entropy: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    alpha: float = 0.4,
    kappa: float = 2.0,
) -> Tensor:
    """A'_t = A_t + min(alpha H_t, |A_t| / kappa).

    The second bound keeps the sign of A; an answer of advantage 0 stays at 0. H is a constant here:
    nothing raises it (see `entropy_bonus`), the policy gradient has larger steps at forks.

    Args:
        entropy: (..., T) floating point, of the current policy, nats. No gradient.
        advantage: (..., T), or (...) with one value per answer.
        mask: (..., T) bool or numeric; where it is 0 the result is 0, even from NaN.
        alpha: advantage per nat, >= 0 (published: 0.4 with GRPO, 0.1 with PPO).
        kappa: > 1.

    Returns:
        (..., T) float32 (float64 for float64), detached.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Cheng et al., "Reasoning with Exploration: An Entropy Perspective" (2025),
    arXiv:2506.14758, entropy-based advantage shaping.
    """
    check_floating("entropy", entropy)
    check_number("alpha", alpha, lambda v: v >= 0, "at least 0")
    check_number("kappa", kappa, lambda v: v > 1, "above 1, which keeps the sign of A,")
    counted = count_mask(mask, entropy)
    extra = alpha * masked(entropy, counted).clamp(min=0)
    advantage = token_advantage(advantage, counted, extra.dtype)
    return advantage + torch.minimum(extra, advantage.abs() / kappa)
