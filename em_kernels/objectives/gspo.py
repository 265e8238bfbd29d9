"""GSPO: one importance ratio an answer, of its whole sequence, and its variant with token
advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels.objectives._inputs import (
    MAX_LOG_RATIO,
    PolicyLoss,
    PolicyTokens,
    policy_metrics,
    policy_tokens,
)
from em_kernels.objectives.grpo import clipped_surrogate


def gspo_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> PolicyLoss:
    """L_t = -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A), s the ratio of the whole answer.

    s = exp(mean_t (logprob_t - old_logprob_t)) over the answer's masked tokens: the ratio of the
    sequences' probabilities, to the power 1 / length. All tokens of an answer have the same s, are
    clipped together, and with one advantage an answer have the same loss: GSPO's objective is its
    mean over answers, `aggregate_loss` with "sequence_mean".

    Args:
        logprob: (..., T) floating point, an answer a row; packed rows are not taken apart.
        old_logprob, mask: as in `grpo_loss`.
        advantage: (..., T), or (...) with one value per answer. No gradient. Where it differs
            between the tokens of an answer, `gspo_token_loss` is the objective that is meant.
        clip_low, clip_high: distances of the clip bounds from 1, >= 0. Those of a token's ratio,
            0.2 and the like, never clip the ratio of a sequence.

    Returns:
        PolicyLoss: `loss` (..., T) float32 (float64 for float64), 0 where the mask is 0; `metrics`
        clip_fraction (tokens of answers that are clipped) and policy_kl (old || current, nats). The
        mean log-ratio is held to at most 20, without gradient above.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Zheng et al., "Group Sequence Policy Optimization" (2025), arXiv:2507.18071, eq. 5 and
    7; clip bounds: section 5.1.
    """
    tokens = policy_tokens(logprob, old_logprob, advantage, mask)
    return _clipped(tokens, _mean_log_ratio(tokens).expand_as(tokens.logprob), clip_low, clip_high)


def gspo_token_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> PolicyLoss:
    """`gspo_loss` with s_t = sg(s) p_t / sg(p_t) in the place of s, sg without gradient.

    s_t has the value of s and the gradient of the token's own log-probability: the advantage of a
    token weighs its own gradient. With one advantage an answer, loss and, under "sequence_mean",
    gradient are those of `gspo_loss`.

    Args, returns, raises: as `gspo_loss`.

    Source: Zheng et al. (2025), arXiv:2507.18071, GSPO-token, section 4.3.
    """
    tokens = policy_tokens(logprob, old_logprob, advantage, mask)
    own = tokens.logprob - tokens.logprob.detach()
    own = torch.where(tokens.logprob.isneginf(), 0, own)
    return _clipped(tokens, _mean_log_ratio(tokens).detach() + own, clip_low, clip_high)


def _mean_log_ratio(tokens: PolicyTokens) -> Tensor:
    """(..., 1), over the tokens of each answer, 0 for one without tokens."""
    total = (tokens.logprob - tokens.old_logprob).sum(-1, keepdim=True)
    return total / tokens.counted.sum(-1, keepdim=True).clamp(min=1)


def _clipped(
    tokens: PolicyTokens, log_ratio: Tensor, clip_low: float, clip_high: float
) -> PolicyLoss:
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    loss, clipped = clipped_surrogate(ratio, tokens.advantage, clip_low, clip_high)
    return PolicyLoss(loss, policy_metrics(tokens, clip_fraction=clipped))
