"""Sampled and greedy accuracy of a model on problems with known answers."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from em_kernels.evaluator.asking import Asked, default_batch_size
from em_kernels.evaluator.records import Answer, write_json
from em_kernels.lm.data import encode_prompt, read_jsonl, text_field
from em_kernels.lm.judge.judges import Judge, judge_name, make_judge
from em_kernels.lm.problems import Problem
from em_kernels.lm.random_state import RandomState
from em_kernels.lm.rollout import Sampling


@dataclass(frozen=True)
class ProblemRecord:
    """Everything the model said to one problem; `greedy` is None where it was not asked."""

    problem: str
    answer: str
    samples: list[Answer]
    greedy: Answer | None


@dataclass(frozen=True)
class EvalResult:
    """Accuracies with standard errors over problems (None where not asked for).

    The sampled accuracy of a problem is the mean over its samples; its standard error is that of
    the mean over problems, so samples of one problem are not taken for independent problems.
    """

    problems: int
    samples: int
    temperature: float
    sampled_accuracy: float | None
    sampled_stderr: float | None
    greedy_accuracy: float | None
    greedy_stderr: float | None
    response_length: float
    truncated: float
    judge: str
    seconds: float
    records: list[ProblemRecord]

    def summary(self) -> dict:
        """Everything but the records."""
        return {name: value for name, value in vars(self).items() if name != "records"}

    def write_json(self, path: str | Path) -> None:
        write_json(Path(path), asdict(self))


def read_problems(path: str | Path, limit: int | None = None) -> list[Problem]:
    """The problems of a file of lines {"problem": ..., "answer": ...}, the first `limit` of them.

    Raises:
        FileNotFoundError, ValueError: no such file; a broken line, named by its number.
    """
    problems = [
        Problem(text_field(path, number, line, "problem"), text_field(path, number, line, "answer"))
        for number, line in read_jsonl(path)
    ]
    if not problems:
        raise ValueError(f"{path}: no problems in the file")
    return problems[:limit]


def evaluate(
    model,
    tokenizer,
    problems: Sequence[tuple[str, str]],
    *,
    samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    greedy: bool = True,
    max_new_tokens: int = 2048,
    batch_size: int | None = None,
    judge: str | Judge = "auto",
    seed: int = 0,
    progress: bool = True,
) -> EvalResult:
    """Ask every problem through the chat template and judge the answers.

    Args:
        model, tokenizer: a transformers causal language model.
        problems: (problem, answer) pairs.
        samples: answers drawn per problem at `temperature` and `top_p`; 0 for none.
        greedy: also take the likeliest token each time, once per problem.
        max_new_tokens: longest answer.
        batch_size: answers generated at once, of problems of similar length; None is 256 for a
            model below 50 million parameters, else 64 on a GPU and 8 on a CPU.
        judge: a name (see `make_judge`) or a function (response, answer) -> bool.
        seed: of the sampling; the caller's random state is left alone.

    Raises:
        ValueError: a bad argument, or a prompt longer than the model has positions.
    """
    _check_arguments(problems, samples, temperature, top_p, greedy, batch_size)
    judge = make_judge(judge) if isinstance(judge, str) else judge
    name = judge_name(judge)
    problems = [Problem(*problem) for problem in problems]
    prompts = [encode_prompt(tokenizer, problem.problem) for problem in problems]
    ask = partial(_ask, Asked(model, tokenizer, judge), problems, prompts)
    size = batch_size or default_batch_size(model)
    drawing = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    likeliest = Sampling(temperature=0, max_new_tokens=max_new_tokens)
    started = time.perf_counter()
    with RandomState(seed), _bar(len(problems) * (samples + greedy), progress) as bar:
        drawn = ask(drawing, samples, size, bar)
        best = ask(likeliest, int(greedy), size, bar)
    records = [
        ProblemRecord(*problem, drawn[i], best[i][0] if greedy else None)
        for i, problem in enumerate(problems)
    ]
    return _summarise(records, samples, temperature, name, time.perf_counter() - started)


def _ask(
    asked: Asked,
    problems: list[Problem],
    prompts: list[list[int]],
    sampling: Sampling,
    times: int,
    batch_size: int,
    bar,
) -> list[list[Answer]]:
    """`times` answers to each problem, short problems first."""
    answers: list[list[Answer]] = [[] for _ in problems]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    turns = [i for i in order for _ in range(times)]
    for start in range(0, len(turns), batch_size):
        batch = turns[start : start + batch_size]
        rights = [problems[i].answer for i in batch]
        for i, answer in zip(batch, asked.ask([prompts[i] for i in batch], rights, sampling)):
            answers[i].append(answer)
        bar.update(len(batch))
    return answers


def _summarise(
    records: list[ProblemRecord], samples: int, temperature: float, judge: str, seconds: float
) -> EvalResult:
    sampled = [statistics.fmean(a.correct for a in r.samples) for r in records if r.samples]
    greedy = [float(r.greedy.correct) for r in records if r.greedy]
    answers = [a for r in records for a in [*r.samples, r.greedy] if a]
    return EvalResult(
        problems=len(records),
        samples=samples,
        temperature=temperature,
        sampled_accuracy=statistics.fmean(sampled) if sampled else None,
        sampled_stderr=_standard_error(sampled),
        greedy_accuracy=statistics.fmean(greedy) if greedy else None,
        greedy_stderr=_standard_error(greedy),
        response_length=statistics.fmean(a.tokens for a in answers),
        truncated=statistics.fmean(not a.finished for a in answers),
        judge=judge,
        seconds=seconds,
        records=records,
    )


def _standard_error(values: list[float]) -> float | None:
    """Of the mean; None below two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _check_arguments(problems, samples, temperature, top_p, greedy, batch_size) -> None:
    if not problems:
        raise ValueError("problems must have at least one problem, got none")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
        raise ValueError(f"samples must be an int, 0 or more, got {samples!r}")
    if samples == 0 and not greedy:
        raise ValueError("samples must be 1 or more where greedy=False, got 0: nothing to do")
    if not temperature > 0 or not math.isfinite(temperature):
        raise ValueError(f"temperature must be positive and finite, got {temperature!r}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p!r}")
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be a positive int or None, got {batch_size!r}")


def _bar(total: int, show: bool):
    from tqdm import tqdm

    return tqdm(total=total, desc="eval", unit="answer", disable=not show)
