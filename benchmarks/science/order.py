"""EM before reinforcement learning helps, after it it hurts."""

from __future__ import annotations

from pathlib import Path

from benchmarks.rl_study import arms as rl_study
from benchmarks.science.figures import COLOURS, MODES, curve, picture
from benchmarks.science.numbers import Part, change, interval, said, table
from benchmarks.science.store import Store

FIRST, AFTER = "EM then GRPO", "GRPO then EM"
ARMS = ("untrained", FIRST, AFTER)
RL, ALL = rl_study.UPDATES, rl_study.UPDATES + rl_study.EM_UPDATES
SHOWN = {
    "untrained": ("untrained", 0),
    "EM alone": (FIRST, rl_study.EM_UPDATES),
    "GRPO alone": (AFTER, RL),
    FIRST: (FIRST, ALL),
    AFTER: (AFTER, ALL),
}


def text(store: Store) -> str:
    parts = []
    for temperature, mode in MODES.items():
        alone = store.accuracy(AFTER, RL, temperature)
        for name, sign in ((FIRST, 1), (AFTER, -1)):
            found = change(store.accuracy(name, ALL, temperature), alone)
            parts.append(Part(f"{name} over GRPO alone, {mode}", found, sign))
    rows = [
        [name, update, *(interval(store.accuracy(arm, update, t)) for t in MODES)]
        for name, (arm, update) in SHOWN.items()
    ]
    return f"{said(parts)}\n\n{table(['arm', 'updates', *MODES.values()], rows)}"


def draw(store: Store, path: Path) -> None:
    start = store.accuracy("untrained", 0)
    with picture(path) as axis:
        for arm, colour in ((FIRST, "em"), (AFTER, "GRPO")):
            updates = store.updates(arm)
            values = [store.accuracy(arm, u) for u in updates]
            begun = {seed: start[seed] for seed in values[0]}
            curve(axis, [0, *updates], [begun, *values], COLOURS[colour], arm)
        for update, colour in ((rl_study.EM_UPDATES, "em"), (RL, "GRPO")):
            axis.axvline(update, color=COLOURS[colour], linestyle=":", linewidth=1)
        axis.set(xlabel="updates taken (dotted: from the one to the other)", ylim=(0, 1))
        axis.set(ylabel="held-out accuracy, sampled at T = 1", title="EM before and after RL")
        axis.legend(frameon=False, loc="lower right")
