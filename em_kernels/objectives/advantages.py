"""Advantages from rewards: how much better an answer is than the others to its prompt."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from em_kernels.backends.interface import accumulate_dtype
from em_kernels.objectives._inputs import Groups
from em_kernels.ops.checks import check_flag, check_floating, check_number


def group_advantage(
    reward: Tensor,
    prompt: Tensor,
    *,
    normalize_std: bool = True,
    eps: float = 1e-6,
    correction: int = 1,
) -> Tensor:
    """A_i = (r_i - mean r) / (std r + eps), mean and std over the answers to the same prompt.

    A group of one answer, and one whose rewards are all equal, has A = 0 exactly, and nothing is
    learned from it. A UserWarning says so where every group has one answer, except while
    torch.compile traces.

    Args:
        reward: (N,) floating point, one per answer.
        prompt: (N,) integer id of the prompt each answer belongs to; groups may differ in size.
        normalize_std: divide by std + eps; without it A = r - mean r.
        eps: added to the standard deviation, in units of the reward, >= 0.
        correction: std divides by G - correction: 1 is the sample, 0 the population form.

    Returns:
        (N,) float32 (float64 for float64), detached, in standard deviations (or in units of the
        reward without `normalize_std`). A NaN reward makes its own group NaN.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Shao et al., "DeepSeekMath" (2024), section 4.1.2; without std: Liu et al.,
    "Understanding R1-Zero-Like Training: A Critical Perspective" (2025).
    """
    check_floating("reward", reward)
    check_flag("normalize_std", normalize_std)
    check_number("eps", eps, lambda v: v >= 0, "at least 0")
    if correction not in (0, 1):
        raise ValueError(f"correction must be 0 or 1, got {correction!r}")
    groups, values = Groups(prompt, reward), reward.detach().to(torch.float64)
    # torch.compile knows no number of groups to decide by.
    if not torch.compiler.is_compiling() and groups.number == len(reward) > 0:
        warnings.warn(
            "group_advantage: every prompt has one answer, so every advantage is 0 and nothing is "
            "learned from the rewards; give all the answers to a prompt the same id in `prompt`",
            stacklevel=2,
        )
    centred = torch.where(_all_equal(values, groups), 0, values - groups.mean(values))
    if normalize_std:
        free = (groups.size - correction).clamp(min=1)
        std = (groups.total(centred.square()) / free).sqrt()
        centred = torch.where(std == 0, 0, centred / (std + eps))
    return centred.to(accumulate_dtype(reward.dtype))


def _all_equal(values: Tensor, groups: Groups) -> Tensor:
    """Per row: its group has one value only (rounding of the mean does not enter)."""
    first = values.new_empty(groups.number)
    first[groups.index] = values
    return groups.all(values == first[groups.index])
