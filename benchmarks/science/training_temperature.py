"""EM is best at a temperature of training near 0.5; loss and sampling share it."""

from __future__ import annotations

from pathlib import Path

from benchmarks.science.arms import RATES, TRAINING_TEMPERATURES, rate_arm, temperature_arm
from benchmarks.science.choices import Choices
from benchmarks.science.figures import COLOURS, MODES, curve, picture
from benchmarks.science.numbers import Part, change, interval, said, table
from benchmarks.science.store import Store

BEST, UPDATE = 0.5, 10
ARMS = (
    "untrained",
    *(rate_arm(t, rate) for t in TRAINING_TEMPERATURES for rate in RATES),
    *(temperature_arm(t) for t in TRAINING_TEMPERATURES),
)


def text(store: Store) -> str:
    parts = [
        Part(f"T = {BEST:g} over T = {other:g}, {MODES[mode]}", _better(store, other, mode), 1)
        for mode in (1.0, 0.5)
        for other in TRAINING_TEMPERATURES
        if other != BEST
    ]
    choices = Choices(store)
    rows = [["untrained", "", *(interval(store.accuracy("untrained", 0, m)) for m in MODES)]]
    for t in TRAINING_TEMPERATURES:
        found = [interval(store.accuracy(temperature_arm(t), UPDATE, mode)) for mode in MODES]
        rows.append([f"{t:g}", f"{choices.rate(t):g}", *found])
    head = ["training temperature", "rate", *MODES.values()]
    return f"{said(parts)}\n\n{table(head, rows)}"


def _better(store: Store, other: float, mode: float):
    own, its = (store.accuracy(temperature_arm(t), UPDATE, mode) for t in (BEST, other))
    return change(own, its)


def draw(store: Store, path: Path) -> None:
    with picture(path) as axis:
        for (mode, label), colour in zip(MODES.items(), ("em", "GRPO", "mark")):
            arms = [temperature_arm(t) for t in TRAINING_TEMPERATURES]
            values = [store.accuracy(arm, UPDATE, mode) for arm in arms]
            curve(axis, TRAINING_TEMPERATURES, values, COLOURS[colour], label)
            start = interval(store.accuracy("untrained", 0, mode)).mean
            axis.axhline(start, color=COLOURS[colour], linestyle=":", linewidth=1)
        axis.set(xlabel="temperature of training", ylabel="held-out accuracy after 10 updates")
        axis.set(ylim=(0, 1.02), title="The temperature that EM is trained at (dotted: untrained)")
        axis.legend(frameon=False, loc="lower right")
