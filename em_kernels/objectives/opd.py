"""On-policy distillation: the weight of every token's divergence from the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels.objectives._inputs import masked
from em_kernels.objectives.aggregation import aggregation_weight
from em_kernels.ops.arguments import check_floating, count_mask


def opd_weight(
    mask: Tensor, teacher_entropy: Tensor | None = None, *, mode: str = "token_mean"
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
        mask: (..., T) bool or numeric, tokens where it is non-zero count. Of the whole update:
            the mean is over all its tokens, whatever the micro-batches.
        teacher_entropy: (..., T) H(q_t), nats, without gradient; None leaves the weights equal.
            NaN where the mask is 0 is ignored.
        mode: of `aggregate_loss`.

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
    weight = aggregation_weight(counted, mode=mode)
    if teacher_entropy is not None:
        check_floating("teacher_entropy", teacher_entropy, counted)
        entropy = masked(teacher_entropy.detach(), counted, torch.float64)
        mean = entropy.sum() / counted.sum().clamp(min=1)
        weight = weight * torch.where(mean > 0, entropy / mean, 1.0)
    return weight.float()
