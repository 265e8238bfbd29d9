"""The parts of a report: each takes what was found, as a dict, and tells it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from em_kernels.analysis import plots
from em_kernels.analysis import summary_tables as made
from em_kernels.analysis.metrics import read_metrics
from em_kernels.analysis.page import Figure, Part, Passage, Piece, Section, coloured
from em_kernels.analysis.tables import MEASURES, Table, interval, number, p_value, percent
from em_kernels.analysis.tables import temperature as named
from em_kernels.evaluator.records import Record, read_settings
from em_kernels.evaluator.summary import records_of
from em_kernels.lm.data import is_number
from em_kernels.trainer.checkpoint import read_config

NO_PLOTS = "Without plots: matplotlib is not installed."
EXAMPLES = 3  # of each kind
FIRST = (
    *("loss", "mean_entropy", "accuracy", "reward_mean", "response_length", "truncated"),
    "grad_norm",
)
UNITS = {
    "mean_entropy": "nats per token",
    **dict.fromkeys(("divergence", "teacher_entropy", "ref_kl"), "nats per token"),
    "response_length": "tokens",
    "response_tokens": "tokens",
    "truncated": "share of answers",
    "tokens_per_second": "tokens / s",
    "sample_seconds": "s",
    "loss_seconds": "s",
}
Plot = tuple[Any, ...]
"""What it shows, in words; what draws it, see `plots.png`, and of what."""


def _section(
    title: str, notes: Sequence[str], tables: Sequence[Table], *drawn: Plot, **others
) -> Section:
    """With its plots, or with a note that says why there are none."""
    try:
        figures = [Figure(plots.png(*draw), alt) for alt, *draw in drawn]
    except ImportError:
        figures, notes = [], [*notes, NO_PLOTS]
    return Section(title, notes, tables, figures, **others)


def evaluation(summary: dict) -> Section:
    tables, at = made.eval_tables(summary), summary["temperatures"]
    if not at:
        return Section("Accuracy", ["No answers yet."], tables)
    notes: list[str] = []
    drawn: list[Plot] = []
    if summary["labelled"]:
        drawn.append(("accuracy at every temperature", plots.accuracy, summary))
        if any(t["calibration"] for t in at):
            drawn.append(("accuracy against confidence", plots.reliability, summary))
    if summary["missing_answers"]:
        notes.append(f"Not finished: {summary['missing_answers']} answers are missing.")
    return _section("Accuracy", notes, tables, *drawn)


def examples(folder: str | Path) -> Section:
    """The settings, and the first answers that are right, wrong, and without a final answer.

    At most one of each kind to a problem.
    """
    settings = read_settings(folder)
    kinds: dict[str, list[Record]] = {"right": [], "wrong": [], "without a final answer": []}
    for record in records_of(folder, settings):
        answer = record.answer
        kind = "wrong" if answer.parsed else "without a final answer"
        of_kind = kinds["right" if answer.correct else kind]
        asked = {other.problem for other in of_kind}
        if answer.tokens and len(of_kind) < EXAMPLES and record.problem not in asked:
            of_kind.append(record)
    if not settings["config"]["labelled"]:
        kinds = {"some": [record for records in kinds.values() for record in records][:EXAMPLES]}
    parts = [
        Part(f"Answers: {kind}", [_example(settings, record) for record in records])
        for kind, records in kinds.items()
    ]
    folded = ("Settings", made.settings_table(settings["config"]))
    return Section("Settings and examples", folded=folded, parts=parts)


def _example(settings: dict, record: Record) -> Passage:
    problem = settings["problems"][record.problem]
    right = f"; the answer is {problem['answer']}" if problem["answer"] else ""
    said = f"{problem['problem']}\n→ {record.answer.text}"
    name = f"Problem {record.problem}, {named(record.temperature)}{right}"
    return Passage(name, [Piece(said)])


def comparison(result: dict) -> Section:
    told = (result["a"], result["b"], result["temperatures"])
    plot = ("B - A at every temperature", plots.comparison, *told)
    return _section("B against A, pair by pair", [], [made.comparison_table(*told)], plot)


def selection(result: dict) -> Section:
    rows, by = result["rows"], result["by"]
    plot = ("prompts by rank", plots.selection, rows, result["chosen"], by)
    return _section("Selected prompts", [], [made.selection_table(rows, by)], plot)


def shift(result: dict) -> Section:
    notes = [
        "Moments of the logits over the full vocabulary, per token, then averaged over the tokens "
        "of the same texts. Pooled: of all logits of all tokens at once; its skewness is also "
        "given as compat, the reading closest to a histogram of all logits. The published "
        "script's exact definition could not be verified.",
        f"{_texts(result)} Tokens left out, not finite: "
        + ", ".join(str(model["not_finite"]) for model in result["models"]),
    ]
    plot = ("skewness per token", plots.shift, result)
    return _section("Logits shift", notes, [made.shift_table(result)], plot)


def forks(result: dict) -> Section:
    notes = [
        f"Forks are the tokens with H ≥ {result['tau']:.4g} nats, the top {result['ratio']:.0%} of "
        f"{result['tokens']} tokens by entropy; they carry {percent(result['share_of_entropy'])} "
        f"of all entropy. Mean entropy {result['mean']:.4f} nats. Model: {result['model']}. "
        f"{_texts(result)} Tokens left out, not finite: {result['not_finite']}.",
    ]
    plot = ("entropies and forks", plots.forks, result)
    top = result["quantiles"]["0.99"]
    texts = _coloured(result, "entropy", "entropy", top)
    return _section("Forks", notes, [made.types_table(result)], plot, parts=[texts])


def drift(result: dict) -> Section:
    base, model = result["models"]
    before, after = result["entropy"]
    kl = result["measures"]["kl_to_base"]
    notes = [
        f"How far the distributions of {model} (after) have moved from those of {base} (before), "
        f"over the whole vocabulary, at T = 1, on the same {result['tokens']} tokens. Mean entropy "
        f"{before:.4f} nats before, {after:.4f} after. Forks are the tokens with H ≥ "
        f"{result['tau']:.4g} nats before, the top {result['ratio']:.0%}; they carry "
        f"{percent(kl['at_forks'])} of all KL(after ‖ before).",
        f"{_texts(result)} Tokens left out, not finite: {result['not_finite']}.",
    ]
    tables = [made.drift_table(result), made.drift_bins_table(result), made.moved_table(result)]
    plot = ("divergence per token, and by entropy before", plots.drift, result)
    top = kl["quantiles"]["0.99"]
    texts = _coloured(result, "kl_to_base", MEASURES["kl_to_base"], top)
    return _section("Drift from the model before", notes, tables, plot, parts=[texts])


def _coloured(result: dict, name: str, words: str, top: float) -> Part:
    """The texts of a result, coloured by the numbers that are called `name`."""
    passages = [
        Passage(
            text["key"],
            coloured(text["pieces"], text[name], top),
            f"and {text['not_shown']} tokens more" if text["not_shown"] else "",
        )
        for text in result["texts"]
    ]
    note = (
        f"From white (0) to orange ({top:.3g} nats and above); hold the pointer over a token for "
        f"its {words}."
    )
    return Part(f"Texts, coloured by {words}", passages, note)


def _texts(result: dict) -> str:
    """Where the texts are from, and which were left out."""
    return f"Texts: {result['source']}; left out: {_counted(result['left_out']) or 'none'}."


def _counted(left_out: dict[str, int]) -> str:
    return ", ".join(f"{count} ({why})" for why, count in left_out.items())


def temperature(result: dict) -> Section:
    notes = [
        "The texts are fixed: only the temperature of the distributions changes, so this is not "
        "the entropy along texts drawn at T.",
        f"Model: {result['model']}. {_texts(result)}",
    ]
    plot = ("entropy by temperature", plots.entropy_at_temperatures, result)
    return _section("Entropy against temperature", notes, [made.temperature_table(result)], plot)


def law(result: dict) -> Section:
    notes, tables, drawn = _law(result)
    return _section("Entropy and performance", notes, tables, *drawn)


def _law(result: dict) -> tuple[list[str], list[Table], list[Plot]]:
    """Notes, tables and plots."""
    notes = ["The ceiling b - a is R extrapolated to H = 0."]
    if not result["fit"]:
        notes = [f"No fit: {result['reason']}."]
    if result["left_out"]:
        notes.append(f"Left out: {_counted(result['left_out'])}.")
    if not result["points"]:
        return notes, [], []
    plot = ("performance against entropy", plots.law, result)
    tables = [made.law_table(result)]
    if result.get("forecasts"):
        notes.append(
            "Of the first updates: intervals are of 95 %, of linear regression; the points of a "
            "run follow each other, which makes them too narrow."
        )
        tables.insert(0, made.forecast_table(result["forecasts"]))
    return notes, tables, [plot]


def run_curve(result: dict) -> Section:
    notes, tables, drawn = _law(result["law"])
    if result["broken_lines"]:
        notes.insert(0, "Not read of the metrics: " + "; ".join(result["broken_lines"]) + ".")
    curve = ("accuracy, entropy and loss by update", plots.run_curve, result)
    return _section(
        "Accuracy and entropy by update",
        [verdict(result), *notes],
        [made.run_table(result), *tables],
        curve,
        *drawn,
    )


def verdict(result: dict) -> str:
    """Over-confidence in words."""
    peak, after = result["peak"], result["after_peak"]
    if after is None:
        return f"Accuracy is best at the last update that was evaluated, {peak}: no decline."
    p = p_value(after["p_value"])
    p = f"p {p}" if p.startswith("<") else f"p = {p}"
    text = (
        f"Accuracy peaks at update {peak}; from there to the last update it changes by "
        f"{interval(after, 'difference', sign='+')}, {p} (the peak was chosen by looking, so p is "
        "too small)."
    )
    if result["over_confident"]:
        return text + " Entropy in training went on falling: over-confidence."
    return text + " No over-confidence: that would be p < 0.05 with entropy in training falling."


def metrics(folder: str | Path) -> Section:
    """The settings of a run, and every number of its metrics by update."""
    lines, broken = read_metrics(folder)
    folded = ("Settings", made.settings_table(read_config(folder).to_dict()))
    notes = ["Not read: " + "; ".join(broken) + "."] if broken else []
    lines = [{k: v for k, v in line.items() if is_number(v)} for line in lines]
    names = sorted({k for line in lines for k in line} - {"update", "step"}, key=_importance)
    if not names:
        return Section("Training", [*notes, "No updates yet."], folded=folded)
    plot = ("metrics by update", plots.metrics, lines, names, UNITS)
    last = number(lines[-1].get("mean_entropy"), 4)
    notes.append(f"{len(lines)} updates; mean entropy in the last: {last} nats per token.")
    return _section("Training", notes, [made.metrics_table(lines, names)], plot, folded=folded)


def _importance(name: str) -> tuple[int, str]:
    """What is asked about first comes first, how long it took last."""
    place = FIRST.index(name) if name in FIRST else len(FIRST)
    return place + (name.endswith(("seconds", "second"))), name
