"""One prompt or several, at the same number of answers, updates and prompts' quality."""

from __future__ import annotations

from pathlib import Path

from benchmarks.science.figures import COLOURS, bars, picture
from benchmarks.science.numbers import Part, change, interval, said, table
from benchmarks.science.store import Store

UPDATE = 10
ONE, SEVERAL = "by variance", ("4 prompts", "10 prompts")
ARMS = ("untrained", ONE, *SEVERAL)


def text(store: Store) -> str:
    one = store.accuracy(ONE, UPDATE)
    parts = [
        Part(f"one prompt less {arm}", change(one, store.accuracy(arm, UPDATE)), 1)
        for arm in SEVERAL
    ]
    rows = [["untrained", interval(store.accuracy("untrained", 0)), ""]]
    for name, arm in (("1 prompt", ONE), *((arm, arm) for arm in SEVERAL)):
        found = store.accuracy(arm, UPDATE)
        worst = f"{min(found.values()):.3f} to {max(found.values()):.3f}"
        rows.append([name, interval(found), worst])
    head = ["64 answers an update to", "accuracy, T = 1", "over seeds"]
    return f"{said(parts)}\n\n{table(head, rows)}"


def draw(store: Store, path: Path) -> None:
    shown = (("1 prompt", ONE, "em"), *((arm, arm, "GRPO") for arm in SEVERAL))
    start = store.accuracy("untrained", 0)
    with picture(path) as axis:
        rows = [
            (name, interval(store.accuracy(arm, UPDATE)), COLOURS[colour])
            for name, arm, colour in shown
        ]
        rows.append(("untrained", interval(start), COLOURS["untrained"]))
        bars(axis, rows)
        for place, (_, arm, colour) in enumerate(reversed(shown), start=1):
            own = store.accuracy(arm, UPDATE).values()
            axis.plot(list(own), [place - 0.22] * len(own), ".", color=COLOURS[colour], alpha=0.5)
        axis.set(xlabel="held-out accuracy at T = 1 after 10 updates (dots: seeds)")
        axis.set_title("One prompt and several, 64 answers an update")
