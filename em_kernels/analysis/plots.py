"""Plots as PNG, read without a legend: titles, units, labels at the lines, colours of Okabe and Ito
(which the colour-blind tell apart)."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from em_kernels.analysis.tables import MEASURES, temperature_of
from em_kernels.lm.data import is_number

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
INTERVAL = "bars: 95 % bootstrap interval over"
STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.titlesize": 11,
    "grid.alpha": 0.3,
}


def png(draw: Callable[..., None], *arguments) -> bytes:
    """What `draw` puts on a figure of its own; pyplot's figures and backend are left alone."""
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        draw(figure, *arguments)
        figure.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()


def _axes(figure, rows: int = 1, columns: int = 1, size=(7.0, 3.8)) -> list[Any]:
    figure.set_size_inches(size)
    return figure.subplots(rows, columns, squeeze=False).ravel().tolist()


def _label(axis, text: str, x: float, y: float, colour: str, offset=(8, 0), **options) -> None:
    """Words beside a point; a dollar sign begins no mathematics."""
    options = {"va": "center", "textcoords": "offset points", **options}
    axis.annotate(_plain(text), (x, y), offset, color=colour, fontsize=9, **options)


def _label_above(axis, text: str, x: float, height: float, colour: str) -> None:
    """Words at x, at a share of the axis' height."""
    at = {"xycoords": ("data", "axes fraction"), "color": colour, "fontsize": 9}
    axis.annotate(f" {text}", (x, height), **at)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")


def _errors(axis, x: Sequence[float], found: Sequence[dict], colour: str, **options) -> None:
    """Means with their intervals, from `Interval`s as dicts."""
    means = [f["mean"] for f in found]
    bars = [[f["mean"] - f["low"] for f in found], [f["high"] - f["mean"] for f in found]]
    axis.errorbar(x, means, yerr=bars, color=colour, marker="o", capsize=3, **options)


def _whole_numbers(axis) -> None:
    axis.xaxis.get_major_locator().set_params(integer=True)


def accuracy(figure, summary: dict) -> None:
    """Mean, pass and majority at every temperature."""
    at = summary["temperatures"]
    (axis,) = _axes(figure, size=(7, 4))
    _errors(axis, range(len(at)), [t["mean"] for t in at], BLUE)
    _label(axis, "mean accuracy", len(at) - 1, at[-1]["mean"]["mean"], BLUE)
    for name, colour, shift in (("pass", GREEN, 0.06), ("majority", ORANGE, -0.06)):
        many = [(i + shift, *_of_many(t, name)) for i, t in enumerate(at) if t["samples"] > 1]
        if many:
            x, k, found = zip(*many)
            _errors(axis, x, found, colour, linestyle="--")
            _label(axis, f"{name}@{k[-1]}", x[-1], found[-1]["mean"], colour)
    axis.set_xticks(range(len(at)), map(temperature_of, at))
    axis.set(ylabel="share of problems", ylim=(-0.02, 1.02), xlim=(-0.3, len(at) - 0.3))
    axis.set_title(f"Accuracy on {summary['problems']} problems\n({INTERVAL} problems)")


def _of_many(at: dict, name: str) -> tuple[int, dict]:
    """(k, interval) of majority@k over all samples, or of the largest pass@k."""
    if name == "majority":
        return at["samples"], at["majority"]
    return max(at["pass"].items())


def reliability(figure, summary: dict) -> None:
    """Accuracy against confidence, a panel for each temperature."""
    at = [t for t in summary["temperatures"] if t["calibration"]]
    axes = _axes(figure, columns=len(at), size=(max(3.6 * len(at), 4.4), 4.7))
    for axis, t in zip(axes, at):
        confidence, right, answers = zip(*t["calibration"]["bins"])
        axis.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":")
        axis.plot(confidence, right, color=BLUE, linewidth=1)
        sizes = [20 + 130 * n / max(answers) for n in answers]
        axis.scatter(confidence, right, s=sizes, color=BLUE)
        axis.set_title(f"{temperature_of(t)}: ECE {t['calibration']['ece']:.3f}")
        axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
        axis.set_xlabel("confidence, exp(mean log-probability)")
    axes[0].set_ylabel("share of answers that are right")
    figure.suptitle("Calibration\n(larger dot: more answers; dotted: perfect)")


def comparison(figure, a: str, b: str, rows: Sequence[dict]) -> None:
    """B - A at every temperature, with its interval and p-value."""
    (axis,) = _axes(figure, size=(7, 1.6 + 0.6 * len(rows)))
    for i, row in enumerate(rows):
        bars = [[row["difference"] - row["low"]], [row["high"] - row["difference"]]]
        axis.errorbar(row["difference"], i, xerr=bars, color=BLUE, marker="o", capsize=4)
        text = f"{row['difference']:+.3f}, p = {row['p_value']:.2g}"
        _label(axis, text, row["difference"], i, BLUE, (0, 8), ha="center", va="baseline")
    axis.axvline(0, color=GREY, linewidth=1)
    axis.set_yticks(range(len(rows)), map(temperature_of, rows))
    axis.set(ylim=(-0.5, len(rows) - 0.2), xlabel="accuracy of B - accuracy of A")
    axis.set_title(_plain(f"A: {a}\nB: {b}\n({INTERVAL} problems)"), fontsize=9)


def selection(figure, rows: Sequence[dict], chosen: int, by: str) -> None:
    """The signal that ranks, prompt by prompt; the chosen ones in colour."""
    values, name = [row[by] for row in rows], by.replace("_", " ")
    (axis,) = _axes(figure)
    axis.scatter(range(1, chosen + 1), values[:chosen], s=14, color=ORANGE)
    axis.scatter(range(chosen + 1, len(values) + 1), values[chosen:], s=8, color=GREY)
    _label(axis, f"the {chosen} selected", 1, values[0], ORANGE, (10, 10))
    unit = " (nats)" if "entropy" in by else ""
    axis.set(xlabel="rank of the prompt", ylabel=f"{name}{unit}")
    axis.margins(y=0.15)
    axis.set_title(f"{len(rows)} prompts by {name}")


def shift(figure, result: dict) -> None:
    """Histograms of the skewness per token, before and after."""
    edges, counts = result["histogram"]["edges"], result["histogram"]["tokens"]
    names = ("before", "after") if len(counts) == 2 else ("model",)
    (axis,) = _axes(figure)
    colours, heights = (BLUE, ORANGE), (0.97, 0.88)
    for found, name, colour, model, high in zip(counts, names, colours, result["models"], heights):
        shares = [count / sum(found) for count in found]
        axis.stairs(shares, edges, color=colour, fill=True, alpha=0.25)
        axis.stairs(shares, edges, color=colour, linewidth=1.5)
        axis.axvline(model["skewness"], color=colour, linestyle="--", linewidth=1)
        text = f"{name}: mean {model['skewness']:.3f}"
        _label_above(axis, text, model["skewness"], high, colour)
    axis.set(xlabel="skewness of a token's logits", ylabel="share of tokens")
    axis.set_title(f"Logits shift, {result['models'][0]['tokens']} tokens")


def drift(figure, result: dict) -> None:
    """Both KLs per token, and their means by the entropy before."""
    histogram, tau = result["histogram"], result["tau"]
    left, right = _axes(figure, columns=2, size=(9, 4))
    for name, colour, high in zip(histogram["tokens"], (BLUE, ORANGE), (0.95, 0.87)):
        shares = [count / result["tokens"] for count in histogram["tokens"][name]]
        left.stairs(shares, histogram["edges"], color=colour, fill=True, alpha=0.25)
        left.stairs(shares, histogram["edges"], color=colour, linewidth=1.5)
        text = f"{MEASURES[name]}: mean {result['measures'][name]['mean']:.3g}"
        _label_above(left, text, histogram["edges"][0], high, colour)
        points = [(row["entropy"], row[name]) for row in result["bins"]]
        points = [point for point in points if min(point) > 0]
        if points:
            right.plot(*zip(*points), color=colour, marker="o")
            beside = (-8, 0) if colour == BLUE else (8, -12)
            align = "right" if colour == BLUE else "left"
            _label(right, MEASURES[name], *points[len(points) // 2], colour, beside, ha=align)
            right.set(xscale="log", yscale="log")
    left.set(xscale="log", xlabel="divergence of a token (nats, log scale)")
    left.set(ylabel="share of tokens", ylim=(0, 1.35 * left.dataLim.ymax))
    left.set_title(f"{result['tokens']} tokens (the first bar: 1e-9 and less)")
    if tau > 0:
        right.axvline(tau, color=GREY, linewidth=1, linestyle=":")
        right.annotate(
            f"forks: H ≥ {tau:.3g} ",
            (tau, 0.03),
            xycoords=("data", "axes fraction"),
            color=GREY,
            fontsize=9,
            ha="right",
        )
    right.set(xlabel="entropy before (nats, log scale)")
    right.set(ylabel="mean divergence (nats, log scale)")
    right.set_title("Tenths of the tokens, by entropy before")


def forks(figure, result: dict) -> None:
    """All entropies and the threshold, and the types that are forks most often."""
    edges, counts = result["histogram"]["edges"], result["histogram"]["tokens"]
    types = result["types"][:12][::-1]
    left, right = _axes(figure, columns=2, size=(9, 4))
    left.stairs(counts, edges, color=BLUE, fill=True, alpha=0.4)
    left.axvline(result["tau"], color=ORANGE, linewidth=1.2)
    _label_above(left, f"forks: H ≥ {result['tau']:.3g}", result["tau"], 0.95, ORANGE)
    left.set(yscale="symlog", xlabel="entropy of a token (nats)", ylabel="tokens (log scale)")
    left.set_ylim(bottom=0)
    left.set_title(f"{result['tokens']} tokens")
    right.barh(range(len(types)), [row["forks"] for row in types], color=ORANGE, alpha=0.7)
    right.set_yticks(range(len(types)), [_plain(repr(row["token"])) for row in types])
    right.set(xlabel="times a fork")
    right.set_title("Tokens that are forks most often")


def entropy_at_temperatures(figure, result: dict) -> None:
    rows = result["temperatures"]
    (axis,) = _axes(figure)
    _errors(axis, [r["temperature"] for r in rows], [r["over_texts"] for r in rows], BLUE)
    axis.set(xlabel="temperature T", ylabel="mean entropy (nats per token)")
    axis.set_ylim(bottom=0)
    title = f"Entropy of softmax(z / T) on {rows[0]['texts']} fixed texts"
    axis.set_title(f"{title}\n({INTERVAL} texts)")


def law(figure, result: dict) -> None:
    """The points, each with its label, and the curve through them."""
    import numpy as np

    points, fit = result["points"], result["fit"]
    x = [p["entropy"] for p in points]
    title = "R = -a exp(H) + b"
    (axis,) = _axes(figure, size=(7, 4.4))
    if fit:
        grid = np.linspace(0, max(x) * 1.05, 200)
        axis.plot(grid, -fit["a"] * np.exp(grid) + fit["b"], color=ORANGE)
        _label(axis, f"ceiling {fit['ceiling']:.3f}", 0, fit["ceiling"], ORANGE, (4, 9))
        quality = "" if fit["r2"] is None else f", R² = {fit['r2']:.3f}"
        title += f": a = {fit['a']:.3g}, b = {fit['b']:.3g}{quality}"
    axis.scatter(x, [p["performance"] for p in points], color=BLUE, zorder=3)
    for row in result.get("forecasts", ()):
        _forecast(axis, row, max(x))
    for point in _apart(points):
        _label(axis, point["label"], point["entropy"], point["performance"], BLUE, (6, 6))
    axis.set(xlabel="mean entropy of the answers H (nats per token)", ylabel="performance R")
    axis.margins(x=0.2, y=0.2)
    axis.set_title(title)


def _forecast(axis, row: dict, widest: float) -> None:
    """The line of a run's first updates, dashed, with rings around them; and its ceiling."""
    import numpy as np

    grid, fit = np.linspace(0, widest * 1.05, 200), row["fit"]
    axis.plot(grid, -fit["a"] * np.exp(grid) + fit["b"], color=GREEN, linestyle="--")
    x, y = zip(*row["points"])
    axis.scatter(x, y, s=90, facecolors="none", edgecolors=GREEN, zorder=4)
    ceiling = row["ceiling"]
    bar = [[ceiling["mean"] - ceiling["low"]], [ceiling["high"] - ceiling["mean"]]]
    axis.errorbar(0, ceiling["mean"], bar, color=GREEN, marker="o", capsize=3)
    words = f"from the first {row['share']:.0%}: {ceiling['mean']:.3f}"
    _label(axis, words, 0, ceiling["high"], GREEN)


def _apart(points: Sequence[dict]) -> list[dict]:
    """Points whose labels do not cover each other; the table names all."""
    names = ("entropy", "performance")
    spans = [max(p[n] for p in points) - min(p[n] for p in points) or 1.0 for n in names]
    kept: list[dict] = []
    for point in points:
        away = [[abs(point[n] - k[n]) / span for n, span in zip(names, spans)] for k in kept]
        if all(x > 0.25 or y > 0.09 for x, y in away):
            kept.append(point)
    return kept


def run_curve(figure, result: dict) -> None:
    """Accuracy above, entropy in the middle, loss below, by updates taken."""
    points, training = result["points"], result["training"]
    updates = [p["update"] for p in points]
    top, middle, bottom = _axes(figure, rows=3, size=(7, 8))
    _errors(top, updates, [p["accuracy"] for p in points], BLUE)
    first = points[0]["accuracy"]["mean"]
    _label(top, temperature_of(points[0]), updates[0], first, BLUE, (6, -12))
    greedy = [p["greedy"] for p in points]
    if None not in greedy and points[0]["temperature"]:
        _errors(top, updates, greedy, ORANGE, linestyle="--")
        _label(top, "greedy", updates[0], greedy[0]["mean"], ORANGE, (6, 10))
    top.axvline(result["peak"], color=GREY, linestyle=":")
    _label(top, "peak", result["peak"], 0.04, GREY, (4, 0))
    top.set(ylabel="accuracy", ylim=(0, 1.1))
    top.set_title(f"Accuracy by update\n({INTERVAL} problems)")
    known = [(p["update"], p["entropy"]) for p in points if p["entropy"] is not None]
    if known:
        middle.plot(*zip(*known), color=BLUE, marker="o")
        _label(middle, "answers of the evaluation", *known[0], BLUE, (6, 8))
    _training(middle, training, "mean_entropy")
    middle.set(ylabel="mean entropy\n(nats per token)")
    middle.set_title("Entropy")
    _training(bottom, training, "loss")
    bottom.set_title("Loss")
    bottom.set(xlabel="optimiser updates taken", ylabel="loss")
    for axis in (top, middle, bottom):
        axis.set_xlim(-0.4, max(updates) + 0.4)
        _whole_numbers(axis)
    for axis in (middle, bottom):
        _on_log_scale(axis)


def _on_log_scale(axis) -> None:
    """Where every value is positive: what falls to almost nothing can be seen to go on falling."""
    values = [value for line in axis.lines for value in line.get_ydata()]
    if values and min(values) > 0:
        axis.set_yscale("log")
        axis.set_ylabel(f"{axis.get_ylabel()}, log scale")
        axis.margins(y=0.15)


def _training(axis, lines: Sequence[dict], name: str) -> None:
    known = [(line["at"], line[name]) for line in lines if is_number(line.get(name))]
    if known:
        axis.plot(*zip(*known), color=GREEN, marker=".", linewidth=1)
        _label(axis, "on the training prompts", *known[len(known) // 2], GREEN, (6, 10))


def metrics(figure, lines: Sequence[dict], names: Sequence[str], units: Mapping[str, str]) -> None:
    """A small panel for each metric of a run."""
    rows = -(-len(names) // 3)
    axes = _axes(figure, rows, 3, size=(10, 2.5 * rows))
    for axis, name in zip(axes, names):
        x, y = zip(*[(line["update"], line[name]) for line in lines if name in line])
        axis.plot(x, y, color=BLUE, marker="." if len(lines) < 60 else "")
        if min(y) == max(y):
            axis.set_ylim(y[0] - 0.5, y[0] + 0.5)
        _whole_numbers(axis)
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set(xlabel="update", ylabel=units.get(name, ""))
    for axis in axes[len(names) :]:
        axis.set_visible(False)
