"""Entropy bonus: a fixed coefficient, or one steered toward a target entropy."""

from __future__ import annotations

from torch import Tensor

from em_kernels.objectives._inputs import masked
from em_kernels.ops.checks import check_bound, check_floating, check_number, count_mask

COEF_MIN, COEF_MAX = 0.0, 1.0


def entropy_bonus(loss: Tensor, entropy: Tensor, mask: Tensor, *, coef: float) -> Tensor:
    """L_t - coef H_t per token: coef > 0 holds entropy up, coef < 0 minimises it.

    Args:
        loss: (..., T) floating point, per token.
        entropy: (..., T), of the current policy, with its gradient, in nats.
        mask: (..., T) bool or numeric; where it is 0 the result is 0, even from NaN.
        coef: finite, loss units per nat.

    Returns:
        (..., T) float32 (float64 for float64), for `aggregate_loss`.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Williams and Peng, "Function Optimization Using Connectionist Reinforcement Learning
    Algorithms" (1991); Mnih et al., "Asynchronous Methods for Deep RL" (2016).
    """
    check_floating("loss", loss)
    check_floating("entropy", entropy, loss)
    check_number("coef", coef, lambda v: True, "a number")
    counted = count_mask(mask, loss)
    return masked(loss, counted) - coef * masked(entropy, counted)


def next_entropy_coef(
    coef: float,
    entropy: float,
    *,
    target: float,
    step: float = 0.005,
    minimum: float = COEF_MIN,
    maximum: float = COEF_MAX,
) -> float:
    """c + step while the entropy is below the target, c - step while above, c at it; in
    [minimum, maximum].

    Args:
        coef: c of the update just made.
        entropy: mean entropy over the tokens of that update, nats.
        target: the entropy to hold, nats, >= 0.
        step: change of c an update, > 0.
        minimum, maximum: bounds on c.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: He et al., "Skywork Open Reasoner 1 Technical Report" (2025), adaptive entropy control.
    """
    _check_steered(coef, entropy, target)
    check_bound("minimum", minimum)
    check_bound("maximum", maximum)
    check_number("step", step, lambda v: v > 0, "positive")
    if not minimum <= maximum:
        raise ValueError(
            f"minimum must be at most maximum, got minimum={minimum!r} and maximum={maximum!r}"
        )
    sign = (entropy < target) - (entropy > target)
    return min(max(coef + sign * step, minimum), maximum)


def active_entropy_coef(coef: float, entropy: float, *, target: float) -> float:
    """c where entropy <= target, else 0: the bonus acts only while the entropy is too low.

    Arguments and source as in `next_entropy_coef`.
    """
    _check_steered(coef, entropy, target)
    return coef if entropy <= target else 0.0


def _check_steered(coef: float, entropy: float, target: float) -> None:
    check_number("coef", coef, lambda v: True, "a number")
    check_number("entropy", entropy, lambda v: v >= 0, "at least 0")
    check_number("target", target, lambda v: v >= 0, "at least 0")
