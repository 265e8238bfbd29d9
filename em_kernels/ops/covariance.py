"""Log-probability/advantage covariance of a batch, and the token selections built on it.

Everything is over the tokens of the whole batch that is passed in (and, with `group`, of every
rank's): thresholds taken per micro-batch select other tokens, and more of them. Without `group`
nothing here waits for the device, but for `linear_token_covariance` with a mask.

A trainer that works in micro-batches does it in two phases. First it collects the scalars of every
token of one optimiser update, without gradient, and selects once; then it trains:

    with torch.no_grad():
        logprob = torch.cat([token_logprob(part) for part in micro_batches])
    selected = kl_cov_selection(logprob, advantage, mask, ratio=2e-3)
    tokens = aggregation_denominator(mask)
    for part in micro_batches:                      # the same rows, in the same order
        loss, _ = kl_cov_loss(token_logprob(part), old[part], ..., selected[part])
        aggregate_loss(loss, mask[part], denominator=tokens).backward()

`clip_cov_selection` and `kl_cov_selection` (em_kernels.objectives) and `high_entropy_mask` are the
first phase of their methods. The gradients add up to those of one pass over the whole batch.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Unpack

from em_kernels.backends.interface import accumulate_dtype
from em_kernels.ops.arguments import row_mask
from em_kernels.ops.checks import check_bound, check_floating, check_group, check_number, count_mask
from em_kernels.ops.linear_softmax_stats import linear_softmax_stats
from em_kernels.ops.options import DEFAULTS, CovarianceOptions, LinearStatsOptions, takes_options
from em_kernels.ops.truncate import LIMITS


def token_covariance(
    logprob: Tensor,
    advantage: Tensor,
    mask: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """c_i = (A_i - mean A)(logprob_i - mean logprob), means over the masked tokens of the batch.

    Args:
        logprob, advantage: (...) floating point, of one shape.
        mask: (...) bool or numeric, tokens where it is non-zero count; None counts all. A floating
            mask may hold 0 and 1 only, as in `softmax_stats`.
        group: data-parallel process group whose ranks share one mean.

    Returns:
        (...) float32 (float64 for float64), detached; 0 where the mask is 0, and everywhere if no
        token counts.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Cui et al., "The Entropy Mechanism of Reinforcement Learning for Reasoning Language
    Models" (2025), arXiv:2505.22617, the token-wise centred cross-product of
    Clip-Cov and KL-Cov.
    """
    check_floating("logprob", logprob)
    check_floating("advantage", advantage, logprob)
    check_group(group)
    counted, dtype = _counted(mask, logprob), logprob.dtype
    logprob, advantage = (
        torch.where(counted, x.detach().to(torch.float64), 0) for x in (logprob, advantage)
    )
    sums = torch.stack([counted.sum().to(torch.float64), advantage.sum(), logprob.sum()])
    if group is not None:
        dist.all_reduce(sums, group=group)
    count = sums[0].clamp(min=1)
    cov = (advantage - sums[1] / count) * (logprob - sums[2] / count)
    return torch.where(counted, cov, 0).to(accumulate_dtype(dtype))


@takes_options
def linear_token_covariance(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    advantage: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    **options: Unpack[CovarianceOptions],
) -> Tensor:
    """`token_covariance` with logprob of softmax(hidden @ weight.T), without all the logits.

    Tokens whose target is `ignore_index`, or was left out by a sampler, do not count. On a GPU a
    `mask` is looked at, which waits for the device: tokens where it is 0 are left out of the
    product.

    Args:
        hidden, weight, target, bias: as in `linear_softmax_stats`.
        advantage, mask, group: as in `token_covariance`; `group` is the data-parallel one.
        vocab_group: the vocabulary-parallel group, `group` of `linear_softmax_stats`.
    """
    truncated = any(options.get(name) is not None for name in (*LIMITS, "kept"))
    stats_options: LinearStatsOptions = {
        **options,
        "mask": mask,
        "outputs": ("logprob", "is_kept") if truncated else ("logprob",),
        "group": vocab_group,
        "accumulate_into": None,
    }
    with torch.no_grad():
        stats = linear_softmax_stats(hidden, weight, target, bias=bias, **stats_options)
    ignored = options.get("ignore_index", DEFAULTS["ignore_index"])
    counted = row_mask(hidden, target, ignored, mask)
    if truncated:
        counted = stats.is_kept
    return token_covariance(stats.logprob, advantage, counted, group=options.get("group"))


def clip_cov_mask(
    cov: Tensor,
    mask: Tensor | None = None,
    *,
    ratio: float = 2e-4,
    lower: float = 1.0,
    upper: float = 5.0,
    exclude: Tensor | None = None,
    generator: torch.Generator | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Clip-Cov's tokens: max(floor(ratio N), 1) drawn uniformly from lower < cov < upper.

    N is the number of masked tokens of the batch; where fewer tokens are eligible all of them are
    taken. Their loss is to be multiplied by 0, the denominator kept.

    Args:
        cov: (...) from `token_covariance`.
        mask: (...) tokens that count; None counts all.
        ratio: a fraction of the tokens (not a percentage), in (0, 1].
        lower, upper: bounds on cov, both exclusive.
        exclude: (...) tokens that may not be taken (already clipped by PPO).
        generator: source of the draw, on the device of `cov`; with `group`, rank 0's is used.
        group: data-parallel group over whose whole batch the draw is made.

    Returns:
        (...) bool.

    Source: Cui et al. (2025), arXiv:2505.22617, Clip-Cov.
    """
    check_floating("cov", cov)
    for name, bound in (("lower", lower), ("upper", upper)):
        check_bound(name, bound)
    if not lower < upper:
        raise ValueError(f"lower must be below upper, got lower={lower!r} and upper={upper!r}")
    eligible = _counted(mask, cov) & (cov > lower) & (cov < upper)
    if exclude is not None:
        eligible &= ~_counted(exclude, cov, "exclude")
    batch = _Batch(cov, mask, group)
    eligible = batch.join(eligible)
    # torch.rand takes a generator or a size that torch.compile left open, not both.
    key = torch.empty(eligible.shape, device=cov.device).uniform_(generator=generator)
    if group is not None:
        dist.broadcast(key, group=group, group_src=0)
    return batch.own(_first(key, eligible, batch.take(ratio)))


def kl_cov_mask(
    cov: Tensor,
    mask: Tensor | None = None,
    *,
    ratio: float = 2e-4,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """KL-Cov's tokens: the max(floor(ratio N), 1) masked tokens of the largest covariance.

    Exactly that many: on ties the earlier token is taken. They get the KL penalty
    -A rho + beta |logprob - logprob_old|, the others -A rho. Arguments as in `clip_cov_mask`.

    Source: Cui et al. (2025), arXiv:2505.22617, KL-Cov.
    """
    check_floating("cov", cov)
    batch = _Batch(cov, mask, group)
    eligible = batch.join(_counted(mask, cov) & ~cov.isnan())
    return batch.own(_first(-batch.join(cov), eligible, batch.take(ratio)))


def high_entropy_mask(
    entropy: Tensor,
    mask: Tensor | None = None,
    *,
    ratio: float = 0.2,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """1[H_t >= tau] with tau the (1 - ratio) quantile of H over the masked tokens of the batch.

    The quantile interpolates linearly, as torch.quantile. Arguments as in `clip_cov_mask`.

    Source: Wang et al., "Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective
    Reinforcement Learning for LLM Reasoning" (2025), arXiv:2506.01939.
    """
    check_floating("entropy", entropy)
    _check_ratio(ratio)
    counted = _counted(mask, entropy) & ~entropy.isnan()
    batch = _Batch(entropy, mask, group)
    values, everyone = batch.join(entropy.detach().to(torch.float64)), batch.join(counted)
    if values.numel() == 0:
        return counted
    ordered = torch.where(everyone, values, math.inf).sort().values
    position = ((1 - ratio) * (everyone.sum() - 1).clamp(min=0)).view(1)
    below, above = (ordered.gather(0, i.long()) for i in (position.floor(), position.ceil()))
    tau = torch.where(above > below, below + (above - below) * position.frac(), below)
    return counted & (entropy.detach().to(torch.float64) >= tau)


class _Batch:
    """The flattened tokens of this process, or of all ranks of a group joined in rank order."""

    def __init__(self, tokens: Tensor, mask: Tensor | None, group: dist.ProcessGroup | None):
        check_group(group)
        self.shape, self.group = tokens.shape, group
        self.sizes = [tokens.numel()]
        if group is not None:
            size = torch.tensor([tokens.numel()], device=tokens.device)
            sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
            dist.all_gather(sizes, size, group=group)
            self.sizes = [int(s) for s in sizes]
        self.count = self.join(_counted(mask, tokens)).sum()

    def join(self, tokens: Tensor) -> Tensor:
        flat = tokens.detach().reshape(-1)
        if self.group is None:
            return flat
        padded = flat.new_zeros(max(self.sizes))
        padded[: flat.numel()] = flat
        parts = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes)])

    def own(self, tokens: Tensor) -> Tensor:
        """This rank's, in memory of their own."""
        if self.group is not None:
            tokens = tokens.split(self.sizes)[dist.get_rank(self.group)].clone()
        own: Tensor = torch.ops.aten._unsafe_view(tokens, self.shape)
        return own

    def take(self, ratio: float) -> Tensor:
        """max(floor(ratio N), 1), on the device."""
        _check_ratio(ratio)
        return (self.count.to(torch.float64) * ratio).floor().clamp(min=1)


def _first(key: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    """The `count` eligible tokens of the smallest key; `count` may be on the device."""
    order = torch.where(eligible, key.to(torch.float64), math.inf).argsort(stable=True)
    # An eligible key of +inf must still come before every token that is not eligible.
    order = order[(~eligible[order]).to(torch.int8).argsort(stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device)
    return eligible & (rank < count)


def _counted(mask: Tensor | None, like: Tensor, name: str = "mask") -> Tensor:
    if mask is None:
        return torch.ones(like.shape, dtype=torch.bool, device=like.device)
    return count_mask(mask, like, name)


def _check_ratio(ratio: float) -> None:
    check_number("ratio", ratio, lambda v: 0 < v <= 1, "in (0, 1]")
