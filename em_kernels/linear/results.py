"""The results of rows, put together from chunks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from em_kernels.linear.plan import Rows


def empty_rows(
    rows: Rows, shapes: Iterable[Sequence[int]], dtype: torch.dtype, like: Tensor
) -> list[Tensor]:
    """Zeros where a row is left out: what a masked row reports."""
    make = torch.empty if rows.index is None else torch.zeros
    return [make(shape, dtype=dtype, device=like.device) for shape in shapes]


def put(results: Sequence[Tensor], rows: Tensor | slice, values: Sequence[Tensor]) -> None:
    """The values of some of the rows."""
    for result, value in zip(results, values, strict=True):
        result[rows] = value.to(result)  # float32 of float64 operands, where that is asked for
