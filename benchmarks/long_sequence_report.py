"""What `benchmarks.long_sequence` has measured, as tables and as a picture.

    python -m benchmarks.long_sequence_report     draws docs/images/long_sequence.png anew

Memory grows by so much a token, so what lies beyond the rows is forecast by the line through the
two longest sequences that were measured, and not for sequences many times as long; unless these two
are too far apart: of a short one the peak is another. A forecast is called one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from benchmarks.long_sequence import FILE, GB, WAYS
from benchmarks.markdown import table_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PICTURE = ROOT / "docs/images/long_sequence.png"
CAPS = (8, 16, 24)
APART = 8  # the most that one of the two lengths of a line is of the other, and a forecast of both
COLOURS = ("#999999", "#0072b2", "#56b4e9", "#d55e00", "#e69f00")


class Line(NamedTuple):
    """Bytes = start + slope * tokens."""

    start: float
    slope: float

    def bytes(self, tokens: float) -> float:
        return self.start + self.slope * tokens

    def tokens(self, size: float) -> float:
        return (size - self.start) / self.slope


def rows(results: Path = RESULTS) -> list[dict]:
    return json.loads((results / FILE).read_text())["rows"]


def measured(found: list[dict], way: str) -> dict[int, dict]:
    """By tokens: what ended, and else what died."""
    own = [row for row in found if row["way"] == way]
    return {row["tokens"]: row for row in sorted(own, key=lambda r: r["failure"] is None)}


def line_of(found: list[dict], way: str) -> Line | None:
    ended = {t: r["peak_bytes"] for t, r in measured(found, way).items() if not r["failure"]}
    if len(ended) < 2:
        return None
    first, last = sorted(ended)[-2:]
    if last > APART * first:
        return None
    slope = (ended[last] - ended[first]) / (last - first)
    return Line(ended[last] - slope * last, slope) if slope > 0 else None


def cell(row: dict | None) -> str:
    if row is None:
        return "-"
    if row["failure"]:
        return f"dies at {row['cap'] / GB:.0f}"
    return f"{row['peak_bytes'] / GB:.1f}"


def memory_table(results: Path = RESULTS) -> str:
    """GB at the peak, by tokens."""
    found = rows(results)
    every = sorted({row["tokens"] for row in found})
    lines = [["peak memory, GB", *(f"{tokens:,}" for tokens in every)]]
    lines.append(["---", *["---:"] * len(every)])
    for way, (name, _) in WAYS.items():
        own = measured(found, way)
        if own:
            lines.append([name, *(cell(own.get(tokens)) for tokens in every)])
    return table_rows(lines)


def longest(found: list[dict], way: str, size: int) -> str:
    """Of a way, the most tokens for so many GB: measured, and by the line."""
    own, line = measured(found, way), line_of(found, way)
    ended = [t for t, r in own.items() if not r["failure"] and r["peak_bytes"] <= size * GB]
    ran = f"{max(ended):,}" if ended else "none"
    if line is None:
        return ran
    forecast, far = rounded(line.tokens(size * GB)), APART * max(own)
    return f"{ran} (over {far:,})" if forecast > far else f"{ran} ({forecast:,})"


def rounded(tokens: float) -> int:
    """Down, to two figures."""
    whole = max(int(tokens), 0)
    step = 10 ** max(len(str(whole)) - 2, 0)
    return whole // step * step


def fits_table(results: Path = RESULTS) -> str:
    """The longest sequence that ran within so many GB, and in brackets the forecast."""
    found = rows(results)
    lines = [["longest sequence, tokens", *(f"{size} GB" for size in CAPS)]]
    lines.append(["---", *["---:"] * len(CAPS)])
    for way, (name, _) in WAYS.items():
        if measured(found, way):
            lines.append([name, *(longest(found, way, size) for size in CAPS)])
    return table_rows(lines)


def draw(results: Path = RESULTS, path: Path = PICTURE) -> None:
    """Memory against tokens, both on logarithmic axes: points measured, dashes forecast."""
    from benchmarks.science.figures import picture

    found = rows(results)
    with picture(path, width=8.5) as axis:
        for (way, (name, _)), colour in zip(WAYS.items(), COLOURS):
            _draw_way(axis, found, way, name, colour)
        for size in CAPS:
            axis.axhline(size, color="black", linewidth=0.7, alpha=0.5)
        axis.set(xscale="log", yscale="log", xlim=(860, 150_000), ylim=(3.5, 33))
        ticks = [1024 * 2**i for i in range(8)]
        axis.set_xticks(ticks, [f"{t // 1024}k" for t in ticks])
        axis.set_yticks([4, 8, 16, 24], ["4", "8", "16", "24"])
        axis.minorticks_off()
        axis.set(xlabel="tokens of the one sequence", ylabel="most memory of the process, GB")
        axis.set_title("One update of a 0.5 B model in bfloat16, V = 151,936", fontsize=11)
        axis.legend(
            fontsize=8,
            loc="upper left",
            bbox_to_anchor=(0, -0.13),
            ncol=2,
            frameon=False,
            title="points measured, dashes forecast",
        )


def _draw_way(axis, found: list[dict], way: str, name: str, colour: str) -> None:
    ended = {t: r["peak_bytes"] / GB for t, r in measured(found, way).items() if not r["failure"]}
    if not ended:
        return
    at = sorted(ended)
    axis.plot(at, [ended[t] for t in at], "o-", color=colour, markersize=4, label=name)
    line = line_of(found, way)
    if line is not None:
        on = [at[-1] * APART ** (i / 24) for i in range(25)]
        axis.plot(on, [line.bytes(t) / GB for t in on], "--", color=colour, linewidth=1)


if __name__ == "__main__":
    draw()
    print(memory_table(), fits_table(), f"drawn: {PICTURE}", sep="\n\n")
