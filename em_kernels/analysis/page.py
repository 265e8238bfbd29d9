"""One HTML page that needs nothing else: styles inside, plots as data, all text escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from em_kernels.analysis.tables import Table

if TYPE_CHECKING:
    from jinja2 import Template


class Figure(NamedTuple):
    """A plot: PNG and what it shows, for those who cannot see it."""

    png: bytes
    alt: str

    @property
    def data(self) -> str:
        return base64.b64encode(self.png).decode("ascii")


class Piece(NamedTuple):
    """A part of a text, on a background from white (0) to orange (1); its tooltip."""

    text: str
    shade: float = 0.0
    tip: str = ""


class Passage(NamedTuple):
    """A text to be shown as it is, under its name, and a remark on what was left off."""

    name: str
    pieces: Sequence[Piece]
    more: str = ""


class Part(NamedTuple):
    """Texts of one kind."""

    title: str
    passages: Sequence[Passage]
    note: str = ""


class Section(NamedTuple):
    """A part of a report; `folded` is a table that opens on a click, under its name."""

    title: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    folded: tuple[str, Table] | None = None
    parts: Sequence[Part] = ()


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole page."""
    return _template().render(title=title, sections=sections)


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("em_kernels", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.jinja")


def coloured(pieces: Sequence[str], values: Sequence[float], top: float) -> list[Piece]:
    """Pieces of a text, white at 0 nats and orange at `top` and above; NaN is white."""
    # Of 0 and NaN, max gives the first.
    shades = [min(max(0.0, value / top), 1.0) if top > 0 else 0.0 for value in values]
    tips = [f"{value:.4f} nats" for value in values]
    return list(map(Piece, pieces, shades, tips))
