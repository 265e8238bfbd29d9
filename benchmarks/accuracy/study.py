"""The cells of the study, measured."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.accuracy.inputs import (
    ENTROPIES,
    FLOAT32_LOGITS,
    HIDDEN,
    LOGITS,
    TEMPERATURES,
    Cell,
)
from benchmarks.accuracy.measure import measured
from benchmarks.accuracy.rows import COLUMNS, Row, key_of, line_of, load

VOCAB, LARGE_VOCAB = 4096, 151936
LARGE_TEMPERATURE = 0.7
SOURCES = (
    *((LOGITS, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *((HIDDEN, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *((FLOAT32_LOGITS, dtype) for dtype in (torch.bfloat16, torch.float16)),
)


def cells(quick: bool = False) -> Iterator[Cell]:
    """All of them, or two of every source with a small vocabulary."""
    entropies, temperatures = (ENTROPIES, TEMPERATURES) if not quick else ((1e-8, 1.0), (0.7,))
    for source, dtype in SOURCES:
        for temperature in temperatures:
            for entropy in entropies:
                yield Cell(source, dtype, 300 if quick else VOCAB, temperature, entropy)
    if not quick:
        for dtype in (torch.float32, torch.bfloat16):
            for entropy in entropies:
                yield Cell(LOGITS, dtype, LARGE_VOCAB, LARGE_TEMPERATURE, entropy)


def run(
    path: Path,
    quick: bool,
    device: str = "cpu",
    resume: bool = False,
    said: Callable[[str], object] = print,
) -> list[Row]:
    """Measure every cell; `path` has each row when it is measured. `resume` keeps what it has."""
    there, group = (kept(path) if resume else {}), None
    with path.open("a" if there else "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not there:
            writer.writeheader()
        for cell in cells(quick):
            if group != (group := cell[:4]):
                dtype = str(cell.dtype).removeprefix("torch.")
                said(f"{cell.source}, {dtype}, V = {cell.vocab}, T = {cell.temperature}")
            for name, errors in measured(cell, device, there.get(key_of(cell), set())):
                writer.writerow(line_of(cell, name, errors))
                file.flush()
    return load(path)


def kept(path: Path) -> dict[tuple, set[str]]:
    """cell -> what has been measured there; the half of a line that a kill left is taken away."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    found: dict[tuple, set[str]] = {}
    for row in load(path):
        found.setdefault(row.cell, set()).add(row.name)
    return found
