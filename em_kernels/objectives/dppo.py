"""DPPO: a token is dropped where its distribution has moved too far, not where its ratio has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from em_kernels.objectives._inputs import (
    PolicyLoss,
    PolicyTokens,
    log_ratio,
    masked,
    policy_metrics,
    policy_tokens,
    weighted_logprob,
)
from em_kernels.objectives.ppl import topk_label_kl
from em_kernels.ops.checks import check_floating, check_number, check_tensor

DIVERGENCES = ("binary_tv", "binary_kl", "topk_tv", "topk_kl")
THRESHOLDS = {"binary_tv": 0.15, "binary_kl": 0.05, "topk_tv": 0.15, "topk_kl": 0.05}


def dppo_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    divergence: str = "binary_tv",
    delta_low: float | None = None,
    delta_high: float | None = None,
    max_ratio: float = 20.0,
    topk_logprob: Tensor | None = None,
    old_topk_logprob: Tensor | None = None,
    topk_ids: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> PolicyLoss:
    """L_t = -sg(min(rho, max_ratio)) A logprob, and 0 for the tokens outside the trust region.

    rho = exp(logprob - old_logprob), sg without gradient. A token is outside where the advantage
    pushes it further away and the divergence D(mu, p) of the old from the current distribution is
    large: for A > 0 where p > mu at the token and D > delta_high, else where p < mu and
    D > delta_low. A ratio is no divergence: it is large at unlikely tokens, where little has
    changed, and near 1 where much mass has moved.

        binary_tv   |mu - p| at the token
        binary_kl   mu log(mu / p) + (1 - mu) log((1 - mu) / (1 - p)) at the token
        topk_tv     (sum_k |mu_k - p_k| + |mu_rest - p_rest|) / 2
        topk_kl     sum_k mu_k log(mu_k / p_k) + mu_rest log(mu_rest / p_rest)

    over K ids, all others as one class. Merging classes makes a divergence smaller: each is at most
    that of the whole vocabulary.

    Args:
        logprob, old_logprob, advantage, mask: as in `grpo_loss`; the advantage may differ between
            the tokens of an answer.
        divergence: one of `DIVERGENCES`.
        delta_low, delta_high: D's thresholds, >= 0; None: 0.15 for total variation, 0.05 for KL.
        max_ratio: where the importance weight is truncated, > 0.
        topk_logprob: (..., T, K), K >= 1, log p at the K ids; the forms with K ids need it. Of
            `linear_softmax_stats` with a target of (..., K).
        old_topk_logprob: (..., T, K), log mu at the same ids: `linear_top_logprobs` of the old
            policy, stored.
        topk_ids, token_ids: (..., T, K) and (..., T) int64, the K ids and the sampled token. Where
            it is not among them it takes the place of the last; without both nothing is replaced.

    Returns:
        PolicyLoss: `loss` (..., T) float32 (float64 for float64) for `aggregate_loss`; `metrics`
        clip_fraction (tokens outside the trust region), divergence (mean D, nats for KL) and
        policy_kl (old || current, nats). Tokens outside stay in the mask, and so in the denominator
        of `aggregate_loss`. The log-ratio is held to at most 20.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Qi et al., "Rethinking the Trust Region in LLM Reinforcement Learning" (2026),
    arXiv:2602.04879. Taken from the authors' code (sail-sg/Stable-RL), which puts the sampled
    token in the place of the last of the K ids, and from verl and TRL, whose default thresholds and
    truncation are these. The old policy is mu here; TRL and the authors take the sampler's own
    log-probabilities for it.
    """
    _check_form(divergence, topk_logprob, old_topk_logprob, topk_ids, token_ids)
    low = _threshold("delta_low", delta_low, divergence)
    high = _threshold("delta_high", delta_high, divergence)
    check_number("max_ratio", max_ratio, lambda v: v > 0, "positive")
    tokens = policy_tokens(logprob, old_logprob, advantage, mask)
    if topk_logprob is None or old_topk_logprob is None:
        distance = _binary(divergence, tokens)
    else:
        listed = _listed(tokens, topk_logprob, old_topk_logprob, topk_ids, token_ids)
        distance = _among(divergence, *listed)
    distance = masked(distance, tokens.counted)
    outside = _outside(tokens, distance, low, high)
    weight = log_ratio(tokens).exp().detach().clamp(max=max_ratio)
    metrics = policy_metrics(tokens, clip_fraction=outside, divergence=distance)
    weight = torch.where(outside, 0, weight)
    return PolicyLoss(-weighted_logprob(tokens, weight), metrics)


def _outside(tokens: PolicyTokens, distance: Tensor, low: float, high: float) -> Tensor:
    """Where the advantage pushes a token on that is too far away already."""
    moved = (tokens.logprob - tokens.old_logprob).detach()
    up, down = (moved > 0) & (distance > high), (moved < 0) & (distance > low)
    return torch.where(tokens.advantage > 0, up, down)


def _binary(divergence: str, tokens: PolicyTokens) -> Tensor:
    """Between the token and all others; 1 - p from log p, exact where p is near 1."""
    old, now = tokens.old_logprob, tokens.logprob.detach()
    if divergence == "binary_tv":
        return (old.exp() - now.exp()).abs()
    mu_rest, p_rest = -torch.expm1(old), -torch.expm1(now)
    p_rest = p_rest.clamp(min=torch.finfo(p_rest.dtype).tiny)
    others = torch.xlogy(mu_rest, mu_rest) - mu_rest * p_rest.log()
    own = torch.where(old.isneginf(), 0, old.exp() * (old - now))
    return (own + others).clamp(min=0)  # rounding


def _among(divergence: str, now: Tensor, old: Tensor) -> Tensor:
    """Between the K listed tokens and all others."""
    if divergence == "topk_kl":
        return topk_label_kl(now, old).clamp(min=0)
    p, mu = now.exp(), old.exp()
    rest = (p.sum(-1) - mu.sum(-1)).abs()
    return ((mu - p).abs().sum(-1) + rest) / 2


@torch.no_grad()
def _listed(
    tokens: PolicyTokens,
    topk_logprob: Tensor,
    old_topk_logprob: Tensor,
    topk_ids: Tensor | None,
    token_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """log p and log mu at the K ids, the sampled token among them where ids are known."""
    like = tokens.logprob
    for name, x in (("topk_logprob", topk_logprob), ("old_topk_logprob", old_topk_logprob)):
        check_floating(name, x)
        _check_listed(name, x, like, topk_logprob.shape[-1])
    counted = tokens.counted[..., None]
    now, old = (masked(x, counted, like.dtype) for x in (topk_logprob, old_topk_logprob))
    if topk_ids is None and token_ids is None:
        return now, old
    _check_ids(topk_ids, token_ids, like, topk_logprob.shape[-1])
    missing = ~(topk_ids == token_ids[..., None]).any(-1)  # type: ignore[index, union-attr]
    now, old = now.clone(), old.clone()
    now[..., -1] = torch.where(missing, tokens.logprob, now[..., -1])
    old[..., -1] = torch.where(missing, tokens.old_logprob, old[..., -1])
    return now, old


def _check_form(divergence: str, now: Tensor | None, old: Tensor | None, *ids: Any) -> None:
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {DIVERGENCES}, got {divergence!r}")
    given = {"topk_logprob": now, "old_topk_logprob": old}
    for name, x in (*given.items(), *zip(("topk_ids", "token_ids"), ids)):
        if divergence.startswith("topk") and x is None and name in given:
            raise ValueError(
                f"{name} must be given for {divergence!r}: the log-probabilities of K ids at every "
                "token, got None"
            )
        if not divergence.startswith("topk") and x is not None:
            raise ValueError(f"{name} is for 'topk_tv' and 'topk_kl', got one for {divergence!r}")


def _check_listed(name: str, x: Tensor, like: Tensor, k: int) -> None:
    if x.dim() != like.dim() + 1 or x.shape[:-1] != like.shape or x.shape[-1] != k or k == 0:
        shape = ", ".join(map(str, like.shape))
        raise ValueError(
            f"{name} must have shape ({shape}, K), K the same for all and 1 or more, got "
            f"{tuple(x.shape)}"
        )


def _check_ids(topk_ids: Tensor | None, token_ids: Tensor | None, like: Tensor, k: int) -> None:
    for name, ids, shape in (
        ("topk_ids", topk_ids, (*like.shape, k)),
        ("token_ids", token_ids, tuple(like.shape)),
    ):
        if ids is None:
            raise ValueError(f"{name} must be given, topk_ids and token_ids together, got one")
        check_tensor(name, ids)
        if ids.is_floating_point() or ids.dtype == torch.bool or tuple(ids.shape) != shape:
            raise ValueError(
                f"{name} must be integer ids of shape {shape}, got {ids.dtype} of shape "
                f"{tuple(ids.shape)}"
            )


def _threshold(name: str, given: float | None, divergence: str) -> float:
    if given is None:
        return THRESHOLDS[divergence]
    check_number(name, given, lambda v: v >= 0, "at least 0")
    return given
