"""Problems with known answers: from a file, a folder or name of a data set, or a preset of one.

A row that cannot be used is kept as a `Skipped`, with its number and the reason, for the report.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from em_kernels.backends.interface import MaybeNone
from em_kernels.lm.chat import MESSAGES, Prompt, turns_of
from em_kernels.lm.data import (
    PLACE,
    check_template,
    check_unicode,
    fields_of,
    fill_template,
    text_field,
)
from em_kernels.lm.tables import FORMATS, Row, Rows, has_splits, rows_at

BOXED = PLACE + "\nPlease reason step by step, and put your final answer within \\boxed{}."


class Problem(NamedTuple):
    """A question and its right answer; None where that is not known."""

    problem: str
    answer: str | MaybeNone


def problem_pairs(
    pairs: Iterable[tuple[str, str | None]], answers_needed: bool = False
) -> tuple[Problem, ...]:
    """(problem, answer) pairs as problems.

    Raises:
        TypeError, ValueError: text that is empty or no Unicode; an answer that is no text, or is
            missing where they are needed.
    """
    if isinstance(pairs, (str, bytes)) or not isinstance(pairs, Iterable):
        raise TypeError(f"problems must be (problem, answer) pairs, got {type(pairs).__name__}")
    pairs = tuple(pairs)
    for pair in pairs:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"problems must be (problem, answer) pairs, got {pair!r} among them")
    problems = tuple(Problem(*pair) for pair in pairs)
    for problem, answer in problems:
        if not isinstance(problem, str) or not problem.strip():
            raise ValueError(f"problems must be text that is not empty, got {problem!r}")
        if not isinstance(answer, str) and (answers_needed or answer is not None):
            raise TypeError(f"answers of problems must be text, got {answer!r}")
        check_unicode("problems", problem)
        check_unicode("answers of problems", answer or "")
    return problems


class Skipped(NamedTuple):
    """A row of a source that is no problem: its number, counted from 1, and why not."""

    row: int
    reason: str


@dataclass(frozen=True)
class Source:
    """Where problems lie, and how they are put to the model.

    Args:
        path: a file, a folder or the name of a data set, see `rows_at`.
        config, split: of the data set.
        problem, answer: the fields, the first of which a row has is taken; with answer=() the
            problems have no answers, and get None.
        template: the prompt, with {problem} in it; every other brace is itself.
        settings: of the generation (`samples`, `temperature`, `top_p`, `max_new_tokens`) where the
            caller says nothing else.
    """

    path: str
    config: str | None = None
    split: str = "test"
    problem: tuple[str, ...] = ("problem", "question", "prompt")
    answer: tuple[str, ...] = ("answer", "final_answer", "solution")
    template: str = PLACE
    settings: Mapping[str, float | int] = field(default_factory=dict)

    def __post_init__(self):
        check_template(self.template)

    def prompt(self, problem: str) -> str:
        return fill_template(self.template, problem)


_LONG = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 3072}
# Small sets get many samples a problem: 30 problems with one answer each say little.
PRESETS: dict[str, Source] = {
    "math500": Source("HuggingFaceH4/MATH-500", template=BOXED, settings={"samples": 4, **_LONG}),
    "minerva": Source("math-ai/minervamath", template=BOXED, settings={"samples": 4, **_LONG}),
    "olympiadbench": Source(
        "Hothan/OlympiadBench",
        config="OE_TO_maths_en_COMP",
        split="train",
        template=BOXED,
        settings={"samples": 4, **_LONG},
    ),
    "amc23": Source("math-ai/amc23", template=BOXED, settings={"samples": 32, **_LONG}),
    "aime24": Source(
        "HuggingFaceH4/aime_2024", split="train", template=BOXED, settings={"samples": 32, **_LONG}
    ),
    "aime25": Source("math-ai/aime25", template=BOXED, settings={"samples": 32, **_LONG}),
    "gsm8k": Source(
        "openai/gsm8k",
        config="main",
        template=BOXED,
        settings={"samples": 1, **_LONG, "max_new_tokens": 1024},
    ),
}
"""Benchmarks by name. The judges know the forms of their answers: plain, boxed, or after ####."""


# What settings of training and of evaluation are called in their help.
FILES = (
    f'a {FORMATS} file with "problem" and "answer" (or the names and forms of GSM8K, MATH, AIME), '
    "a folder of `datasets.save_to_disk` or of files by split, the name of a data set, or one of "
    + ", ".join(PRESETS)
)
TEMPLATE = (
    "the prompt, with {problem} where the problem goes (every other brace is itself), or the name "
    "of the preset to take it from"
)
TEMPLATE_SHOWN = "that of the preset that problems name, else {problem} alone"
PROBLEM_FIELD = "the field of a row that holds the problem"
ANSWER_FIELD = "the field of a row that holds the right answer"
FIELD_SHOWN = "the first of the usual ones that it has"
SPLIT = "the part of a data set"


class Problems(NamedTuple):
    """What a source holds: the problems, the rows that are none, and how to ask."""

    problems: list[Problem]
    skipped: list[Skipped]
    source: Source


def find_source(
    name: str,
    *,
    template: str | None = None,
    problem_field: str | None = None,
    answer_field: str | None = None,
    split: str | None = None,
    usual_split: str | None = None,
    **changes,
) -> Source:
    """The preset called `name`, or a file or data set of that name, with what is given on top.

    `template` is a template, or the name of the preset to take it from; `usual_split` is the split
    where none is given, in place of the preset's.

    Raises:
        ValueError: `split` is given for a file that is one table; no such template.
    """
    if template is not None:
        changes["template"] = find_template(template)
    if problem_field is not None:
        changes["problem"] = (problem_field,)
    if answer_field is not None:
        changes["answer"] = (answer_field,)
    if split is not None and not has_splits(name):
        raise ValueError(
            f"split is for data sets and folders, got {split!r} with {name}, which is one table: "
            "leave it out"
        )
    if split or usual_split:
        changes["split"] = split or usual_split
    return replace(PRESETS.get(name.lower()) or Source(name), **changes)


def find_template(text: str) -> str:
    """The template of the preset called `text`, or the text itself.

    Raises:
        TypeError: it is no text.
        ValueError: it is neither a preset nor a template.
    """
    if not isinstance(text, str):
        raise TypeError(f"template must be text, got {type(text).__name__}")
    preset = PRESETS.get(text.lower())
    template = text if preset is None else preset.template
    check_template(template)
    return template


def load_problems(
    source: Source | str,
    limit: int | None = None,
    *,
    strict: bool = False,
    answers_needed: bool = True,
) -> Problems:
    """Read the source, at most `limit` problems of it.

    Args:
        source: where they are, or the name of it, see `find_source`.
        limit: at most so many problems.
        strict: a row that is no problem is an error; otherwise it is one of those skipped.
        answers_needed: a row without any of the fields of answers, or with null in them, is no
            problem; otherwise it is one with the answer None.

    Raises:
        FileNotFoundError, ImportError: of `rows_at`.
        ValueError: of `rows_at`; not one usable problem; of a `strict` read, the first row that is
            none, by its number.
    """
    source = find_source(source) if isinstance(source, str) else source
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more, got {limit}")
    problems: list[Problem] = []
    skipped: list[Skipped] = []
    noun, rows = rows_of(source)
    for number, row in rows:
        if len(problems) == limit:
            break
        try:
            problems.append(_problem(row, source, answers_needed))
        except ValueError as error:
            skipped.append(Skipped(number, str(error)))
            if strict:
                raise row_error(source, noun, number, error) from None
    if not problems and not skipped:
        raise ValueError(f"{source.path}: no problems in it")
    if not problems:
        first = f"row {skipped[0].row}: {skipped[0].reason}"
        raise ValueError(f"{source.path}: no usable problems among {len(skipped)} rows; {first}")
    return Problems(problems, skipped, source)


def rows_of(source: Source) -> Rows:
    return rows_at(source.path, source.split, source.config)


def row_error(source: Source, noun: str, number: int, reason: Exception) -> ValueError:
    """What is wrong with the row of that number."""
    return ValueError(f"{source.path}, {noun} {number}: {reason}")


def _problem(row: Row, source: Source, answers_needed: bool) -> Problem:
    """ValueError: why the row holds none."""
    if isinstance(row, str):
        raise ValueError(row)
    problem = text_field(row, *source.problem, setting="problem_field")
    known = any(row[name] is not None for name in fields_of(row, source.answer))
    if not source.answer or not (answers_needed or known):
        return Problem(problem, None)
    answer = text_field(row, *source.answer, several=True, setting="answer_field")
    return Problem(problem, answer)


def read_prompts(path: str | Path) -> tuple[Prompt, ...]:
    """The prompts of a file or data set (see `rows_at`), of rows with a "prompt", or a "problem"
    or a "question", or with a chat, the turns to be answered, as "prompt" or as "messages".

    Raises:
        FileNotFoundError, ImportError, ValueError: of `rows_at`; no prompt, or a broken row, by its
            number.
    """
    source = Source(str(path), split="train", problem=("prompt", "problem", "question"))
    noun, rows = rows_of(source)
    prompts = []
    for number, row in rows:
        try:
            prompts.append(_prompt(row, source))
        except ValueError as error:
            raise row_error(source, noun, number, error) from None
    if not prompts:
        raise ValueError(f"{path}: no prompts in the file")
    return tuple(prompts)


def _prompt(row: Row, source: Source) -> Prompt:
    """ValueError: why the row holds none."""
    if isinstance(row, str):
        raise ValueError(row)
    present = [name for name in fields_of(row, source.problem) if row[name] is not None]
    name = next(iter(present or fields_of(row, [MESSAGES])), None)
    told = row[name] if name is not None else None
    is_chat = isinstance(told, (list, tuple)) and told and isinstance(told[0], Mapping)
    return turns_of(str(name), told) if is_chat else text_field(row, *source.problem)
