"""Checkpoints that are complete or not there, and the metrics file.

A run's folder:
    train_config.json     the settings it was started with
    adapter.json          of a PEFT model: the settings of its adapter
    run.yaml              the same for `em-kernels train --config` (see run_file.py)
    metrics.jsonl         one line per update
    loggers.json          which run of a logger is this one (see loggers.py)
    .lock                 the process that works in it (see lock.py)
    checkpoint-<update>/  a model folder for transformers, or an adapter (see adapters.py), and
                          shards/ to go on from: what each rank wrote, and what belongs to it
                          (see state.py)
"""

from __future__ import annotations

import json
import os
import reprlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from em_kernels.lm.adapters import MERGED, has_adapter, is_adapted, merged_copy, write_model
from em_kernels.lm.data import is_count, json_rows, read_json_object
from em_kernels.lm.models import (
    SHARDS,
    list_checkpoints,
    load_architecture,
    load_model,
    newest_checkpoint,
    weights_in_parts,
)
from em_kernels.lm.ranks import RankError, Ranks
from em_kernels.lm.text import check_folder, one_line, repair_lines, write_text
from em_kernels.trainer.config import TrainConfig
from em_kernels.trainer.rl_config import RLConfig
from em_kernels.trainer.state import CheckpointError, cause, load_weights_from_parts

CONFIG_FILE = "train_config.json"
ADAPTER_NOTE = "adapter.json"
METRICS_FILE = "metrics.jsonl"


@contextmanager
def new_checkpoint(folder: Path, update: int, keep: int, ranks: Ranks) -> Iterator[Path]:
    """A folder that becomes checkpoint-<update> once every rank has written what it has to.

    It is a temporary one until then, so that a checkpoint is all there. `keep` is how many stay.

    Raises:
        CheckpointError: it could not be written; what was there before still is.
    """
    final = folder / f"checkpoint-{update}"
    temporary = folder / f".{final.name}.tmp"
    with ranks.raise_together():
        try:
            ranks.first(lambda: _begin(temporary))
            yield temporary
            ranks.first(lambda: _finish(temporary, final))
        except RankError:
            raise
        except (Exception, CheckpointException) as error:
            last = newest_checkpoint(folder)
            kept = f"the last good checkpoint is {last}" if last else "there is no earlier one"
            reason = one_line(cause(error), None)
            raise CheckpointError(f"cannot write {final}: {reason}; {kept}") from error
        finally:
            if ranks.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
    ranks.first(lambda: _remove_oldest(folder, keep))


def _begin(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()


def _finish(temporary: Path, final: Path) -> None:
    _flush(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(final.parent)


def write_published(model, tokenizer, folder: Path, merged: bool) -> None:
    """What transformers loads: a model (or its config alone) or an adapter, with the tokenizer.

    `merged` adds the whole model that an adapter makes.
    """
    write_model(model, folder, merged)
    for place in [folder, folder / MERGED] if merged else [folder]:
        tokenizer.save_pretrained(place)


def merge_checkpoint(
    checkpoint: str | Path, output: str | Path, trust_remote_code: bool = False
) -> Path:
    """Make a model folder for transformers of a checkpoint's parts; needs no other process.

    Of an adapter, trained by however many ranks, with the model below it, in float32. Parts are
    read where they alone hold the weights.

    Raises:
        FileNotFoundError: `checkpoint` is no folder.
        ValueError: `checkpoint` has no parts and is no adapter, or `output` is there already.
        ModelError: the model below the adapter is not there, or the two cannot be merged.
        CheckpointError: the parts cannot be read.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    check_folder(checkpoint)
    if not (checkpoint / SHARDS).is_dir() and not has_adapter(checkpoint):
        raise ValueError(
            f"checkpoint must be a folder with {SHARDS}/ in it, got {checkpoint}, "
            "which holds no adapter either"
        )
    if output.exists():
        raise ValueError(f"output must be a new folder, {output} is there already")
    if weights_in_parts(checkpoint):
        model, tokenizer = load_architecture(checkpoint, "cpu", trust_remote_code=trust_remote_code)
        load_weights_from_parts(checkpoint, model, Ranks())
    else:
        model, tokenizer = load_model(str(checkpoint), "cpu", trust_remote_code=trust_remote_code)
    write_published(merged_copy(model) if is_adapted(model) else model, tokenizer, output, False)
    return output


def check_free(folder: Path) -> None:
    """A new run must not mix with another."""
    if (folder / CONFIG_FILE).exists() or newest_checkpoint(folder):
        raise ValueError(
            f"output must be a new folder, {folder} holds a run already: resume it, or choose "
            "another folder"
        )


def write_config(folder: Path, config: TrainConfig, adapter: dict | None = None) -> None:
    """Make the run's folder, with its settings, and those of the adapter it trains, in it."""
    write_text(folder / CONFIG_FILE, json.dumps(config.to_written(), indent=2) + "\n")
    if adapter is not None:
        write_text(folder / ADAPTER_NOTE, json.dumps(adapter, indent=2) + "\n")


def trains_adapter(folder: Path) -> bool:
    """Whether a run was started with a PEFT model, checkpoint or not."""
    newest = newest_checkpoint(folder)
    return (folder / ADAPTER_NOTE).is_file() or (newest is not None and has_adapter(newest))


def read_config(folder: str | Path) -> TrainConfig:
    """The settings a run was started with."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        check_folder(folder)
        raise FileNotFoundError(f"{folder} is no training run: it has no {CONFIG_FILE}")
    values = read_json_object(path)
    try:
        return (RLConfig if "objective" in values else TrainConfig).from_written(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    except (LookupError, AttributeError) as error:
        reason = f"{type(error).__name__}: {one_line(error, 60)}"
        raise ValueError(f"{path}: not the settings of a run ({reason})") from None


_REMEDY = (
    "put the file back as the run wrote it, or begin a new run from the weights of a checkpoint "
    "(`model`)"
)
_NUMBERS = ("loss", "mean_entropy", "response_length")


def wrong_line(row: dict) -> str | None:
    """Why a line of metrics is none of a run's, or None."""
    update = row.get("update")
    if not is_count(update) or update == 0:
        return f"'update' is no number from 1 on but {reprlib.repr(update)}"
    for name in _NUMBERS:
        value = row.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"{name!r} is no number but {reprlib.repr(value)}"
    return None


class Metrics:
    """metrics.jsonl: one line per update, each update once; in memory only without a folder."""

    def __init__(self, folder: Path | None):
        self.path = folder / METRICS_FILE if folder else None
        self.lines: list[dict] = []

    def rewind(self, update: int) -> list[dict]:
        """Keep the lines of updates up to `update`: a killed run may have written more.

        Raises:
            CheckpointError: they are not there, one each and in order.
        """
        if self.path is None:
            return self.lines
        if self.path.is_file():
            repair_lines(self.path)
            self.lines = self._read(update)
        if len(self.lines) < update:
            raise CheckpointError(
                f"{self.path} ends before update {update}, of which there is a checkpoint, and a "
                f"run goes on from its metrics too: {_REMEDY}"
            )
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        return self.lines

    def _read(self, update: int) -> list[dict]:
        lines: list[dict] = []
        for number, row in json_rows(self.path or ""):
            if len(lines) == update:
                break
            wrong = row if isinstance(row, str) else wrong_line(row)
            if isinstance(row, dict) and wrong is None:
                lines.append(row)
                if row["update"] == len(lines):
                    continue
                wrong = f"update {row['update']} where {len(lines)} should be"
            raise CheckpointError(f"{self.path}, line {number}: {wrong}; {_REMEDY}")
        return lines

    def add(self, line: dict) -> None:
        self.lines.append(line)
        if self.path:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise CheckpointError(
                    f"cannot write {self.path}: {one_line(error, None)}"
                ) from error


def _remove_oldest(folder: Path, keep: int) -> None:
    for old in list_checkpoints(folder)[:-keep] if keep else []:
        shutil.rmtree(old)


def _flush(folder: Path) -> None:
    """Have the files on the disk before the rename says that they are."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
