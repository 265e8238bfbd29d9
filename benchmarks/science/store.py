"""The data files: one an arm, with every seed's run in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.rl_study.runs import rounded


class Store:
    """The data files in a folder, one an arm: {"size": ..., "runs": {seed: what `run` gives}}."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, name: str) -> Path:
        words = "".join(c if c.isalnum() or c == "." else " " for c in name)
        return self.folder / f"{'-'.join(words.split())}.json"

    def read(self, name: str) -> dict:
        path = self.path(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def write(self, name: str, found: dict) -> None:
        """Whole or not at all."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(rounded(found)) + "\n", encoding="utf-8")
        os.replace(part, path)

    def cached(self, name: str, make: Callable[[], dict]) -> dict:
        found = self.read(name)
        if not found:
            self.write(name, make())
        return self.read(name)

    def runs(self, arm: str) -> dict[int, dict]:
        """By seed."""
        found = self.read(arm).get("runs", {})
        return {seed: found[str(seed)] for seed in sorted(map(int, found))}

    def points(self, arm: str, update: int) -> dict[int, dict]:
        """By seed, what was measured after that update."""
        return {
            seed: point
            for seed, run in self.runs(arm).items()
            for point in run["points"]
            if point["update"] == update
        }

    def updates(self, arm: str) -> list[int]:
        """Those after which the first seed was measured."""
        return [
            point["update"] for run in [*self.runs(arm).values()][:1] for point in run["points"]
        ]

    def last(self, arm: str) -> int:
        return self.updates(arm)[-1]

    def accuracy(self, arm: str, update: int, temperature: float = 1.0) -> dict[int, float]:
        key, points = f"{temperature:g}", self.points(arm, update)
        return {s: p["accuracy"][key] for s, p in points.items() if key in p["accuracy"]}

    def number(self, arm: str, update: int, name: str) -> dict[int, float]:
        return {seed: point[name] for seed, point in self.points(arm, update).items()}

    def line(self, arm: str, update: int, name: str) -> dict[int, float]:
        """A metric of that update, made before its step."""
        return {seed: run["lines"][name][update - 1] for seed, run in self.runs(arm).items()}
