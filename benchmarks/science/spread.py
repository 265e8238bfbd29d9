"""The gain of EM depends on the seed, by up to two times."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.science.figures import COLOURS, MODES, picture
from benchmarks.science.gains import UPDATE
from benchmarks.science.numbers import table
from benchmarks.science.store import Store

ARMS = ("untrained", "em", "untrained, habits", "em, habits")
CLAIMED = 2.0


def gains_of(store: Store, suffix: str, temperature: float = 1.0) -> dict[int, float]:
    before = store.accuracy("untrained" + suffix, 0, temperature)
    after = store.accuracy("em" + suffix, UPDATE, temperature)
    return {seed: after[seed] - before[seed] for seed in after if seed in before}


def text(store: Store) -> str:
    found = gains_of(store, "").values()
    low, high = min(found), max(found)
    wide = low <= 0 or high / low >= CLAIMED
    ratio = f"{high / low:.1f} times" if low > 0 else "no finite number of times"
    verdict = "Wider than claimed" if wide else "Held"
    first = (
        f"**{verdict}**: over {len(found)} seeds the gain at T = 1 after 10 updates is from "
        f"{low:+.3f} to {high:+.3f}, the largest {ratio} the smallest."
    )
    rows = []
    for base, suffix in (("diffuse", ""), ("habits", ", habits")):
        for temperature, mode in MODES.items():
            own = list(gains_of(store, suffix, temperature).values())
            deviation = statistics.stdev(own) if len(own) > 1 else 0.0
            numbers = (statistics.fmean(own), min(own), max(own))
            cells = [f"{number:+.3f}" for number in numbers]
            rows.append([f"{base}, {mode}", len(own), *cells, f"{deviation:.3f}"])
    head = ["gain in 10 updates", "seeds", "mean", "smallest", "largest", "standard deviation"]
    return f"{first}\n\n{table(head, rows)}"


def draw(store: Store, path: Path) -> None:
    labels = []
    with picture(path) as axis:
        for base, suffix, colour in (("diffuse", "", "em"), ("habits", ", habits", "mark")):
            for temperature, mode in MODES.items():
                own = list(gains_of(store, suffix, temperature).values())
                place = -len(labels)
                labels.append(f"{base}, {mode}")
                axis.plot(own, [place] * len(own), "o", color=COLOURS[colour], alpha=0.5)
                axis.plot(statistics.fmean(own), place, "|", color="black", markersize=16)
        axis.set_yticks([-i for i in range(len(labels))], labels)
        axis.axvline(0, color=COLOURS["untrained"], linewidth=1)
        axis.set(xlabel="change of accuracy in 10 updates, a point a seed (bar: mean)")
        axis.set_title("Spread over seeds")
