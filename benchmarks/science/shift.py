"""EM shifts the logits to the right, reinforcement learning to the left: their skewness.

Both definitions are of `em_kernels.analysis.shift`, on the same texts: what the untrained model
answered to held-out problems.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.rl_study import arms as rl_study
from benchmarks.science.figures import COLOURS, curve, picture
from benchmarks.science.numbers import Part, change, interval, said, table
from benchmarks.science.store import Store

RL = "GRPO then EM"
ARMS = ("untrained", "em", "random reward", RL)
DEFINITIONS = {"skew": "mean over tokens", "pooled": "all logits pooled"}
SHOWN = {"EM": ("em", 10), "EM, on": ("em", 50), "GRPO": (RL, rl_study.UPDATES)}
SIGNS = {"EM": 1, "GRPO": -1}


def text(store: Store) -> str:
    parts = [
        Part(f"{name}, {said_as}", change(*_ends(store, arm, update, kind)), SIGNS[name])
        for kind, said_as in DEFINITIONS.items()
        for name, (arm, update) in SHOWN.items()
        if name in SIGNS
    ]
    start = [interval(store.number("untrained", 0, kind)) for kind in DEFINITIONS]
    rows = [["untrained", 0, *start]]
    shown = {**SHOWN, "random reward": ("random reward", 10)}
    for name, (arm, update) in shown.items():
        found = [change(*_ends(store, arm, update, kind)).shown() for kind in DEFINITIONS]
        rows.append([name, update, *found])
    head = ["skewness, and its change", "updates", *DEFINITIONS.values()]
    return f"{said(parts)}\n\n{table(head, rows)}"


def _ends(store: Store, arm: str, update: int, kind: str) -> tuple[dict, dict]:
    return store.number(arm, update, kind), store.number("untrained", 0, kind)


def draw(store: Store, path: Path) -> None:
    with picture(path, 2, 11) as axes:
        for axis, (kind, said_as) in zip(axes, DEFINITIONS.items()):
            for name, arm, last in (("em", "em", 50), ("GRPO", RL, rl_study.UPDATES)):
                start = store.number("untrained", 0, kind)
                updates = [u for u in store.updates(arm) if u <= last]
                own = [store.number(arm, u, kind) for u in updates]
                start = {seed: start[seed] for seed in own[0]}
                curve(axis, [0, *updates], [start, *own], COLOURS[name], name.upper())
            axis.set(xlabel="updates taken", ylabel="skewness of the logits", title=said_as)
            axis.legend(frameon=False)
