"""The rows of the study as they are kept: one a cell and contender, with its errors."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from benchmarks.accuracy.inputs import Cell

LARGEST, WEIGHT = " largest", " weight"
QUANTITIES = (
    *("H", "logprob", "second"),
    *("dH", "dlogprob", "dsecond"),
    *("dH" + LARGEST, "dlogprob" + LARGEST, "dH" + WEIGHT, "dlogprob" + WEIGHT),
)
STATISTICS = ("median", "worst")  # over the rows of a cell
COLUMNS = (
    *("source", "vocab", "dtype", "T", "H", "implementation"),
    *(f"{name} {kind}" for name in QUANTITIES for kind in STATISTICS if WEIGHT not in name),
    *(name for name in QUANTITIES if WEIGHT in name),
    "failure",
)


class Row(NamedTuple):
    """Errors of one contender in one cell."""

    source: str
    vocab: int
    dtype: str
    temperature: float
    entropy: float  # asked for; infinite at log V
    name: str
    errors: dict[str, tuple[float, float]]  # quantity -> (median, worst); both of a weight's one
    failure: str

    @property
    def cell(self) -> tuple:
        return self[:5]


def key_of(cell: Cell) -> tuple:
    """What `Row.cell` is for its rows."""
    dtype = str(cell.dtype).removeprefix("torch.")
    return (cell.source, cell.vocab, dtype, cell.temperature, cell.entropy)


def line_of(cell: Cell, name: str, errors: dict[str, Tensor] | str) -> dict[str, object]:
    line: dict[str, object] = dict(zip(COLUMNS, (*key_of(cell), name)))
    line["H"] = f"{cell.entropy:g}"
    if isinstance(errors, str):
        return {**line, "failure": errors}
    for quantity in [x for x in QUANTITIES if x in errors]:
        error = errors[quantity]
        if WEIGHT in quantity:
            line[quantity] = short(error[0])
            continue
        line[f"{quantity} median"] = short(error.nan_to_num(math.inf, math.inf).median())
        line[f"{quantity} worst"] = short(error.nan_to_num(math.inf, math.inf).max())
    return line


def short(error: Tensor) -> str:
    """Two digits; NaN, which is as wrong as can be, is infinite."""
    value = error.item()
    return f"{math.inf if math.isnan(value) else value:.1e}".replace("e-0", "e-")


def load(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return [row_of(line) for line in csv.DictReader(file)]


def row_of(line: dict[str, str]) -> Row:
    errors = {}
    for name in QUANTITIES:
        texts = [line[name]] * 2 if WEIGHT in name else [line[f"{name} {x}"] for x in STATISTICS]
        if texts[0]:
            errors[name] = (float(texts[0]), float(texts[1]))
    return Row(
        line["source"],
        int(line["vocab"]),
        line["dtype"],
        float(line["T"]),
        float(line["H"]),
        line["implementation"],
        errors,
        line["failure"],
    )
