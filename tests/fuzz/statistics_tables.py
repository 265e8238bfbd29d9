"""Every argument of the evaluator's estimators and of what it is asked in memory."""

from __future__ import annotations

from typing import Any

from em_kernels import evaluator
from em_kernels.evaluator import statistics
from em_kernels.lm.judge.judges import JUDGES
from fuzz.kinds import FLAG, INF, NAN, NO_INTS, Kind, Place, choices, numbers, wholes
from fuzz.tables import of

NO_LISTS = (None, 3, "text", object(), [None, 1.0, 2.0], ["1", "2"], [[1.0], [2.0]], {1: 2})
FEW = 12


def some(place: Place, low: float = -3.0, high: float = 3.0, least: int = 1) -> list[float]:
    count = max(least, min(place.vocab, FEW))
    return [place.number(low, high) for _ in range(count)]


def rights(place: Place) -> list[bool]:
    return [place.yes() for _ in range(max(1, min(place.vocab, FEW)))]


def values(low: float, high: float, *bad: Any) -> Kind:
    return Kind(lambda place: some(place, low, high), lambda _: [*NO_LISTS, [], *bad])


RIGHT = Kind(rights, lambda place: [None, 3, object(), [True] * (len(rights(place)) + 1), [2, 3]])
RESAMPLES = wholes(1, 60, 0, -1)
SEED = Kind(lambda place: 0, lambda _: [*NO_INTS[:-1], -1])
COUNT = Kind(lambda place: place.whole(1, 20), lambda _: [*NO_INTS[:-1], 0, -1])


def fit_counts(place: Place, given: dict[str, Any]) -> None:
    given["samples"] = max(given["samples"], given["k"], given["correct"])


def fit_votes(place: Place, given: dict[str, Any]) -> None:
    given["k"] = min(given["k"], len(given["clusters"]))
    given["correct"] = given["correct"][: len(given["clusters"])]


def fit_law(place: Place, given: dict[str, Any]) -> None:
    count = len(given["performance"])
    given["entropy"] = [0.1 * i for i in range(max(2, count))]
    given["performance"] = (given["performance"] * 2)[: max(2, count)]


FUNCTIONS = [
    of(statistics.pass_at_k, ("correct", "samples", "k"),
       {"correct": wholes(0, 9, -1, 10**9), "samples": COUNT, "k": wholes(1, 9, 0, -1, 10**9)},
       fit=fit_counts),
    of(statistics.majority_at_k, ("clusters", "correct", "k"),
       {"clusters": Kind(lambda place: [place.pick((None, 0, 1, 2)) for _ in rights(place)],
                         lambda _: [None, 3, object()]),
        "correct": RIGHT, "k": wholes(1, 9, 0, -1, 10**9)}, fit=fit_votes),
    of(statistics.bootstrap, ("values",),
       {"values": values(-3, 3), "confidence": numbers(0.5, 0.99, 0, 1, -0.1),
        "resamples": RESAMPLES, "seed": SEED}),
    of(statistics.compare, ("a", "b"),
       {"a": values(0, 1, [1.0] * 99), "b": values(0, 1, [1.0] * 99), "resamples": RESAMPLES,
        "seed": SEED}, alike={"a": ("a", "b"), "b": ("a", "b")}),
    of(statistics.calibration, ("confidence", "correct"),
       {"confidence": values(0, 1, [1.5], [NAN], [-0.5]), "correct": RIGHT,
        "bins": wholes(1, 12, 0, -1)}, alike={"confidence": ("confidence", "correct")}),
    of(statistics.auroc, ("score", "correct"),
       {"score": values(-2, 2, [0.5] * 99), "correct": RIGHT},
       alike={"score": ("score", "correct")}),
    of(statistics.fit_entropy_law, ("entropy", "performance"),
       {"entropy": values(0, 3, [0.5, 0.5], [NAN, 1.0], [INF, 1.0]),
        "performance": values(0, 1, [NAN, 1.0])}, fit=fit_law,
       alike={"entropy": ("entropy", "entropies"), "performance": ("performance", "performances")}),
    of(evaluator.make_judge, ("name",), {"name": choices(JUDGES)}, alike={"name": ("judge",)}),
    of(evaluator.final_answer, ("text",), {"text": Kind(
        lambda place: place.pick(("", "\\boxed{3}", "#### 4", "no answer", None)),
        lambda _: [3, [1], object(), b"3"])}),
]  # fmt: skip


def least(low: int) -> Kind:
    return Kind(lambda place: low, lambda _: ["1", True, 1.5, NAN, [1], low - 1])


# What takes a model fails before it is used; it is called in tests/evaluator.
REFUSALS = [
    of(evaluator.evaluate, ("model", "tokenizer", "problems"),
       {"model": Kind(lambda place: None, lambda _: []),
        "tokenizer": Kind(lambda place: None, lambda _: []),
        "problems": Kind(lambda place: [("1 + 1", "2")],
                         lambda _: [[], [("1",)], [(1, 2)], [3], None, 3]),
        "samples": least(0), "temperature": numbers(0.1, 2, 0, -1.0),
        "top_p": numbers(0.1, 1, 0, 1.5), "greedy": FLAG, "max_new_tokens": least(1),
        "batch_size": least(1),
        "judge": Kind(lambda place: "exact", lambda _: ["nobody", 3, None, object()]),
        "seed": least(0), "progress": FLAG,
        "system": Kind(lambda place: place.pick(["Be brief.", None]), lambda _: [3, "", b"x"]),
        "chat_template_kwargs": Kind(lambda place: place.pick([{"enable_thinking": False}, None]),
                                     lambda _: [3, "x", [1], {"a": object()}])}),
]  # fmt: skip
OF_FILES = (
    *("compare_folders", "find_source", "load_problems", "rank_prompts", "read_problems"),
    *("run_eval", "summarise", "write_report"),
)
"""Of `evaluator.__all__`: what files hold is drawn in the tests of evaluator, lm and analysis, and
the settings of EvalConfig in test_command_line.py."""
RESULTS = (
    *(
        "Answer",
        "EvalConfig",
        "EvalError",
        "EvalResult",
        "InUseError",
        "Judge",
        "PRESETS",
        "Problem",
    ),
    *("ProblemRecord", "Record", "Records", "Source"),
)
