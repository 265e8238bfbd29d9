"""EMPO: answers that agree with the others are rewarded; no labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from em_kernels.lm.judge import clusters
from em_kernels.lm.judge.clusters import Clusters, cluster_answers, cluster_responses, shares
from em_kernels.objectives._inputs import Groups, check_callable, check_texts
from em_kernels.ops.checks import check_floating, check_integers, check_number

NO_ANSWER = -1
"""The cluster of a response without a final answer: it agrees with nothing, itself included."""


def answer_clusters(
    responses: Sequence[str],
    prompt: Sequence[int] | Tensor,
    *,
    same: Callable[[str, str], bool] | None = None,
    judge: Callable[[str, str], bool] | None = None,
) -> Tensor:
    """Number the responses by meaning, within each prompt.

    A response joins the first cluster of its prompt whose first member it is the same as.

    Args:
        responses: N generated texts.
        prompt: N integer ids of their prompts.
        same: (response, first member of a cluster) -> whether they mean the same. By default their
            final answers (boxed, after ####, or the last expression) are equal by `judge`, and a
            response without one gets `NO_ANSWER`.
        judge: (response, right answer) -> bool; by default `evaluator.make_judge()`. Not with
            `same`.

    Returns:
        (N,) int64 cluster numbers, from 0 within each prompt in order of appearance; on the
        device of `prompt` if that is a tensor.

    Raises:
        ValueError: `prompt` and `responses` differ in length, or `same` and `judge` are given.

    Source: Zhang et al., "Right Question is Already Half the Answer: Fully Unsupervised LLM
    Reasoning Incentivization" (2025), EMPO; clustering by first member: Farquhar et al.,
    "Detecting hallucinations in large language models using semantic entropy" (2024).
    """
    check_texts("responses", responses)
    check_callable("same", same)
    check_callable("judge", judge)
    if not isinstance(prompt, (Tensor, Sequence)):
        raise TypeError(f"prompt must be a sequence or a tensor, got {type(prompt).__name__}")
    prompts = prompt.tolist() if isinstance(prompt, Tensor) else list(prompt)
    if len(prompts) != len(responses):
        raise ValueError(
            f"prompt must have {len(responses)} entries, one per response, got {len(prompts)}"
        )
    if same is not None and judge is not None:
        raise ValueError("same and judge both say which responses are alike; give one of them")
    found: list[int] = [NO_ANSWER] * len(prompts)
    for rows in rows_by_prompt(prompts):
        texts = [responses[row] for row in rows]
        numbers = cluster_answers(texts, same) if same else cluster_responses(texts, judge)
        for row, number in zip(rows, numbers):
            found[row] = NO_ANSWER if number is None else number
    device = prompt.device if isinstance(prompt, Tensor) else None
    return torch.tensor(found, dtype=torch.int64, device=device)


def rows_by_prompt(prompts: Sequence[int]) -> list[list[int]]:
    """The rows of each prompt, both in order of appearance."""
    rows: dict[int, list[int]] = {}
    for row, which in enumerate(prompts):
        rows.setdefault(which, []).append(row)
    return list(rows.values())


def by_prompt(of: Callable[[Clusters], Sequence[float]], cluster: Tensor, prompt: Tensor) -> Tensor:
    """(N,) float32: `of` the clusters of each prompt, a number for each of its answers."""
    check_integers("cluster", cluster)
    groups = Groups(prompt, cluster)
    numbers = [None if number == NO_ANSWER else number for number in cluster.tolist()]
    values = [0.0] * len(numbers)
    for rows in rows_by_prompt(groups.index.tolist()):
        for row, value in zip(rows, of([numbers[row] for row in rows])):
            values[row] = value
    return torch.tensor(values, dtype=torch.float32, device=cluster.device)


def empo_reward(cluster: Tensor, prompt: Tensor) -> Tensor:
    """r_i = |cluster(i)| / G, the share of the G answers to the prompt that agree with answer i.

    Args:
        cluster: (N,) integer, as from `answer_clusters`; `NO_ANSWER` rows agree with themselves
            alone.
        prompt: (N,) integer id of each answer's prompt.

    Returns:
        (N,) float32 in (0, 1].

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Zhang et al. (2025).
    """
    return by_prompt(shares, cluster, prompt)


def semantic_entropy(cluster: Tensor, prompt: Tensor) -> Tensor:
    """SE = -sum_c p_c log p_c over the clusters of a prompt, p_c = |c| / G; given to each answer.

    Args: as in `empo_reward`; each `NO_ANSWER` row is a cluster of its own.

    Returns:
        (N,) float32, nats, in [0, log G].

    Source: Farquhar et al. (2024); Zhang et al. (2025).
    """
    return by_prompt(lambda own: [clusters.semantic_entropy(own)] * len(own), cluster, prompt)


def empo_mask(entropy: Tensor, *, low: float, high: float) -> Tensor:
    """low < SE < high: leaves out prompts the model is sure about, and those it only guesses at.

    Args:
        entropy: (N,) from `semantic_entropy`, nats.
        low, high: both exclusive, nats, low < high; a large `high` keeps all uncertain prompts.

    Returns:
        (N,) bool.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Zhang et al. (2025), entropy thresholding.
    """
    check_floating("entropy", entropy)
    check_number("low", low, lambda v: True, "a number")
    check_number("high", high, lambda v: v > low, f"above low={low!r}")
    return (entropy > low) & (entropy < high)
