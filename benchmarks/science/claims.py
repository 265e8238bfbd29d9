"""The claims by name, in the order of the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from benchmarks.science import (
    gains,
    greedy,
    order,
    overconfidence,
    sampling_temperature,
    selection,
    shift,
    shots,
    spread,
    training_temperature,
)
from benchmarks.science.store import Store


class Claim(Protocol):
    """A module: the arms it needs; what it says of them, as Markdown; its picture."""

    ARMS: tuple[str, ...]

    def text(self, store: Store) -> str: ...
    def draw(self, store: Store, path: Path) -> None: ...


CLAIMS: dict[str, Claim] = {
    "gains": gains,
    "overconfidence": overconfidence,
    "greedy": greedy,
    "shift": shift,
    "sampling_temperature": sampling_temperature,
    "training_temperature": training_temperature,
    "spread": spread,
    "selection": selection,
    "shots": shots,
    "order": order,
}


def updates_table(results: Path) -> str:
    """For `benchmarks.tables`."""
    return gains.updates_table(Store(results / "science"))


def claim_text(name: str, results: Path) -> str:
    """For `benchmarks.tables`."""
    store = Store(results / "science")
    return f"{CLAIMS[name].text(store)}\n\n{seeds(store, CLAIMS[name].ARMS)}"


def seeds(store: Store, arms: Sequence[str]) -> str:
    """How many seeds every arm but those on dev problems has, the commonest number first."""
    by_number: dict[int, list[str]] = {}
    for arm in (arm for arm in arms if "dev" not in arm):
        by_number.setdefault(len(store.runs(arm)), []).append(arm)
    most, *others = sorted(by_number, key=lambda number: -len(by_number[number]))
    named = "; ".join(f"{number}: {', '.join(by_number[number])}" for number in others)
    return f"Seeds: {most}{f' ({named})' if named else ''}."
