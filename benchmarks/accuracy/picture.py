"""The picture of the study: a line an implementation, worst error over rows and temperatures."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from benchmarks.accuracy.rows import Row
from benchmarks.accuracy.verdicts import INTERPRETED, LIMITS, form_of, input_of, is_ours

# Okabe and Ito's colours, markers of their own, and thick lines for ours alone;
# where lines coincide a larger marker shows around a smaller one.
PEERS = {
    "eager": ("#E69F00", "o", 8),
    "-(p log p)": ("#CC79A7", "v", 6),
    "TRL": ("#009E73", "s", 4),
    "Liger": ("#56B4E9", "D", 7),
    "verl": ("#D55E00", "^", 4),
}
OURS = {
    "em_kernels, CPU and reference": "-",
    "em_kernels, Triton interpreted, T = 0.7": (0, (1, 1)),
}
PANELS = {
    "float32 logits": "float32\nlogits",
    "bfloat16 logits": "bfloat16\nlogits",
    "bfloat16 hidden": "bfloat16\nhidden states",
    "bfloat16 hidden, float32 logits": "bfloat16\nhidden states,\nfloat32 logits",
}
COLUMNS = {
    "H": "entropy H",
    "dH": "gradient of H",
    "logprob": "logprob",
    "dlogprob": "gradient of logprob",
}
LOWEST, HIGHEST = 1e-8, 3.0


def draw(rows: list[Row], path: Path) -> None:
    """Small multiples, an input a line of panels and a quantity a column."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    given = [name for name in PANELS if any(input_of(row) == name for row in rows)]
    size = (11.5, 2.1 * len(given) + 1.5)
    figure, axes = plt.subplots(
        len(given),
        len(COLUMNS),
        figsize=size,
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for line, name in zip(axes, given):
        here = [row for row in rows if input_of(row) == name and row.errors]
        for axis, quantity in zip(line, COLUMNS):
            panel(axis, here, quantity)
        line[0].set_ylabel(PANELS[name], rotation=0, ha="right", va="center", labelpad=12)
    for axis, title in zip(axes[0], COLUMNS.values()):
        axis.set_title(title, fontsize=11)
    for axis in axes[-1]:
        axis.set_xlabel("H in nats")
    figure.suptitle("Relative error by the entropy H of the row: the worst row and temperature")
    legend(figure, axes)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def panel(axis, rows: list[Row], quantity: str) -> None:
    largest = math.log(max(row.vocab for row in rows))
    limit = LIMITS[any(row.name == LIMITS[1] for row in rows)]
    axis.plot(*curve(rows, [limit], quantity, largest), color="#777777", linewidth=6, alpha=0.35)
    for name, (colour, marker, size) in PEERS.items():
        forms = sorted({row.name for row in rows if form_of(row.name) == name})
        if forms:
            points = best_of([curve(rows, [form], quantity, largest) for form in forms])
            axis.plot(*points, color=colour, marker=marker, markersize=size, linewidth=1.1)
    for style, interpreted in zip(OURS.values(), (False, True)):
        names = {r.name for r in rows if is_ours(r.name) and (INTERPRETED in r.name) is interpreted}
        if names:
            points = curve(rows, names, quantity, largest)
            axis.plot(*points, color="#000000", linestyle=style, linewidth=2.6)
    axis.set(xscale="log", yscale="log", ylim=(LOWEST, HIGHEST), xticks=[1e-12, 1e-8, 1e-4, 1])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def curve(
    rows: list[Row], names: Iterable[str], quantity: str, largest: float
) -> tuple[list[float], list[float]]:
    """H, and the worst error there; what lies outside the axes is drawn at their ends."""
    found: dict[float, float] = {}
    for row in rows:
        if row.name in set(names):
            h = min(row.entropy, largest)
            found[h] = max(found.get(h, 0.0), row.errors[quantity][1])
    entropies = sorted(found)
    return entropies, [min(max(found[h], LOWEST), 1.0) for h in entropies]


def best_of(curves: list[tuple[list[float], list[float]]]) -> tuple[list[float], list[float]]:
    """Of the forms of one peer the better at each H."""
    return curves[0][0], [min(errors) for errors in zip(*(curve[1] for curve in curves))]


def legend(figure, axes) -> None:
    """Below the panels: ours first, then the peers that are there, then what rounding costs."""
    from matplotlib.lines import Line2D

    ours = [Line2D([], [], color="#000000", ls=s, lw=2.6, label=n) for n, s in OURS.items()]
    drawn = {line.get_marker() for axis in axes.flat for line in axis.lines}
    peers = [
        Line2D([], [], color=colour, marker=marker, markersize=size, lw=1.1, label=name)
        for name, (colour, marker, size) in PEERS.items()
        if marker in drawn
    ]
    limit = Line2D(
        [], [], color="#777777", lw=6, alpha=0.35, label="limit: exact arithmetic, rounded alike"
    )
    figure.legend(
        handles=[*ours, limit, *peers], ncols=4, loc="outside lower center", frameon=False
    )
