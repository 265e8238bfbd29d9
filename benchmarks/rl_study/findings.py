"""What the runs of the study say of the law, and of predicted and measured changes of entropy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from em_kernels.analysis.law import Point, forecast, split_run
from em_kernels.evaluator.statistics import fit_entropy_law

FIRST = 0.2
PREDICTIONS = {
    "logits": "predicted_entropy_change",
    "weights": "predicted_entropy_change_weights",
}


def law(points: Sequence[tuple[float, float]]) -> dict:
    """`fit_entropy_law` of (H, R), and the standard deviation of the residuals."""
    import numpy as np

    entropy, reward = (np.array(values) for values in zip(*points))
    found = fit_entropy_law(entropy.tolist(), reward.tolist())
    residual = reward - (found.b - found.a * np.exp(entropy))
    return {**found._asdict(), "residual": float(residual.std())}


def law_points(runs: list[dict]) -> list[tuple[float, float]]:
    """(H, R) of the same model: held-out accuracy after u updates, mean entropy of update u + 1."""
    pairs = []
    for run in runs:
        entropy = {line["update"] - 1: line["mean_entropy"] for line in run["lines"]}
        pairs += [
            (entropy[p["update"]], p["sampled"]) for p in run["points"] if p["update"] in entropy
        ]
    return pairs


def law_forecast(runs: Sequence[dict]) -> dict:
    """The law of the first fifth of the updates against the last ones, all seeds together.

    R is the accuracy of an update's own answers on the practice problems, H their mean entropy.
    """
    first: list[Point] = []
    last: list[Point] = []
    for run in runs:
        lines = [line for line in run["lines"] if "reward_mean" in line]
        points = [(str(x["update"]), x["mean_entropy"], x["accuracy"]) for x in lines]
        begun, ended = split_run(points, FIRST)
        first, last = [*first, *begun], [*last, *ended]
    return forecast(first, last)


def prediction(runs: Sequence[dict]) -> dict:
    """How the predicted changes of entropy go with the measured one, over the updates of an arm.

    Of each prediction: the correlation, how often the sign is right, and the slope of the measured
    change over it through the origin. Of the prediction in the logits, whose steps are not
    AdamW's, the slope says how much further the weights carry a step; of that in the weights it is
    1 where changes are of first order. `covariance` is minus the covariance of log-probability and
    advantage.
    """
    lines = [line for run in runs for line in run["lines"] if "entropy_change" in line]
    measured = [line["entropy_change"] for line in lines]
    found: dict = {"updates": len(lines)}
    for name, metric in PREDICTIONS.items():
        found[name] = _compared([line[metric] for line in lines], measured)
    found["covariance"] = _compared([-line["cov_mean"] for line in lines], measured)
    return found


def _compared(predicted: list[float], measured: list[float]) -> dict[str, float | None]:
    """None where a number is the same throughout."""
    same = sum((p > 0) == (m > 0) for p, m in zip(predicted, measured))
    moved, square = len(set(predicted)) > 1 < len(set(measured)), sum(p * p for p in predicted)
    product = sum(p * m for p, m in zip(predicted, measured))
    return {
        "correlation": statistics.correlation(predicted, measured) if moved else None,
        "same_sign": same / len(measured),
        "slope": product / square if square else None,
    }


def last_entropy(run: dict) -> float:
    """Mean entropy of the last four updates with an RL objective."""
    entropies = [line["mean_entropy"] for line in run["lines"] if "reward_mean" in line]
    return statistics.fmean(entropies[-4:])
