"""SAPO: a soft gate on the ratio in place of a clip, steeper for tokens to be made less likely."""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels.objectives._inputs import (
    PolicyLoss,
    log_ratio,
    policy_metrics,
    policy_tokens,
)
from em_kernels.ops.checks import check_number


def sapo_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
) -> PolicyLoss:
    """L_t = -(4 / tau) sigmoid(tau (rho - 1)) A, tau = tau_pos where A > 0, else tau_neg.

    rho = exp(logprob - old_logprob). The gradient is that of -rho A times the gate
    4 sigmoid(tau (rho - 1)) (1 - sigmoid(tau (rho - 1))): 1 on-policy, falling smoothly to 0 on
    either side, faster with a larger tau.

    Args:
        logprob, old_logprob, advantage, mask: as in `grpo_loss`; the advantage may differ between
            the tokens of an answer.
        tau_pos, tau_neg: temperatures, > 0.

    Returns:
        PolicyLoss: `loss` (..., T) float32 (float64 for float64) for `aggregate_loss`; `metrics`
        gate (the mean of the gate, 1 on-policy) and policy_kl (old || current, nats). The log-ratio
        is held to at most 20, without gradient above; the gate is 0 long before.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Gao et al. (Qwen team), "Soft Adaptive Policy Optimization" (2025), arXiv:2511.20347;
    temperatures as there and in TRL and verl. Means over answers first: `aggregate_loss` with
    "sequence_mean".
    """
    check_number("tau_pos", tau_pos, lambda v: v > 0, "positive")
    check_number("tau_neg", tau_neg, lambda v: v > 0, "positive")
    tokens = policy_tokens(logprob, old_logprob, advantage, mask)
    ratio = log_ratio(tokens).exp()
    tau = torch.where(tokens.advantage > 0, tau_pos, tau_neg).to(ratio.dtype)
    soft = torch.sigmoid(tau * (ratio - 1))
    metrics = policy_metrics(tokens, gate=4 * soft * (1 - soft))
    return PolicyLoss(-4 / tau * soft * tokens.advantage, metrics)
