"""Tables of text, for a terminal and for a report, and numbers as people read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from em_kernels.lm.text import cut

NONE = "–"
MEASURES = {
    "kl_to_base": "KL(after ‖ before)",
    "kl_from_base": "KL(before ‖ after)",
    "js_to_base": "Jensen-Shannon",
}
"""The divergences of `TokenStats` where the base is the model before."""


class Table(NamedTuple):
    """A title, column heads and rows of text; the first column is set left, the others right."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        lines = [[printable(cell) for cell in line] for line in (self.head, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join([printable(self.title), *(_line(line, widths) for line in lines)])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:])]
    return "  " + "  ".join([cells[0].ljust(widths[0]), *others]).rstrip()


def printable(text: str) -> str:
    """With escapes for what would steer the terminal: texts are anybody's."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


Cell = Callable[[Any], str]


def table(title: str, columns: Mapping[str, Cell], rows: Sequence[Any]) -> Table:
    """A line for each of `rows`: what each of the `columns`, by their heads, makes of it."""
    return Table(title, list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def number(value: float | None, digits: int = 3) -> str:
    """Fixed digits; a dash for None."""
    return NONE if value is None else f"{value:.{digits}f}"


def figures(value: float | None, digits: int = 3) -> str:
    """Significant digits, for what may be small; a dash for None."""
    return NONE if value is None else f"{value:.{digits}g}"


def percent(share: float | None) -> str:
    return NONE if share is None else f"{share:.1%}"


def interval(found: Mapping | None, name: str = "mean", digits: int = 3, sign: str = "") -> str:
    """mean [low, high] of an `Interval` as a dict; a dash for None."""
    if found is None:
        return NONE
    value, low, high = (f"{found[n]:{sign}.{digits}f}" for n in (name, "low", "high"))
    return f"{value} [{low}, {high}]"


def p_value(value: float) -> str:
    """As it stands in a table: 0.012, or < 0.001."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def temperature(value: float) -> str:
    return "greedy" if value == 0 else f"T = {value:g}"


def short(text: str, length: int = 50) -> str:
    """Without line breaks, cut to at most so many characters."""
    return cut(" ".join(text.split()), length)


def of(name: str, show: Callable[..., str] = str, **options) -> Cell:
    """What `show` makes of the entry `name` of a row."""
    return lambda row: show(row[name], **options)


def temperature_of(row: Mapping) -> str:
    return temperature(row["temperature"])
