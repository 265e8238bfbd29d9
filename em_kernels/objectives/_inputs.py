"""What the policy losses share: checked, masked per-token inputs, and sums over prompt groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels.backends.interface import accumulate_dtype, serializable
from em_kernels.ops.checks import (
    check_floating,
    check_number,
    check_shape,
    check_tensor,
    count_mask,
)

MAX_LOG_RATIO = 20.0
"""A log-ratio is held to at most 20 (exp(20) = 5e8) in ratios, in k3 and in importance weights, as
in verl.

Above there is no gradient. Nothing is held from below, where exp only underflows."""
MAX_EXPONENT = 80.0
"""Clip-Cov and KL-Cov do not hold log-ratios in verl; here they are at what float32 can take."""


@serializable
class PolicyLoss(NamedTuple):
    """A loss per token and what to log about it.

    loss: (..., T), 0 where the mask is 0, to be reduced by `aggregate_loss`.
    metrics: detached 0-d tensors, means over the masked tokens passed in (0 if there is none);
    over micro-batches, average them weighted by tokens.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class PolicyTokens(NamedTuple):
    """Inputs of one shape and of float32 or float64, with 0 wherever `counted` is False."""

    logprob: Tensor
    old_logprob: Tensor
    advantage: Tensor
    counted: Tensor


def policy_tokens(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, mask: Tensor
) -> PolicyTokens:
    check_floating("logprob", logprob)
    if old_logprob is None:
        raise ValueError(
            "old_logprob must be given: the log-probabilities of the same tokens under the policy "
            "that sampled them (on-policy: logprob.detach()), got None"
        )
    check_floating("old_logprob", old_logprob, logprob)
    counted = count_mask(mask, logprob)
    dtype = accumulate_dtype(logprob.dtype)
    advantage = token_advantage(advantage, counted, dtype)
    logprob, old_logprob = (masked(x, counted, dtype) for x in (logprob, old_logprob.detach()))
    return PolicyTokens(logprob, old_logprob, advantage, counted)


def token_advantage(advantage: Tensor, counted: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., T), of one value per token or per answer, without gradient; 0 where not counted."""
    check_floating("advantage", advantage)
    if advantage.shape == counted.shape[:-1] != counted.shape:
        advantage = advantage.unsqueeze(-1).expand(counted.shape)
    check_shape("advantage", advantage, counted)
    return masked(advantage.detach(), counted, dtype)


def weighted_logprob(tokens: PolicyTokens, weight: Tensor) -> Tensor:
    """w A log p, 0 where w A is: of a token that has lost all its probability too."""
    factor = weight * tokens.advantage
    return torch.where(factor == 0, 0, factor * tokens.logprob)


def check_clip(clip_low: float, clip_high: float) -> None:
    """Distances of the bounds of a ratio from 1."""
    check_number("clip_low", clip_low, lambda v: v >= 0, "at least 0")
    check_number("clip_high", clip_high, lambda v: v >= 0, "at least 0")


def masked(x: Tensor, counted: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x where counted, else 0: neither a value nor a gradient, NaN included, crosses the mask."""
    return torch.where(counted, x.to(dtype or accumulate_dtype(x.dtype)), 0)


def log_ratio(tokens: PolicyTokens, at_most: float = MAX_LOG_RATIO) -> Tensor:
    return (tokens.logprob - tokens.old_logprob).clamp(max=at_most)


def k3(d: Tensor) -> Tensor:
    """exp(d) - d - 1, accurate near 0, of a log-ratio held to at most `MAX_LOG_RATIO`."""
    d = d.clamp(max=MAX_LOG_RATIO)
    return torch.expm1(d) - d


def masked_mean(x: Tensor, counted: Tensor) -> Tensor:
    """Detached mean over the counted tokens, 0 if there is none."""
    x = masked(x.detach(), counted)
    return x.sum() / counted.sum().clamp(min=1)


def policy_kl(tokens: PolicyTokens) -> Tensor:
    """Mean of rho - 1 - log rho: KL(old || current) estimated on the old policy's tokens, >= 0."""
    return masked_mean(k3((tokens.logprob - tokens.old_logprob).detach()), tokens.counted)


def policy_metrics(tokens: PolicyTokens, **values: Tensor) -> dict[str, Tensor]:
    """The mean of each of `values`, (..., T), of a bool the share of the tokens; and policy_kl."""
    dtype = tokens.logprob.dtype
    means = {name: masked_mean(x.to(dtype), tokens.counted) for name, x in values.items()}
    return {**means, "policy_kl": policy_kl(tokens)}


def check_texts(name: str, value: Sequence[str]) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of texts, got {type(value).__name__}")
    for text in value:
        if not isinstance(text, str):
            raise TypeError(f"{name} must be texts, got {type(text).__name__} among them")


def check_callable(name: str, value: object) -> None:
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function or None, got {type(value).__name__}")


class Groups:
    """The answers of one prompt: rows with equal entries of `prompt`, in any order."""

    def __init__(self, prompt: Tensor, like: Tensor):
        check_tensor("prompt", prompt)
        if prompt.is_floating_point() or prompt.dim() != 1:
            raise ValueError(
                f"prompt must be (N,) integer ids, got {prompt.dtype} of shape "
                f"{tuple(prompt.shape)}"
            )
        check_shape("prompt", prompt, like)
        _, self.index, sizes = prompt.unique(return_inverse=True, return_counts=True)
        self.number, self.size = len(sizes), sizes[self.index]

    def total(self, x: Tensor) -> Tensor:
        """The sum over each row's group, per row, in float64."""
        sums = x.new_zeros(self.number, dtype=torch.float64)
        return sums.index_add_(0, self.index, x.to(torch.float64))[self.index]

    def mean(self, x: Tensor) -> Tensor:
        return self.total(x) / self.size

    def all(self, condition: Tensor) -> Tensor:
        return self.total(condition) == self.size
