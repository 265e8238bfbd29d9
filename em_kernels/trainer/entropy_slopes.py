"""How far the entropy rises along the gradient of what a loss reads of a token: <dH/dz, ds/dz>.

z are the logits of one token at the temperature of the loss, p = softmax(z), l = log p, and s a
statistic of it: a log-probability, the entropy itself, a divergence from another model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from em_kernels.backends.interface import TokenStats
from em_kernels.lm.heads import Head
from em_kernels.ops.divergence import divergence
from em_kernels.ops.softmax_stats import softmax_stats

SHARPER = ("entropy", "varentropy")
_NEEDED = ("logprob", "entropy", "entropy_slope")
KEPT_NEEDED = (*_NEEDED, "collision", "kept_mass")
_BLOCK_ENTRIES = 1 << 24  # of logits, where a divergence has no statistic to make its slope of

Slopes = dict[str, Tensor]
"""By the name of a statistic s in `TokenStats` or `Tokens`: <dH/dz, ds/dz>, of its shape."""


def slopes_need(with_entropy: bool) -> tuple[str, ...]:
    """The statistics that `entropy_slopes` makes its slopes of."""
    return (*_NEEDED, "collision") if with_entropy else _NEEDED


def entropy_slopes(
    stats: TokenStats,
    *,
    labels: Tensor | None = None,
    sharper: TokenStats | None = None,
    kept: TokenStats | None = None,
) -> Slopes:
    """<dH/dz, ds/dz> at every token, of the statistics s that a loss may read.

    With p = softmax(z), l = log p, A = sum_v p_v^2 (l_v + H) and dH/dz_v = -p_v (l_v + H):

        s = l_y:   A - p_y (l_y + H)      `entropy_slope` of the written token; of others from A
        s = H:     |dH/dz|^2 = sum_v p_v^2 (l_v + H)^2, see `squared_gradient`
        s = l_y of what a sampler kept: `kept_slope`

    Args:
        stats: `slopes_need`, (B, T) each.
        labels: (B, T, K), log-probabilities of other tokens that the loss reads.
        sharper: `SHARPER` of the tokens at half the temperature, where the loss reads H.
        kept: `KEPT_NEEDED` of the kept sets, where l_y is of those.
    """
    logprob, entropy, slope = (getattr(stats, name).detach() for name in _NEEDED)
    found = {"logprob": slope if kept is None else kept_slope(entropy, kept)}
    if labels is not None:
        mean = slope + _own_part(logprob, entropy)
        found["label_current"] = mean[..., None] - _own_part(labels.detach(), entropy[..., None])
    if sharper is not None:
        found["entropy"] = squared_gradient(entropy, stats.collision, sharper)
    return found


def kept_slope(entropy: Tensor, kept: TokenStats) -> Tensor:
    """<dH/dz, d log q_y/dz>, q = p / P on the kept set S, 0 elsewhere, P the mass of S under p.

    With C = sum_S q_v^2, B = sum_S q_v^2 (log q_v + H(q)) and `entropy_slope` of q, which is
    B - q_y (log q_y + H(q)):

        P sum_S q_v^2 (l_v + H) - P q_y (l_y + H) = P (slope(q) + (C - q_y) (log P + H - H(q))).

    Args:
        entropy: H of p, over the whole vocabulary.
        kept: `KEPT_NEEDED`, of q.
    """
    mass = kept.kept_mass.clamp(min=torch.finfo(kept.kept_mass.dtype).tiny)
    apart = mass.log() + entropy - kept.entropy
    return mass * (kept.entropy_slope + (kept.collision - kept.logprob.exp()) * apart)


def _own_part(logprob: Tensor, entropy: Tensor) -> Tensor:
    """p_y (l_y + H); 0 where p_y is."""
    logprob = logprob.clamp(min=torch.finfo(logprob.dtype).min)
    return logprob.exp() * (logprob + entropy)


def squared_gradient(entropy: Tensor, collision: Tensor, sharper: TokenStats) -> Tensor:
    """|dH/dz|^2 = sum_v p_v^2 (l_v + H)^2 from statistics of p and of q = p^2 / C, C = sum_v p_v^2.

    q is softmax(2 z): the same logits at half the temperature, so that under q l has the mean
    (log C - H(q)) / 2 and a quarter of q's varentropy V(q) as its variance:

        |dH/dz|^2 = C (V(q) / 4 + ((log C - H(q)) / 2 + H)^2).

    Args:
        entropy, collision: H and C of p.
        sharper: `SHARPER` of q.
    """
    log_c = collision.clamp(min=torch.finfo(collision.dtype).tiny).log()
    mean = (log_c - sharper.entropy) / 2 + entropy
    return collision * (sharper.varentropy / 4 + mean * mean)


@torch.no_grad()
def divergence_slope(
    hidden: Tensor,
    other_hidden: Tensor,
    mask: Tensor,
    temperature: float,
    kind: str,
    **heads: Any,
) -> Tensor:
    """<dH/dz, dD/dz> of the `divergence` D from another model, (B, T), from the logits of both.

    No statistic tells it: logits are made, some rows at a time. Arguments as of
    `linear_divergence`.
    """
    own, other = (_head(heads, side) for side in ("", "other_"))
    found = torch.zeros(mask.shape, device=mask.device)
    for part in mask.nonzero().split(max(_BLOCK_ENTRIES // len(own.weight), 1)):
        at = part.unbind(1)
        z, w = own.logits(hidden[at]) / temperature, other.logits(other_hidden[at]) / temperature
        found[at] = _product_of_gradients(z, partial(divergence, other_logits=w, kind=kind))
    return found


def _head(heads: dict[str, Any], side: str) -> Head:
    names = [name for name in Head._fields if side + name in heads]
    return Head(**{name: heads[side + name] for name in names})


def _product_of_gradients(z: Tensor, statistic: Callable[[Tensor], Tensor]) -> Tensor:
    """<dH/dz, ds/dz> of every row of logits."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        values = softmax_stats(z, outputs=("entropy",)).entropy, statistic(z)
        first, second = (torch.autograd.grad(value.sum(), z)[0] for value in values)
    return (first * second).sum(-1)
