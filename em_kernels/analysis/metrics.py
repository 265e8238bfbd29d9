"""The metrics of a training run."""

from __future__ import annotations

from pathlib import Path

from em_kernels.lm.data import json_rows
from em_kernels.trainer.checkpoint import METRICS_FILE


def read_metrics(run: str | Path) -> tuple[list[dict], list[str]]:
    """The lines of metrics.jsonl, and why others cannot be read."""
    path = Path(run) / METRICS_FILE
    if not path.is_file():
        return [], [f"no {METRICS_FILE}"]
    lines, broken = [], []
    for number, row in json_rows(path):
        if isinstance(row, dict) and isinstance(row.get("update"), int):
            lines.append(row)
        else:
            reason = row if isinstance(row, str) else "no 'update'"
            broken.append(f"line {number}: {reason}")
    return lines, broken
