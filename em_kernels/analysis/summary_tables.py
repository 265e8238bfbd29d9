"""What an evaluation, a comparison and a selection come to, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from em_kernels.analysis.tables import (
    MEASURES,
    NONE,
    Cell,
    Table,
    figures,
    interval,
    number,
    of,
    p_value,
    percent,
    short,
    table,
    temperature,
    temperature_of,
)
from em_kernels.evaluator.select import SIGNALS

SHOWN_ROWS = 10


def eval_tables(summary: dict) -> list[Table]:
    """Accuracy at each temperature, calibration, and all that was left out or odd."""
    found = [counts_table(summary)]
    if summary["labelled"]:
        if any(t["calibration"] for t in summary["temperatures"]):
            found.insert(0, calibration_table(summary))
        found.insert(0, accuracy_table(summary))
    return found


def accuracy_table(summary: dict) -> Table:
    at = summary["temperatures"]
    widest = max((max(t["pass"]) for t in at), default=1)
    most = max((t["samples"] for t in at), default=1)
    title = (
        f"{summary['model']}: {summary['problems']} problems of {summary['source']}, "
        f"judged by {summary['judge']}; mean [95 % interval]"
    )
    columns = {
        "": temperature_of,
        "samples": of("samples"),
        "accuracy": of("mean", interval),
        f"pass@{widest}": lambda t: interval(t["pass"].get(widest)) if widest > 1 else NONE,
        f"majority@{most}": lambda t: interval(t["majority"]) if t["samples"] == most > 1 else NONE,
        "tokens": of("response_length", number, digits=1),
        "entropy (nats)": of("entropy", number, digits=4),
    }
    return table(title, columns, at)


def calibration_table(summary: dict) -> Table:
    measures = {"ECE": "ece", "Brier": "brier", "AUROC": "auroc"}
    rows = [{**t, **t["calibration"]} for t in summary["temperatures"] if t["calibration"]]
    columns = {"": temperature_of, **{head: of(n, number) for head, n in measures.items()}}
    return table(
        "Calibration of the confidence exp(mean log-probability) of an answer", columns, rows
    )


def counts_table(summary: dict) -> Table:
    skipped = summary["skipped_rows"]
    rows = [
        ("rows of the source that are no problems", str(len(skipped))),
        *((f"  row {r['row']}: {r['reason']}", "") for r in skipped[:SHOWN_ROWS]),
        ("prompts too long for the model (count as wrong)", str(len(summary["too_long"]))),
        *(
            (f"records left out: {why}", str(count))
            for why, count in summary["left_out_records"].items()
        ),
        ("answers still missing", str(summary["missing_answers"])),
    ]
    for t in summary["temperatures"]:
        for what, name in (("an end", "without_end"), ("a final answer", "without_final_answer")):
            rows.append((f"answers without {what}, {temperature_of(t)}", percent(t[name])))
    return Table("Left out, or odd", ["", "count or share"], rows)


def comparison_table(a: str, b: str, rows: Sequence[dict]) -> Table:
    title = f"A = {a}, B = {b}; difference [95 % interval], p of a paired sign-flip test"
    columns = {
        "": temperature_of,
        "problems": of("problems"),
        "A": of("a", number),
        "B": of("b", number),
        "B - A": lambda row: interval(row, "difference", sign="+"),
        "p": of("p_value", p_value),
        "B better": of("better"),
        "B worse": of("worse"),
    }
    return table(title, columns, rows)


def selection_table(rows: Sequence[dict], by: str) -> Table:
    """The first prompts, and their signals."""
    signals = {name.replace("_", " "): of(name, number) for name in ("accuracy", *SIGNALS)}
    columns = {"prompt": lambda row: short(row["problem"]), **signals}
    title = f"First by {by.replace('_', ' ')} (entropies in nats)"
    return table(title, columns, rows[:SHOWN_ROWS])


def settings_table(config: dict) -> Table:
    rows = [[name, short(_in_words(value), 500)] for name, value in config.items()]
    return Table("", ["setting", "value"], rows)


def _in_words(value) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def shift_table(result: dict) -> Table:
    names = ("mean", "variance", "skewness")
    heads = [*names, *(f"pooled {name}" for name in names), "compat"]
    models = result["models"]
    found = [
        [*(m[n] for n in names), *(m["pooled"][n] for n in names), m["compat"]] for m in models
    ]
    columns, title = ["model"], models[0]["model"]
    if len(models) == 2:
        found.append([b - a for a, b in zip(*found)])
        columns = ["before", "after", "change"]
        title = f"before: {title}; after: {models[1]['model']}"
    rows = [[head, *(number(v, 4) for v in values)] for head, values in zip(heads, zip(*found))]
    return Table(title, ["logits", *columns], rows)


def drift_table(result: dict) -> Table:
    rows = [{"name": name, **found} for name, found in result["measures"].items()]
    quantiles = {"median": "0.5", "90 %": "0.9", "99 %": "0.99", "largest": "1"}
    columns = {
        "nats per token": lambda row: MEASURES[row["name"]],
        "mean": of("mean", figures),
        **{head: _quantile(q) for head, q in quantiles.items()},
        "at forks": of("forks", figures),
        "elsewhere": of("elsewhere", figures),
        "share of forks": of("at_forks", percent),
    }
    before, after = result["models"]
    return table(f"before: {before}; after: {after}", columns, rows)


def _quantile(q: str) -> Cell:
    return lambda row: figures(row["quantiles"][q])


def drift_bins_table(result: dict) -> Table:
    columns = {
        "H before (nats)": lambda row: f"{figures(row['low'])} to {figures(row['high'])}",
        "tokens": of("tokens"),
        **{head: of(name, figures) for name, head in MEASURES.items()},
    }
    return table("Mean divergence by the entropy before", columns, result["bins"])


def moved_table(result: dict) -> Table:
    columns = {
        "what stood before": lambda row: short(row["context"], 40),
        "token": lambda row: repr(row["token"]),
        "H before": of("entropy_before", figures),
        "H after": of("entropy_after", figures),
        **{MEASURES[name]: of(name, figures) for name in ("kl_to_base", "kl_from_base")},
        "text": lambda row: f"{row['key']}, token {row['position'] + 1}",
    }
    rows = result["moved"][:SHOWN_ROWS]
    return table("Tokens at which the distribution moved most", columns, rows)


def types_table(result: dict) -> Table:
    columns = {
        "token": lambda row: repr(row["token"]),
        "times": of("count"),
        "a fork": of("forks"),
        "share": lambda row: percent(row["forks"] / row["count"]),
        "mean entropy (nats)": of("mean_entropy", number, digits=4),
    }
    return table("Tokens that are forks most often", columns, result["types"])


def temperature_table(result: dict) -> Table:
    columns = {
        "": lambda row: f"T = {row['temperature']:g}",
        "mean over tokens (nats)": of("entropy", number, digits=4),
        "mean over texts [95 % interval]": of("over_texts", interval, digits=4),
    }
    return table("Entropy against temperature", columns, result["temperatures"])


def law_table(result: dict) -> Table:
    columns = {
        "": of("label"),
        "H (nats)": of("entropy", number, digits=4),
        "R": of("performance", number),
    }
    title, fit = "Entropy and performance", result["fit"]
    if fit:
        title = (
            f"R = -a exp(H) + b: a = {fit['a']:.4g}, b = {fit['b']:.4g}, ceiling b - a = "
            f"{fit['ceiling']:.4g}, R2 = {number(fit['r2'])}, {fit['points']} points"
        )
    return table(title, columns, result["points"])


def forecast_table(rows: Sequence[dict]) -> Table:
    columns = {
        "": of("run"),
        "updates fitted": lambda row: str(row["fitted"]),
        "ceiling b - a [95 % interval]": of("ceiling", interval),
        "H at the end (nats)": of("entropy", number, digits=4),
        "R predicted there": of("predicted", interval),
        "R reached": of("reached", number),
        "inside": lambda row: "yes" if row["inside"] else "no",
    }
    share, last = rows[0]["share"], rows[0]["last"]
    title = f"The end (last {last} updates), predicted from the first {share:.0%} of the updates"
    return table(title, columns, rows)


def run_table(result: dict) -> Table:
    columns = {
        "update": of("update"),
        f"accuracy, {temperature(result['points'][0]['temperature'])}": of("accuracy", interval),
        "greedy": of("greedy", interval),
        "entropy (nats)": of("entropy", number, digits=4),
        "tokens": of("response_length", number, digits=1),
        "no end": of("without_end", percent),
        "no final answer": of("without_final_answer", percent),
        "ECE": lambda p: number(p["calibration"]["ece"]) if p["calibration"] else NONE,
        "left out": lambda p: str(p["too_long"] + p["skipped_rows"] + p["missing_answers"]),
    }
    return table("Accuracy [95 % interval] by update", columns, result["points"])


def metrics_table(lines: Sequence[dict], names: Sequence[str]) -> Table:
    ends = (lines[0], lines[-1])
    rows = [
        [name.replace("_", " "), *(f"{e[name]:.5g}" if name in e else NONE for e in ends)]
        for name in names
    ]
    return Table("First and last update", ["", *(f"update {e['update']}" for e in ends)], rows)
