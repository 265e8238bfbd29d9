"""Rewards: one number per answer, from labels, from the model itself, or from neither."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from em_kernels.lm.judge.clusters import Clusters, majority
from em_kernels.lm.judge.judges import make_judge, marked_answer
from em_kernels.objectives._inputs import check_callable, check_texts, masked
from em_kernels.objectives.empo import by_prompt
from em_kernels.objectives.l_grpo import length_term
from em_kernels.ops.checks import check_floating, check_number, check_tensor, count_mask


def verified_reward(
    responses: Sequence[str],
    answers: Sequence[str],
    *,
    judge: Callable[[str, str], bool] | None = None,
) -> Tensor:
    """1 where the final answer of the response is the right one, else 0: (N,) float32.

    Args:
        responses: N generated texts.
        answers: N right answers.
        judge: (response, right answer) -> bool; by default `evaluator.make_judge()`.

    Raises:
        ValueError: `answers` and `responses` differ in length.

    Source: Lambert et al., "Tulu 3" (2024), verifiable rewards.
    """
    check_texts("responses", responses)
    check_texts("answers", answers)
    check_callable("judge", judge)
    if len(answers) != len(responses):
        raise ValueError(
            f"answers must have {len(responses)} entries, one per response, got {len(answers)}"
        )
    judge = judge or make_judge()
    return torch.tensor([float(judge(r, a)) for r, a in zip(responses, answers)])


def majority_reward(cluster: Tensor, prompt: Tensor) -> Tensor:
    """1 for the answers in the largest cluster of their prompt, else 0: (N,) float32.

    Of clusters of equal size the one with the smallest number (the first to appear) wins.
    `NO_ANSWER` never does.

    Args: as in `empo_reward`.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Zuo et al., "TTRL: Test-Time Reinforcement Learning" (2025).
    """
    return by_prompt(_in_majority, cluster, prompt)


def _in_majority(clusters: Clusters) -> list[float]:
    elected = majority(clusters)
    return [float(number is not None and number == elected) for number in clusters]


def negative_entropy_reward(entropy: Tensor, mask: Tensor) -> Tensor:
    """-sum_t m_t H_t / sum_t m_t per answer, nats: confidence as reward. An empty answer gets 0.

    Args:
        entropy: (..., T) floating point, of the policy that answered.
        mask: (..., T) bool or numeric, tokens where it is non-zero count (a floating mask holds 0
            and 1 only); NaN elsewhere is ignored.

    Returns:
        (...) float32 (float64 for float64), detached.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Prabhudesai et al., "Maximizing Confidence Alone Improves Reasoning" (2025), RENT;
    Agarwal et al., "The Unreasonable Effectiveness of Entropy Minimization in LLM Reasoning"
    (2025), EM-RL with token-level entropy.
    """
    return -_answer_mean("entropy", entropy, mask)


def self_certainty_reward(self_certainty: Tensor, mask: Tensor) -> Tensor:
    """sum_t m_t KL(U || p_t) / sum_t m_t per answer, nats. An empty answer gets 0.

    Args:
        self_certainty: (..., T) from `softmax_stats(outputs=("self_certainty",))`.
        mask: as in `negative_entropy_reward`.

    Returns, raises: as `negative_entropy_reward`.

    Source: Zhao et al., "Learning to Reason without External Rewards" (2025), Intuitor.
    """
    return _answer_mean("self_certainty", self_certainty, mask)


def _answer_mean(name: str, values: Tensor, mask: Tensor) -> Tensor:
    check_floating(name, values)
    counted = count_mask(mask, values)
    return masked(values.detach(), counted).sum(-1) / counted.sum(-1).clamp(min=1)


def length_reward(length: Tensor, *, max_length: float) -> Tensor:
    """1 - |o| / L_max, 0 beyond L_max: brevity alone, right or wrong.

    Args:
        length: (N,) tokens of each answer.
        max_length: L_max, tokens, > 0.

    Returns:
        (N,) float32 in [0, 1].

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: the length term of Song and Zheng, "Walk Before You Run!" (2025), without its condition.
    """
    return length_term(length, max_length=max_length)


def random_reward(
    like: Tensor, *, probability: float = 0.5, generator: torch.Generator | None = None
) -> Tensor:
    """1 with the given probability, else 0, whatever the answer: a control arm.

    Args:
        like: (N,) gives shape and device.
        probability: in [0, 1].
        generator: source of the draw, on the device of `like`.

    Returns:
        (N,) float32.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Shao et al., "Spurious Rewards: Rethinking Training Signals in RLVR" (2025).
    """
    check_tensor("like", like)
    check_number("probability", probability, lambda v: 0 <= v <= 1, "in [0, 1]")
    draw = torch.rand(like.shape, device=like.device, generator=generator)
    return (draw < probability).to(torch.float32)


def format_reward(responses: Sequence[str]) -> Tensor:
    r"""1 where the response marks an answer (a filled \boxed{...}, or a line after ####), right or
    wrong, else 0: a control arm. (N,) float32.

    Source: Shao et al., "Spurious Rewards: Rethinking Training Signals in RLVR" (2025).
    """
    check_texts("responses", responses)
    return torch.tensor([float(bool(marked_answer(response))) for response in responses])
