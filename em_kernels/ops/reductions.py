"""From one loss a token to one number: what each token weighs, over how many ranks they may lie."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from em_kernels.ops.checks import (
    RANGES,
    check_group,
    check_integers,
    check_number,
    check_shape,
)
from em_kernels.ops.ranks import PADDING
from em_kernels.ops.registry import call
from em_kernels.ops.schemas import CountTokens

REDUCTIONS = ("token_mean", "sequence_mean", "sum")


class Sequences(NamedTuple):
    """Which tokens are one sequence, and where the others lie."""

    segment_ids: Tensor | None = None  # None: a row of the last dimension is one
    group: str | None = None  # of the ranks that have other tokens

    @classmethod
    def of(cls, segment_ids: Tensor | None, token_group: Any, like: Tensor) -> Self:
        """Checked; `like` has the shape of the tokens."""
        if segment_ids is not None:
            check_integers("segment_ids", segment_ids)
            check_shape("segment_ids", segment_ids, like)
            segment_ids = segment_ids.long()
        return cls(segment_ids, check_group(token_group, "token_group"))

    @property
    def are_rows(self) -> bool:
        """Of this rank, which exchanges nothing."""
        return self.segment_ids is None and self.group is None

    def without_padding(self, counted: Tensor) -> Tensor:
        return counted if self.segment_ids is None else counted & (self.segment_ids > PADDING)


WHOLE_ROWS = Sequences()


class Counts(NamedTuple):
    """How many tokens and sequences count; each token's sequence's length, as `counted` or (..., 1)
    broadcasts to it."""

    tokens: Tensor
    sequences: Tensor
    lengths: Tensor

    def number(self, mode: str) -> Tensor:
        """What the sum of a mode is divided by: tokens, or sequences that have one."""
        return (self.tokens if mode == "token_mean" else self.sequences).clamp(min=1)


def counts_of(counted: Tensor, sequences: Sequences, mode: str) -> Counts:
    """`counted` is a bool for each token; over a group a collective, which waits for the device."""
    if not sequences.are_rows:
        return Counts(*call(CountTokens(counted, sequences.segment_ids, mode, sequences.group)))
    lengths = counted.sum(-1, keepdim=True)
    return Counts(counted.sum(), (lengths > 0).sum(), lengths)


def token_weight(
    counted: Tensor,
    mode: str,
    sequences: Sequences = WHOLE_ROWS,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """What each token weighs, float64: m / D, in "sequence_mean" m / (n D), n the length of its
    sequence and D the number of tokens or sequences unless it is given."""
    weight = counted.to(torch.float64)
    if denominator is not None and (mode != "sequence_mean" or sequences.segment_ids is None):
        sequences = WHOLE_ROWS  # nothing to be learned of other tokens
    counts = counts_of(counted, sequences, mode)
    if mode == "sequence_mean":
        weight = weight / counts.lengths.clamp(min=1)
    return weight / (counts.number(mode) if denominator is None else denominator)


def reduction_weight(
    counted: Tensor,
    reduction: str | float,
    dtype: torch.dtype,
    sequences: Sequences = WHOLE_ROWS,
) -> Tensor:
    """What `entropy_loss` multiplies H with: `counted` (a bool per token) over its normaliser."""
    match reduction:
        case "sum":
            return counted.to(dtype)
        case "token_mean" | "sequence_mean":
            return token_weight(counted, reduction, sequences).to(dtype)
        case str():
            raise ValueError(f"reduction must be one of {REDUCTIONS} or a float, got {reduction!r}")
        case _:
            check_number("reduction", reduction, lambda v: v > 0, "positive", RANGES[dtype])
            return counted.to(dtype) / reduction
