"""Checkpoints that are complete or not there, and the metrics file.

A run's folder:
    train_config.json     the settings it was started with
    adapter.json          of a PEFT model: the settings of its adapter
    metrics.jsonl         one line per update
    checkpoint-<update>/  a model folder for transformers, or an adapter (see adapters.py), and
                          trainer_state.pt to go on from; of several ranks, also shards/ (see
                          sharded_checkpoint.py)
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch

from em_kernels.lm.adapters import MERGED, has_adapter, write_model
from em_kernels.lm.data import read_jsonl
from em_kernels.lm.models import SHARDS, list_checkpoints, newest_checkpoint
from em_kernels.lm.text import one_line
from em_kernels.trainer.config import TrainConfig
from em_kernels.trainer.rl_config import RLConfig

CONFIG_FILE = "train_config.json"
ADAPTER_NOTE = "adapter.json"
METRICS_FILE = "metrics.jsonl"
STATE_FILE = "trainer_state.pt"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read."""


def save_checkpoint(
    folder: Path,
    update: int,
    model,
    tokenizer,
    state: dict,
    keep: int,
    shards: Path | None = None,
    merged: bool = False,
) -> Path:
    """Write checkpoint-<update>: to a temporary folder, then renamed, so that it is all there.

    `model` is what `save_pretrained` writes: the model, or its config alone. `shards`, a folder
    that is written already, becomes part of the checkpoint. `merged` adds the whole model that an
    adapter makes.

    Raises:
        CheckpointError: it could not be written; what was there before still is.
    """
    final = folder / f"checkpoint-{update}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_model(model, temporary, merged)
        for place in [temporary, temporary / MERGED] if merged else [temporary]:
            tokenizer.save_pretrained(place)
        torch.save({"update": update, **state}, temporary / STATE_FILE)
        if shards:
            shards.rename(temporary / SHARDS)
        _flush(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(folder)
    except Exception as error:
        last = newest_checkpoint(folder)
        kept = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        raise CheckpointError(f"cannot write {final}: {one_line(error, None)}; {kept}") from error
    finally:
        for leftover in filter(None, (temporary, shards)):
            shutil.rmtree(leftover, ignore_errors=True)
    _remove_oldest(folder, keep)
    return final


def load_state(checkpoint: Path, device: torch.device) -> dict:
    """update, optimizer and random of a checkpoint."""
    try:
        return torch.load(checkpoint / STATE_FILE, map_location=device, weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"cannot resume from {checkpoint}: {one_line(error, None)}"
        ) from error


def check_free(folder: Path) -> None:
    """A new run must not mix with another."""
    if (folder / CONFIG_FILE).exists() or newest_checkpoint(folder):
        raise ValueError(f"output {folder} holds a run already: resume it or choose another folder")


def write_config(folder: Path, config: TrainConfig, adapter: dict | None = None) -> None:
    """Make the run's folder, with its settings, and those of the adapter it trains, in it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG_FILE, json.dumps(config.to_dict(), indent=2) + "\n")
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
        raise FileNotFoundError(f"no run to resume in {folder}: it has no {CONFIG_FILE}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return (RLConfig if "objective" in values else TrainConfig).from_dict(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


class Metrics:
    """metrics.jsonl: one line per update, each update once; in memory only without a folder."""

    def __init__(self, folder: Path | None):
        self.path = folder / METRICS_FILE if folder else None
        self.lines: list[dict] = []

    def rewind(self, update: int) -> None:
        """Keep the lines of updates up to `update`: a killed run may have written more."""
        if self.path.is_file():
            text = self.path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            write_text(self.path, whole)
            self.lines = [m for _, m in read_jsonl(self.path) if m["update"] <= update]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

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


def write_text(path: Path, text: str) -> None:
    """Replace a file in one go."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


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
