"""What the pictures share: colours that the colour-blind can tell apart, curves, bars, a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.science.numbers import BySeed, Interval, interval

COLOURS = {
    "untrained": "#777777",
    "em": "#0072B2",
    "outside prompt": "#E69F00",
    "random reward": "#CC79A7",
    "GRPO": "#009E73",
    "mark": "#D55E00",
}
MODES = {1.0: "sampled, T = 1", 0.5: "sampled, T = 0.5", 0.0: "greedy"}


@contextmanager
def picture(path: Path, columns: int = 1, width: float = 7.5, **options: Any) -> Iterator[Any]:
    """Axes beside each other (one, or a list of them), written to `path` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, columns, figsize=(width, 4.5), layout="constrained", squeeze=False, **options
    )
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    yield axes[0][0] if columns == 1 else list(axes[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def curve(
    axis, x: Sequence[float], values: Sequence[BySeed], colour: str, label: str, seeds: bool = True
) -> Interval:
    """The mean with its 95 % interval, every seed as a thin line; returns the last interval."""
    if seeds:
        for seed in values[0]:
            own = [(at, value[seed]) for at, value in zip(x, values) if seed in value]
            axis.plot(*zip(*own), color=colour, alpha=0.25, linewidth=0.8)
    spans = [interval(value) for value in values]
    axis.plot(x, [s.mean for s in spans], color=colour, marker="o", markersize=4, label=label)
    low, high = [s.low for s in spans], [s.high for s in spans]
    axis.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    return spans[-1]


def bars(axis, rows: Sequence[tuple[str, Interval, str]]) -> None:
    """Horizontal points with their intervals, (label, interval, colour), the first on top."""
    for place, (_, found, colour) in enumerate(reversed(rows)):
        axis.plot([found.low, found.high], [place, place], color=colour, linewidth=2.5)
        axis.plot(found.mean, place, "o", color=colour)
    axis.set_yticks(range(len(rows)), [label for label, *_ in reversed(rows)])
    axis.set_ylim(-0.6, len(rows) - 0.4)
