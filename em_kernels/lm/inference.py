"""Entropy control while generating: processors of logits for transformers' `generate`.

    from transformers import LogitsProcessorList
    model.generate(..., logits_processor=LogitsProcessorList([EntropyDescent(threshold=0.3)]))

Each takes scores (B, V) and gives scores (B, V), row by row on its own; a row's result does not
depend on its batch. Entropies are in nats. On a GPU neither waits for the device, and with the
Triton kernels each is one launch, in which a row is gone through until it is done.
"""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels.backends.interface import accumulate_dtype
from em_kernels.ops.arguments import check_impl, check_logits
from em_kernels.ops.checks import check_number, got_int, is_int


class EntropyDescent:
    """EM-INF: gradient descent on the logits themselves until their entropy is low enough.

        z <- z - learning_rate * dH/dz   while H(softmax(z)) > threshold, at most `steps` times

    which minimises max(H, threshold). dH/dz_v = p_v (E - d_v) raises likely tokens and lowers
    unlikely ones; their order stays. A row at or below the threshold is returned as it came. A
    masked logit (-inf) stays masked; a row with NaN, +inf or no finite logit is left alone.

    Args:
        threshold: nats, >= 0.
        steps: at most so many, each one pass over the scores.
        learning_rate: > 0, in logits per unit of gradient.
        impl: backend, as in `softmax_stats`.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Agarwal et al., "The Unreasonable Effectiveness of Entropy Minimization in LLM
    Reasoning" (2025), arXiv:2505.15134, EM-INF. The defaults are this library's.
    """

    def __init__(
        self,
        threshold: float = 0.3,
        *,
        steps: int = 10,
        learning_rate: float = 1.0,
        impl: str = "auto",
    ):
        check_number("threshold", threshold, lambda v: v >= 0, "0 or more")
        check_number("learning_rate", learning_rate, lambda v: v > 0, "positive")
        _check_count("steps", steps)
        check_impl(impl)
        self.threshold, self.steps, self.learning_rate = threshold, steps, learning_rate
        self.impl = impl

    @torch.no_grad()
    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        check_logits(scores, "scores")
        settings = (self.threshold, self.learning_rate, self.steps)
        (z,) = torch.ops.em_kernels.entropy_descent(scores, *settings, self.impl)
        return z.to(scores.dtype)


class AdaptiveTemperature:
    """Divides each row by the temperature in [minimum, 1] that gives it the entropy aimed at.

        T solves H(softmax(z / T)) = max(threshold, ratio * H)   where H > threshold

    H rises with T, so T is found by halving the interval. Rows at or below the threshold keep
    T = 1; where even the minimum leaves more entropy than wanted (ties), T is the minimum.

    Args:
        threshold: nats, >= 0: the least entropy to leave.
        ratio: in [0, 1): the share of the entropy to keep, where that is above the threshold.
        minimum: of the temperature, in (0, 1).
        iterations: halvings of the interval, each one pass over the scores; the temperature found
            is within (1 - minimum) / 2^iterations of the solution.
        impl: backend, as in `softmax_stats`.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Agarwal et al. (2025), arXiv:2505.15134, algorithm 1 (inference-time adaptive
    temperature), here always run to full precision. The defaults are this library's.
    """

    def __init__(
        self,
        threshold: float = 0.3,
        *,
        ratio: float = 0.0,
        minimum: float = 0.05,
        iterations: int = 12,
        impl: str = "auto",
    ):
        check_number("threshold", threshold, lambda v: v >= 0, "0 or more")
        check_number("ratio", ratio, lambda v: 0 <= v < 1, "in [0, 1)")
        check_number("minimum", minimum, lambda v: 0 < v < 1, "in (0, 1)")
        _check_count("iterations", iterations)
        check_impl(impl)
        self.threshold, self.ratio, self.minimum = threshold, ratio, minimum
        self.iterations, self.impl = iterations, impl

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        temperature = self.temperature(scores)
        z = scores.to(accumulate_dtype(scores.dtype)) / temperature[..., None]
        return torch.where((temperature == 1)[..., None], scores, z.to(scores.dtype))

    @torch.no_grad()
    def temperature(self, scores: Tensor) -> Tensor:
        """The temperature of each row, (B,) float32 (float64 for float64)."""
        check_logits(scores, "scores")
        goal = (self.threshold, self.ratio, self.minimum, self.iterations)
        (found,) = torch.ops.em_kernels.entropy_temperature(scores, *goal, self.impl)
        return found


def _check_count(name: str, value: int) -> None:
    if not is_int(value, 1):
        raise ValueError(f"{name} must be a positive int, got {got_int(value)}")
