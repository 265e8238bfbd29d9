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
from benchmarks.accuracy.rows import COLUMNS, Row, line_of, load

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
    path: Path, quick: bool, device: str = "cpu", said: Callable[[str], object] = print
) -> list[Row]:
    """Measure every cell; `path` has each row when it is measured."""
    group = None
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for cell in cells(quick):
            if group != (group := cell[:4]):
                dtype = str(cell.dtype).removeprefix("torch.")
                said(f"{cell.source}, {dtype}, V = {cell.vocab}, T = {cell.temperature}")
            for name, errors in measured(cell, device):
                writer.writerow(line_of(cell, name, errors))
                file.flush()
    return load(path)
