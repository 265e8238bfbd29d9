"""The entropy law R = -a exp(H) + b, over evaluations or over the checkpoints of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from em_kernels.evaluator.statistics import fit_entropy_law
from em_kernels.evaluator.summary import summarise


def entropy_law(points: Sequence[tuple[str, float, float]]) -> dict:
    """Fit R = -a exp(H) + b to (label, H in nats, R), see `fit_entropy_law`.

    The ceiling b - a is R at H = 0, which is an extrapolation. `fit` is None, and `reason` says
    why, where the points do not determine one.
    """
    rows = [{"label": label, "entropy": h, "performance": r} for label, h, r in points]
    result = {"kind": "law", "points": rows, "fit": None, "reason": None}
    try:
        found = fit_entropy_law([h for _, h, _ in points], [r for *_, r in points])
    except ValueError as error:
        return {**result, "reason": str(error)}
    return {**result, "fit": found._asdict()}


def points_of(folders: Sequence[str | Path]) -> list[tuple[str, float, float]]:
    """(label, mean entropy of the answers, accuracy) of every evaluation and temperature above 0.

    Raises:
        EvalError: a folder without an evaluation.
        ValueError: an evaluation without entropies.
    """
    points = []
    for folder in folders:
        for at in summarise(folder)["temperatures"]:
            if at["temperature"] == 0:
                continue
            if at["entropy"] is None:
                raise ValueError(f"{folder} has no entropies: its model's head is not known")
            label = f"{Path(folder).name}, T = {at['temperature']:g}"
            points.append((label, at["entropy"], at["mean"]["mean"]))
    return points
