"""Greedy accuracy gains where the likeliest answer is wrong by habit, not for want of skill."""

from __future__ import annotations

from pathlib import Path

from benchmarks.science import gains
from benchmarks.science.figures import COLOURS, MODES, curve, picture
from benchmarks.science.numbers import Part, change, interval, said, table
from benchmarks.science.store import Store
from em_kernels.tiny_math.pretrain import HABITS

SUFFIX = ", habits"
ARMS = tuple(arm + SUFFIX for arm in gains.ARMS)
EM, UNTRAINED = gains.EM + SUFFIX, "untrained" + SUFFIX


def text(store: Store) -> str:
    last = store.last(EM)
    later = [
        Part(f"{mode}, from update 10 to {last}", change(*_ends(store, t, last)), -1)
        for t, mode in MODES.items()
    ]
    rows = [[f"EM, update {u}", *_by_habit(store, EM, u)] for u in store.updates(EM)]
    rows.insert(0, ["untrained", *_by_habit(store, UNTRAINED, 0)])
    habits = table(["greedy accuracy by habit", *HABITS], rows)
    return (
        f"{gains.text(store, SUFFIX)}\n\nOver-confidence, which would be a decline: {said(later)}"
        f"\n\n{habits}"
    )


def _ends(store: Store, temperature: float, last: int) -> list[dict[int, float]]:
    return [store.accuracy(EM, update, temperature) for update in (last, gains.UPDATE)]


def _by_habit(store: Store, arm: str, update: int) -> list[str]:
    found = store.points(arm, update).values()
    means = [interval(p["greedy_by_habit"][habit] for p in found).mean for habit in HABITS]
    return [f"{mean:.3f}" for mean in means]


def draw(store: Store, path: Path) -> None:
    updates = [0, *store.updates(EM)]
    with picture(path, 2, 11) as (left, right):
        for (temperature, mode), arm in zip(MODES.items(), ("em", "GRPO", "mark")):
            start = store.accuracy(UNTRAINED, 0, temperature)
            values = [start, *(store.accuracy(EM, u, temperature) for u in updates[1:])]
            curve(left, updates, values, COLOURS[arm], mode)
        left.set(xlabel="updates taken", ylabel="accuracy", ylim=(0, 1.02))
        left.set_title("EM on the model of habits")
        left.legend(frameon=False, loc="lower right")
        for habit, arm in zip(HABITS, ("em", "GRPO", "mark")):
            values = [_of_habit(store, UNTRAINED, 0, habit)]
            values += [_of_habit(store, EM, u, habit) for u in updates[1:]]
            curve(right, updates, values, COLOURS[arm], f"{habit} problems")
        right.set(xlabel="updates taken", ylabel="greedy accuracy", ylim=(0, 1.02))
        right.set_title("greedy, by the habit of the problem")
        right.legend(frameon=False, loc="lower right")


def _of_habit(store: Store, arm: str, update: int, habit: str) -> dict[int, float]:
    points = store.points(arm, update)
    return {seed: point["greedy_by_habit"][habit] for seed, point in points.items()}
