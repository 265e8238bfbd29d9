"""On-policy distillation: the weight of every token's divergence from the teacher."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from em_kernels.backends.vocab_parallel import gather
from em_kernels.objectives._inputs import masked
from em_kernels.objectives.aggregation import aggregation_weight
from em_kernels.ops.checks import check_floating, check_number, count_mask


def opd_weight(
    mask: Tensor,
    teacher_entropy: Tensor | None = None,
    *,
    mode: str = "token_mean",
    denominator: float | Tensor | None = None,
    max_length: int | None = None,
    mean_entropy: float | Tensor | None = None,
    segment_ids: Tensor | None = None,
    token_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The weights w of L = sum_t w_t D(p_t, q_t) over answers that the student p sampled.

    D is KL(p || q) by default, KL(q || p) or Jensen-Shannon, q the teacher on the same tokens;
    the sampling is not differentiated. L and its gradient are, a micro-batch at a time,
    `linear_divergence_loss(hidden, weight, teacher_hidden, teacher_weight, token_weight=w[rows])`.

        w_t = a_t                  a the weights of `aggregate_loss`: 1 / tokens for token_mean
        w_t = a_t H_t / mean H     with the teacher's entropies, mean H over the masked tokens

    The second gives forks of the teacher more and what it is sure of less weight; its mean over
    the tokens stays that of the first. Where the teacher is sure of every token, it is the first.

    Args:
        mask: (..., T) bool or numeric, tokens where it is non-zero count. Of the whole update, so
            that sums and mean are over all its tokens; of a micro-batch, give `denominator` and
            `mean_entropy`.
        teacher_entropy: (..., T) H(q_t), nats, without gradient; None leaves the weights equal.
            NaN where the mask is 0 is ignored.
        mode, denominator, max_length, segment_ids, token_group: as in `aggregate_loss`; the mean
            is over the tokens of all ranks of the group.
        mean_entropy: mean H of the whole update, nats, >= 0, a number or 0-d tensor; None takes it
            from `teacher_entropy`.

    Returns:
        (..., T) float32, 0 where the mask is 0.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: on-policy distillation: Agarwal et al., "On-Policy Distillation of Language Models"
    (2024), GKD with lambda = 1; Gu et al., "MiniLLM" (2024); per token, with the reverse KL: Lu
    and Thinking Machines Lab, "On-Policy Distillation" (2025). A weight by entropy is that of Su
    et al., "EA-KD: Entropy-based Adaptive Knowledge Distillation" (2023), arXiv:2311.13621, with
    the teacher's entropy alone and a mean of 1. Not this: Jin et al., "Entropy-Aware On-Policy
    Distillation of Language Models" (2026), arXiv:2603.07079, who add the forward KL to the
    reverse KL where the teacher's entropy is high.
    """
    counted = count_mask(mask)
    whose: dict[str, Any] = dict(segment_ids=segment_ids, token_group=token_group)
    divisor: dict[str, Any] = dict(denominator=denominator, max_length=max_length)
    weight = aggregation_weight(counted, mode=mode, **divisor, **whose)
    if mean_entropy is not None:
        _check_mean(mean_entropy)
    if teacher_entropy is None:
        return weight.float()
    check_floating("teacher_entropy", teacher_entropy, counted)
    counted = counted & (weight != 0)
    entropy = masked(teacher_entropy.detach(), counted, torch.float64)
    if mean_entropy is None:
        mean_entropy = _mean(entropy, counted, token_group)
    mean = torch.as_tensor(mean_entropy, dtype=torch.float64, device=entropy.device)
    return (weight * torch.where(mean > 0, entropy / mean, 1.0)).float()


def _mean(entropy: Tensor, counted: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Over the tokens of all ranks."""
    total = torch.stack([entropy.sum(), counted.sum().double()])
    if group is not None:
        total = gather(total, group).sum(0)
    return total[0] / total[1].clamp(min=1)


def _check_mean(mean: float | Tensor) -> None:
    if not isinstance(mean, Tensor):
        check_number("mean_entropy", mean, lambda v: v >= 0, "at least 0")
    elif mean.dim() != 0:
        raise ValueError(f"mean_entropy must be a number or 0-d, got shape {tuple(mean.shape)}")
