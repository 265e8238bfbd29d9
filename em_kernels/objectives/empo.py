"""EMPO: answers that agree with the others are rewarded; no labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from em_kernels.objectives._inputs import Groups
from em_kernels.ops.arguments import check_number, check_tensor

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
    prompts = prompt.tolist() if isinstance(prompt, Tensor) else list(prompt)
    if len(prompts) != len(responses):
        raise ValueError(
            f"prompt must have {len(responses)} entries, one per response, got {len(prompts)}"
        )
    if same is not None and judge is not None:
        raise ValueError("same and judge both say which responses are alike; give one of them")
    # Imported where it is used: the evaluator needs the trainer, which needs the objectives.
    from em_kernels.lm.judge.judges import final_answer, number_answers, same_answer

    texts: Sequence[str | None] = responses
    if same is None:
        texts, same = [final_answer(response) for response in responses], same_answer(judge)
    rows: dict[int, list[int]] = {}
    for row, which in enumerate(prompts):
        rows.setdefault(which, []).append(row)
    device = prompt.device if isinstance(prompt, Tensor) else None
    clusters = torch.full((len(prompts),), NO_ANSWER, dtype=torch.int64, device=device)
    for own in rows.values():
        numbers = number_answers([texts[row] for row in own], same)
        clusters[own] = clusters.new_tensor([NO_ANSWER if n is None else n for n in numbers])
    return clusters


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
    return _share(cluster, prompt).to(torch.float32)


def semantic_entropy(cluster: Tensor, prompt: Tensor) -> Tensor:
    """SE = -sum_c p_c log p_c over the clusters of a prompt, p_c = |c| / G; given to each answer.

    Args: as in `empo_reward`; each `NO_ANSWER` row is a cluster of its own.

    Returns:
        (N,) float32, nats, in [0, log G].

    Source: Farquhar et al. (2024); Zhang et al. (2025).
    """
    # The mean over answers of -log p_c(i) weighs each cluster's -log p_c by p_c.
    surprise = -_share(cluster, prompt).log()
    return Groups(prompt, cluster).mean(surprise).clamp(min=0).to(torch.float32)


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
    check_tensor("entropy", entropy)
    check_number("low", low, lambda v: True, "a number")
    check_number("high", high, lambda v: v > low, f"above low={low!r}")
    return (entropy > low) & (entropy < high)


def _share(cluster: Tensor, prompt: Tensor) -> Tensor:
    """|cluster(i)| / G in float64."""
    check_tensor("cluster", cluster)
    groups = Groups(prompt, cluster)
    _, inverse, counts = torch.stack([groups.index, cluster.to(groups.index)]).unique(
        dim=1, return_inverse=True, return_counts=True
    )
    size = torch.where(cluster == NO_ANSWER, 1, counts[inverse])
    return size.to(torch.float64) / groups.size
