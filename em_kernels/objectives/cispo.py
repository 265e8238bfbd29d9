"""CISPO: the importance weight is clipped, not the token, so that every token keeps a gradient."""

from __future__ import annotations

from torch import Tensor

from em_kernels.objectives._inputs import (
    PolicyLoss,
    check_clip,
    log_ratio,
    policy_metrics,
    policy_tokens,
    weighted_logprob,
)


def cispo_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> PolicyLoss:
    """L_t = -sg(clip(rho, 1 - clip_low, 1 + clip_high)) A logprob.

    rho = exp(logprob - old_logprob), sg without gradient: REINFORCE with a truncated importance
    weight. Where rho is outside the bounds the token still pushes, with the weight of the bound;
    PPO's clip would silence it. Only the gradient means anything: the value of the loss does not
    fall as rewards rise.

    Args:
        logprob, old_logprob, advantage, mask: as in `grpo_loss`; the advantage may differ between
            the tokens of an answer.
        clip_low: distance of the lower bound from 1, >= 0; 1, or more, is no lower bound.
        clip_high: distance of the upper bound from 1, >= 0. TRL and Liger are told the bound itself
            and have no lower one: their epsilon_high is 1 + clip_high.

    Returns:
        PolicyLoss: `loss` (..., T) float32 (float64 for float64) for `aggregate_loss`; `metrics`
        clip_fraction (tokens whose weight is that of a bound) and policy_kl (old || current, nats).
        The log-ratio is held to at most 20.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: MiniMax, "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention"
    (2025), arXiv:2506.13585, section 3.1, where the upper bound alone is tuned. The bound of 5 is
    what TRL recommends after Khatri et al., "The Art of Scaling Reinforcement Learning Compute for
    LLMs" (2025), arXiv:2510.13786. Mean over tokens: `aggregate_loss` with "token_mean".
    """
    check_clip(clip_low, clip_high)
    tokens = policy_tokens(logprob, old_logprob, advantage, mask)
    ratio = log_ratio(tokens).exp().detach()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    metrics = policy_metrics(tokens, clip_fraction=weight != ratio)
    return PolicyLoss(-weighted_logprob(tokens, weight), metrics)
