"""Tables as text for a terminal and as HTML for a report, and numbers as people read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

NONE = "–"


class Table(NamedTuple):
    """A title, column heads and rows of text; the first column is set left, the others right."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        lines = [list(map(str, line)) for line in (self.head, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join([self.title, *(_line(line, widths) for line in lines)])

    def html(self) -> str:
        head = "".join(f"<th>{escape(str(cell))}</th>" for cell in self.head)
        rows = "".join(
            "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>\n"
            for row in self.rows
        )
        title = f'<p class="key">{escape(self.title)}</p>'
        return f"{title}<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.rjust(width) if i else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(cells, widths))
    )
    return "  " + "  ".join([first, *others]).rstrip()


def number(value: float | None, digits: int = 3) -> str:
    """Fixed digits; a dash for None."""
    return NONE if value is None else f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    return NONE if share is None else f"{share:.1%}"


def interval(found: Mapping) -> str:
    """mean [low, high] of an `Interval` as a dict."""
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def p_value(value: float) -> str:
    """As it stands in a table: 0.012, or < 0.001."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def temperature(value: float) -> str:
    return "greedy" if value == 0 else f"T = {value:g}"
