"""Which prompts are worth training on: ranked by how much the model's answers to them vary."""

from __future__ import annotations

import json
from pathlib import Path

from em_kernels.evaluator.records import EvalError, read_settings
from em_kernels.evaluator.summary import AnswerSummary, clusters_of, read_answers, share_correct
from em_kernels.lm.data import fill_template
from em_kernels.lm.judge.clusters import semantic_entropy, vote_margin
from em_kernels.lm.judge.judges import Judge, make_judge
from em_kernels.lm.settings import check_choice, check_int
from em_kernels.lm.text import write_text

SIGNALS = {"variance": -1, "entropy": -1, "semantic_entropy": -1, "margin": 1}
"""Signal -> the sign that sorts the most uncertain prompt first."""


def rank_prompts(folder: str | Path, by: str = "variance", top: int | None = None) -> list[dict]:
    """The problems of an evaluation, those the model is least decided on first.

    Each is a dict: prompt (as it was put to the model), problem, answer, samples, and the signals

        accuracy a           share of right samples (None where the problems have no answers)
        variance             a (1 - a), at most 1/4
        entropy              mean over samples of the mean entropy of their tokens, nats
        semantic_entropy     -sum_c p_c log p_c over different final answers, nats
        margin               (votes of the commonest final answer - of the next) / samples

    The last three need no labels. Ties stay in the order of the file. Problems that were too long
    to ask, or that have no answers yet, are not ranked.

    Args:
        folder: of an evaluation with one temperature above 0.
        by: a key of `SIGNALS`; all but "margin" rank the largest first.
        top: only the first so many.

    Raises:
        EvalError: no evaluation, or none with exactly one temperature above 0.
        ImportError: the judge of the evaluation is missing.
        ValueError: an unknown signal, or one that this evaluation does not have.

    Source: Gao et al., "One-shot Entropy Minimization" (2025): selection by variance of accuracy.
    """
    check_choice("by", by, tuple(SIGNALS))
    check_top(top)
    settings = read_settings(folder)
    drawn = [t for t in settings["config"]["temperatures"] if t > 0]
    if len(drawn) != 1:
        raise EvalError(f"{folder} must have one temperature above 0 to rank by, has {drawn}")
    answers = read_answers(folder).get(drawn[0], {})
    left_out = set(settings["too_long"])
    judge = make_judge(settings["config"]["judge"])
    rows = [_row(settings, i, answers[i], judge) for i in answers if i not in left_out]
    if any(row[by] is None for row in rows):
        raise ValueError(f"{folder} has no {by} for its answers; rank by another signal")
    return sorted(rows, key=lambda row: SIGNALS[by] * row[by])[:top]


def check_top(top: int | None) -> None:
    if top is not None:
        check_int("top", top, 1)


def _row(settings: dict, i: int, answers: list[AnswerSummary], judge: Judge) -> dict:
    problem, config = settings["problems"][i], settings["config"]
    accuracy = share_correct(answers) if config["labelled"] else None
    votes = clusters_of(answers, judge)
    known = [answer.entropy for answer in answers if answer.entropy is not None]
    return {
        "prompt": fill_template(config["template"], problem["problem"]),
        **problem,
        "samples": len(answers),
        "accuracy": accuracy,
        "variance": None if accuracy is None else accuracy * (1 - accuracy),
        "entropy": sum(known) / len(known) if len(known) == len(answers) else None,
        "semantic_entropy": semantic_entropy(votes),
        "margin": vote_margin(votes),
    }


def write_prompts(rows: list[dict], path: str | Path) -> None:
    """As JSON lines that `em-kernels train --prompts` takes."""
    write_text(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
