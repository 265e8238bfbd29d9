"""Accuracy against the temperature of sampling: it falls after EM, and rises after RL."""

from __future__ import annotations

from pathlib import Path

from benchmarks.rl_study import arms as rl_study
from benchmarks.science.arms import SWEEP
from benchmarks.science.figures import COLOURS, curve, picture
from benchmarks.science.numbers import Part, change, interval, said, table
from benchmarks.science.store import Store

RL = "GRPO then EM"
ARMS = ("untrained", "em", RL)
SHOWN = {"untrained": ("untrained", 0), "EM": ("em", 10), "GRPO": (RL, rl_study.UPDATES)}
SIGNS = {"EM": -1, "GRPO": 1}
LOW, HIGH = 0.25, 1.0


def text(store: Store) -> str:
    def slope(name: str):
        arm, update = SHOWN[name]
        return change(store.accuracy(arm, update, HIGH), store.accuracy(arm, update, LOW))

    parts = [
        Part(f"{name}, from T = {LOW:g} to {HIGH:g}", slope(name), sign)
        for name, sign in SIGNS.items()
    ]
    rows = [
        [name, *(f"{interval(store.accuracy(arm, update, t)).mean:.3f}" for t in SWEEP)]
        for name, (arm, update) in SHOWN.items()
    ]
    head = ["accuracy at T =", *(f"{t:g}" if t else "greedy" for t in SWEEP)]
    return (
        f"{said(parts)} The untrained model: {slope('untrained').shown()}.\n\n{table(head, rows)}"
    )


def draw(store: Store, path: Path) -> None:
    with picture(path) as axis:
        for (name, (arm, update)), colour in zip(SHOWN.items(), ("untrained", "em", "GRPO")):
            values = [store.accuracy(arm, update, t) for t in SWEEP]
            curve(axis, SWEEP, values, COLOURS[colour], f"{name}, {update} updates")
        axis.set(xlabel="temperature of sampling (0: greedy)", ylabel="held-out accuracy")
        axis.set(ylim=(0, 1), title="Accuracy against the temperature of sampling")
        axis.legend(frameon=False, loc="lower left")
