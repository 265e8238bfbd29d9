"""ConciseR, second stage: reward short answers where the prompt is mastered."""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels.objectives._inputs import Groups
from em_kernels.ops.checks import check_number, check_real, check_shape, check_tensor


def l_grpo_reward(correct: Tensor, length: Tensor, prompt: Tensor, *, max_length: float) -> Tensor:
    """r_i = 1[correct_i] + 1[all answers of the prompt are correct] (1 - |o_i| / L_max).

    Where some answer is wrong this is the plain accuracy. Where all are right the first term is
    the same for all of them, so that `group_advantage` depends on length alone; adding the length
    term or putting it in the place of the accuracy gives the same advantages. The loss is
    `grpo_loss` or `grpo_plus_plus_loss` with them. Lengths above L_max count as L_max.

    Args:
        correct: (N,) bool or numeric, non-zero where the answer is right.
        length: (N,) tokens of the answer |o_i|, integer or floating point.
        prompt: (N,) integer id of each answer's prompt.
        max_length: L_max, tokens, > 0.

    Returns:
        (N,) float32 in [0, 2].

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Song and Zheng, "Walk Before You Run! Concise LLM Reasoning via Reinforcement Learning"
    (2025), L-GRPO.
    """
    check_tensor("correct", correct)
    mastered = Groups(prompt, correct).all(correct != 0)
    check_tensor("length", length)
    check_shape("length", length, correct)
    right = (correct != 0).to(torch.float32)
    return right + mastered * length_term(length, max_length=max_length)


def length_term(length: Tensor, *, max_length: float) -> Tensor:
    """1 - |o| / L_max, 0 for answers longer than L_max: float32, of the shape of `length`."""
    check_real("length", length)
    check_number("max_length", max_length, lambda v: v > 0, "positive")
    return (1 - length.to(torch.float32) / max_length).clamp(min=0)
