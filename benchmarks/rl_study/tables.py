"""The study as Markdown."""

from __future__ import annotations

import statistics

from benchmarks.rl_study.findings import FIRST, last_entropy


def tables(study: dict) -> str:
    """Every arm after its last update, the law, the law's forecast, predicted against measured."""
    return "\n".join([*_arms(study), *_law(study), *_forecast(study), *_prediction(study)]) + "\n"


def _arms(study: dict) -> list[str]:
    error = 0.5 / study["problems"] ** 0.5
    lines = [
        f"{study['problems']} held-out problems, mean ± standard deviation over seeds; "
        f"{study['updates']} updates of {study['responses']} answers, EM for "
        f"{study['em_updates']}, each stage of ConciseR for {study['updates']}. One standard error "
        f"of a single accuracy is at most {error:.3f}. Entropy: mean over the sampled tokens of "
        "the last four updates on the practice problems, nats.",
        "",
        "| arm | entropy | sampled, T = 1 | greedy | length | seeds |",
        "|---|---|---|---|---|---|",
        _row("untrained", [{**b, "entropy": None} for b in study["base"]]),
    ]
    for arm, runs in study["arms"].items():
        ends = [{**run["points"][-1], "entropy": last_entropy(run)} for run in runs]
        lines.append(_row(arm, ends))
    return lines


def _law(study: dict) -> list[str]:
    lines = ["", "R = -a exp(H) + b, R held-out accuracy, over the points of all seeds:", ""]
    lines += ["| arm | a | b | ceiling b - a | residual (sd) | r² | points |", "|---" * 7 + "|"]
    for arm, law in study["law"].items():
        numbers = [law[name] for name in ("a", "b", "ceiling", "residual", "r2")]
        cells = [*("" if n is None else f"{n:.3f}" for n in numbers), str(law["points"])]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def _forecast(study: dict) -> list[str]:
    lines = [
        "",
        f"The law fitted to the first {FIRST:.0%} of the updates, R the accuracy of their own "
        "answers, against as many last updates; 95 % intervals of linear regression:",
        "",
        "| arm | ceiling b - a | R predicted for the end | R reached | inside |",
        "|---" * 5 + "|",
    ]
    for arm, found in study["forecast"].items():
        spans = [_span(found[name]) for name in ("ceiling", "predicted")]
        inside = "yes" if found["inside"] else "no"
        lines.append(f"| {arm} | {spans[0]} | {spans[1]} | {found['reached']:.3f} | {inside} |")
    return lines


def _span(interval: dict) -> str:
    return f"{interval['mean']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"


def _prediction(study: dict) -> list[str]:
    lines = [
        "",
        "Change of mean entropy on an update's own answers, against three predictions: r is the "
        "correlation, slope that of the measured change over the predicted one:",
        "",
        "| arm | in the logits: r | right sign | in the weights: r | right sign | slope "
        "| covariance: r | updates |",
        "|---" * 8 + "|",
    ]
    for arm, found in study["prediction"].items():
        logits, weights, covariance = (found[n] for n in ("logits", "weights", "covariance"))
        numbers = [logits["correlation"], logits["same_sign"]]
        numbers += [weights["correlation"], weights["same_sign"], weights["slope"]]
        numbers.append(covariance["correlation"])
        cells = " | ".join("" if n is None else f"{n:.2f}" for n in numbers)
        lines.append(f"| {arm} | {cells} | {found['updates']} |")
    return lines


def _row(name: str, points: list[dict]) -> str:
    labels = (("entropy", ".3f"), ("sampled", ".3f"), ("greedy", ".3f"), ("length", ".1f"))
    cells = " | ".join(_cell(points, *label) for label in labels)
    return f"| {name} | {cells} | {len(points)} |"


def _cell(points: list[dict], label: str, digits: str) -> str:
    values = [point[label] for point in points if point[label] is not None]
    if not values:
        return ""
    mean = f"{statistics.fmean(values):{digits}}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{digits}}"
