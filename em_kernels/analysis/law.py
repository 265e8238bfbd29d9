"""The entropy law R = -a exp(H) + b, over evaluations or over the checkpoints of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from em_kernels.analysis.metrics import read_metrics
from em_kernels.evaluator.statistics import fit_entropy_law
from em_kernels.evaluator.summary import summarise
from em_kernels.lm.data import is_number
from em_kernels.trainer.checkpoint import METRICS_FILE

PERFORMANCE = ("accuracy", "reward_mean", "reward")


def entropy_law(
    points: Sequence[tuple[str, float, float]], left_out: dict[str, int] | None = None
) -> dict:
    """Fit R = -a exp(H) + b to (label, H in nats, R), see `fit_entropy_law`.

    The ceiling b - a is R at H = 0, which is an extrapolation. `fit` is None, and `reason` says
    why, where the points do not determine one.
    """
    rows = [{"label": label, "entropy": h, "performance": r} for label, h, r in points]
    result: dict[str, Any] = {"kind": "law", "points": rows, "fit": None, "reason": None}
    result["left_out"] = left_out or {}
    try:
        found = fit_entropy_law([h for _, h, _ in points], [r for *_, r in points])
    except ValueError as error:
        return {**result, "reason": str(error)}
    return {**result, "fit": found._asdict()}


class Points(NamedTuple):
    """(label, H in nats, R) of each point, and how many were left out for which reason."""

    points: list[tuple[str, float, float]]
    left_out: dict[str, int]


def points_of(folder: str | Path) -> Points:
    """A point for each temperature above 0 of an evaluation, or for each update of a run.

    Of an evaluation, H is the mean entropy of the answers' tokens at T = 1 and R their accuracy; of
    a run, `mean_entropy` and the first of `PERFORMANCE` that its metrics have, both measured on the
    answers that the update drew.

    Raises:
        EvalError: neither an evaluation nor a run.
    """
    folder = Path(folder)
    if (folder / METRICS_FILE).is_file():
        return _of_run(folder)
    drawn = [at for at in summarise(folder)["temperatures"] if at["temperature"] > 0]
    points = [
        (f"{folder.name}, T = {at['temperature']:g}", at["entropy"], at["mean"]["mean"])
        for at in drawn
        if at["entropy"] is not None
    ]
    without = len(drawn) - len(points)
    return Points(points, {"no entropies": without} if without else {})


def _of_run(folder: Path) -> Points:
    lines, broken = read_metrics(folder)
    name = next((n for n in PERFORMANCE if any(n in line for line in lines)), PERFORMANCE[0])
    points: list[tuple[str, float, float]] = []
    left_out = Counter(broken)
    for line in lines:
        entropy, performance = line.get("mean_entropy"), line.get(name)
        if is_number(entropy) and is_number(performance):
            points.append((f"update {line['update']}", float(entropy), float(performance)))
        else:
            left_out[f"no 'mean_entropy' or no {name!r}"] += 1
    return Points(points, dict(left_out))
