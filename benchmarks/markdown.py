"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable


def table_rows(lines: Iterable[Iterable[object]]) -> str:
    """A line of the table for each of cells; the second is of dashes."""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
