"""What the answers of an evaluation amount to."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from em_kernels.evaluator.records import RECORDS, Answer, Records, by_problem, read_settings
from em_kernels.evaluator.statistics import (
    bootstrap,
    calibration,
    compare,
    majority_at_k,
    pass_at_k,
)
from em_kernels.lm.judge.clusters import cluster_final_answers
from em_kernels.lm.judge.judges import Judge, final_answer, make_judge


class AnswerSummary(NamedTuple):
    """An answer without its text: what is kept of each in memory."""

    correct: bool
    final: str | None
    tokens: int
    finished: bool
    entropy: float | None
    confidence: float | None

    @classmethod
    def of(cls, answer: Answer) -> AnswerSummary:
        return cls(
            answer.correct,
            final_answer(answer.text),
            answer.tokens,
            answer.finished,
            answer.entropy,
            answer.confidence,
        )


Answers = dict[float, dict[int, list[AnswerSummary]]]
"""temperature -> problem -> answers in the order of their sample numbers."""


def read_answers(folder: str | Path) -> Answers:
    """Those of the evaluation in the folder."""
    return _answers(records_of(folder, read_settings(folder)))


def records_of(folder: str | Path, settings: dict) -> Records:
    """The records of the folder that are the evaluation's, and its count of the others."""
    return Records(Path(folder) / RECORDS, settings)


def _answers(records: Records) -> Answers:
    return by_problem((record.key, AnswerSummary.of(record.answer)) for record in records)


def share_correct(answers: Iterable[AnswerSummary]) -> float:
    """The accuracy on one problem."""
    return statistics.fmean(answer.correct for answer in answers)


def clusters_of(answers: list[AnswerSummary], judge: Judge) -> list[int | None]:
    """Number the answers by their final answers; None without."""
    return cluster_final_answers((answer.final for answer in answers), judge)


def summarise(folder: str | Path) -> dict:
    """Accuracies with bootstrap intervals, and what there is to know before believing them.

    Per temperature: mean@k (the mean over problems of the share of right samples), pass@k for
    powers of two up to the number of samples, majority@k, mean response length, the shares without
    an end and without a final answer, mean entropy, and calibration of the sequence confidence.
    Problems not finished yet, rows of the source left out, records left out (broken, doubled, or of
    another evaluation) and prompts that were too long are counted; a prompt that was too long
    counts as wrong.

    Raises:
        EvalError: no evaluation.
        ImportError: SciPy is missing, or the judge of the evaluation.
    """
    settings = read_settings(folder)
    config = settings["config"]
    judge = make_judge(config["judge"])
    records = records_of(folder, settings)
    found = _answers(records)
    asked = sum(config["samples"] if t > 0 else 1 for t in config["temperatures"])
    answers = sum(len(a) for problems in found.values() for a in problems.values())
    return {
        "model": config["model"],
        "problems": len(settings["problems"]),
        "source": config["problems"],
        "judge": config["judge"],
        "labelled": config["labelled"],
        "samples": config["samples"],
        "skipped_rows": settings["skipped"],
        "too_long": settings["too_long"],
        "left_out_records": dict(records.left_out),
        "missing_answers": asked * len(settings["problems"]) - answers,
        "temperatures": [
            {"temperature": t, **_at_temperature(list(problems.values()), judge)}
            for t, problems in found.items()
        ],
    }


def _at_temperature(problems: list[list[AnswerSummary]], judge: Judge) -> dict:
    answers = [answer for of_problem in problems for answer in of_problem]
    k = min(map(len, problems))
    counts = [(sum(a.correct for a in p), len(p)) for p in problems]
    votes = [(clusters_of(p, judge), [a.correct for a in p]) for p in problems]
    powers = [2**i for i in range(k.bit_length()) if 2**i <= k]
    said = [a for a in answers if a.tokens]
    return {
        "samples": k,
        "mean": bootstrap(list(map(share_correct, problems)))._asdict(),
        "pass": {n: bootstrap([pass_at_k(c, m, n) for c, m in counts])._asdict() for n in powers},
        "majority": bootstrap([majority_at_k(*vote, k) for vote in votes])._asdict(),
        "response_length": _mean(a.tokens for a in said),
        "without_end": _mean(not a.finished for a in said),
        "without_final_answer": _mean(a.final is None for a in said),
        "entropy": _mean(a.entropy for a in said if a.entropy is not None),
        "calibration": _calibration(said),
    }


def _mean(values: Iterable[float]) -> float | None:
    values = [float(value) for value in values]
    return statistics.fmean(values) if values else None


def _calibration(answers: list[AnswerSummary]) -> dict | None:
    """Of exp(mean log-probability) as the confidence that an answer is right."""
    pairs = [(min(a.confidence, 1.0), a.correct) for a in answers if a.confidence is not None]
    return calibration(*zip(*pairs))._asdict() if pairs else None


def compare_folders(a: str | Path, b: str | Path) -> list[dict]:
    """b - a at every temperature both have, over the problems both were asked, pair by pair.

    Raises:
        EvalError: a folder without an evaluation.
        ValueError: no problem, or no temperature, in common.
    """
    first, second = _means(a), _means(b)
    rows = []
    for temperature in sorted(set(first) & set(second)):
        shared = sorted(set(first[temperature]) & set(second[temperature]))
        if shared:
            pairs = [[means[temperature][text] for text in shared] for means in (first, second)]
            found = compare(*pairs)
            averages = {"a": statistics.fmean(pairs[0]), "b": statistics.fmean(pairs[1])}
            rows.append({"temperature": temperature, **averages, **found._asdict()})
    if not rows:
        raise ValueError(f"{a} and {b} have no problem and temperature in common")
    return rows


def _means(folder: str | Path) -> dict[float, dict[str, float]]:
    """temperature -> text of the problem -> share of right samples."""
    problems = read_settings(folder)["problems"]
    return {
        temperature: {problems[i]["problem"]: share_correct(a) for i, a in of_problem.items()}
        for temperature, of_problem in read_answers(folder).items()
    }
