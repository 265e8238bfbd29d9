"""How far a long job is, on stderr: a bar on a terminal or in a notebook, lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """A context; `advance` in it tells what is done.

    Args:
        name, unit: of the job, and of what is counted.
        total: how many there are; None where that is not known.
        done: how many were done before.
        show: False is silent.
        every: without a bar, the least seconds between two lines; the last one is always written.
    """

    def __init__(
        self,
        name: str,
        unit: str,
        total: int | None = None,
        done: int = 0,
        *,
        show: bool = True,
        every: float = 10.0,
    ):
        self.name, self.unit, self.total, self.done = name, unit, total, done
        self.show, self.every = show, every
        self._bar: Any = None

    def __enter__(self) -> Progress:
        self._began = self._said = time.monotonic()
        if self.show and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            from tqdm.auto import tqdm

            options = dict(desc=self.name, unit=self.unit, initial=self.done)
            self._bar = tqdm(total=self.total, **options)
        return self

    def __exit__(self, *failure: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int = 1, **said: str) -> None:
        """`count` more are done; `said` is shown beside."""
        self.done += count
        if self._bar is not None:
            self._bar.set_postfix(**said, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if self.show and (now - self._said >= self.every or self.done == self.total):
            self._said = now
            of = "" if self.total is None else f"/{self.total}"
            told = "".join(f", {name.replace('_', ' ')} {value}" for name, value in said.items())
            seconds = f"{now - self._began:.0f} s"
            print(f"{self.name}: {self.unit} {self.done}{of}{told}, {seconds}", file=sys.stderr)
