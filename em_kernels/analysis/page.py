"""One HTML page that needs nothing else: styles inside, plots as data, all text escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from em_kernels.analysis.tables import Table

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem;
  border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: .3rem 0 1.2rem; font-size: .88rem; display: block;
  overflow-x: auto; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e4e4e4; text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th { border-bottom: 2px solid #888; }
th:first-child, td:first-child { text-align: left; white-space: pre-wrap; }
img { max-width: 100%; height: auto; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; background: #fafafa; padding: .8rem;
  border: 1px solid #e4e4e4; font: .9rem/1.7 ui-monospace, monospace; margin: .6rem 0 1.2rem; }
.text span { border-radius: 2px; padding: .05rem 0; }
.note { color: #444; } .key { font-weight: 600; margin: 0; }
details { margin: .6rem 0 1.2rem; } summary { font-weight: 600; cursor: pointer; }
details th, details td { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


class Figure(NamedTuple):
    """A plot: PNG and what it shows, for those who cannot see it."""

    png: bytes
    alt: str


class Section(NamedTuple):
    """A part of a report; `html` is put in as it is."""

    title: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    html: str = ""


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole page."""
    body = "\n".join(map(_section, sections))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _section(section: Section) -> str:
    notes = "".join(f'<p class="note">{escape(note)}</p>\n' for note in section.notes)
    figures = "".join(map(_image, section.figures))
    tables = "".join(table.html() for table in section.tables)
    heading = f"<h2>{escape(section.title)}</h2>"
    return f"<section>{heading}\n{notes}{figures}{tables}{section.html}</section>"


def _image(figure: Figure) -> str:
    data = base64.b64encode(figure.png).decode("ascii")
    alt = escape(figure.alt, quote=True)
    return f'<p><img alt="{alt}" src="data:image/png;base64,{data}"></p>\n'


def folded(title: str, table: Table) -> str:
    """A table that opens on a click."""
    return f"<details><summary>{escape(title)}</summary>{table.html()}</details>"


def coloured(pieces: Sequence[str], values: Sequence[float], top: float) -> str:
    """Pieces of a text on a background from white (0) to orange (`top` and above).

    The value of each is its tooltip.
    """
    return "".join(map(_piece, pieces, values, [top] * len(pieces)))


def _piece(piece: str, value: float, top: float) -> str:
    share = min(max(value / top, 0.0), 1.0) if top > 0 and value == value else 0.0
    style = f' style="background:rgba(213,94,0,{0.75 * share:.2f})"' if share >= 0.01 else ""
    return f'<span title="{value:.4f} nats"{style}>{escape(piece)}</span>'
