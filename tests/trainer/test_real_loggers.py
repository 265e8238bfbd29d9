"""The loggers themselves, where they are installed: what they show of a run that was resumed."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_loggers import expected, small, stopped, untimed
from trainer_runs import run


def resumed(folder: Path, name: str) -> list[tuple[int, str, float]]:
    """What metrics.jsonl has of a run that ended in update 4 and went on from its second."""
    with pytest.raises(KeyboardInterrupt):
        run(small(folder, name, updates=5, save_every=2), on_step=stopped(4))
    run(small(folder, name, updates=5, save_every=2), resume=True)
    return untimed(expected(folder, name))


WANDB_HEADER = 7
BLOCK, FRAME = 2**15, struct.Struct("<IHB")  # of LevelDB's log format, which wandb's files have


def log_records(data: bytes) -> Iterator[bytes]:
    """The records: each in frames of (checksum, length, type); 1 whole, 2 first, 3 on, 4 last."""
    place, record = 0, b""
    while place + FRAME.size <= len(data):
        left = BLOCK - (place + WANDB_HEADER) % BLOCK
        if left < FRAME.size:
            place += left
            continue
        _, length, kind = FRAME.unpack_from(data, place)
        place += FRAME.size
        record = (record if kind in (3, 4) else b"") + data[place : place + length]
        place += length
        if kind in (1, 4):
            yield record


def test_tensorboard_reads_every_update_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = resumed(tmp_path, "tensorboard")
    assert len(list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))) == 2
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in {row[1] for row in rows}:
        found = [(event.step, event.value) for event in events.Scalars(name)]
        wanted = [(update, value) for update, key, value in rows if key == name]
        assert [step for step, _ in found] == [update for update, _ in wanted]
        values = [value for _, value in wanted]  # which TensorBoard has in float32
        assert [value for _, value in found] == pytest.approx(values, rel=1e-6, abs=1e-12)


def test_trackio_keeps_every_update_once(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils

    for module in (sqlite_storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    rows = resumed(tmp_path / "run", "trackio")
    named = json.loads((tmp_path / "run" / "loggers.json").read_text())["trackio"]["id"]
    found = [
        (line["step"], key, value)
        for line in sqlite_storage.SQLiteStorage.get_logs("em-kernels", named)
        for key, value in line.items()
        if key not in ("step", "timestamp")
    ]
    assert untimed(found) == rows


def test_wandb_writes_offline_what_a_resumed_run_has(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows = resumed(tmp_path / "run", "wandb")
    found, record = [], wandb_internal_pb2.Record()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"), key=os.path.getmtime)
    assert len(files) == 2 and len({path.name for path in files}) == 1  # one run, in two parts
    for path in files:
        for data in log_records(path.read_bytes()[WANDB_HEADER:]):
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                line = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in items}
                pairs = ((key, value) for key, value in line.items() if key[0] != "_")
                found += [(line["update"], *pair) for pair in pairs if pair[0] != "update"]
    assert sorted(untimed(found)) == sorted(rows)
