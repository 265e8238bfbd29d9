"""Statistics of whole rows from those of their shards.

A softmax over a row that is cut into shards is a mixture of the shards' own softmaxes: with z = c u
(`units`), m_k the largest u of shard k, m that of all, L_k = c (m_k - m) + log1p(r_k) its log sum
of exponentials, and p_{v|k} its softmax,

    p_v = w_k p_{v|k},   w_k = exp(L_k) / sum_j exp(L_j)

and every statistic of p is one of w and the shards' own. No formula below subtracts numbers that
agree in most of their digits: a row with an entropy of 1e-9 keeps its relative accuracy, whichever
shards its entries lie in. All of it is done in float64 and shard by shard in one order, so whoever
merges the same numbers gets the same bits.

Sources: the grouping property of the entropy (Shannon, A Mathematical Theory of Communication,
1948, section 6), its like for the Kullback-Leibler divergence (chain rule), law of total variance.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels.backends.interface import ROW_OUTPUTS, Saved

# What each output needs of every shard, besides `Saved`: "count" is its number of finite logits,
# "logit_away" their mean less the largest, "logit_std" their standard deviation, in units of u.
_PARTS = {
    "logprob": ("logprob",),
    "varentropy": ("varentropy",),
    "collision": ("collision",),
    "is_top1": ("is_top1",),
    "self_certainty": ("self_certainty", "count"),
    "logit_mean": ("logit_away", "count"),
    "logit_var": ("logit_away", "logit_std", "count"),
    "logit_skew": ("logit_away", "logit_std", "logit_skew", "count"),
    "entropy_slope": ("logprob", "collision", "entropy_slope"),
}

SPREAD = ("logit_away", "logit_std", "logit_skew")
_ORDER = (*(name for name in ROW_OUTPUTS if name not in SPREAD), *SPREAD, "count")
_FAR = -1e100  # in place of -inf: a weight of 0 times its square is 0


def parts_of(outputs: tuple[str, ...]) -> tuple[str, ...]:
    """The statistics of a shard from which `merge` makes `outputs`, `Saved` first."""
    needed = {part for name in outputs for part in _PARTS.get(name, ())}
    return (*Saved._fields, *(name for name in _ORDER if name in needed))


def merge(
    parts: dict[str, Tensor], owner: Tensor | None, outputs: tuple[str, ...], c: float | Tensor
) -> Tensor:
    """[max, log1p_r, mean_d, *outputs] of the whole rows, (S, N), NaN where a shard is NaN.

    Args:
        parts: name -> (K, N) float64 for the names in `parts_of(outputs)`, shards in the order of
            the vocabulary. Logprob, is_top1 and entropy_slope are of the target in the shard that
            has it, and of any other entry elsewhere. A shard without a finite logit has max -inf
            and all else 0.
        owner: (N,) the shard that has the target, None without targets.
        c: a number or (N,).
    """
    mixture = _Mixture.of(parts, c)
    values = {"max": mixture.max, "log1p_r": mixture.log1p_r, "mean_d": mixture.mean_d}
    values.update(_of_rows(mixture, parts, outputs, c))
    if owner is not None:
        values.update(_of_target(mixture, parts, owner, outputs))
    if "count" in parts:
        values.update(_logit_moments(mixture, parts, c))
    rows = torch.stack([values[name] for name in (*Saved._fields, *outputs)])
    return rows + (mixture.max - mixture.max)  # 0, or NaN where there is no finite maximum


class _Mixture(NamedTuple):
    """The weights of the shards, (K, N), and what the gradient needs of whole rows, (N,)."""

    log_weight: Tensor
    weight: Tensor
    distance: Tensor  # the shard's mean of d under p
    leader: Tensor  # the first shard that holds the maximum
    max: Tensor
    log1p_r: Tensor
    mean_d: Tensor

    @classmethod
    def of(cls, parts: dict[str, Tensor], c: float | Tensor) -> _Mixture:
        top, leader = parts["max"].max(0)
        delta = (parts["max"] - top) * c
        log_weight = _log_softmax(delta + parts["log1p_r"])
        weight = log_weight.exp()
        distance = delta.clamp(min=_FAR) + parts["mean_d"]
        mean_d = sum_shards(weight * distance)
        # max p = w_a max p_a in shard a, the leader: two terms of one sign in the logarithm.
        log1p_r = _at(leader, parts["log1p_r"] - log_weight)
        return cls(log_weight, weight, distance, leader, top, log1p_r, mean_d)

    @property
    def away(self) -> Tensor:
        """The shard's mean of log p under p minus the row's."""
        return self.distance - self.mean_d


def _log_softmax(x: Tensor) -> Tensor:
    """Over dimension 0, to rounding in relative terms even where it is close to 0."""
    heaviest, at = x.max(0, keepdim=True)
    d = x - heaviest
    return d - torch.log1p(sum_shards(d.exp().scatter(0, at, 0)))


def _of_rows(
    mixture: _Mixture, parts: dict[str, Tensor], outputs: tuple[str, ...], c: float | Tensor
) -> dict[str, Tensor]:
    values = {}
    if "lse" in outputs:
        values["lse"] = mixture.max * c + mixture.log1p_r
    if "entropy" in outputs:
        values["entropy"] = mixture.log1p_r - mixture.mean_d
    if "max_prob" in outputs:
        values["max_prob"] = (-mixture.log1p_r).exp()
    if "varentropy" in outputs:
        values["varentropy"] = sum_shards(mixture.weight * (parts["varentropy"] + mixture.away**2))
    if "collision" in outputs:
        values["collision"] = sum_shards(mixture.weight**2 * parts["collision"])
    return values


def _of_target(
    mixture: _Mixture, parts: dict[str, Tensor], owner: Tensor, outputs: tuple[str, ...]
) -> dict[str, Tensor]:
    values = {}
    if "logprob" in outputs:
        values["logprob"] = _at(owner, mixture.log_weight + parts["logprob"])
    if "is_top1" in outputs:
        values["is_top1"] = torch.where(mixture.leader == owner, _at(owner, parts["is_top1"]), 0.0)
    if "entropy_slope" in outputs:
        values["entropy_slope"] = _entropy_slope(mixture, parts, owner)
    return values


def _entropy_slope(mixture: _Mixture, parts: dict[str, Tensor], owner: Tensor) -> Tensor:
    """sum_v p_v^2 (l_v + H) - p_y (l_y + H), where l_v + H = l_{v|k} + H_k + away_k.

    A shard reports slope_k = sum p^2 (l + H_k) - own_k of its own distribution, with own_k the term
    of its target; away from the owner, own_k is added back. In the owner's shard the two terms
    nearly cancel as p_y -> 1, so their difference is kept together and 1 - w taken by expm1.
    """
    weight, away = mixture.weight, mixture.away
    slope, collision, logprob = (parts[n] for n in ("entropy_slope", "collision", "logprob"))
    p = logprob.exp()
    entropy = parts["log1p_r"] - parts["mean_d"]
    own = torch.where(p > 0, p * (logprob + entropy), 0)
    elsewhere = weight**2 * (slope + own + collision * away)
    rest = -torch.expm1(mixture.log_weight)
    at_owner = weight * (weight * slope - rest * own + away * (weight * collision - p))
    shard = torch.arange(len(weight), device=owner.device)[:, None]
    return sum_shards(torch.where(shard == owner, at_owner, elsewhere))


def _logit_moments(
    mixture: _Mixture, parts: dict[str, Tensor], c: float | Tensor
) -> dict[str, Tensor]:
    """Mean, variance, third moment; KL(U || p) = sum f_k KL_k + KL(f || w) with f_k = n_k / n."""
    count = parts["count"]
    share = count / sum_shards(count)
    values = {}
    if "self_certainty" in parts:
        ratio = torch.where(count > 0, share.log() - mixture.log_weight, 0)
        values["self_certainty"] = sum_shards(share * (parts["self_certainty"] + ratio))
    if "logit_away" in parts:
        away = torch.where(count > 0, parts["max"] - mixture.max + parts["logit_away"], 0)
        # From one of the means, so that equal means differ from theirs by exactly 0.
        anchor = _at(mixture.leader, away)
        mean = anchor + sum_shards(share * (away - anchor))
        values["logit_mean"] = (mixture.max + mean) * c
        away = away - mean
    if "logit_std" in parts:
        largest = torch.maximum(parts["logit_std"], away.abs()).amax(0)
        unit = torch.where(largest > 0, largest, 1)  # in which squares and cubes are of size 1
        std, away = parts["logit_std"] / unit, away / unit
        var = sum_shards(share * (std**2 + away**2))
        values["logit_var"] = (var.sqrt() * unit * c) ** 2
    if "logit_skew" in parts:
        third = parts["logit_skew"] * std**3
        third = sum_shards(share * (third + away * (3 * std**2 + away**2)))
        values["logit_skew"] = (third / var**1.5).masked_fill(var == 0, 0)
    return values


def _at(shard: Tensor, values: Tensor) -> Tensor:
    """values[shard[i], i]"""
    return values.gather(0, shard[None])[0]


def sum_shards(values: Tensor) -> Tensor:
    """Over the shards, in their order."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total
