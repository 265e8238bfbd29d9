"""From a loss per token to one number, with the divisor in plain sight."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from em_kernels.backends.interface import accumulate_dtype
from em_kernels.objectives._inputs import masked
from em_kernels.ops.checks import check_floating, check_number, count_mask
from em_kernels.ops.reductions import Sequences, counts_of, token_weight

CONSTANT = "sequence_mean_token_sum_norm"
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_mean_token_sum", CONSTANT)


def aggregate_loss(
    loss: Tensor,
    mask: Tensor,
    *,
    mode: str = "token_mean",
    denominator: float | Tensor | None = None,
    max_length: int | None = None,
    segment_ids: Tensor | None = None,
    token_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """One loss from the losses of the masked tokens.

    token_mean:                    sum_bt m_bt L_bt / D,               D = number of tokens
    sequence_mean:                 sum_b (sum_t m_bt L_bt / n_b) / D,  D = number of answers
    sequence_mean_token_sum:       sum_b sum_t m_bt L_bt / D,          D = number of answers
    sequence_mean_token_sum_norm:  sum_b sum_t m_bt L_bt / D,          D = answers x max_length

    with n_b the tokens of answer b; an answer without tokens does not count. D is taken from
    `mask` unless given. The losses of the micro-batches of one update, each called with the D of
    the whole update, add up to the loss of the whole, whatever the cut between answers.

    sequence_mean is GRPO's and GSPO's, in which a token of a long answer weighs less; token_mean
    with the D of the update DAPO's, and with that of `mask` alone BNPO's in TRL, which therefore
    changes with the size of the micro-batch; the last one is Dr. GRPO's, whose normaliser is the
    same whatever the answers' lengths.

    With a `token_group` n_b and D count the tokens of all its ranks, and the result is this rank's
    part: the sum over its own tokens. Parts, and their gradients, add up over the ranks to those of
    the whole. DDP and FSDP average gradients over their W ranks: multiply the part by W for them.

    Args:
        loss: (..., T) floating point; an answer is one row of the last dimension, or what
            `segment_ids` say.
        mask: (..., T) bool or numeric, tokens where it is non-zero count (a floating mask holds 0
            and 1 only); NaN elsewhere is ignored.
        mode: one of `AGGREGATIONS`.
        denominator: D, a positive number or 0-d tensor, from `aggregation_denominator` of the
            whole update, of all ranks; None takes it from `mask`.
        max_length: L_max of sequence_mean_token_sum_norm, tokens, the longest that an answer may
            be; that mode needs it where there is no `denominator`, and no other has it.
        segment_ids, token_group: as in `em_kernels.entropy_loss`: which tokens are one answer, in
            packed rows or cut over ranks, and the ranks that have other tokens. With a
            `denominator` ranks exchange only what "sequence_mean" wants of `segment_ids`.

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
    weight = aggregation_weight(
        counted,
        mode=mode,
        denominator=denominator,
        max_length=max_length,
        segment_ids=segment_ids,
        token_group=token_group,
    )
    if segment_ids is not None:
        counted = counted & (weight != 0)
    return (masked(loss, counted) * weight.to(accumulate_dtype(loss.dtype))).sum()


def aggregation_weight(
    mask: Tensor,
    *,
    mode: str = "token_mean",
    denominator: float | Tensor | None = None,
    max_length: int | None = None,
    segment_ids: Tensor | None = None,
    token_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The weight of every token in `aggregate_loss`, (..., T) float64: what `token_loss` takes
    for losses that are linear in log-probability or entropy. Arguments as in `aggregate_loss`."""
    _check_mode(mode)
    longest = _check_length(mode, max_length, wanted=denominator is None)
    counted, sequences = _counted(mask, segment_ids, token_group)
    if denominator is not None:
        _check_denominator(denominator)
        return token_weight(counted, mode, sequences, denominator)
    weight = token_weight(counted, mode, sequences)
    return weight if longest is None else weight / longest


def aggregation_denominator(
    mask: Tensor,
    *,
    mode: str = "token_mean",
    max_length: int | None = None,
    segment_ids: Tensor | None = None,
    token_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """D of `aggregate_loss`: the tokens of the mask, or its answers that have any, or those times
    `max_length`; 0-d int64, at least 1. With a `token_group` those of all its ranks."""
    _check_mode(mode)
    longest = _check_length(mode, max_length, wanted=True)
    number = counts_of(*_counted(mask, segment_ids, token_group), mode).number(mode)
    return number if longest is None else number * longest


def _counted(
    mask: Tensor, segment_ids: Tensor | None, token_group: dist.ProcessGroup | None
) -> tuple[Tensor, Sequences]:
    """The tokens that count, and whose they are."""
    counted = count_mask(mask)
    sequences = Sequences.of(segment_ids, token_group, counted)
    return sequences.without_padding(counted), sequences


def _check_mode(mode: str) -> None:
    if mode not in AGGREGATIONS:
        raise ValueError(f"mode must be one of {AGGREGATIONS}, got {mode!r}")


def _check_length(mode: str, max_length: int | None, wanted: bool) -> int | None:
    if mode != CONSTANT:
        if max_length is not None:
            raise ValueError(f"max_length is for {CONSTANT!r}, got {max_length!r} with {mode!r}")
        return None
    if max_length is None and not wanted:
        return None
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise ValueError(
            f"max_length must be a positive int with {CONSTANT!r}, the longest that an answer may "
            f"be, got {max_length!r}"
        )
    return max_length


def _check_denominator(denominator: float | Tensor) -> None:
    if not isinstance(denominator, Tensor):
        check_number("denominator", denominator, lambda v: v > 0, "positive")
    elif denominator.dim() != 0:
        raise ValueError(
            f"denominator must be a number or 0-d, got shape {tuple(denominator.shape)}"
        )
