"""A training run through its checkpoints: accuracy, entropy, loss, and over-confidence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from em_kernels.analysis.law import entropy_law
from em_kernels.analysis.metrics import read_metrics
from em_kernels.evaluator.summary import compare_folders, summarise
from em_kernels.lm.data import is_number
from em_kernels.lm.models import list_checkpoints, updates_of
from em_kernels.trainer.checkpoint import read_config

EVALUATIONS = "evaluations"
MEASURED = ("entropy", "response_length", "without_end", "without_final_answer", "calibration")


def models_of_run(run: str | Path) -> list[tuple[int, str]]:
    """(updates, model) of a run: the model it began with, then its checkpoints.

    Raises:
        FileNotFoundError: no run.
        ValueError: a run without a checkpoint.
    """
    config = read_config(run)
    checkpoints = list_checkpoints(Path(run))
    if not checkpoints:
        raise ValueError(f"{run} has no checkpoint to evaluate")
    first = [] if config.model is None else [(0, config.model)]
    return first + [(updates_of(path), str(path)) for path in checkpoints]


def evaluation_folder(run: str | Path, update: int) -> Path:
    return Path(run) / EVALUATIONS / f"update-{update}"


def evaluate_run(run: str | Path, evaluate: Callable[[str, Path], dict]) -> dict:
    """Have `evaluate(model, folder)` make an evaluation of each model of the run, then `follow`."""
    models = models_of_run(run)
    for update, model in models:
        evaluate(model, evaluation_folder(run, update))
    return follow(run, [update for update, _ in models])


def follow(run: str | Path, updates: list[int]) -> dict:
    """Accuracy and entropy after each of `updates`, beside loss and entropy in training.

    Accuracy is that at the first temperature above 0 of the evaluations (greedy beside it).
    Metrics of update u are measured on the model after u - 1 updates, so they stand at u - 1.

    Over-confidence is where training goes on lowering the entropy while accuracy declines:
    `peak` is the update with the best accuracy, `after_peak` the last - the peak, pair by pair with
    its p-value (too small by nature, as the peak was chosen by looking), and `over_confident`
    whether accuracy fell after the peak with p < 0.05 while the mean entropy in training, that of
    the evaluations where there are no metrics, fell too. `law` fits R = -a exp(H) + b over the
    points.
    """
    points = [_point(run, update) for update in updates]
    metrics, broken = read_metrics(run)
    best = max(points, key=lambda point: point["accuracy"]["mean"])
    last = points[-1]
    after = None if best is last else _difference(run, best, last)
    training = [{**line, "at": line["update"] - 1} for line in metrics]
    worse = after is not None and after["difference"] < 0 and after["p_value"] < 0.05
    labelled = [(f"update {p['update']}", p["entropy"], p["accuracy"]["mean"]) for p in points]
    known = [point for point in labelled if point[1] is not None]
    return {
        "kind": "run",
        "run": str(run),
        "points": points,
        "training": training,
        "broken_lines": broken,
        "peak": best["update"],
        "after_peak": after,
        "over_confident": worse and _entropy_fell(points, training, best["update"]),
        "law": entropy_law(known),
    }


def _entropy_fell(points: list[dict], training: list[dict], peak: int) -> bool:
    """From the peak to the end."""
    measured = [line.get("mean_entropy") for line in training if line["at"] >= peak]
    known = [h for h in measured if is_number(h)]
    if len(known) < 2:
        known = [p["entropy"] for p in points if p["update"] >= peak and p["entropy"] is not None]
    return len(known) > 1 and known[-1] < known[0]


def _point(run: str | Path, update: int) -> dict:
    summary = summarise(evaluation_folder(run, update))
    by_temperature = {at["temperature"]: at for at in summary["temperatures"]}
    drawn = [at for t, at in by_temperature.items() if t > 0]
    chosen = (drawn or list(by_temperature.values()))[0]
    greedy = by_temperature.get(0.0)
    return {
        "update": update,
        "temperature": chosen["temperature"],
        "accuracy": chosen["mean"],
        "greedy": greedy and greedy["mean"],
        **{name: chosen[name] for name in MEASURED},
        "too_long": len(summary["too_long"]),
        "skipped_rows": len(summary["skipped_rows"]),
        "missing_answers": summary["missing_answers"],
    }


def _difference(run: str | Path, best: dict, last: dict) -> dict:
    folders = [evaluation_folder(run, point["update"]) for point in (best, last)]
    rows = compare_folders(*folders)
    return next(row for row in rows if row["temperature"] == best["temperature"])
