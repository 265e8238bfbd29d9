"""The entropy law R = -a exp(H) + b, over evaluations or over the checkpoints of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from em_kernels.analysis.metrics import read_metrics
from em_kernels.evaluator.records import SETTINGS, EvalError
from em_kernels.evaluator.statistics import CONFIDENCE, Interval, fit_entropy_law, require_scipy
from em_kernels.evaluator.summary import summarise
from em_kernels.lm.data import is_number
from em_kernels.trainer.checkpoint import METRICS_FILE

PERFORMANCE = ("accuracy", "reward_mean", "reward")
Point = tuple[str, float, float]
"""Label, H in nats, R."""


def entropy_law(points: Sequence[Point], left_out: dict[str, int] | None = None) -> dict:
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


def predict_ceiling(points: Sequence[Point], share: float = 0.2) -> dict:
    """The law of a run's first updates against where the run ends.

    R = -a exp(H) + b is fitted to the first `share` of the points (rounded to whole ones). The
    ceiling b - a, R at H = 0, has the interval of the line; `predicted`, R at the entropy of the
    last points (as many as were fitted, at most the others), has that of a mean of so many new
    points; `reached` is their mean R. 95 %, of Student's t with k - 2 degrees of freedom: with
    s^2 the residual variance of the k points that were fitted, x = exp(H), and m new points,

        variance at x:  s^2 (1 / k + (x - mean x)^2 / sum (x - mean x)^2)  [+ s^2 / m].

    The points of a run follow each other and are no independent draws, and x has an error of its
    own: the interval is the least that can be said.

    Args:
        points: (label, H in nats, R) in the order of the updates.
        share: in (0, 1).

    Raises:
        ValueError: a share outside (0, 1), or one of too few points for a line with an error.

    Source: the law, and that its fit to the early part of a run predicts the end: Cui et al., "The
    Entropy Mechanism of Reinforcement Learning for Reasoning Language Models" (2025),
    arXiv:2505.22617; the interval is that of linear regression.
    """
    first, last = split_run(points, share)
    return {"share": share, **forecast(first, last)}


def split_run(points: Sequence[Point], share: float) -> tuple[Sequence[Point], Sequence[Point]]:
    """The first `share` of the points, and as many of the last, or the others if those are fewer.

    Raises:
        ValueError: as of `predict_ceiling`.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be above 0 and below 1, got {share!r}: 0.2 is a fifth")
    number = round(share * len(points))
    if number < 3 or number == len(points):
        raise ValueError(
            f"share={share:g} of {len(points)} points is {number}: it takes 3 at least for a line "
            "with an error, and one behind them to predict; take another share, or a longer run"
        )
    return points[:number], points[-min(number, len(points) - number) :]


def forecast(first: Sequence[Point], last: Sequence[Point]) -> dict:
    """`predict_ceiling` of points that were split before, of one run or of several alike."""
    import numpy as np

    x, r = (np.array(values, dtype=np.float64) for values in zip(*(p[1:] for p in first)))
    x, end = np.exp(x), np.exp([h for _, h, _ in last])
    fit = fit_entropy_law([h for _, h, _ in first], r.tolist())
    residual = float(((r - fit.b + fit.a * x) ** 2).sum()) / (len(x) - 2)
    factor = float(require_scipy().t.ppf((1 + CONFIDENCE) / 2, len(x) - 2))

    def at(place: float, more: float = 0.0) -> Interval:
        leverage = 1 / len(x) + (place - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum() + more
        mean, width = fit.b - fit.a * place, factor * float(leverage * residual) ** 0.5
        return Interval(mean, mean - width, mean + width)

    predicted, reached = at(float(end.mean()), 1 / len(last)), float(np.mean([p[2] for p in last]))
    return {
        "fit": fit._asdict(),
        "fitted": len(first),
        "points": [[h, r] for _, h, r in first],
        "last": len(last),
        "ceiling": at(1.0)._asdict(),
        "entropy": float(np.mean([h for _, h, _ in last])),
        "predicted": predicted._asdict(),
        "reached": reached,
        "inside": predicted.low <= reached <= predicted.high,
    }


def predict_runs(runs: Mapping[str, Sequence[Point]], share: float) -> list[dict]:
    """`predict_ceiling` of each run, by its name; a ValueError names the run."""
    rows = []
    for name, points in runs.items():
        try:
            rows.append({"run": name, **predict_ceiling(points, share)})
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return rows


class Points(NamedTuple):
    """Each point, and how many were left out for which reason."""

    points: list[Point]
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
    if folder.is_dir() and not (folder / SETTINGS).is_file():
        raise EvalError(
            f"{folder} is neither an evaluation nor a training run: it has no {SETTINGS} and no "
            f"{METRICS_FILE}"
        )
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
    points: list[Point] = []
    left_out = Counter(broken)
    for line in lines:
        entropy, performance = line.get("mean_entropy"), line.get(name)
        if is_number(entropy) and is_number(performance):
            points.append((f"update {line['update']}", float(entropy), float(performance)))
        else:
            left_out[f"no 'mean_entropy' or no {name!r}"] += 1
    return Points(points, dict(left_out))
