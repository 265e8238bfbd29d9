"""Loggers besides metrics.jsonl: TensorBoard, Weights & Biases, Trackio.

metrics.jsonl is what counts. A logger gets the numbers of each of its lines, by their names there,
at the step `update`; None and text are left out. loggers.json in the run's folder says which run of
a logger is this one, and up to which update it has the lines. So a run that goes on, or whose
logger failed for a while, gives each logger the lines that it lacks, and none twice.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol
from uuid import uuid4

from em_kernels.lm.data import read_json_object
from em_kernels.lm.optional import require
from em_kernels.lm.text import one_line, write_text

if TYPE_CHECKING:
    from em_kernels.trainer.run import Run

NOTE = "loggers.json"
PROJECT = "em-kernels"


@dataclass
class Mark:
    """What a logger has: its own name for the run, and the last update that was given to it."""

    id: str | None = None
    last: int = 0


class Logger(Protocol):
    """What shows the metrics of a run; `id` is its own name for it.

    A logger that `rewinds` takes back, when it is opened, what it has of updates after `mark.last`.
    """

    package: ClassVar[str]
    rewinds: ClassVar[bool]
    id: str | None

    def __init__(self, folder: Path | None, settings: dict[str, Any], mark: Mark) -> None: ...

    def log(self, update: int, values: dict[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in the folder `tensorboard` of the run."""

    package: ClassVar[str] = "torch.utils.tensorboard"
    rewinds: ClassVar[bool] = True

    def __init__(self, folder: Path | None, settings: dict[str, Any], mark: Mark) -> None:
        if folder is None:
            raise ValueError("tensorboard writes into the run's folder, and there is none")
        place = folder / "tensorboard"
        purge = mark.last + 1 if place.exists() else None  # TensorBoard hides what is there from it
        self.id: str | None = None
        self._writer = _load("tensorboard").SummaryWriter(str(place), purge_step=purge)

    def log(self, update: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, update)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandB:
    """A run of wandb; one that the caller has under way is used, and left open.

    The metrics are drawn over `update` and have no step of wandb's own: that one only grows, so
    what a caller logs besides would push them out.
    """

    package: ClassVar[str] = "wandb"
    rewinds: ClassVar[bool] = False

    def __init__(self, folder: Path | None, settings: dict[str, Any], mark: Mark) -> None:
        wandb = _load("wandb")
        self._own = wandb.run is None
        self._run = wandb.run or wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME") or (folder and folder.name),
            id=mark.id,
            resume=None if mark.id is None else "allow",
            config=settings,
        )
        self.id: str | None = self._run.id
        self._run.define_metric("*", step_metric="update")

    def log(self, update: int, values: dict[str, float]) -> None:
        self._run.log({**values, "update": update})

    def close(self, failed: bool) -> None:
        if self._own:
            self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of trackio, whose name is that of the run's folder and some letters of its own."""

    package: ClassVar[str] = "trackio"
    rewinds: ClassVar[bool] = False

    def __init__(self, folder: Path | None, settings: dict[str, Any], mark: Mark) -> None:
        self._trackio = _load("trackio")
        named = f"{folder.name}-{uuid4().hex[:8]}" if folder else None
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        options: dict[str, Any] = dict(config=settings, resume="allow" if mark.id else "never")
        self.id: str | None = self._trackio.init(project, mark.id or named, **options).name

    def log(self, update: int, values: dict[str, float]) -> None:
        values.pop("step", None)  # a name that trackio has for the update
        self._trackio.log(values, step=update)

    def close(self, failed: bool) -> None:
        self._trackio.finish()


LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def _load(name: str) -> Any:
    instead = f"leave {name} out of log_to"
    return require(LOGGERS[name].package, f"'em-kernels[{name}]'", instead)


def check_installed(names: Sequence[str]) -> None:
    """Raise an ImportError that says what to install, where a logger is not there."""
    for name in names:
        _load(name)


class Loggers:
    """The loggers of a run, each with what it has."""

    def __init__(self, folder: Path | None = None, marks: dict[str, Mark] | None = None):
        self._note = None if folder is None else folder / NOTE
        self._marks = marks or {}
        self._open: dict[str, Logger] = {}
        self._warned: set[str] = set()

    def open(self, name: str, run: Run) -> None:
        """Raise a ValueError that says why a logger does not start."""
        mark = self._marks.setdefault(name, Mark())
        if LOGGERS[name].rewinds:
            mark.last = min(mark.last, run.done)
        settings = json.loads(json.dumps(run.config.to_written()))
        try:
            logger = LOGGERS[name](run.folder, settings, mark)
        except Exception as error:  # each has its own
            raise ValueError(f"log_to: {name} does not start: {one_line(error)}") from error
        if logger.id != mark.id:  # a run that has nothing yet
            self._marks[name] = Mark(logger.id)
        self._open[name] = logger

    def log(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Give each logger what it lacks of the run's metrics.

        What one raises is a warning, once; it lacks these lines until it takes them again.
        """
        for name, logger in self._open.items():
            mark = self._marks[name]
            for line in [line for line in lines if line["update"] > mark.last]:
                try:
                    self._give(logger, mark, line)
                except Exception as error:  # each has its own
                    self._warn(name, f"could not log update {line['update']}: {one_line(error)}")
                    break

    def _give(self, logger: Logger, mark: Mark, line: Mapping[str, Any]) -> None:
        """Noted before: what a process is killed in the midst of is not given again."""
        before, mark.last = mark.last, line["update"]
        try:
            self._write()
            logger.log(mark.last, numbers(line))
        except Exception:
            mark.last = before
            raise

    def close(self, failed: bool) -> None:
        for name, logger in self._open.items():
            try:
                self._write()
                logger.close(failed)
            except Exception as error:
                self._warn(name, f"could not be closed: {one_line(error)}")

    def _write(self) -> None:
        if self._note is not None:
            marks = {name: asdict(mark) for name, mark in self._marks.items()}
            write_text(self._note, json.dumps(marks) + "\n")

    def _warn(self, name: str, what: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            text = f"{name} {what}; the run goes on, and metrics.jsonl has every line"
            warnings.warn(text, RuntimeWarning, stacklevel=3)


@contextmanager
def open_loggers(run: Run, resume: bool) -> Iterator[Loggers]:
    """Those of a run, with the lines that it has already; closed with the block, however it ends.

    The first rank alone has any.

    Raises:
        ValueError: one does not start.
        RankError: on the other ranks, then.
    """
    loggers, failed = Loggers(), True
    try:
        with run.ranks.raise_together():
            if run.ranks.is_first:
                loggers = Loggers(run.folder, _read_marks(run.folder) if resume else {})
                for name in run.config.log_to:
                    loggers.open(name, run)
                loggers.log(run.metrics.lines)
        yield loggers
        failed = False
    finally:
        loggers.close(failed)


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics, but the update."""
    return {
        name: float(value)
        for name, value in line.items()
        if isinstance(value, Real) and name != "update"
    }


def _read_marks(folder: Path | None) -> dict[str, Mark]:
    """Those of a run that goes on. Without a note that can be read all loggers begin anew."""
    try:
        found = read_json_object(folder / NOTE) if folder else {}
        return {name: Mark(mark["id"], int(mark["last"])) for name, mark in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
