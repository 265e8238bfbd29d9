"""The arguments of the operators: a NamedTuple for each, which is also its schema (`records`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from em_kernels.backends.interface import (
    Argument,
    Descent,
    Goal,
    Numbers,
    RowSpec,
    Saved,
    Size,
    Upstream,
)
from em_kernels.backends.pair import Divergence, OtherSpec, PairSaved
from em_kernels.backends.specs import read_numbers
from em_kernels.linear.low_rank import LowRank
from em_kernels.linear.plan import Needs, OtherNeeds
from em_kernels.ops.records import arguments


def with_numbers(call: Any) -> Any:
    """The call with the values of its specs' `numbers` where they belong."""
    if hasattr(call, "other"):
        call = call._replace(other=read_numbers(call.other))
    if call.spec.numbers is None:
        return call
    numbers = Numbers(*call.spec.numbers.tolist())
    call = call._replace(spec=read_numbers(call.spec))
    if hasattr(call, "needs"):
        call = call._replace(needs=call.needs._replace(filter_eps=numbers.filter_eps or None))
    return call


Changed = Annotated[Tensor, Argument(type="Tensor(a!)")]


@arguments
class SoftmaxStats(NamedTuple):
    logits: Tensor
    spec: RowSpec
    outputs: Sequence[str]
    impl: str


@arguments
class SoftmaxGrad(NamedTuple):
    logits: Tensor
    spec: RowSpec
    saved: Saved
    upstream: Upstream
    impl: str


@arguments
class SoftmaxLoss(NamedTuple):
    logits: Tensor
    spec: RowSpec
    upstream: Upstream
    outputs: Sequence[str]
    impl: str


@arguments
class SoftmaxLossInplace(NamedTuple):
    logits: Changed
    rows: Annotated[Sequence[Tensor], Argument(type="Tensor(b!)[]")]
    spec: RowSpec
    upstream: Upstream
    outputs: Sequence[str]
    impl: str


@arguments
class LinearStats(NamedTuple):
    hidden: Tensor
    weight: Tensor
    spec: RowSpec
    outputs: Sequence[str]
    chunk_tokens: Size | None
    logits_dtype: torch.dtype | None
    impl: str
    needs: Needs = Needs()  # of the gradient that will follow: none
    keep_logits: Size | None = 0
    low: LowRank = LowRank()


@arguments
class LinearStatsFused(NamedTuple):
    hidden: Tensor
    weight: Tensor
    spec: RowSpec
    outputs: Sequence[str]


@arguments
class LinearGrad(NamedTuple):
    hidden: Tensor
    weight: Tensor
    spec: RowSpec
    saved: Saved
    upstream: Upstream
    needs: Needs
    chunk_tokens: Size | None
    logits_dtype: torch.dtype | None
    impl: str
    kept: Tensor | None = None
    low: LowRank = LowRank()


@arguments
class LinearGradInto(NamedTuple):
    into: Changed
    # What is needed of dX, db and the low-rank part's.
    results: Annotated[Sequence[Tensor], Argument(type="Tensor(b!)[]")]
    hidden: Tensor
    weight: Tensor
    spec: RowSpec
    saved: Saved
    upstream: Upstream
    needs: Needs
    chunk_tokens: Size | None
    logits_dtype: torch.dtype | None
    impl: str
    kept: Tensor | None = None
    low: LowRank = LowRank()


@arguments
class LinearLoss(NamedTuple):
    hidden: Tensor
    weight: Tensor
    spec: RowSpec
    upstream: Upstream
    needs: Needs
    outputs: Sequence[str]
    chunk_tokens: Size | None
    logits_dtype: torch.dtype | None
    impl: str
    low: LowRank = LowRank()


@arguments
class TopCall(NamedTuple):
    logits: Tensor
    spec: RowSpec
    k: int
    impl: str


@arguments
class LinearTopCall(NamedTuple):
    hidden: Tensor
    weight: Tensor
    spec: RowSpec
    k: int
    chunk_tokens: Size | None
    logits_dtype: torch.dtype | None
    impl: str
    low: LowRank = LowRank()


@arguments
class DivergenceStats(NamedTuple):
    logits: Tensor
    other_logits: Tensor
    spec: RowSpec
    other: OtherSpec
    divergence: Divergence
    outputs: Sequence[str]
    other_outputs: Sequence[str]
    impl: str


@arguments
class DivergenceGrad(NamedTuple):
    logits: Tensor
    other_logits: Tensor
    spec: RowSpec
    other: OtherSpec
    divergence: Divergence
    saved: PairSaved
    upstream: Tensor | None  # None where the gradient is not wanted
    other_upstream: Tensor | None
    impl: str


@arguments
class DivergenceLoss(NamedTuple):
    logits: Tensor
    other_logits: Tensor
    spec: RowSpec
    other: OtherSpec
    divergence: Divergence
    upstream: Tensor | None
    other_upstream: Tensor | None
    outputs: Sequence[str]
    other_outputs: Sequence[str]
    impl: str


@arguments
class LinearDivergenceStats(NamedTuple):
    hidden: Tensor
    weight: Tensor
    other_hidden: Tensor
    other_weight: Tensor
    spec: RowSpec
    other: OtherSpec
    divergence: Divergence
    outputs: Sequence[str]
    other_outputs: Sequence[str]
    chunk_tokens: Size | None
    logits_dtype: torch.dtype | None
    impl: str


@arguments
class LinearDivergenceGrad(NamedTuple):
    hidden: Tensor
    weight: Tensor
    other_hidden: Tensor
    other_weight: Tensor
    spec: RowSpec
    other: OtherSpec
    divergence: Divergence
    saved: PairSaved
    upstream: Tensor
    needs: Needs
    other_needs: OtherNeeds
    chunk_tokens: Size | None
    logits_dtype: torch.dtype | None
    impl: str


@arguments
class LinearDivergenceLoss(NamedTuple):
    hidden: Tensor
    weight: Tensor
    other_hidden: Tensor
    other_weight: Tensor
    spec: RowSpec
    other: OtherSpec
    divergence: Divergence
    upstream: Tensor
    needs: Needs
    other_needs: OtherNeeds
    outputs: Sequence[str]
    other_outputs: Sequence[str]
    chunk_tokens: Size | None
    logits_dtype: torch.dtype | None
    impl: str


@arguments
class EntropyTemperature(NamedTuple):
    logits: Tensor
    goal: Goal
    impl: str


@arguments
class EntropyDescent(NamedTuple):
    logits: Tensor
    descent: Descent
    impl: str


@arguments
class AllReduce(NamedTuple):
    x: Tensor
    group: str


@arguments
class ScaleInplace(NamedTuple):
    x: Changed
    factor: Tensor
    impl: str


@arguments
class CountTokens(NamedTuple):
    counted: Tensor
    segment_ids: Tensor | None
    mode: str
    group: str | None


@arguments
class GatherAlike(NamedTuple):
    x: Tensor
    group: str
    layout: str
