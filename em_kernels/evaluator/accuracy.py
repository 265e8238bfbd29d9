"""Sampled and greedy accuracy of a model on problems with known answers, in memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from em_kernels.backends.interface import MaybeNone
from em_kernels.evaluator.asking import Asked, Plan, ask_all, default_batch_size
from em_kernels.evaluator.records import Answer, by_problem, write_json
from em_kernels.lm.chat import Chat, check_system, encode_prompt
from em_kernels.lm.judge.judges import Judge, judge_name, make_judge
from em_kernels.lm.problems import Problem, load_problems, problem_pairs
from em_kernels.lm.settings import check_flag, check_int, fraction, key_values, positive


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
    sampled_accuracy: float | MaybeNone
    sampled_stderr: float | MaybeNone
    greedy_accuracy: float | MaybeNone
    greedy_stderr: float | MaybeNone
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
    """The problems of a file, a data set or a preset, the first `limit` of them.

    Raises:
        FileNotFoundError, ImportError, ValueError: of `load_problems`; a row that is no problem,
            named by its number.
    """
    return load_problems(str(path), limit, strict=True).problems


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
    system: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
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
        system: the system turn before every problem.
        chat_template_kwargs: what the chat template reads besides, as {"enable_thinking": False}.

    Raises:
        TypeError, ValueError: a bad argument, or a prompt longer than the model has positions.
    """
    _check_arguments(problems, samples, temperature, top_p, greedy, batch_size)
    check_int("max_new_tokens", max_new_tokens, 1)
    check_int("seed", seed, 0)
    check_flag("progress", progress)
    judge = _get_judge(judge)
    pairs = problem_pairs(problems, answers_needed=True)
    chat = Chat(
        None if system is None else check_system("system", system),
        chat_template_kwargs and key_values("chat_template_kwargs", chat_template_kwargs),
    )
    prompts = [encode_prompt(tokenizer, problem, chat) for problem, _ in pairs]
    temperatures = [temperature] * (samples > 0) + [0.0] * greedy
    size = batch_size or default_batch_size(model)
    plan = Plan(temperatures, samples, top_p, max_new_tokens, size)
    started = time.perf_counter()
    asked = Asked(model, tokenizer, judge)
    batches = ask_all(asked, plan, pairs, prompts, seed, progress=progress)
    found = by_problem((record.key, record.answer) for batch in batches for record in batch)
    seconds = time.perf_counter() - started
    return _result(pairs, found, samples, temperature, judge_name(judge), seconds)


def _get_judge(judge: str | Judge) -> Judge:
    if not isinstance(judge, str) and not callable(judge):
        raise TypeError(f"judge must be a name or a function, got {type(judge).__name__}")
    return make_judge(judge) if isinstance(judge, str) else judge


def _result(
    pairs: Sequence[Problem],
    found: dict[float, dict[int, list[Answer]]],
    samples: int,
    temperature: float,
    judge: str,
    seconds: float,
) -> EvalResult:
    """Of the answers that were found, by temperature and by the problem's place."""
    drawn, likeliest = found.get(temperature, {}), found.get(0.0, {})
    answers = [a for by in found.values() for of_problem in by.values() for a in of_problem]
    return EvalResult(
        len(pairs),
        samples,
        temperature,
        *_accuracy(drawn),
        *_accuracy(likeliest),
        response_length=statistics.fmean(a.tokens for a in answers),
        truncated=statistics.fmean(not a.finished for a in answers),
        judge=judge,
        seconds=seconds,
        records=[
            ProblemRecord(problem, answer or "", drawn.get(i, []), *likeliest.get(i, [None]))
            for i, (problem, answer) in enumerate(pairs)
        ],
    )


def _accuracy(by_problem: dict[int, list[Answer]]) -> tuple[float | None, float | None]:
    """The mean over problems, None without any, and its standard error, None below two."""
    values = [statistics.fmean(a.correct for a in answers) for answers in by_problem.values()]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values) if values else None, error


def _check_arguments(problems, samples, temperature, top_p, greedy, batch_size) -> None:
    if isinstance(problems, str) or not isinstance(problems, Sequence):
        raise TypeError(f"problems must be a sequence of pairs, got {type(problems).__name__}")
    check_flag("greedy", greedy)
    if not problems:
        raise ValueError("problems must have at least one problem, got none")
    check_int("samples", samples, 0)
    if samples == 0 and not greedy:
        raise ValueError("samples must be 1 or more where greedy=False, got 0: nothing to do")
    positive("temperature", temperature)
    fraction("top_p", top_p)
    if batch_size is not None:
        check_int("batch_size", batch_size, 1)
