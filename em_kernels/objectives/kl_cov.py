"""KL-Cov: a KL penalty on the tokens of the highest log-probability/advantage covariance."""

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
from em_kernels.ops.checks import check_number, count_mask
from em_kernels.ops.covariance import kl_cov_mask, token_covariance


@torch.no_grad()
def kl_cov_selection(
    logprob: Tensor, advantage: Tensor, mask: Tensor, *, ratio: float = 2e-4, group=None
) -> Tensor:
    """The tokens KL-Cov holds back: `kl_cov_mask` of `token_covariance`.

    Call it once with all the tokens of an optimiser update, then take slices for micro-batches.

    Args:
        logprob, advantage, mask: as in `kl_cov_loss`.
        ratio: a fraction of the tokens (2e-3 for 7B and 2e-4 for 32B models in the paper).
        group: data-parallel process group over whose whole batch the choice is made.

    Returns:
        (..., T) bool, max(floor(ratio N), 1) of the N masked tokens.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Cui et al., "The Entropy Mechanism of Reinforcement Learning for Reasoning Language
    Models" (2025), arXiv:2505.22617, KL-Cov.
    """
    tokens = policy_tokens(logprob, logprob, advantage, mask)
    cov = token_covariance(tokens.logprob, tokens.advantage, tokens.counted, group=group)
    return kl_cov_mask(cov, tokens.counted, ratio=ratio, group=group)


def kl_cov_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    selected: Tensor,
    *,
    kl_coef: float = 1.0,
) -> PolicyLoss:
    """L_t = -A rho + kl_coef |logprob - old_logprob| if selected, else -A rho; never clipped.

    On-policy (logprob = old_logprob) the penalty and its gradient are 0: the method acts only from
    the second update on the same answers.

    Args:
        selected: (..., T) bool from `kl_cov_selection` of the whole update.
        kl_coef: beta, >= 0.
        All others: as in `grpo_loss`.

    Returns:
        PolicyLoss with metrics selected_fraction, abs_log_ratio and policy_kl (nats). The
        log-ratio is not held, as in verl, up to what overflows: 80, without gradient above.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Cui et al. (2025), arXiv:2505.22617, KL-Cov.
    """
    check_number("kl_coef", kl_coef, lambda v: v >= 0, "at least 0")
    tokens = policy_tokens(logprob, old_logprob, advantage, mask)
    selected = count_mask(selected, logprob, "selected")
    distance = (tokens.logprob - tokens.old_logprob).abs()
    loss = -tokens.advantage * log_ratio(tokens, MAX_EXPONENT).exp()
    metrics = policy_metrics(tokens, selected_fraction=selected, abs_log_ratio=distance)
    return PolicyLoss(torch.where(selected, loss + kl_coef * distance, loss), metrics)
