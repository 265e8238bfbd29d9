"""Problems with known answers: from JSON lines, Parquet, a datasets name, or a preset of one.

A row that cannot be used is kept as a `Skipped`, with its number and the reason, for the report.
"""

from __future__ import annotations

import importlib
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from em_kernels.lm.data import check_unicode, is_number, not_unicode, parse_line
from em_kernels.lm.text import one_line

BOXED = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
PLAIN = "{problem}"


class Problem(NamedTuple):
    """A question and its right answer."""

    problem: str
    answer: str


class Skipped(NamedTuple):
    """A row of a source that is no problem: its number, counted from 1, and why not."""

    row: int
    reason: str


@dataclass(frozen=True)
class Source:
    """Where problems lie, and how they are put to the model.

    Args:
        path: a .jsonl, .json (lines) or .parquet file, or a folder or name for `datasets`.
        config, split: of the data set.
        problem, answer: the fields, the first of which a row has is taken; with answer=() the
            problems have no answers, and get "".
        template: the prompt, with {problem} in it (other braces doubled).
        settings: of the generation (`samples`, `temperature`, `top_p`, `max_new_tokens`) where the
            caller says nothing else.
    """

    path: str
    config: str | None = None
    split: str = "test"
    problem: tuple[str, ...] = ("problem", "question", "prompt")
    answer: tuple[str, ...] = ("answer", "final_answer", "solution")
    template: str = PLAIN
    settings: Mapping[str, float | int] = field(default_factory=dict)

    def __post_init__(self):
        try:
            filled = self.template.format(problem="(the problem)")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"template {self.template!r} cannot be filled: {error!r}") from None
        if "(the problem)" not in filled:
            raise ValueError(f"template must have {{problem}} in it, got {self.template!r}")
        check_unicode("template", self.template)

    def prompt(self, problem: str) -> str:
        return self.template.format(problem=problem)


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


class Problems(NamedTuple):
    """What a source holds: the problems, the rows that are none, and how to ask."""

    problems: list[Problem]
    skipped: list[Skipped]
    source: Source


def find_source(name: str, **changes) -> Source:
    """The preset called `name`, or a file or data set of that name, with `changes` on top."""
    preset = PRESETS.get(name.lower())
    return replace(preset or Source(name), **changes)


def load_problems(source: Source | str, limit: int | None = None) -> Problems:
    """Read the source, at most `limit` problems of it.

    Raises:
        FileNotFoundError: no such file.
        ImportError: a Parquet file or a data set without the package `datasets`.
        ValueError: a data set that cannot be loaded, or not one usable problem.
    """
    source = find_source(source) if isinstance(source, str) else source
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more, got {limit}")
    problems: list[Problem] = []
    skipped: list[Skipped] = []
    for number, row in _rows(source):
        if len(problems) == limit:
            break
        found = _read(row, source)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            skipped.append(Skipped(number, found))
    if not problems:
        first = f"; row {skipped[0].row}: {skipped[0].reason}" if skipped else ""
        raise ValueError(f"{source.path}: no usable problems among {len(skipped)} rows{first}")
    return Problems(problems, skipped, source)


def _rows(source: Source) -> Iterator[tuple[int, dict | str]]:
    """(number from 1, row), where a row that cannot be read is the reason instead."""
    path = Path(source.path).expanduser()
    if path.suffix in (".jsonl", ".json"):
        return json_rows(path)
    if path.suffix == ".parquet":
        return _table(source, "parquet", data_files={source.split: str(_existing(path))})
    if path.is_file():
        raise ValueError(f"{path}: problems are read from .jsonl, .json and .parquet files")
    return _table(source, source.path, name=source.config)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    return path


def json_rows(path: Path) -> Iterator[tuple[int, dict | str]]:
    """(line number, object) of a file of JSON lines; of a broken line, the reason instead."""
    with _existing(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _json_object(line, number)


def _json_object(line: bytes, number: int) -> dict | str:
    try:
        value = parse_line(line, number)
    except ValueError as error:
        return str(error)
    return value if isinstance(value, dict) else f"not a JSON object but {type(value).__name__}"


def _table(source: Source, kind: str, **options) -> Iterator[tuple[int, dict]]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(
            f"{source.path} needs the package datasets ({error}); `pip install datasets`"
        ) from error
    try:
        table = datasets.load_dataset(kind, split=source.split, **options)
    except Exception as error:  # the hub, the network, the file: each has its own
        raise ValueError(
            f"cannot load the data set {source.path!r}, split {source.split!r}: {one_line(error)}"
        ) from error
    return enumerate(table, start=1)


def _read(row: dict | str, source: Source) -> Problem | str:
    """The problem in a row, or why there is none."""
    if isinstance(row, str):
        return row
    values = []
    for names in filter(None, (source.problem, source.answer)):
        present = [name for name in names if name in row]
        if not present:
            return f"no field {' or '.join(map(repr, names))}, only {sorted(row)}"
        value, must = row[present[0]], f"{present[0]!r} must be"
        text = _text(value)
        if text is None:
            return f"{must} text that is not empty, got {reprlib.repr(value)}"
        reason = not_unicode(text)
        if reason is not None:
            return f"{must} Unicode text, got {reason}"
        values.append(text)
    return Problem(values[0], values[1] if source.answer else "")


def _text(value) -> str | None:
    """Text or a number as text; several answers are joined as one list."""
    if isinstance(value, (list, tuple)) and value:
        parts = [None if isinstance(v, (list, tuple)) else _text(v) for v in value]
        return None if None in parts else ", ".join(parts)
    if is_number(value):
        return _number_text(value)
    return value if isinstance(value, str) and value.strip() else None


def _number_text(value: int | float) -> str | None:
    """Its shortest decimal digits, without an exponent: 0.00001, not 1e-05; None for NaN."""
    number = Decimal(value) if isinstance(value, int) else Decimal(repr(float(value)))
    return format(number, "f") if number.is_finite() else None
