"""Estimates of KL(p || p_ref) from the log-probabilities of tokens sampled from p."""

from __future__ import annotations

from torch import Tensor

from em_kernels.backends.interface import accumulate_dtype
from em_kernels.objectives._inputs import k3
from em_kernels.ops.checks import check_floating

KL_ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(logprob: Tensor, ref_logprob: Tensor, *, estimator: str = "k3") -> Tensor:
    """Per token, with d = logprob_ref - logprob:

    k1 = -d                  unbiased, of either sign; its gradient has mean 0 under p
    k2 = d^2 / 2             biased, >= 0; its gradient is that of KL(p || p_ref) on average
    k3 = exp(d) - d - 1      unbiased, >= 0, small variance; the gradient of KL(p_ref || p) on
                             average

    The KL itself, at every token and over the whole vocabulary, is
    `linear_divergence(hidden, weight, ref_hidden, ref_weight, kind="reverse_kl")`, or `divergence`
    of logits; `grpo_loss` takes it as `ref_kl`.

    "On average" is over tokens sampled from p itself, with the sampling not differentiated. For
    k3, d is held to at most 20 (no gradient above), which keeps exp(d) finite; verl's k3 holds d
    to [-20, 20] and the result to at most 10, TRL's nothing.

    Args:
        logprob: (...) floating point, of the sampled tokens under the current policy p.
        ref_logprob: (...) of the same tokens under the reference; no gradient is sent to it.
        estimator: one of `KL_ESTIMATORS`.

    Returns:
        (...) float32 (float64 for float64), in nats.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Schulman, "Approximating KL Divergence" (2020); k3 in GRPO: Shao et al.,
    "DeepSeekMath" (2024), eq. 4.
    """
    check_floating("logprob", logprob)
    check_floating("ref_logprob", ref_logprob, logprob)
    dtype = accumulate_dtype(logprob.dtype)
    d = ref_logprob.detach().to(dtype) - logprob.to(dtype)
    match estimator:
        case "k1":
            return -d
        case "k2":
            return d.square() / 2
        case "k3":
            return k3(d)
        case _:
            raise ValueError(f"estimator must be one of {KL_ESTIMATORS}, got {estimator!r}")
