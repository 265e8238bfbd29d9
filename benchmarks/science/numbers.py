"""Means over seeds with their intervals, and what they say about a claim."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.markdown import table_rows
from em_kernels.evaluator.statistics import CONFIDENCE, require_scipy

BySeed = Mapping[int, float]


class Interval(NamedTuple):
    """A mean and its two-sided 95 % interval; the ends are NaN where there is one seed."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return self.shown("")

    def shown(self, sign: str = "+") -> str:
        """With a sign, as a change."""
        return f"{self.mean:{sign}.3f} [{self.low:{sign}.3f}, {self.high:{sign}.3f}]"


def interval(values: BySeed | Iterable[float]) -> Interval:
    """Student's t over seeds."""
    x = list(values.values() if isinstance(values, Mapping) else values)
    if not x:
        raise ValueError("values must have at least one seed, got none: run its arm")
    mean = math.fsum(x) / len(x)
    if len(x) == 1:
        return Interval(mean, math.nan, math.nan)
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in x) / (len(x) - 1) / len(x))
    reach = error * float(require_scipy().t.ppf((1 + CONFIDENCE) / 2, len(x) - 1))
    return Interval(mean, mean - reach, mean + reach)


def change(after: BySeed, before: BySeed) -> Interval:
    """Of after - before, seed by seed."""
    return interval(after[seed] - before[seed] for seed in after if seed in before)


def apart(a: BySeed, b: BySeed) -> Interval:
    """Of mean(a) - mean(b), where a seed of one is nothing to the same seed of the other: Welch."""
    first, second = list(a.values()), list(b.values())
    mean = interval(first).mean - interval(second).mean
    if min(len(first), len(second)) < 2:
        return Interval(mean, math.nan, math.nan)
    found = require_scipy().ttest_ind(first, second, equal_var=False)
    ends = found.confidence_interval(CONFIDENCE)
    return Interval(mean, float(ends.low), float(ends.high))


class Part(NamedTuple):
    """One part of a claim: of what, the change that was measured, and its claimed sign."""

    what: str
    found: Interval
    sign: int

    @property
    def verdict(self) -> str:
        """An interval that is all on the claimed side is what "held" means."""
        low, high = sorted((self.sign * self.found.low, self.sign * self.found.high))
        if low > 0:
            return "Held"
        return "The reverse was found" if high < 0 else "Not decided"


def said(parts: Sequence[Part]) -> str:
    """Whether a claim held, as a whole and then part by part, with the numbers."""
    held = sum(p.verdict == "Held" for p in parts)
    one = len({p.verdict for p in parts}) == 1
    sentences = [] if one else [f"**Held in {held} of {len(parts)} parts.**"]
    for verdict in ("Held", "The reverse was found", "Not decided"):
        own = [f"{p.what} ({p.found.shown()})" for p in parts if p.verdict == verdict]
        if own:
            sentences.append(f"**{verdict}**: {', '.join(own)}.")
    return " ".join(sentences)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return table_rows(lines)
