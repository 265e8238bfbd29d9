"""What an evaluation, a comparison and a selection come to, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from em_kernels.analysis.tables import (
    NONE,
    Table,
    interval,
    number,
    p_value,
    percent,
    temperature,
)

SHOWN_ROWS = 10


def eval_tables(summary: dict) -> list[Table]:
    """Accuracy at each temperature, calibration, and all that was left out or odd."""
    found = [accuracy_table(summary), counts_table(summary)]
    if any(t["calibration"] for t in summary["temperatures"]) and summary["labelled"]:
        found.insert(1, calibration_table(summary))
    return found if summary["labelled"] else found[1:]


def accuracy_table(summary: dict) -> Table:
    title = (
        f"{summary['model']}: {summary['problems']} problems of {summary['source']}, "
        f"judged by {summary['judge']}; mean [95 % interval]"
    )
    widest = max((max(map(int, t["pass"])) for t in summary["temperatures"]), default=1)
    most = max((t["samples"] for t in summary["temperatures"]), default=1)
    head = ["", "samples", "accuracy", f"pass@{widest}", f"majority@{most}"]
    rows = [
        [
            temperature(t["temperature"]),
            str(t["samples"]),
            interval(t["mean"]),
            _pass(t, widest),
            interval(t["majority"]) if t["samples"] == most > 1 else NONE,
            number(t["response_length"], 1),
            number(t["entropy"], 4),
        ]
        for t in summary["temperatures"]
    ]
    return Table(title, [*head, "tokens", "entropy (nats)"], rows)


def _pass(at: dict, k: int) -> str:
    by_k = {int(n): found for n, found in at["pass"].items()}
    return interval(by_k[k]) if k > 1 and k in by_k else NONE


def calibration_table(summary: dict) -> Table:
    rows = [
        [
            temperature(t["temperature"]),
            number(t["calibration"]["ece"]),
            number(t["calibration"]["brier"]),
            number(t["calibration"]["auroc"]),
        ]
        for t in summary["temperatures"]
        if t["calibration"]
    ]
    title = "Calibration of the confidence exp(mean log-probability) of an answer"
    return Table(title, ["", "ECE", "Brier", "AUROC"], rows)


def counts_table(summary: dict) -> Table:
    rows = [
        ["rows of the source that are no problems", str(len(summary["skipped_rows"]))],
        *[[f"  row {r['row']}: {r['reason']}", ""] for r in summary["skipped_rows"][:SHOWN_ROWS]],
        ["prompts too long for the model (count as wrong)", str(len(summary["too_long"]))],
        ["answers still missing", str(summary["missing_answers"])],
    ]
    for t in summary["temperatures"]:
        name = temperature(t["temperature"])
        rows.append([f"answers without an end, {name}", percent(t["without_end"])])
        rows.append([f"answers without a final answer, {name}", percent(t["without_final_answer"])])
    return Table("Left out, or odd", ["", "count or share"], rows)


def comparison_table(a: str, b: str, rows: Sequence[dict]) -> Table:
    title = f"A = {a}, B = {b}; difference [95 % interval], p of a paired sign-flip test"
    head = ["", "problems", "A", "B", "B - A", "p", "B better", "B worse"]
    cells = [
        [
            temperature(r["temperature"]),
            str(r["problems"]),
            number(r["a"]),
            number(r["b"]),
            f"{r['difference']:+.3f} [{r['low']:+.3f}, {r['high']:+.3f}]",
            p_value(r["p_value"]),
            str(r["better"]),
            str(r["worse"]),
        ]
        for r in rows
    ]
    return Table(title, head, cells)


def selection_table(rows: Sequence[dict], by: str) -> Table:
    """The first prompts, and their signals."""
    names = ("accuracy", "variance", "entropy", "semantic_entropy", "margin")
    cells = [
        [_short(row["problem"]), *(number(row[name]) for name in names)]
        for row in rows[:SHOWN_ROWS]
    ]
    head = ["prompt", *(name.replace("_", " ") for name in names)]
    return Table(f"First by {by.replace('_', ' ')} (entropies in nats)", head, cells)


def _short(text: str, length: int = 50) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def settings_table(config: dict) -> Table:
    rows = [[name, _short(str(value), 500)] for name, value in config.items()]
    return Table("", ["setting", "value"], rows)


def shift_table(result: dict) -> Table:
    names = ("mean", "variance", "skewness")
    heads = [*names, *(f"pooled {name}" for name in names), "compat"]
    columns = [_shift_column(model) for model in result["models"]]
    if len(columns) == 2:
        change = [number(b - a, 4) for a, b in zip(*columns)]
        cells = [
            [h, number(a, 4), number(b, 4), c] for h, (a, b), c in zip(heads, zip(*columns), change)
        ]
        models = result["models"]
        title = f"before: {models[0]['model']}; after: {models[1]['model']}"
        return Table(title, ["logits", "before", "after", "change"], cells)
    cells = [[h, number(a, 4)] for h, a in zip(heads, columns[0])]
    return Table(result["models"][0]["model"], ["logits", "model"], cells)


def _shift_column(model: dict) -> list[float]:
    names = ("mean", "variance", "skewness")
    return [
        *(model[n] for n in names),
        *(model["pooled"][n] for n in names),
        model["compat"],
    ]


def types_table(result: dict) -> Table:
    rows = [
        [
            repr(t["token"]),
            str(t["count"]),
            str(t["forks"]),
            percent(t["forks"] / t["count"]),
            number(t["mean_entropy"], 4),
        ]
        for t in result["types"]
    ]
    head = ["token", "times", "a fork", "share", "mean entropy (nats)"]
    return Table("Tokens that are forks most often", head, rows)


def temperature_table(result: dict) -> Table:
    rows = [
        [f"T = {r['temperature']:g}", number(r["entropy"], 4), _fine(r["over_texts"])]
        for r in result["temperatures"]
    ]
    head = ["", "mean over tokens (nats)", "mean over texts [95 % interval]"]
    return Table("Entropy against temperature", head, rows)


def _fine(found: dict) -> str:
    return f"{found['mean']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"


def law_table(result: dict) -> Table:
    rows = [
        [p["label"], number(p["entropy"], 4), number(p["performance"])] for p in result["points"]
    ]
    title = "Entropy and performance"
    if result["fit"]:
        fit = result["fit"]
        title = (
            f"R = -a exp(H) + b: a = {fit['a']:.4g}, b = {fit['b']:.4g}, ceiling b - a = "
            f"{fit['ceiling']:.4g}, R2 = {number(fit['r2'])}, {fit['points']} points"
        )
    return Table(title, ["", "H (nats)", "R"], rows)


def run_table(result: dict) -> Table:
    rows = [
        [
            str(p["update"]),
            interval(p["accuracy"]),
            interval(p["greedy"]) if p["greedy"] else NONE,
            number(p["entropy"], 4),
            number(p["response_length"], 1),
            percent(p["without_end"]),
            percent(p["without_final_answer"]),
            number(p["calibration"]["ece"]) if p["calibration"] else NONE,
            str(p["too_long"] + p["skipped_rows"] + p["missing_answers"]),
        ]
        for p in result["points"]
    ]
    drawn = temperature(result["points"][0]["temperature"])
    head = ["update", f"accuracy, {drawn}", "greedy", "entropy (nats)", "tokens", "no end"]
    head += ["no final answer", "ECE", "left out"]
    return Table("Accuracy [95 % interval] by update", head, rows)


def metrics_table(lines: Sequence[dict], names: Sequence[str]) -> Table:
    first, last = lines[0], lines[-1]
    rows = [[n.replace("_", " "), _general(first.get(n)), _general(last.get(n))] for n in names]
    head = ["", f"update {first['update']}", f"update {last['update']}"]
    return Table("First and last update", head, rows)


def _general(value: float | None) -> str:
    return NONE if value is None else f"{value:.5g}"
