"""What a sampler kept, as the functions are told it: the limits there are, and checks of values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels.backends import row_index
from em_kernels.backends.interface import RowSpec
from em_kernels.backends.truncation import Limits

SAMPLERS = ("transformers", "vllm")


class Limit(NamedTuple):
    """One of the limits of a kept set."""

    none: float  # what stands for None
    whole: bool  # a number of entries
    holds: Callable[[float], bool]
    rule: str


LIMITS = {
    "top_k": Limit(math.inf, True, lambda v: v >= 1, "from 1 on"),
    "top_p": Limit(1.0, False, lambda v: 0 < v <= 1, "in (0, 1]"),
    "min_p": Limit(0.0, False, lambda v: 0 <= v <= 1, "in [0, 1]"),
}
"""In the order of `RowSpec.truncation`."""


def check_values(spec: RowSpec) -> None:
    """ValueError naming the first value that cannot be, of a flattened spec, rows that are left out
    aside. Where looking would wait for a device such a row is NaN instead."""
    if spec.truncation is not None and row_index.is_free_to_look(spec.truncation):
        _check_limits(spec, spec.truncation)
    if spec.kept_ids is not None and row_index.is_free_to_look(spec.kept_ids):
        _check_sets(spec, spec.kept_ids)


def _check_limits(spec: RowSpec, truncation: Tensor) -> None:
    bad = _counted(spec, ~Limits.of(truncation).good())
    if not bad.any():
        return
    row = int(bad.nonzero()[0, 0])
    for (name, limit), value in zip(LIMITS.items(), truncation[row].tolist(), strict=True):
        if not limit.holds(value):
            raise ValueError(f"{name} must be {limit.rule}, got {value:g} at token {row}")


def _check_sets(spec: RowSpec, ids: Tensor) -> None:
    assert spec.kept_rows is not None
    start, end = spec.kept_rows.unbind(-1)
    if len(start) == 0:
        first, last = 0, len(ids)
    else:
        first, last = int(start[0]), int(end[-1])
    if first != 0 or last != len(ids) or bool((end < start).any()):
        raise ValueError(
            f"kept: offsets must ascend from 0 to {len(ids)}, the number of ids; "
            f"got {first} to {last}" + ("" if last != len(ids) or first else ", not ascending")
        )
    empty = _counted(spec, end == start)
    if empty.any():
        raise ValueError(f"kept: a row that counts must keep an id, got none at token {_at(empty)}")
    row = torch.arange(len(start)).repeat_interleave(end - start)
    outside = _counted(spec, (ids < 0) | (ids >= spec.valid_vocab), row)
    if outside.any():
        place = _at(outside)
        raise ValueError(
            f"kept: ids must be in [0, {spec.valid_vocab}), got {ids[place].item()} "
            f"at token {row[place].item()}"
        )
    order = torch.sort(row * spec.valid_vocab + ids)
    again = _counted(spec, order.values[1:] == order.values[:-1], row[order.indices[1:]])
    if again.any():
        place = int(order.indices[1:][again][0])
        raise ValueError(
            f"kept: ids of a row must be there once each, got {ids[place].item()} again "
            f"at token {row[place].item()}"
        )


def _counted(spec: RowSpec, bad: Tensor, row: Tensor | None = None) -> Tensor:
    """`bad` where its row counts; an entry for each row, or of those named."""
    if spec.mask is None:
        return bad
    return bad & (spec.mask if row is None else spec.mask[row])


def _at(bad: Tensor) -> int:
    return int(bad.nonzero()[0, 0])
