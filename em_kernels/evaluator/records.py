"""An evaluation on disk: its settings, and its answers, one JSON line each, so that a stopped one
can go on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from em_kernels.lm.data import PLACE
from em_kernels.lm.text import UTF8, write_text

Kept = TypeVar("Kept")
SETTINGS, RECORDS, SUMMARY = "eval.json", "records.jsonl", "summary.json"
VERSION = 2  # of eval.json


class EvalError(ValueError):
    """A folder that holds another evaluation, or none."""


def read_settings(folder: str | Path) -> dict:
    """What eval.json of the folder holds.

    Raises:
        EvalError: there is none, or it cannot be read.
    """
    path = Path(folder) / SETTINGS
    if not path.is_file():
        raise EvalError(f"{folder} is not an evaluation: it has no {SETTINGS}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvalError(f"{path} cannot be read: {error}") from None
    if settings.get("version") != VERSION and "config" in settings:
        _bring_up_to_date(settings)
    return settings


def _bring_up_to_date(settings: dict) -> None:
    """Braces of the template were doubled in version 1, and no answer was an empty one."""
    config = settings["config"]
    config["template"] = config["template"].format(problem=PLACE)
    for problem in settings["problems"]:
        problem["answer"] = problem["answer"] or None


def write_json(path: Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


@dataclass(frozen=True)
class Answer:
    """One answer of the model.

    Args:
        text, tokens: what it said; how many tokens, the end token included.
        finished: it ended by itself.
        correct: the judge's verdict.
        parsed: a final answer was found in it; without one it is wrong.
        entropy, logprob: mean entropy (nats) and sum of log-probabilities of its tokens under the
            model at T = 1; None where signals were not asked for.
        ids: its tokens, the end token included.
    """

    text: str
    tokens: int
    finished: bool
    correct: bool
    parsed: bool = True
    entropy: float | None = None
    logprob: float | None = None
    ids: list[int] | None = None

    @property
    def confidence(self) -> float | None:
        """exp(mean log-probability of its tokens), in [0, 1]."""
        return None if self.logprob is None else math.exp(self.logprob / max(self.tokens, 1))


Key = tuple[int, float, int]
"""Number of the problem, temperature, number of the sample."""


@dataclass(frozen=True)
class Record:
    """One answer, to problem number `problem`, drawn at `temperature` (0 is greedy)."""

    problem: int
    temperature: float
    sample: int
    answer: Answer

    @property
    def key(self) -> Key:
        return self.problem, self.temperature, self.sample


class Records:
    """Records in a file, appended to a batch at a time and read back as a stream."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, records: list[Record]) -> None:
        lines = "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in records)
        with self.path.open("a", encoding=UTF8["encoding"], errors=UTF8["errors"]) as file:
            file.write(lines)

    def __iter__(self) -> Iterator[Record]:
        if not self.path.is_file():
            return
        with self.path.open(encoding="utf-8") as file:
            for line in file:
                value = json.loads(line)
                yield Record(**{**value, "answer": Answer(**value["answer"])})


def by_problem(records: Iterable[tuple[Key, Kept]]) -> dict[float, dict[int, list[Kept]]]:
    """temperature -> problem -> the answers to it, all in order; of one key, the last."""
    last = dict(records)
    found: dict[float, dict[int, list[Kept]]] = {}
    for key in sorted(last, key=lambda key: (key[1], key[0], key[2])):
        problem, temperature, _ = key
        found.setdefault(temperature, {}).setdefault(problem, []).append(last[key])
    return found
