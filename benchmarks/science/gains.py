"""EM on one unlabelled prompt gains within ten updates, and neither control does."""

from __future__ import annotations

from pathlib import Path

from benchmarks.science.figures import COLOURS, MODES, bars, picture
from benchmarks.science.numbers import Interval, Part, change, interval, said, table
from benchmarks.science.store import Store

UPDATE = 10
EM, CONTROLS = "em", ("outside prompt", "random reward")
ARMS = ("untrained", EM, *CONTROLS)


def gain(store: Store, arm: str, temperature: float, suffix: str = "") -> Interval:
    """Of an arm over the untrained model, after ten updates."""
    after = store.accuracy(arm + suffix, UPDATE, temperature)
    return change(after, store.accuracy("untrained" + suffix, 0, temperature))


def text(store: Store, suffix: str = "") -> str:
    parts = [Part(mode, gain(store, EM, t, suffix), 1) for t, mode in MODES.items()]
    best = {
        mode: max(gain(store, c, t, suffix).mean for c in CONTROLS) for t, mode in MODES.items()
    }
    controls = ", ".join(f"{value:+.3f} ({mode})" for mode, value in best.items())
    head = ["after 10 updates", *MODES.values()]
    start = [interval(store.accuracy("untrained" + suffix, 0, t)) for t in MODES]
    rows = [["untrained", *start]]
    for arm in (EM, *CONTROLS):
        rows.append([arm, *(interval(store.accuracy(arm + suffix, UPDATE, t)) for t in MODES)])
    return f"{said(parts)} The better of the two controls: {controls}.\n\n{table(head, rows)}"


def updates_table(store: Store) -> str:
    """EM by the number of updates; a cell is empty where nothing was measured."""
    updates = store.updates(EM)
    rows = []
    for temperature, mode in MODES.items():
        found = [store.accuracy("untrained", 0, temperature)]
        found += [store.accuracy(EM, update, temperature) for update in updates]
        rows.append([mode, *(f"{interval(own).mean:.3f}" if own else "" for own in found)])
    entropy = [interval(store.line(EM, update, "mean_entropy")).mean for update in updates]
    rows.append(["mean entropy on the prompt, nats", "", *(f"{h:.4f}" for h in entropy)])
    return table(["EM, update", "0", *map(str, updates)], rows)


def draw(store: Store, path: Path, suffix: str = "") -> None:
    with picture(path, 3, 11, sharey=True, sharex=True) as axes:
        for axis, (temperature, mode) in zip(axes, MODES.items()):
            rows = [
                (arm, gain(store, arm, temperature, suffix), COLOURS[arm])
                for arm in (EM, *CONTROLS)
            ]
            bars(axis, rows)
            axis.axvline(0, color=COLOURS["untrained"], linewidth=1)
            axis.set(title=mode, xlabel="change of accuracy in 10 updates")
