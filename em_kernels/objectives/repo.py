"""REPO-R: the advantage rescaled by the token's own log-probability, and the controller of it."""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels.objectives._inputs import masked, token_advantage
from em_kernels.ops.checks import check_floating, check_number, count_mask

ZETA, ZETA_MIN, ZETA_MAX = 1e-3, 1e-4, 0.05
LEAST_LOGPROB = -20.0


@torch.no_grad()
def repo_advantage(
    logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    zeta: float,
    entropy: Tensor | None = None,
) -> Tensor:
    """A' = A - zeta |A| L, held to the sign of A:

        A > 0:  max(A (1 - zeta L), 0)        A < 0:  min(A (1 + zeta L), 0)

    with L = log p of the token, or log p + H with its `entropy`: log p less its mean over the
    vocabulary. With zeta > 0 rare tokens of good answers gain more and rare tokens of bad ones lose
    less, which raises the entropy; zeta < 0 lowers it.

    Args:
        logprob: (..., T) floating point, of the tokens under the current policy. No gradient.
        advantage: (..., T), or (...) with one value per answer.
        mask: (..., T) bool or numeric; where it is 0 the result is 0, even from NaN.
        zeta: finite, per nat, of either sign.
        entropy: (..., T) of the current policy, nats; None leaves L uncentred, as published.

    Returns:
        (..., T) float32 (float64 for float64), detached.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Petrenko et al., "Entropy-Preserving Reinforcement Learning" (2026), arXiv:2603.11682,
    REPO-R, appendix D.2, as SkyRL implements it (pull request 1896), whose lower bound of -20 on
    log p is kept. The general REPO is A - beta L with the centred L; REPO-R has beta = zeta |A|,
    and log p in place of L to spare the mean, which here costs nothing.
    """
    check_floating("logprob", logprob)
    check_number("zeta", zeta, lambda v: True, "a number")
    counted = count_mask(mask, logprob)
    scale = masked(logprob, counted).clamp(min=LEAST_LOGPROB)
    if entropy is not None:
        check_floating("entropy", entropy, logprob)
        scale = scale + masked(entropy, counted, scale.dtype)
    advantage = token_advantage(advantage, counted, scale.dtype)
    return advantage * (1 - zeta * advantage.sign() * scale).clamp(min=0)


def next_zeta(
    zeta: float,
    entropy: float,
    *,
    target: float,
    minimum: float = ZETA_MIN,
    maximum: float = ZETA_MAX,
) -> float:
    """Of the next update: doubled toward what is missing, halved on the way back, the sign changed
    where halving passes `minimum`.

        entropy < target:  min(2 zeta, maximum) if zeta > 0, minimum if zeta / 2 > -minimum,
                           zeta / 2 else
        entropy > target:  the same of -zeta, negated
        entropy = target:  zeta

    Args:
        zeta: of the update just made.
        entropy: mean entropy over the tokens of that update, nats.
        target: the entropy to hold, nats, >= 0; published: that before training.
        minimum, maximum: bounds on |zeta|, 0 < minimum <= maximum (published for REPO-R: 1e-4 and
            0.05).

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: as `repo_advantage`; what 0 becomes, `minimum` of the wanted sign, is SkyRL's.
    """
    check_number("zeta", zeta, lambda v: True, "a number")
    check_number("entropy", entropy, lambda v: v >= 0, "at least 0")
    check_number("target", target, lambda v: v >= 0, "at least 0")
    check_zeta_bounds(minimum, maximum)
    if entropy == target:
        return zeta
    sign = 1 if entropy < target else -1
    toward = sign * zeta
    if toward > 0:
        return sign * min(2 * toward, maximum)
    return sign * (minimum if toward / 2 > -minimum else toward / 2)


def check_zeta_bounds(minimum: float, maximum: float) -> None:
    check_number("minimum", minimum, lambda v: v > 0, "positive")
    check_number("maximum", maximum, lambda v: v > 0, "positive")
    if minimum > maximum:
        raise ValueError(
            f"minimum must be at most maximum, got minimum={minimum!r} and maximum={maximum!r}"
        )
