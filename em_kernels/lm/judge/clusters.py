"""Answers by meaning: which are the same, how many agree, and how undecided they are together.

Votes, semantic entropy and the rewards made of them all come from here. Answers are numbered from 0
in the order in which their meanings first appear; None is no answer, which agrees with nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from em_kernels.lm.judge.answers import final_answer
from em_kernels.lm.judge.judges import Judge, make_judge

Clusters = Sequence[int | None]
"""The number of each answer's meaning."""


def cluster_answers(
    answers: Iterable[str | None], same: Callable[[str, str], bool]
) -> list[int | None]:
    """Number the answers, those of one meaning alike.

    An answer joins the first cluster whose first member it is the `same` as.

    Source: Farquhar et al., "Detecting hallucinations in large language models using semantic
    entropy" (2024), clustering by first member.
    """
    firsts: list[str] = []
    return [None if answer is None else _place(answer, firsts, same) for answer in answers]


def _place(answer: str, firsts: list[str], same: Callable[[str, str], bool]) -> int:
    for number, first in enumerate(firsts):
        if same(answer, first):
            return number
    firsts.append(answer)
    return len(firsts) - 1


def cluster_final_answers(
    answers: Iterable[str | None], judge: Judge | None = None
) -> list[int | None]:
    """Number final answers, as `final_answer` finds them, by `judge` (`make_judge()`)."""
    judge = judge or make_judge()

    def same(answer: str, first: str) -> bool:
        return answer == first or judge(f"\\boxed{{{answer}}}", first)

    return cluster_answers(answers, same)


def cluster_responses(responses: Iterable[str], judge: Judge | None = None) -> list[int | None]:
    """Number whole responses by their final answers; one without a final answer gets None."""
    return cluster_final_answers(map(final_answer, responses), judge)


def shares(clusters: Clusters) -> list[float]:
    """For each answer the share of all that agree with it, itself included."""
    counts = Counter(clusters)
    return [(1 if c is None else counts[c]) / len(clusters) for c in clusters]


def semantic_entropy(clusters: Clusters) -> float:
    """-sum_c p_c log p_c over the clusters, nats; each None is a cluster of its own; 0 of none.

    Source: Farquhar et al. (2024).
    """
    # The mean over answers of -log p_c(i) weighs each cluster's -log p_c by p_c.
    surprise = math.fsum(-math.log(share) for share in shares(clusters))
    return max(surprise, 0.0) / max(len(clusters), 1)


def majority(clusters: Clusters) -> int | None:
    """The cluster of most answers; of several as large, that of the answer that came first.

    None where there is no answer.

    Source: Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in Language Models"
    (2022), arXiv:2203.11171.
    """
    counts = Counter(c for c in clusters if c is not None)
    return min(counts, key=lambda c: (-counts[c], c), default=None)


def vote_margin(clusters: Clusters) -> float:
    """(votes of the commonest answer - votes of the next) / all; None is no answer."""
    counts = Counter(c for c in clusters if c is not None)
    first, second, *_ = [*(count for _, count in counts.most_common(2)), 0, 0]
    return (first - second) / max(len(clusters), 1)
