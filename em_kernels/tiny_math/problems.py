"""Synthetic arithmetic word problems, their worked solutions and three disjoint splits.

A problem starts with a count ("has 12 apples", "has 3 bags of 12 apples"), changes it two or three
times and asks how many are left. A solution is one equation a line and ends in "#### answer". All
values of a right solution lie in 0..199. Everything is drawn from seeded `random.Random`
generators, so equal seeds give equal text.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

NAMES = ("Anna", "Ben", "Carl", "Dora", "Emma", "Finn", "Gina", "Hugo", "Iris", "Jack")
OBJECTS = ("apples", "books", "coins", "cards", "eggs", "nuts", "pens", "rocks", "shells", "stamps")
GAINS = ("buys", "finds", "gets")
LOSSES = ("eats", "loses", "sells")
MAX_VALUE = 199
# Wrong steps may lead higher, up to three digits.
MAX_WRITTEN = 999

SPLITS = ("pretrain", "dev", "heldout")
# Share of the hash range, in tenths, that belongs to each split.
_SPLIT_OF_TENTH = ("dev", "heldout") + ("pretrain",) * 8

WRITERS = ("careful", "sloppy", "direct", "restless")


@dataclass(frozen=True)
class Problem:
    """A word problem. `steps` holds (operator, operand) pairs applied in turn to `start`."""

    text: str
    start: int
    steps: tuple[tuple[str, int], ...]
    answer: int


def apply(operator: str, left: int, right: int) -> int:
    """Value of `left operator right` for '+', '-' and '*'; differences below zero are zero."""
    if operator == "+":
        return left + right
    if operator == "-":
        return max(left - right, 0)
    if operator == "*":
        return left * right
    raise ValueError(f"operator must be '+', '-' or '*', received {operator!r}")


def solve(start: int, steps: Iterable[tuple[str, int]]) -> int:
    """Result of applying the steps in turn to `start`."""
    for operator, operand in steps:
        start = apply(operator, start, operand)
    return start


def _draw_start(rng: random.Random) -> tuple[str, int, list[tuple[str, int]]]:
    if rng.random() < 0.35:
        bags, each = rng.randint(2, 9), rng.randint(2, 20)
        return f"{bags} bags of {each}", bags, [("*", each)]
    count = rng.randint(2, 99)
    return str(count), count, []


def _draw_change(rng: random.Random, value: int) -> tuple[str, tuple[str, int]] | None:
    """A sentence and its step that keep the value in range, or None if this draw does not."""
    kind = rng.choice(("gain", "gain", "loss", "loss", "double"))
    if kind == "gain":
        amount = rng.randint(2, 99)
        sentence, step = f"{rng.choice(GAINS)} {amount} more", ("+", amount)
    elif kind == "loss":
        amount = rng.randint(2, 99)
        sentence, step = f"{rng.choice(LOSSES)} {amount}", ("-", amount)
        if amount > value:
            return None
    else:
        sentence, step = "doubles the number", ("*", 2)
    return (sentence, step) if apply(step[0], value, step[1]) <= MAX_VALUE else None


def draw_problem(rng: random.Random) -> Problem:
    """Draw one problem, of any split."""
    name, item = rng.choice(NAMES), rng.choice(OBJECTS)
    opening, start, steps = _draw_start(rng)
    value = solve(start, steps)
    sentences = [f"{name} has {opening} {item}."]
    changes = rng.randint(2, 3)
    while len(sentences) <= changes:
        change = _draw_change(rng, value)
        if change is None:
            continue
        sentence, step = change
        sentences.append(f"{name} {sentence}.")
        steps.append(step)
        value = apply(step[0], value, step[1])
    sentences.append(f"How many {item} does {name} have?")
    return Problem(" ".join(sentences), start, tuple(steps), value)


def split_of(text: str) -> str:
    """Split ("pretrain", "dev" or "heldout") of a problem, decided by the SHA-256 of its text."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return _SPLIT_OF_TENTH[int.from_bytes(digest[:8], "big") % 10]


def stream(split: str, seed: int) -> Iterator[Problem]:
    """Endless stream of problems of one split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, received {split!r}")
    rng = random.Random(f"{split}-{seed}")
    while True:
        problem = draw_problem(rng)
        if split_of(problem.text) == split:
            yield problem


def make_problems(split: str, count: int, seed: int = 0) -> list[Problem]:
    """The first `count` distinct problems of `stream(split, seed)`."""
    if count < 0:
        raise ValueError(f"count must not be negative, received {count}")
    found: dict[str, Problem] = {}
    source = stream(split, seed)
    while len(found) < count:
        problem = next(source)
        found.setdefault(problem.text, problem)
    return list(found.values())


def write_problems(path: str | Path, split: str, count: int, seed: int = 0) -> Path:
    """Write `make_problems(split, count, seed)` as JSON lines {"problem": str, "answer": str}."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for problem in make_problems(split, count, seed):
            line = {"problem": problem.text, "answer": str(problem.answer)}
            file.write(json.dumps(line) + "\n")
    return path


def _garble_digit(rng: random.Random, value: int) -> int:
    digits = list(str(value))
    digits[rng.randrange(len(digits))] = str(rng.randrange(10))
    return int("".join(digits))


def slip(rng: random.Random, operator: str, left: int, right: int) -> int:
    """A careless result of `left operator right`, nearly always wrong.

    Off by 1, 2 or 10, or a digit garbled, or the wrong operation; clamped to 0..999.
    """
    value = apply(operator, left, right)
    kind = rng.choice(("near", "ten", "digit", "operation"))
    if kind == "near":
        wrong = value + rng.choice((-2, -1, 1, 2))
    elif kind == "ten":
        wrong = value + rng.choice((-10, 10))
    elif kind == "digit":
        wrong = _garble_digit(rng, value)
    else:
        wrong = apply("+" if operator == "-" else "-", left, right)
    return min(max(wrong, 0), MAX_WRITTEN)


def write_solution(
    problem: Problem,
    writer: str = "careful",
    slip_rate: float = 0.0,
    rng: random.Random | None = None,
) -> str:
    """Solution text by one writer.

    "careful" writes one equation a line; "sloppy" also starts each line with "so"; "direct" gives
    the answer alone; "restless" is careful, but does not stop at the answer: a step that nobody
    asked for follows, and another answer. Each step slips with probability `slip_rate` and later
    steps go on from the wrong value; "direct" is always right.
    """
    if writer not in WRITERS:
        raise ValueError(f"writer must be one of {WRITERS}, received {writer!r}")
    if writer == "direct":
        return f"#### {problem.answer}"
    rng = rng or random.Random(0)
    opening = "so " if writer == "sloppy" else ""
    lines, value = [], problem.start
    for operator, operand in problem.steps:
        solver = partial(slip, rng) if rng.random() < slip_rate else apply
        result = min(solver(operator, value, operand), MAX_WRITTEN)
        lines.append(f"{opening}{value}{operator}{operand}={result}")
        value = result
    lines.append(f"#### {value}")
    if writer == "restless":
        more = rng.randint(2, 99)
        lines += [f"{value}+{more}={value + more}", f"#### {value + more}"]
    return "\n".join(lines)


def draw_equation(rng: random.Random) -> tuple[str, str]:
    """One drill ("40-7=", "33") from the ranges the problems use."""
    operator = rng.choice(("+", "+", "-", "-", "*"))
    if operator == "*":
        left, right = rng.choice(
            ((rng.randint(2, 9), rng.randint(2, 20)), (rng.randint(0, MAX_VALUE // 2), 2))
        )
    else:
        left, right = rng.randint(0, MAX_VALUE), rng.randint(2, 99)
        if operator == "-" and right > left:
            left, right = right, left
        if operator == "+" and left + right > MAX_VALUE:
            left = rng.randint(0, MAX_VALUE - right)
    return f"{left}{operator}{right}=", str(apply(operator, left, right))
