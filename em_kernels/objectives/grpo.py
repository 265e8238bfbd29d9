"""GRPO: the clipped policy-gradient loss, with clip-higher and a KL penalty as options."""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels.objectives._inputs import (
    PolicyLoss,
    check_clip,
    log_ratio,
    policy_metrics,
    policy_tokens,
)
from em_kernels.objectives.kl import check_reference, kl_penalty
from em_kernels.ops.checks import check_floating


def grpo_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ref_logprob: Tensor | None = None,
    ref_kl: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
) -> PolicyLoss:
    """L_t = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + kl_coef KL_t.

    rho = exp(logprob - old_logprob), A the advantage of the answer, KL_t either the estimate of
    KL(p || p_ref) at the sampled token, from `ref_logprob`, or KL(p || p_ref) itself, over the
    whole vocabulary, as `ref_kl`. clip_high > clip_low is DAPO's clip-higher.

    Args:
        logprob: (..., T) floating point, of the sampled tokens under the current policy.
        old_logprob: (..., T) under the policy that sampled them; `logprob.detach()` on-policy.
        advantage: (..., T), or (...) with one value per answer. No gradient.
        mask: (..., T) bool or numeric, tokens where it is non-zero count (a floating mask holds 0
            and 1 only); NaN elsewhere is ignored.
        clip_low, clip_high: distances of the clip bounds from 1, >= 0.
        ref_logprob: (..., T) under the reference policy; kl_coef > 0 needs it or `ref_kl`.
        ref_kl: (..., T) KL(p || p_ref) per token with its gradient, nats, in place of an estimate:
            `linear_divergence(hidden, weight, ref_hidden, ref_weight, kind="reverse_kl")`. It has
            no sampling error, and its gradient is that of the KL at every token.
        kl_coef: beta of the KL penalty, >= 0.
        kl_estimator: "k1", "k2" or "k3" of `kl_estimate`; with `ref_kl` nothing is estimated.

    Returns:
        PolicyLoss: `loss` (..., T) float32 (float64 for float64) for `aggregate_loss`; `metrics`
        clip_fraction (tokens whose clipped term is the active one and thus have no gradient),
        policy_kl (old || current, nats) and, with a reference, ref_kl (nats). The log-ratio is
        held to at most 20, without gradient above: verl's to [-20, 20], TRL's not at all.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Schulman et al., "Proximal Policy Optimization Algorithms" (2017), eq. 7; Shao et al.,
    "DeepSeekMath" (2024), eq. 3; clip-higher: Yu et al., "DAPO" (2025).
    """
    check_reference(kl_coef, ref_logprob, ref_kl, kl_estimator)
    tokens = policy_tokens(logprob, old_logprob, advantage, mask)
    loss, clipped = clipped_surrogate(
        log_ratio(tokens).exp(), tokens.advantage, clip_low, clip_high
    )
    return kl_penalty(
        PolicyLoss(loss, policy_metrics(tokens, clip_fraction=clipped)),
        logprob,
        mask,
        kl_coef=kl_coef,
        ref_logprob=ref_logprob,
        ref_kl=ref_kl,
        kl_estimator=kl_estimator,
    )


def clipped_surrogate(
    ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """(-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), where the clipped term is smaller).

    Shapes (...), `ratio` and `advantage` alike; the second result is bool. Source: as `grpo_loss`.
    """
    check_clip(clip_low, clip_high)
    check_floating("ratio", ratio)
    check_floating("advantage", advantage, ratio)
    plain = -ratio * advantage
    bounded = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    return torch.maximum(plain, bounded), (bounded > plain).detach()
