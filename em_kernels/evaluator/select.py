"""Which prompts are worth training on: ranked by how much the model's answers to them vary."""

from __future__ import annotations

import json
from pathlib import Path

from em_kernels.evaluator.records import UTF8, EvalError, read_settings, share_correct
from em_kernels.evaluator.summary import AnswerSummary, clusters_of, read_answers
from em_kernels.lm.data import fill_template
from em_kernels.lm.judge.clusters import semantic_entropy, vote_margin
from em_kernels.lm.judge.judges import Judge, make_judge

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
    if by not in SIGNALS:
        raise ValueError(f"by must be one of {tuple(SIGNALS)}, got {by!r}")
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
    if top is not None and top < 1:
        raise ValueError(f"top must be 1 or more, got {top}")


def _row(settings: dict, i: int, answers: list[AnswerSummary], judge: Judge) -> dict:
    problem, config = settings["problems"][i], settings["config"]
    accuracy = share_correct(answers) if config["labelled"] else None
    votes = clusters_of(answers, judge)
    return {
        "prompt": fill_template(config["template"], problem["problem"]),
        **problem,
        "samples": len(answers),
        "accuracy": accuracy,
        "variance": None if accuracy is None else accuracy * (1 - accuracy),
        "entropy": _mean([a.entropy for a in answers]),
        "semantic_entropy": semantic_entropy(votes),
        "margin": vote_margin(votes),
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(values) if len(known) == len(values) else None


def write_prompts(rows: list[dict], path: str | Path) -> None:
    """As JSON lines that `em-kernels train --prompts` takes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, **UTF8)
