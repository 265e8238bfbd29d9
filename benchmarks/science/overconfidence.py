"""The loss falls on while accuracy falls; and what stopping early by a threshold is worth.

A stop looks at the run's own metrics, as `stop_entropy`, `stop_skew` and `stop_patience` of the
trainer do. Its threshold is the one that is best on dev problems, in other runs.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from benchmarks.science.figures import COLOURS, curve, picture
from benchmarks.science.numbers import Part, change, interval, said, table
from benchmarks.science.store import Store
from em_kernels.trainer.schedule import should_stop

EM, DEV = "em", "em, dev"
ARMS = ("untrained", EM, DEV)
ENTROPIES = tuple(float(f"{0.1 * 10 ** (-i / 8):.2g}") for i in range(22))
SKEWS = tuple(round(6.5 + 0.05 * i, 2) for i in range(41))


class Stop(NamedTuple):
    """A policy: the trainer's settings, or a fixed number of updates."""

    entropy: float | None = None
    skew: float | None = None
    patience: int = 1
    after: int | None = None

    def at(self, lines: dict[str, list[float]]) -> int:
        """The update after which it stops a run with these metrics; the last if nowhere."""
        total = len(lines["mean_entropy"])
        if self.after is not None:
            return min(self.after, total)
        config = SimpleNamespace(
            stop_entropy=self.entropy, stop_skew=self.skew, stop_patience=self.patience
        )
        rows = [dict(zip(lines, values)) for values in zip(*lines.values())]
        return next((u for u in range(1, total) if should_stop(config, rows[:u])), total)


def candidates(updates: list[int]) -> dict[str, list[Stop]]:
    """By the name of a policy, the settings that dev problems choose from."""
    return {
        "mean entropy below {}": [Stop(entropy=h) for h in ENTROPIES],
        "mean entropy below {}, patience 3": [Stop(entropy=h, patience=3) for h in ENTROPIES],
        "skewness above {}": [Stop(skew=s) for s in SKEWS],
        "{} updates, whatever happens": [Stop(after=u) for u in updates],
    }


def stopped(store: Store, arm: str, stop: Stop) -> tuple[dict[int, float], dict[int, float]]:
    """(update, accuracy at T = 1) by seed, at the first measured update from the stop on."""
    at, right = {}, {}
    for seed, run in store.runs(arm).items():
        wanted = stop.at(run["lines"])
        point = next(p for p in run["points"] if p["update"] >= wanted)
        at[seed], right[seed] = point["update"], point["accuracy"]["1"]
    return at, right


def chosen(store: Store) -> dict[str, Stop]:
    """The best of each policy on dev problems; of equally good ones the first."""

    def on_dev(stop: Stop) -> float:
        return interval(stopped(store, DEV, stop)[1]).mean

    return {name: max(stops, key=on_dev) for name, stops in candidates(store.updates(DEV)).items()}


def oracle(store: Store) -> dict[int, float]:
    """Each seed's best measured accuracy: chosen by looking, so too good."""
    runs = store.runs(EM)
    return {seed: max(p["accuracy"]["1"] for p in run["points"]) for seed, run in runs.items()}


def log_loss(store: Store, update: int) -> dict[int, float]:
    """log10 of the loss of that update (mean entropy in nats), by seed."""
    return {seed: math.log10(h) for seed, h in store.line(EM, update, "mean_entropy").items()}


def text(store: Store) -> str:
    ten, fifty = (store.accuracy(EM, update) for update in (10, 50))
    loss = [log_loss(store, update) for update in (50, 10)]
    parts = [
        Part("log10 of the loss, from update 10 to 50", change(*loss), -1),
        Part("accuracy at T = 1 meanwhile", change(fifty, ten), -1),
    ]
    best = oracle(store)
    ends = {"none, at update 10": (10, ten), "none, at update 50": (50, fifty)}
    rows = [
        [name, update, interval(own), *_against(own, store)] for name, (update, own) in ends.items()
    ]
    for name, stop in chosen(store).items():
        at, own = stopped(store, EM, stop)
        mean = f"{interval(at).mean:.1f}"
        rows.append([_named(name, stop), mean, interval(own), *_against(own, store)])
    rows.append(["each seed's best (oracle)", "", interval(best), *_against(best, store)])
    head = [
        "stop",
        "at update",
        "accuracy, T = 1",
        "over update 10",
        "over update 50",
        "over the oracle",
    ]
    return f"{said(parts)}\n\n{table(head, rows)}"


def _against(own: dict[int, float], store: Store) -> list[str]:
    """What is gained over update 10, over update 50 and over the oracle."""
    others = store.accuracy(EM, 10), store.accuracy(EM, 50), oracle(store)
    return ["" if own == other else change(own, other).shown() for other in others]


def _named(name: str, stop: Stop) -> str:
    return name.format(
        next(f"{x:g}" for x in (stop.after, stop.entropy, stop.skew) if x is not None)
    )


def draw(store: Store, path: Path) -> None:
    updates = [0, *store.updates(EM)]
    with picture(path, 2, 11) as (left, right):
        start = store.accuracy("untrained", 0)
        values = [start, *(store.accuracy(EM, u) for u in updates[1:])]
        curve(left, updates, values, COLOURS["em"], "EM")
        left.axhline(interval(start).mean, color=COLOURS["untrained"], linestyle=":")
        for (name, stop), mark in zip(chosen(store).items(), "sD^v"):
            at, accuracy = stopped(store, EM, stop)
            place = interval(at).mean, interval(accuracy).mean
            left.plot(*place, mark, color=COLOURS["mark"], label=_named(name, stop))
        left.set(xlabel="updates taken", ylabel="held-out accuracy, sampled at T = 1", ylim=(0, 1))
        left.legend(frameon=False, loc="lower right", fontsize=8.5)
        lines = range(1, len(next(iter(store.runs(EM).values()))["lines"]["mean_entropy"]) + 1)
        curve(
            right, [u - 1 for u in lines], [log_loss(store, u) for u in lines], COLOURS["em"], "EM"
        )
        right.set(xlabel="updates taken", ylabel="log10 of the loss (mean entropy, nats per token)")
        right.set_title("the loss falls on")
        left.set_title("accuracy, and where the stops end it")
