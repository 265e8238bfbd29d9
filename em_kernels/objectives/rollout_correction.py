"""Importance weights between the policy that drew the answers and the trainer's own.

An engine and a trainer with the same weights differ: by rounding, by kernels, by what the engine
cut off or penalised. With mu the sampler's distribution and pi_old the trainer's, both of the time
when the answers were drawn, the loss of a token is multiplied by a weight made of pi_old / mu.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels.backends.interface import accumulate_dtype, serializable
from em_kernels.objectives._inputs import MAX_LOG_RATIO, k3, masked, masked_mean
from em_kernels.ops.checks import check_floating, check_number, count_mask


class Correction(NamedTuple):
    """How a weight is made of the ratios of an answer.

    weighs: "token", each its own ratio; "sequence", their product; "geometric", their geometric
    mean. judged: which of these is held against the bounds. zeroed: what is outside of them is 0,
    else it is the bound. floor, cap: the bounds that the source has.
    """

    weighs: str
    judged: str
    zeroed: bool
    floor: float
    cap: float

    def bounds(self, floor: float | None, cap: float | None) -> tuple[float, float]:
        """(floor, cap), those of the source where they are None."""
        return self.floor if floor is None else floor, self.cap if cap is None else cap


CORRECTIONS = {
    "token_tis": Correction("token", "token", False, 0.0, 2.0),
    "sequence_tis": Correction("sequence", "sequence", False, 0.0, 2.0),
    "geometric_tis": Correction("geometric", "geometric", False, 0.0, 2.0),
    "icepop": Correction("token", "token", True, 0.5, 5.0),
    "token_mask": Correction("token", "token", True, 0.0, 3.0),
    "sequence_mask": Correction("sequence", "sequence", True, 0.0, 3.0),
    "geometric_mask": Correction("token", "geometric", True, 0.5, 5.0),
}


@serializable
class RolloutWeight(NamedTuple):
    """A weight per token, and what to log about it.

    weight: (..., T), 0 where the mask is 0. metrics: 0-d, over the masked tokens passed in (0 if
    there is none): rollout_clipped, the share whose ratio was outside of the bounds, and
    rollout_weight_mean.
    """

    weight: Tensor
    metrics: dict[str, Tensor]


@torch.no_grad()
def rollout_weight(
    old_logprob: Tensor,
    rollout_logprob: Tensor,
    mask: Tensor,
    *,
    mode: str = "token_tis",
    floor: float | None = None,
    cap: float | None = None,
) -> RolloutWeight:
    """w_t of rho_t = pi_old(a_t) / mu(a_t), which the loss of a token is multiplied by:

        token_tis       min(max(rho_t, floor), cap)
        sequence_tis    min(max(prod_s rho_s, floor), cap), over the tokens s of the answer
        geometric_tis   min(max((prod_s rho_s)^(1/n), floor), cap), n the tokens of the answer
        icepop          rho_t if floor <= rho_t <= cap else 0
        token_mask      the same, with TRL's bounds
        sequence_mask   R if floor <= R <= cap else 0, R = prod_s rho_s
        geometric_mask  rho_t if floor <= (prod_s rho_s)^(1/n) <= cap else 0

    No gradient passes, and what is zeroed is not taken out of what the loss is divided by. Nothing
    is normalised over the batch.

    Args:
        old_logprob: (..., T) floating point, of the sampled tokens under the trainer's weights
            that the answers were drawn with.
        rollout_logprob: (..., T) under the distribution that they were drawn from. A token of which
            it is NaN, not said, has rho = 1.
        mask: (..., T) bool or numeric, tokens where it is non-zero count (a floating mask holds 0
            and 1 only); NaN elsewhere is ignored.
        mode: one of `CORRECTIONS`.
        floor, cap: bounds, 0 <= floor < cap; None takes those of the source: 0 and 2 for tis; 0.5
            and 5 for icepop and geometric_mask; 0 and 3 for token_mask and sequence_mask.

    Returns:
        RolloutWeight, float32 (float64 for float64). Logarithms of what is held against the bounds
        are held to at most 20 before the exponential.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: token_tis: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training" (2025); its cap and sequence_tis: `rollout_is` of verl 0.9 (OpenRLHF holds from 0.5 to
    5, TRL to 3). geometric_tis: level "geometric", mode "truncate" of THUDM/slime's
    train_infer_mismatch_helper; that its cap is 2 is this library's choice. icepop: Ling Team,
    "Every Step Evolves" (2025), arXiv:2510.18855, with the bounds of verl and OpenRLHF. token_mask,
    sequence_mask: `vllm_importance_sampling_mode` of TRL 1.16. geometric_mask: "seq-mask-tis" of
    OpenRLHF.
    """
    rule = CORRECTIONS[check_correction(mode)]
    floor, cap = rule.bounds(floor, cap)
    check_bounds(floor, cap)
    counted, d = _log_ratio(old_logprob, rollout_logprob, mask)
    judged = _ratio(d, counted, rule.judged)
    inside = (judged >= floor) & (judged <= cap)
    weight = judged.clamp(floor, cap)
    if rule.zeroed:
        weight = _ratio(d, counted, rule.weighs).where(inside, 0)
    weight = masked(weight, counted)
    metrics = {
        "rollout_clipped": masked_mean((~inside).to(weight.dtype), counted),
        "rollout_weight_mean": masked_mean(weight, counted),
    }
    return RolloutWeight(weight, metrics)


@torch.no_grad()
def rollout_difference(
    old_logprob: Tensor, rollout_logprob: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """How far sampler and trainer are apart, over the masked tokens (0 if there is none).

    With d = log pi_old - log mu at a sampled token:

        rollout_logprob_diff_mean, rollout_logprob_diff_max   of |d|
        rollout_kl_k1   mean of -d, an estimate of KL(mu || pi_old), unbiased, of either sign
        rollout_kl_k3   mean of exp(d) - d - 1, the same, >= 0, of small variance

    Tokens of which the sampler does not say a log-probability, NaN, are left out.

    Args:
        old_logprob, rollout_logprob, mask: as in `rollout_weight`.

    Returns:
        0-d float32 (float64 for float64), nats.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Schulman, "Approximating KL Divergence" (2020). verl has them as rollout_corr/kl and
    k3_kl, TRL the first two as sampling/sampling_logp_difference/mean and max.
    """
    counted, d = _log_ratio(old_logprob, rollout_logprob, mask)
    counted = counted & ~rollout_logprob.isnan()
    return {
        "rollout_logprob_diff_mean": masked_mean(d.abs(), counted),
        "rollout_logprob_diff_max": masked(d.abs(), counted).amax() if d.numel() else d.sum(),
        "rollout_kl_k1": masked_mean(-d, counted),
        "rollout_kl_k3": masked_mean(k3(d), counted),
    }


def check_correction(mode: str) -> str:
    if mode not in tuple(CORRECTIONS):
        raise ValueError(f"mode must be one of {tuple(CORRECTIONS)}, got {mode!r}")
    return mode


def check_bounds(floor: float, cap: float) -> None:
    check_number("floor", floor, lambda v: v >= 0, "0 or more")
    check_number("cap", cap, lambda v: v > floor, f"above floor={floor!r}")


def _log_ratio(old_logprob: Tensor, rollout_logprob: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(the tokens that count, d of them)."""
    check_floating("old_logprob", old_logprob)
    check_floating("rollout_logprob", rollout_logprob, old_logprob)
    counted = count_mask(mask, old_logprob)
    dtype = accumulate_dtype(old_logprob.dtype)
    said = counted & ~rollout_logprob.isnan()
    return counted, masked(old_logprob.to(dtype) - rollout_logprob.to(dtype), said)


def _ratio(d: Tensor, counted: Tensor, of: str) -> Tensor:
    if of != "token":
        total = d.sum(-1, keepdim=True, dtype=torch.float64)
        if of == "geometric":
            total = total / counted.sum(-1, keepdim=True).clamp(min=1)
        d = total.to(d.dtype).expand(d.shape)
    return d.clamp(max=MAX_LOG_RATIO).exp()
