"""Policy-labelled preference learning: preferences explained by regret, not by reward.

A segment is an answer; its label is the policy pi that produced it. The label enters as
KL(pi || p) at every token, exactly, from the heads of both models (`linear_label_kl`) or from
log-probabilities in full (`label_kl`); from the k most likely tokens (`topk_label_kl`); or, for
want of any, with pi taken to be certain of what it wrote (`pseudo_label_kl`).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from em_kernels.backends.interface import accumulate_dtype, serializable
from em_kernels.objectives._inputs import masked
from em_kernels.ops.arguments import NEVER_IGNORED, check_logits
from em_kernels.ops.checks import (
    check_flag,
    check_floating,
    check_number,
    check_shape,
    check_tensor,
    count_mask,
)
from em_kernels.ops.divergence import linear_divergence
from em_kernels.ops.softmax_stats import softmax_stats


@serializable
class PreferenceLoss(NamedTuple):
    """loss: (B,), one per pair. metrics: detached 0-d means over the pairs."""

    loss: Tensor
    metrics: dict[str, Tensor]


def ppl_loss(
    chosen_logprob: Tensor,
    rejected_logprob: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    chosen_kl: Tensor | None = None,
    rejected_kl: Tensor | None = None,
    gamma: float,
    alpha: float = 1.0,
    length_normalize: bool = False,
) -> PreferenceLoss:
    """L = -log sigmoid(-(R+ - R-)), R the `segment_regret` of the chosen (+) and rejected (-).

    In R+ - R- the KL terms of the two segments stand against each other (contrastive KL): p is
    drawn toward the policy that wrote the chosen segment and away from the other. Without labels
    (both KL None) the loss is -log sigmoid(alpha sum_t gamma^t (logprob+ - logprob-)), the
    DPO-like loss of contrastive preference learning.

    Args:
        chosen_logprob, rejected_logprob: (B, T+) and (B, T-) floating point, of the tokens of
            each segment under the policy p being trained, with their gradient.
        chosen_mask, rejected_mask: of the same shapes, bool or numeric; NaN elsewhere is ignored.
        chosen_kl, rejected_kl: of the same shapes, KL(pi || p) per token, in nats, from one of
            the label functions; None drops the labels. Both or neither.
        gamma, alpha, length_normalize: as in `segment_regret`.

    Returns:
        PreferenceLoss: `loss` (B,) float32 (float64 for float64); `metrics` margin (R- - R+),
        accuracy (margin > 0) and contrastive_kl (the part of R+ - R- that is due to labels).

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Cho et al., "Policy-labeled Preference Learning: Is Preference Enough for RLHF?"
    (2025), regret-based objective and contrastive KL regularisation; without labels: Hejna et al.,
    "Contrastive Preference Learning" (2024).
    """
    if (chosen_kl is None) != (rejected_kl is None):
        given = "chosen_kl" if rejected_kl is None else "rejected_kl"
        raise ValueError(f"chosen_kl and rejected_kl must be given together, got only {given}")
    regret = partial(segment_regret, gamma=gamma, alpha=alpha, length_normalize=length_normalize)
    chosen = regret(chosen_logprob, chosen_kl, chosen_mask)
    rejected = regret(rejected_logprob, rejected_kl, rejected_mask)
    check_shape("rejected_logprob (its segments)", rejected, chosen)
    margin = rejected - chosen
    with torch.no_grad():
        unlabelled = regret(rejected_logprob, None, rejected_mask)
        unlabelled = unlabelled - regret(chosen_logprob, None, chosen_mask)
    metrics = {
        "margin": _mean(margin),
        "accuracy": _mean((margin > 0).to(margin.dtype)),
        "contrastive_kl": _mean(unlabelled - margin),
    }
    return PreferenceLoss(softplus(-margin), metrics)


def segment_regret(
    logprob: Tensor,
    kl: Tensor | None,
    mask: Tensor,
    *,
    gamma: float,
    alpha: float = 1.0,
    length_normalize: bool = False,
) -> Tensor:
    """R = sum_t gamma^t Reg_t = alpha sum_t gamma^t (-logprob_t + t KL_t), divided by the number
    of tokens with `length_normalize`.

    t counts the masked tokens of a segment from 0. KL_t enters Reg of each of the t tokens before
    it with gamma^t in all, hence the factor t: without gamma < 1, long segments are all KL.

    Args:
        logprob: (..., T) floating point, of the tokens of the segment under p.
        kl: (..., T) KL(pi || p) per token, nats; None is 0.
        mask: (..., T) bool or numeric (floating: 0 and 1 only), tokens where it is non-zero.
        gamma: discount, in (0, 1].
        alpha: entropy temperature of the reward model, > 0; it scales the regret.
        length_normalize: divide by the number of tokens.

    Returns:
        (...) float32 (float64 for float64), 0 for an empty segment.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Cho et al. (2025), regret of a segment under its label.
    """
    check_flag("length_normalize", length_normalize)
    counted, cost, kl = _regret_inputs(logprob, kl, mask, gamma, alpha)
    position = (counted.cumsum(-1) - 1).clamp(min=0).to(cost.dtype)
    regret = alpha * (gamma**position * torch.where(counted, cost + position * kl, 0)).sum(-1)
    return regret / counted.sum(-1).clamp(min=1) if length_normalize else regret


def token_regret(
    logprob: Tensor, kl: Tensor | None, mask: Tensor, *, gamma: float, alpha: float = 1.0
) -> Tensor:
    """Reg_t = alpha (-logprob_t + sum_{l>=1} gamma^l KL(pi || p)_{t+l}) along the segment itself.

    The expectation over continuations under pi is taken at the one continuation that pi wrote.

    Args, raises, source: as `segment_regret`.

    Returns:
        (..., T) float32 (float64 for float64), 0 where the mask is 0; to be read, token by token:
        `segment_regret` is its discounted sum in one pass.
    """
    counted, cost, kl = _regret_inputs(logprob, kl, mask, gamma, alpha)
    future, steps = cost.new_zeros(cost.shape[:-1]), []
    for t in reversed(range(cost.shape[-1])):
        steps.append(future)
        future = torch.where(counted[..., t], gamma * (kl[..., t] + future), future)
    ahead = torch.stack(steps[::-1], -1) if steps else torch.zeros_like(cost)
    return alpha * torch.where(counted, cost + ahead, 0)


def linear_label_kl(
    hidden: Tensor,
    weight: Tensor,
    label_hidden: Tensor,
    label_weight: Tensor,
    **options: Any,
) -> Tensor:
    """KL(pi || p) = sum_v pi_v (log pi_v - log p_v), p and pi each from hidden states and a head.

    It never holds all the log-probabilities of either. The label policy is another model, the one
    that wrote the segments or a reference, and is frozen: no gradient is sent to it.

    Args:
        hidden, weight: (..., D) and (V, D) of the policy p, with their gradient.
        label_hidden, label_weight: (..., D') and (V, D') of pi on the same tokens.
        options: of `linear_divergence`, but for `kind`; those of pi begin with `other_`.

    Returns:
        (...) float32 (float64 for float64), nats, >= 0.

    Raises:
        TypeError, ValueError: as `linear_divergence`, whose `other_hidden` and `other_weight` are
            those of the label.

    Source: as `label_kl`.
    """
    check_tensor("label_hidden", label_hidden)
    check_tensor("label_weight", label_weight)
    label = label_hidden.detach(), label_weight.detach()
    bias = options.get("other_bias")
    if bias is not None:
        options = {**options, "other_bias": bias.detach()}
    return linear_divergence(hidden, weight, *label, kind="forward_kl", **options)


def label_kl(logprob: Tensor, label_logprob: Tensor) -> Tensor:
    """KL(pi || p) = sum_v pi_v (log pi_v - log p_v) over the whole vocabulary.

    Args:
        logprob: (..., V) normalised log-probabilities of p, with their gradient, -pi. (From logits,
            `divergence(logits, label_logits)` gives the same without normalising either first.)
        label_logprob: (..., V) of pi; -inf (probability 0) contributes 0. No gradient.

    Returns:
        (...) float32 (float64 for float64), nats, >= 0 up to rounding; +inf where p is 0 and pi is
        not.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Kullback and Leibler, "On Information and Sufficiency" (1951).
    """
    return _kl_terms(*_label_inputs(logprob, label_logprob)).sum(-1)


def topk_label_kl(logprob: Tensor, label_logprob: Tensor) -> Tensor:
    """KL(pi || p) with the vocabulary cut to k tokens and one class for all the others.

    sum_{v in top k} pi_v (log pi_v - log p_v) + pi_rest (log pi_rest - log p_rest), where
    pi_rest = 1 - sum pi_v. Merging classes can only lose information: this is at most the full KL,
    and equal to it where pi_rest = 0 or pi and p agree on the shape of the rest.

    Args:
        logprob: (..., k) log-probabilities of p at the stored tokens (`logprob_at`).
        label_logprob: (..., k) stored log-probabilities of pi at them. No gradient.

    Returns, raises: as `label_kl`. p_rest is held above the rounding of 1.

    Source: as `label_kl`; the bound is the log sum inequality, Cover and Thomas, "Elements of
    Information Theory" (2006), theorem 2.7.1.
    """
    logprob, label_logprob = _label_inputs(logprob, label_logprob)
    listed = _kl_terms(logprob, label_logprob).sum(-1)
    p_rest = 1 - logprob.exp().sum(-1)
    pi_rest = (1 - label_logprob.exp().sum(-1)).clamp(min=0)
    p_rest = p_rest.clamp(min=torch.finfo(p_rest.dtype).eps)
    return listed + torch.xlogy(pi_rest, pi_rest) - pi_rest * p_rest.log()


def pseudo_label_kl(logprob: Tensor) -> Tensor:
    """-logprob: KL(pi || p) of a policy pi that is certain of the token it wrote.

    Args:
        logprob: (..., T) floating point, of the tokens of the segment under p.

    Returns:
        (..., T) float32 (float64 for float64), nats.

    Source: Cho et al. (2025), deterministic pseudo-labels.
    """
    check_floating("logprob", logprob)
    return -logprob.to(accumulate_dtype(logprob.dtype))


def logprob_at(logits: Tensor, index: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at k tokens per row, without the others.

    Args:
        logits: (..., V) floating point.
        index: (..., k) int64 token ids.
        temperature: > 0.

    Returns:
        (..., k) float32 (float64 for float64), differentiable in `logits`.

    Raises:
        TypeError, ValueError: naming the argument and what was received.
    """
    check_logits(logits)
    check_tensor("index", index)
    if index.dtype != torch.int64 or index.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"index must be int64 of shape ({', '.join(map(str, logits.shape[:-1]))}, k), got "
            f"{index.dtype} of shape {tuple(index.shape)}"
        )
    options: Any = dict(temperature=temperature, ignore_index=NEVER_IGNORED)
    return softmax_stats(logits, index, outputs=("logprob",), **options).logprob


def _regret_inputs(
    logprob: Tensor, kl: Tensor | None, mask: Tensor, gamma: float, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(counted, -logprob, kl), 0 where not counted."""
    check_number("gamma", gamma, lambda v: 0 < v <= 1, "in (0, 1]")
    check_number("alpha", alpha, lambda v: v > 0, "positive")
    check_floating("logprob", logprob)
    counted = count_mask(mask, logprob)
    cost = -masked(logprob, counted)
    if kl is None:
        return counted, cost, torch.zeros_like(cost)
    check_floating("kl", kl, logprob)
    return counted, cost, masked(kl, counted, cost.dtype)


def _label_inputs(logprob: Tensor, label_logprob: Tensor) -> tuple[Tensor, Tensor]:
    check_floating("logprob", logprob)
    check_floating("label_logprob", label_logprob, logprob)
    dtype = accumulate_dtype(logprob.dtype)
    return logprob.to(dtype), label_logprob.detach().to(dtype)


def _kl_terms(logprob: Tensor, label_logprob: Tensor) -> Tensor:
    possible = label_logprob > -torch.inf
    difference = torch.where(possible, label_logprob, 0) - torch.where(possible, logprob, 0)
    return label_logprob.exp() * difference


def _mean(x: Tensor) -> Tensor:
    return x.detach().sum() / max(x.numel(), 1)
