"""The picture of the study: nine panels, labelled at the lines, in colours that the colour-blind
can tell apart (Okabe and Ito's)."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from benchmarks.rl_study.findings import law_points

COLOURS = {
    "GRPO": "#000000",
    "Clip-Cov": "#0072B2",
    "KL-Cov": "#009E73",
    "80/20": "#E69F00",
    "entropy target": "#CC79A7",
    "random reward": "#999999",
    "EMPO": "#D55E00",
    "majority vote": "#56B4E9",
    "EM then GRPO": "#D55E00",
    "GRPO then EM": "#0072B2",
    "ConciseR": "#009E73",
    "Dr. GRPO": "#0072B2",
    "CISPO": "#D55E00",
    "GSPO": "#009E73",
    "SAPO": "#CC79A7",
    "DPPO": "#E69F00",
    "REPO-R": "#56B4E9",
    "PPL": "#999999",
}
SINCE = ("GRPO", "Dr. GRPO", "CISPO", "GSPO", "SAPO", "DPPO", "REPO-R", "PPL")
ENTROPY = ("GRPO", "Clip-Cov", "KL-Cov", "80/20", "entropy target", "random reward")
LABELS = ("GRPO", "EMPO", "majority vote", "random reward")
ORDER = ("GRPO", "EM then GRPO", "GRPO then EM")
LAW = ("GRPO", "Clip-Cov", "KL-Cov", "80/20")


def plot(study: dict, path: Path) -> None:
    """Draw the arms that the study has; lines are means over seeds, bands one deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(3, 3, figsize=(16, 14), layout="constrained")
    panels = (_entropy, _accuracy, _law, _since, _change, _forecast, _order, _labels, _length)
    for axis, panel in zip(axes.flat, panels):
        panel(axis, study)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Entropy-controlled RL on the embedded model: mean and one standard deviation over seeds; "
        f"accuracy on {study['curve_problems']} held-out problems "
        f"(last point: {study['problems']})",
        fontsize=13,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _entropy(axis, study: dict) -> None:
    ends = [
        _curve(axis, study, arm, "lines", "mean_entropy", shift=-1)
        for arm in _present(study, ENTROPY)
    ]
    _label_ends(axis, ends)
    axis.set_title("Entropy: collapse under GRPO, and what holds it")
    axis.set(xlabel="updates taken", ylabel="mean entropy (nats per token)")
    axis.set_ylim(bottom=0)


def _accuracy(axis, study: dict) -> None:
    _accuracy_of(axis, study, ENTROPY)
    axis.set_title("What it does to accuracy")


def _since(axis, study: dict) -> None:
    arms = _present(study, SINCE)
    ends = [_curve(axis, study, arm, "lines", "mean_entropy", shift=-1) for arm in arms]
    if ends:
        _label_ends(axis, ends)
    axis.set_title("Entropy under later objectives")
    axis.set(xlabel="updates taken", ylabel="mean entropy (nats per token)")
    axis.set_ylim(bottom=0)


def _change(axis, study: dict) -> None:
    """Every update of the arms with one objective: measured over predicted through the weights."""
    pairs = [
        (line["predicted_entropy_change_weights"], line["entropy_change"])
        for arm in study["prediction"]
        for run in study["arms"][arm]
        for line in run["lines"]
    ]
    if not pairs:
        axis.set_axis_off()
        return
    axis.plot(*zip(*pairs), ".", color=COLOURS["Clip-Cov"], alpha=0.5, markersize=4)
    largest = max(abs(x) for pair in pairs for x in pair)
    axis.plot([-largest, largest], [-largest, largest], color="black", linewidth=1)
    axis.set(xlabel="predicted in the weights (nats)", ylabel="measured (nats)")
    axis.set_title(
        f"Change of mean entropy in each of {len(pairs)} updates,\nunder every objective"
    )


def _forecast(axis, study: dict) -> None:
    """Ceiling and end of every arm, from its first fifth, and the accuracy reached."""
    rows = list(study["forecast"].items())[::-1]
    if not rows:
        axis.set_axis_off()
        return
    for y, (_, found) in enumerate(rows):
        span = found["predicted"]
        bar = [[span["mean"] - span["low"]], [span["high"] - span["mean"]]]
        axis.errorbar(span["mean"], y, xerr=bar, fmt="o", color=COLOURS["Clip-Cov"], capsize=2)
        axis.plot(found["ceiling"]["mean"], y, "|", color=COLOURS["KL-Cov"], markersize=12)
        axis.plot(found["reached"], y, "D", color=COLOURS["EMPO"], markersize=5)
    axis.set_yticks(range(len(rows)), [arm for arm, _ in rows], fontsize=9)
    axis.set_xlabel("accuracy of the answers trained on")
    axis.set_title(
        "From the first fifth: R at the end (dot, 95 %)\nand the ceiling (bar); R reached (diamond)"
    )


def _labels(axis, study: dict) -> None:
    _accuracy_of(axis, study, LABELS)
    axis.set_title("Without labels: EMPO and majority vote\n(GRPO here has verified rewards)")


def _order(axis, study: dict) -> None:
    _accuracy_of(axis, study, ORDER)
    axis.set_title(f"One-shot EM ({study['em_updates']} updates) before GRPO, and after it")


def _accuracy_of(axis, study: dict, arms: tuple[str, ...]) -> None:
    shown = _present(study, arms)
    _label_ends(axis, [_curve(axis, study, arm, "points", "sampled", marker="o") for arm in shown])
    axis.set(xlabel="updates taken", ylabel="held-out accuracy, sampled at T = 1")


def _law(axis, study: dict) -> None:
    """Every point of the curves, and GRPO's fitted line."""
    for arm in _present(study, LAW):
        pairs = [pair for pair in law_points(study["arms"][arm])]
        x, y = [math.exp(h) for h, _ in pairs], [r for _, r in pairs]
        axis.plot(x, y, _MARKERS[arm], color=COLOURS[arm], alpha=0.75, label=arm)
        if arm == "GRPO" and arm in study["law"]:
            law = study["law"][arm]
            ends = [min(x), max(x)]
            axis.plot(ends, [law["b"] - law["a"] * e for e in ends], color=COLOURS[arm])
            text = (
                f"GRPO: R = -{law['a']:.2f} exp(H) + {law['b']:.2f}\n"
                f"residual {law['residual']:.3f}, r² = {law['r2']:.2f}"
            )
            axis.annotate(text, (0.04, 0.06), xycoords="axes fraction")
    axis.legend(frameon=False, loc="upper right")
    axis.set(xlabel="exp(H), H in nats per token", ylabel="held-out accuracy R, sampled at T = 1")
    axis.set_title("The law R = -a exp(H) + b")


_MARKERS = {"GRPO": "o", "Clip-Cov": "s", "KL-Cov": "^", "80/20": "D"}


def _length(axis, study: dict) -> None:
    """Response length of ConciseR's two stages on the held-out problems, with accuracy above."""
    if "ConciseR" not in study["arms"]:
        axis.set_axis_off()
        return
    arms = _present(study, ("GRPO", "ConciseR"))
    ends = [_curve(axis, study, arm, "points", "length", marker="o") for arm in arms]
    axis.set_ylim(0, 1.25 * axis.get_ylim()[1])
    _label_ends(axis, ends)
    axis.axvline(study["updates"], color="grey", linestyle=":")
    top = axis.get_ylim()[1]
    axis.annotate(" L-GRPO from here", (study["updates"], top), va="top", color="grey")
    runs = study["arms"]["ConciseR"]
    for i, point in enumerate(runs[0]["points"]):
        if point["update"] in (0, study["updates"], 2 * study["updates"]):
            accuracy = statistics.fmean(run["points"][i]["sampled"] for run in runs)
            length = statistics.fmean(run["points"][i]["length"] for run in runs)
            axis.annotate(
                f"accuracy {accuracy:.2f}",
                (point["update"], length),
                (4, -22),
                textcoords="offset points",
                rotation=-20,
                va="top",
                color=COLOURS["ConciseR"],
            )
    axis.set_title("ConciseR: GRPO++, then L-GRPO")
    axis.set(xlabel="updates taken", ylabel="response length (tokens)")


def _present(study: dict, arms: tuple[str, ...]) -> list[str]:
    return [arm for arm in arms if study["arms"].get(arm)]


def _curve(axis, study: dict, arm: str, kind: str, name: str, shift: int = 0, marker=None):
    """Draw the mean over seeds with its band; returns (arm, last x, last y) for the label."""
    runs = study["arms"][arm]
    shown = [[point for point in run[kind] if name in point] for run in runs]
    x = [point["update"] + shift for point in shown[0]]
    values = [[point[name] for point in points] for points in zip(*shown)]
    mean = [statistics.fmean(v) for v in values]
    spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    axis.plot(x, mean, color=COLOURS[arm], marker=marker, markersize=4, linewidth=1.8)
    low, high = ([m + sign * s for m, s in zip(mean, spread)] for sign in (-1, 1))
    axis.fill_between(x, low, high, color=COLOURS[arm], alpha=0.12, linewidth=0)
    return arm, x[-1], mean[-1]


def _label_ends(axis, ends: list[tuple[str, float, float]]) -> None:
    """Names right of the lines' ends, moved apart where they would overlap."""
    bottom, top = axis.get_ylim()
    step, last = (top - bottom) * 0.05, -math.inf
    right = max(x for _, x, _ in ends)
    for arm, x, y in sorted(ends, key=lambda end: end[2]):
        last = max(y, last + step)
        axis.annotate(
            arm,
            (x, y),
            (x + right * 0.03, last),
            color=COLOURS[arm],
            va="center",
            arrowprops=dict(arrowstyle="-", color=COLOURS[arm], alpha=0.4, linewidth=0.8),
        )
    axis.set_xlim(right=right * 1.4)
    axis.set_ylim(bottom, max(top, last + step))
