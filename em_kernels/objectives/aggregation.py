"""From a loss per token to one number, with the divisor in plain sight."""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels.backends.interface import accumulate_dtype
from em_kernels.objectives._inputs import masked
from em_kernels.ops.arguments import check_floating, check_number, count_mask

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_mean_token_sum")


def aggregate_loss(
    loss: Tensor,
    mask: Tensor,
    *,
    mode: str = "token_mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """One loss from the losses of the masked tokens.

    token_mean:               sum_bt m_bt L_bt / D,                     D = number of tokens
    sequence_mean:            sum_b (sum_t m_bt L_bt / n_b) / D,        D = number of answers
    sequence_mean_token_sum:  sum_b sum_t m_bt L_bt / D,                D = number of answers

    with n_b the tokens of answer b; an answer without tokens does not count. D is taken from
    `mask` unless given. The losses of the micro-batches of one update, each called with the D of
    the whole update, add up to the loss of the whole, whatever the cut; dividing
    sequence_mean_token_sum by (answers x longest length) gives Dr. GRPO's constant normaliser.

    Args:
        loss: (..., T) floating point; an answer is one row of the last dimension.
        mask: (..., T) bool or numeric, tokens where it is non-zero count (a floating mask holds 0
            and 1 only); NaN elsewhere is ignored.
        mode: one of `AGGREGATIONS`.
        denominator: D, a positive number or 0-d tensor, from `aggregation_denominator` of the
            whole update (summed over ranks, if there are several); None takes it from `mask`.

    Returns:
        0-d float32 (float64 for float64), 0 if no token counts; differentiable in `loss`.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: token_mean: Yu et al., "DAPO" (2025); sequence_mean: Shao et al.,
    "DeepSeekMath" (2024), eq. 3; constant normaliser: Liu et al., "Understanding R1-Zero-Like
    Training" (2025).
    """
    check_floating("loss", loss)
    counted = count_mask(mask, loss)
    weight = aggregation_weight(counted, mode=mode, denominator=denominator)
    return (masked(loss, counted) * weight.to(accumulate_dtype(loss.dtype))).sum()


def aggregation_weight(
    mask: Tensor, *, mode: str = "token_mean", denominator: float | Tensor | None = None
) -> Tensor:
    """The weight of every token in `aggregate_loss`, (..., T) float64: what `token_loss` takes
    for losses that are linear in log-probability or entropy. Arguments as in `aggregate_loss`."""
    counted = count_mask(mask)
    if denominator is None:
        denominator = aggregation_denominator(counted, mode=mode)
    _check_mode(mode)
    _check_denominator(denominator)
    weight = counted.to(torch.float64)
    if mode == "sequence_mean":
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1)
    return weight / denominator


def aggregation_denominator(mask: Tensor, *, mode: str = "token_mean") -> Tensor:
    """D of `aggregate_loss`: the tokens of the mask, or its rows that have any; 0-d int64, at
    least 1."""
    counted = count_mask(mask)
    _check_mode(mode)
    number = counted.sum() if mode == "token_mean" else counted.any(-1).sum()
    return number.clamp(min=1)


def _check_mode(mode: str) -> None:
    if mode not in AGGREGATIONS:
        raise ValueError(f"mode must be one of {AGGREGATIONS}, got {mode!r}")


def _check_denominator(denominator: float | Tensor) -> None:
    if not isinstance(denominator, Tensor):
        check_number("denominator", denominator, lambda v: v > 0, "positive")
    elif denominator.dim() != 0:
        raise ValueError(
            f"denominator must be a number or 0-d, got shape {tuple(denominator.shape)}"
        )
