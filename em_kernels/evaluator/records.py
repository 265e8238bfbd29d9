"""An evaluation on disk: its settings, and its answers, one JSON line each, so that a stopped one
can go on."""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from em_kernels.lm.data import PLACE, is_count, is_number, json_rows, read_json_object
from em_kernels.lm.text import UTF8, check_folder, text_digest, write_text

Kept = TypeVar("Kept")
SETTINGS, RECORDS, SUMMARY = "eval.json", "records.jsonl", "summary.json"
VERSION = 3  # of eval.json; from 3 on, each record has the mark of its evaluation
ELSEWHERE = ("output", "device", "trust_remote_code")
"""Settings that may change when an evaluation goes on."""


class EvalError(ValueError):
    """A folder that holds another evaluation, or none."""


def read_settings(folder: str | Path) -> dict:
    """What eval.json of the folder holds.

    Raises:
        EvalError: there is none, or it is not as an evaluation writes it.
    """
    path = Path(folder) / SETTINGS
    check_folder(folder, EvalError)
    if not path.is_file():
        raise EvalError(f"{folder} is not an evaluation: it has no {SETTINGS}")
    try:
        settings = read_json_object(path)
    except ValueError as error:
        raise EvalError(f"{error}; {_REMEDY}") from None
    reason = _wrong_settings(settings)
    if reason is not None:
        raise EvalError(f"{path}: {reason}; {_REMEDY}")
    if settings.get("version", 1) == 1:
        _bring_up_to_date(settings)
    return settings


_REMEDY = "restore the file, or evaluate into another folder"
_CONFIG: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("model", "problems", "judge", "template"), lambda v: isinstance(v, str)),
    "labelled": lambda v: isinstance(v, bool),
    "samples": lambda v: is_count(v) and v > 0,
    "max_new_tokens": lambda v: is_count(v) and v > 0,
    "top_p": is_number,
    "seed": lambda v: isinstance(v, int),
    "temperatures": lambda v: _is_list(v, is_number) and 0 < len(v) == len(set(v)),
}


def _is_list(value: Any, good: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(good, value))


def _wrong_settings(settings: dict) -> str | None:
    """What is not as an evaluation writes it, or None."""
    version = settings.get("version", 1)
    if not is_count(version) or version > VERSION:
        return f"its version is {version!r:.60}, this em_kernels reads 1 to {VERSION}"
    parts: dict[str, Callable[[Any], bool]] = {
        "config": lambda v: isinstance(v, dict),
        "problems": lambda v: bool(v) and _is_list(v, _is_problem),
        "skipped": lambda v: _is_list(v, _is_skipped),
        "too_long": lambda v: _is_list(v, is_count),
        "weights": lambda v: isinstance(v, str),
    }
    wrong = _wrong_entry(settings, parts)
    return wrong or _wrong_entry(settings["config"], _CONFIG, "config.")


def _wrong_entry(held: dict, good: dict[str, Callable[[Any], bool]], where: str = "") -> str | None:
    for name, is_good in good.items():
        if name not in held:
            return f"it has no {where}{name}"
        if not is_good(held[name]):
            return f"{where}{name} cannot be {reprlib.repr(held[name])}"
    return None


def _is_problem(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("problem"), str):
        return False
    return "answer" in row and isinstance(row["answer"], (str, type(None)))


def _is_skipped(row: Any) -> bool:
    return isinstance(row, dict) and is_count(row.get("row")) and isinstance(row.get("reason"), str)


def _bring_up_to_date(settings: dict) -> None:
    """Braces of the template were doubled in version 1, and no answer was an empty one."""
    config = settings["config"]
    with suppress(LookupError, ValueError):  # not of version 1 at all: it is as it says
        config["template"] = config["template"].format(problem=PLACE)
    for problem in settings["problems"]:
        problem["answer"] = problem["answer"] or None


def mark(settings: dict, problem: int) -> str:
    """Tells the answers of an evaluation to one of its problems from those of any other: a digest
    of the weights, of all that decides what is drawn, and of the problem."""
    config = {n: v for n, v in settings["config"].items() if n not in ELSEWHERE}
    parts = (settings["weights"], config, settings["problems"][problem])
    return text_digest(json.dumps(parts, sort_keys=True))


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
    """One answer, to problem number `problem`, drawn at `temperature` (0 is greedy); `of` is the
    mark of the evaluation that it was drawn in."""

    problem: int
    temperature: float
    sample: int
    answer: Answer
    of: str | None = None

    @property
    def key(self) -> Key:
        return self.problem, self.temperature, self.sample


class Records:
    """Records in a file, appended to a batch at a time and read back as a stream.

    Args:
        path: of the file.
        settings: of the evaluation that they are read for, see `read_settings`: what is not of it,
            and a second answer of the same number, is left out. Without, all records are read.

    `left_out` says how many lines the last read left out, for which reasons.
    """

    def __init__(self, path: Path, settings: dict | None = None):
        self.path, self.settings = path, settings
        self.left_out: Counter[str] = Counter()

    def add(self, records: list[Record]) -> None:
        lines = "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in records)
        with self.path.open("a", encoding=UTF8["encoding"], errors=UTF8["errors"]) as file:
            file.write(lines)

    def __iter__(self) -> Iterator[Record]:
        self.left_out.clear()
        if not self.path.is_file():
            return
        belongs = None if self.settings is None else Belonging(self.settings)
        for _, row in json_rows(self.path):
            found = row if isinstance(row, str) else _record(row)
            if isinstance(found, Record) and belongs is not None:
                found = belongs.refused(found) or found
            if isinstance(found, str):
                self.left_out[found] += 1
            else:
                yield found


class Belonging:
    """Which records are an evaluation's, each once."""

    def __init__(self, settings: dict):
        config = settings["config"]
        self.marked = settings.get("version", 1) >= 3
        self.problems, self.samples = len(settings["problems"]), config["samples"]
        self.temperatures = set(config["temperatures"])
        self.mark = cache(partial(mark, settings))
        self.seen: set[Key] = set()

    def refused(self, record: Record) -> str | None:
        """Why the record is left out, or None."""
        if record.problem >= self.problems:
            return "of a problem that the evaluation does not have"
        if record.temperature not in self.temperatures:
            return "of another temperature"
        if record.sample >= (self.samples if record.temperature > 0 else 1):
            return "of a sample beyond those asked for"
        if self.marked and record.of != self.mark(record.problem):
            return "of another evaluation (model, problem, prompt, seed or settings)"
        if record.key in self.seen:
            return "doubled"
        self.seen.add(record.key)
        return None


_ANSWER: dict[str, Callable[[Any], bool]] = {
    "text": lambda v: isinstance(v, str),
    "tokens": is_count,
    "finished": lambda v: isinstance(v, bool),
    "correct": lambda v: isinstance(v, bool),
}
_MORE: dict[str, Callable[[Any], bool]] = {
    "parsed": lambda v: isinstance(v, bool),
    "entropy": lambda v: v is None or is_number(v),
    "logprob": lambda v: v is None or (is_number(v) and v <= 1),  # above 0 by rounding alone
    "ids": lambda v: v is None or _is_list(v, is_count),
}


def _record(row: dict) -> Record | str:
    """The record of a line, or why it holds none."""
    answer = row.get("answer")
    key: tuple[Any, Any, Any] = (row.get("problem"), row.get("temperature"), row.get("sample"))
    if not (is_count(key[0]) and is_number(key[1]) and is_count(key[2])):
        return "no record: no number of a problem, temperature and sample"
    if not isinstance(answer, dict):
        return f"no record: the answer is no object but {type(answer).__name__}"
    for name, good in (_ANSWER | {n: c for n, c in _MORE.items() if n in answer}).items():
        if name not in answer or not good(answer[name]):
            return f"no record: no usable {name!r} in the answer"
    known = {name: answer[name] for name in (*_ANSWER, *_MORE) if name in answer}
    of = row.get("of")
    return Record(*key, Answer(**known), of if isinstance(of, str) else None)


def by_problem(records: Iterable[tuple[Key, Kept]]) -> dict[float, dict[int, list[Kept]]]:
    """temperature -> problem -> the answers to it, all in order; of one key, the last."""
    last = dict(records)
    found: dict[float, dict[int, list[Kept]]] = {}
    for key in sorted(last, key=lambda key: (key[1], key[0], key[2])):
        problem, temperature, _ = key
        found.setdefault(temperature, {}).setdefault(problem, []).append(last[key])
    return found
