"""KL(p || p_ref): estimates from the log-probabilities of tokens sampled from p, and a penalty."""

from __future__ import annotations

from torch import Tensor

from em_kernels.backends.interface import accumulate_dtype
from em_kernels.objectives._inputs import PolicyLoss, k3, masked, masked_mean
from em_kernels.ops.checks import check_floating, check_number, count_mask

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


def kl_penalty(
    policy: PolicyLoss,
    logprob: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    ref_logprob: Tensor | None = None,
    ref_kl: Tensor | None = None,
    kl_estimator: str = "k3",
) -> PolicyLoss:
    """L_t + kl_coef KL_t, of any policy loss per token.

    Args:
        policy: what `cispo_loss`, `gspo_loss`, ... give; `grpo_loss` takes the arguments below.
        logprob: (..., T) floating point, of the sampled tokens under the current policy p.
        mask: (..., T) bool or numeric, tokens where it is non-zero count; NaN elsewhere is ignored.
        kl_coef: beta, >= 0; above 0 it needs `ref_logprob` or `ref_kl`.
        ref_logprob: (..., T) under the reference policy, of which KL_t is `kl_estimate`.
        ref_kl: (..., T) KL(p || p_ref) per token with its gradient, nats, in place of an estimate:
            `linear_divergence(hidden, weight, ref_hidden, ref_weight, kind="reverse_kl")`.
        kl_estimator: one of `KL_ESTIMATORS`; with `ref_kl` nothing is estimated.

    Returns:
        PolicyLoss, with the metric ref_kl (nats) besides where there is a reference.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Shao et al., "DeepSeekMath" (2024), eq. 3 and 4.
    """
    check_reference(kl_coef, ref_logprob, ref_kl, kl_estimator)
    if not isinstance(policy, PolicyLoss):
        raise TypeError(f"policy must be a PolicyLoss, got {type(policy).__name__}")
    check_floating("logprob", logprob)
    counted, dtype = count_mask(mask, logprob), policy.loss.dtype
    if ref_logprob is not None:
        check_floating("ref_logprob", ref_logprob, logprob)
        known = masked(ref_logprob, counted, dtype)
        ref_kl = kl_estimate(masked(logprob, counted, dtype), known, estimator=kl_estimator)
    if ref_kl is None:
        return policy
    check_floating("ref_kl", ref_kl, logprob)
    ref_kl = masked(ref_kl, counted, dtype)
    metrics = {**policy.metrics, "ref_kl": masked_mean(ref_kl, counted)}
    return PolicyLoss(policy.loss + kl_coef * ref_kl, metrics)


def check_reference(
    kl_coef: float, ref_logprob: Tensor | None, ref_kl: Tensor | None, kl_estimator: str
) -> None:
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator must be one of {KL_ESTIMATORS}, got {kl_estimator!r}")
    check_number("kl_coef", kl_coef, lambda v: v >= 0, "at least 0")
    if ref_logprob is not None and ref_kl is not None:
        raise ValueError("ref_kl must be given instead of ref_logprob, got both: leave one out")
    if kl_coef > 0 and ref_logprob is None and ref_kl is None:
        raise ValueError(
            f"ref_logprob must be given for kl_coef={kl_coef!r}, or ref_kl, got None for both"
        )
