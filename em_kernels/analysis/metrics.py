"""The metrics of a training run."""

from __future__ import annotations

from pathlib import Path

from em_kernels.lm.data import json_rows
from em_kernels.trainer.checkpoint import METRICS_FILE, wrong_line


def read_metrics(run: str | Path) -> tuple[list[dict], list[str]]:
    """The lines of metrics.jsonl, each update's first, and why others are left out."""
    path = Path(run) / METRICS_FILE
    if not path.is_file():
        return [], [f"no {METRICS_FILE}"]
    lines: dict[int, dict] = {}
    broken = []
    for number, row in json_rows(path):
        if isinstance(row, str):
            wrong: str | None = row
        else:
            wrong = wrong_line(row)
            if wrong is None and row["update"] in lines:
                wrong = f"update {row['update']} for a second time"
            if wrong is None:
                lines[row["update"]] = row
        if wrong is not None:
            broken.append(f"line {number}: {wrong}")
    return list(lines.values()), broken
