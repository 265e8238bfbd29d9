"""What was claimed of the errors, held to the rows: the numbers behind docs/accuracy.md.

"Worse than a peer" is more than MARGIN times both the best peer's error and the limit, and some
units of float32 beside, more where a product of float32 is summed in anybody's order. The limit is
what exact arithmetic leaves that rounds the logits, where there is a matrix product, and the
results to the same dtypes: a peer below it has had luck with a rounding.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.accuracy.rows import LARGEST, STATISTICS, WEIGHT, Row
from benchmarks.markdown import table_rows

MARGIN, UNIT = 2.0, 2.0**-24
UNITS = {True: 4, False: 8}  # from logits, and from hidden states
TIMES, BELOW = 100.0, 1e-4
LIMITS = ("exact, rounded once", "exact, of rounded logits")  # of results; of logits too
OURS = ("reference", "cpu", "triton", "cuda")
GIVEN_FLOAT32, INTERPRETED = ", given float32", ", interpreted"
CLAIMED = ("H", "logprob", "dH", "dlogprob")


class Comparison(NamedTuple):
    """One quantity and statistic of one of ours in one cell, beside the best peer."""

    ours: Row
    quantity: str
    error: float
    peer: str
    peer_error: float
    limit: float  # of exact arithmetic whose logits and results are rounded as ours

    @property
    def times(self) -> float:
        """As many times nearer to the truth than the best peer."""
        return self.peer_error / self.error if self.error else math.inf

    @property
    def is_worse(self) -> bool:
        return not self.at_limit and self.error > MARGIN * self.peer_error + self.rounding

    @property
    def at_limit(self) -> bool:
        """Not to be had better in these dtypes."""
        return self.error <= MARGIN * self.limit + self.rounding

    @property
    def rounding(self) -> float:
        return UNIT * UNITS[self.ours.source == "logits"]


def is_ours(name: str) -> bool:
    return name.split(",")[0].split(" ")[0] in OURS


def comparisons(rows: Iterable[Row]) -> list[Comparison]:
    by_cell: dict[tuple, list[Row]] = {}
    for row in rows:
        by_cell.setdefault(row.cell, []).append(row)
    return [found for cell in by_cell.values() for found in in_cell(cell)]


def in_cell(rows: list[Row]) -> Iterable[Comparison]:
    peers = [r for r in rows if not is_ours(r.name) and r.name not in LIMITS and r.errors]
    limit = max((row for row in rows if row.name in LIMITS), key=lambda row: row.name == LIMITS[1])
    for row in rows:
        if not is_ours(row.name) or not peers:
            continue
        for quantity, errors in row.errors.items():
            others = [peer for peer in peers if quantity in peer.errors]
            for number in range(1 if WEIGHT in quantity else len(STATISTICS)):
                best = min(others, key=lambda peer: peer.errors[quantity][number])
                yield Comparison(
                    row,
                    quantity,
                    errors[number],
                    best.name,
                    best.errors[quantity][number],
                    limit.errors[quantity][number],
                )


def verdicts(rows: list[Row]) -> str:
    """What is printed: both verdicts, then the comparisons that break them, worst first."""
    compared = comparisons(rows)
    lines = [claims(rows)]
    worse = sorted((c for c in compared if c.is_worse), key=lambda c: c.times)
    short = sorted((c for c in compared if is_short(c)), key=lambda c: c.times)
    for said, found in (("worse than a peer", worse), ("less than 100 times", short)):
        lines += [f"{said}: {len(found)}", *(f"  {in_words(c)}" for c in found[:10])]
    failed = {f"{row.name}: {row.failure}" for row in rows if row.failure}
    return "\n".join([*lines, *sorted(failed)])


def in_words(found: Comparison) -> str:
    row = found.ours
    h = "log V" if math.isinf(row.entropy) else f"{row.entropy:g}"
    return (
        f"{row.name}: {found.quantity} {found.error:.1e}, {found.peer} {found.peer_error:.1e}, "
        f"{row.source} {row.dtype} V = {row.vocab} T = {row.temperature} H = {h}"
    )


def is_claimed(found: Comparison) -> bool:
    """Whether it should be TIMES as good as every peer."""
    quantity = found.quantity.removesuffix(LARGEST).removesuffix(WEIGHT)
    return quantity in CLAIMED and found.ours.entropy < BELOW


def is_short(found: Comparison) -> bool:
    return is_claimed(found) and found.times < TIMES and not found.at_limit


def claims(rows: list[Row]) -> str:
    """Markdown: whether both claims held where kernels were run as they are, and the table."""
    found = [c for c in comparisons(rows) if INTERPRETED not in c.ours.name]
    worse, claimed = sum(c.is_worse for c in found), [c for c in found if is_claimed(c)]
    missed = sum(map(is_short, claimed))
    far = sum(c.times >= TIMES for c in claimed)
    verdict = {True: "**Held**", False: "**Not held**"}
    return (
        f"{verdict[not worse]}: never worse than a peer ({worse} of {len(found)} are).\n"
        f"{verdict[not missed]}: {TIMES:.0f} times nearer to the truth than every peer below "
        f"H = {BELOW:g}, or at the limit ({far} and {len(claimed) - far - missed} of "
        f"{len(claimed)}; {missed} are neither).\n\n{verdict_table(rows)}"
    )


def verdict_table(rows: list[Row]) -> str:
    """Markdown: both claims, an input and kind of backend a line."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    as_they_are = ", ".join(kinds(rows))
    for found in comparisons(rows):
        name = found.ours.name if INTERPRETED in found.ours.name else as_they_are
        groups.setdefault((input_of(found.ours), name), []).append(found)
    head = ["input", "backends", "comparisons", "worse than a peer", "largest ratio to a peer"]
    head += ["below 1e-4", "100 x nearer", "at the limit", "less"]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for (given, kind), found in groups.items():
        claimed = [c for c in found if is_claimed(c)]
        far = [c for c in claimed if c.times >= TIMES]
        missed = [c for c in claimed if is_short(c)]
        ratio = max((beyond(c) for c in found), default=0.0)
        numbers = [len(found), sum(c.is_worse for c in found), f"{ratio:.2f}", len(claimed)]
        numbers += [len(far), len(claimed) - len(far) - len(missed), len(missed)]
        lines.append([given, kind, *map(str, numbers)])
    return table_rows(lines)


def beyond(found: Comparison) -> float:
    """Our error less what rounding allows, over the larger of the best peer's and the limit."""
    error, other = max(found.error - found.rounding, 0.0), max(found.peer_error, found.limit)
    return error / other if other else (math.inf if error else 0.0)


def kinds(rows: Iterable[Row]) -> list[str]:
    """Our backends that were run as they are, in their order."""
    there = {row.name.split(" ")[0] for row in rows if is_ours(row.name)}  # "triton," is not one
    return [name for name in OURS if name in there]


def input_of(row: Row) -> str:
    large = f", V = {row.vocab}" if row.vocab > 100_000 else ""
    if row.source == "logits":
        return f"{row.dtype} logits{large}"
    return f"{row.dtype} {row.source}"


LABELS = {
    "H": "H",
    "logprob": "logprob",
    "dH": "gradient of H",
    "dlogprob": "gradient of logprob",
}
PEERS = ("eager", "-(p log p)", "TRL", "Liger", "verl")


def error_table(rows: list[Row], below: bool) -> str:
    """Markdown: median and worst error below H = BELOW, or from there on, over all cells."""
    rows = [row for row in rows if (row.entropy < BELOW) is below and row.errors]
    head = ["input", "error of", "limit", *OURS[:2], OURS[2] + INTERPRETED, OURS[3], *PEERS]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for given in dict.fromkeys(map(input_of, rows)):
        here = [row for row in rows if input_of(row) == given]
        for quantity, label in LABELS.items():
            cells = [error_cell(here, name, quantity) for name in head[2:]]
            lines.append([given, label, *cells])
    return table_rows(lines)


def error_cell(rows: list[Row], column: str, quantity: str) -> str:
    """Median over cells of the median over rows / the worst of all; of a peer's forms the better.

    The CPU's levels are one column: the worst of them.
    """
    forms: dict[str, list[tuple[float, float]]] = {}
    last = [row.name for row in rows if row.name in LIMITS][
        -1
    ]  # from hidden states, of rounded ones
    for row in rows:
        if form_of(row.name) == column and (column != "limit" or row.name == last):
            name = column if is_ours(row.name) else row.name
            forms.setdefault(name, []).append(row.errors[quantity])
    if not forms:
        return "not yet measured" if column == "cuda" else "-"
    found = [
        (statistics.median(m for m, _ in errors), max(w for _, w in errors))
        for errors in forms.values()
    ]
    median, worst = min(found, key=lambda pair: pair[::-1])
    return f"{median:.0e} / {worst:.0e}"


def form_of(name: str) -> str:
    """The column of a contender."""
    if name in LIMITS:
        return "limit"
    if name.startswith("cpu "):
        return "cpu"
    return name.removesuffix(GIVEN_FLOAT32)
