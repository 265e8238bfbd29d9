"""What TensorBoard, wandb and trackio keep of what they are given, without the packages.

Each behaves as its package does in what the trainer relies on; the tests with the packages
themselves (test_real_loggers.py) say whether it does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
RESERVED = ("project", "run", "timestamp", "step", "time", "metrics")  # trackio's, in a line


class Store:
    """The runs of wandb and trackio, by name; for each the (step, values) in order."""

    def __init__(self):
        self.runs: dict[str, list[tuple[int | None, dict]]] = {}
        self.inits: list[dict] = []
        self.ends: list[Any] = []
        self.fails: set[int] = set()  # calls of log that raise, counted from 1
        self.calls = 0

    def log(self, run: str, values: dict, step: int | None) -> None:
        self.calls += 1
        if self.calls in self.fails:
            raise ConnectionError("the network is gone")
        self.runs[run].append((step, values))


class SummaryWriter:
    """Appends scalars to a file, after a line that takes back those from `purge_step` on."""

    store: Store

    def __init__(self, log_dir: str, purge_step: int | None = None):
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        self.path = Path(log_dir) / "events.jsonl"
        if purge_step is not None:
            self._write(["purge", purge_step])

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.store.calls += 1
        if self.store.calls in self.store.fails:
            raise OSError("the disk is full")
        self._write([name, value, step])

    def _write(self, row: list) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def flush(self) -> None: ...

    def close(self) -> None:
        self.store.ends.append(None)


class WandbRun:
    def __init__(self, store: Store, id: str):
        self.store, self.id = store, id

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "update")

    def log(self, values: dict) -> None:
        self.store.log(self.id, values, values["update"])

    def finish(self, exit_code: int) -> None:
        self.store.ends.append(exit_code)


def put_in(monkeypatch, name: str) -> Store:
    """The stand-in of a logger in the place of its package."""
    module, store = ModuleType(PACKAGES[name]), Store()
    made: Any = module
    if name == "tensorboard":
        made.SummaryWriter = type("SummaryWriter", (SummaryWriter,), {"store": store})
    elif name == "wandb":

        def init(**options):
            store.inits.append(options)
            id = options["id"] or f"run{len(store.runs)}"
            assert options["id"] is None or options["resume"] == "allow"
            store.runs.setdefault(id, [])
            return WandbRun(store, id)

        made.run, made.init = None, init
    else:

        def begin(project, name=None, *, config, resume):
            store.inits.append(dict(project=project, name=name, config=config, resume=resume))
            assert (resume == "allow") == (name in store.runs)
            store.runs.setdefault(name or "brave-sunset-0", [])
            made.current = made_run = type("Run", (), {"name": name or "brave-sunset-0"})
            return made_run

        made.init = begin

        def log(values, step):
            kept = {key if key not in RESERVED else f"__{key}": values[key] for key in values}
            store.log(made.current.name, kept, step)

        made.log = log
        made.finish = lambda: store.ends.append(None)
    monkeypatch.setitem(sys.modules, PACKAGES[name], module)
    return store


def shown(name: str, store: Store, folder: Path) -> list[tuple[int, str, float]]:
    """(update, metric, value) of everything that the logger shows of its one run, in order."""
    if name != "tensorboard":
        (rows,) = store.runs.values()
        return [
            (step, key, value)
            for step, values in rows
            for key, value in values.items()
            if key != "update"
        ]
    found: list[tuple[int, str, float]] = []
    for line in (folder / "tensorboard" / "events.jsonl").open():
        key, *rest = json.loads(line)
        if key == "purge":
            found = [row for row in found if row[0] < rest[0]]
        else:
            found.append((rest[1], key, rest[0]))
    return found
