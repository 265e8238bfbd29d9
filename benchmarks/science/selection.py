"""The prompt whose answers vary most is the best one to train on."""

from __future__ import annotations

from pathlib import Path

from benchmarks.science.arms import SELECTIONS
from benchmarks.science.figures import COLOURS, bars, picture
from benchmarks.science.numbers import Part, apart, interval, said, table
from benchmarks.science.store import Store

UPDATE = 10
ARMS = ("untrained", *(f"by {way}" for way in SELECTIONS))


def text(store: Store) -> str:
    variance = store.accuracy("by variance", UPDATE)
    parts = [
        Part(f"variance over {way}", apart(variance, store.accuracy(f"by {way}", UPDATE)), 1)
        for way in SELECTIONS[1:]
    ]
    start = interval(store.accuracy("untrained", 0))
    rows = [["untrained", start, "", ""]]
    for way in SELECTIONS:
        found = store.accuracy(f"by {way}", UPDATE)
        ends = f"{min(found.values()):.3f} to {max(found.values()):.3f}"
        better = sum(value > start.mean for value in found.values())
        rows.append([way, interval(found), ends, f"{better} of {len(found)}"])
    head = ["prompts selected by", "accuracy, T = 1", "worst to best prompt", "that gain"]
    return f"{said(parts)}\n\n{table(head, rows)}"


def draw(store: Store, path: Path) -> None:
    start = interval(store.accuracy("untrained", 0))
    colours = ("em", "GRPO", "mark", "random reward")
    with picture(path) as axis:
        found = [store.accuracy(f"by {way}", UPDATE) for way in SELECTIONS]
        rows = [
            (way, interval(own), COLOURS[colour])
            for way, own, colour in zip(SELECTIONS, found, colours)
        ]
        bars(axis, rows)
        for place, (own, colour) in enumerate(zip(reversed(found), reversed(colours))):
            dots = list(own.values())
            axis.plot(dots, [place - 0.22] * len(dots), ".", color=COLOURS[colour], alpha=0.6)
        axis.axvline(start.mean, color=COLOURS["untrained"], linestyle=":")
        axis.set(xlabel="held-out accuracy at T = 1 after 10 updates (dots: prompts)")
        axis.set_title("How the one prompt is selected (dotted: untrained)")
