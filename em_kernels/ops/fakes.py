"""What the operators return as tensors without values: `torch.compile` and friends trace these."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from em_kernels.backends.interface import RESULT_DTYPES, RowSpec, Saved, accumulate_dtype
from em_kernels.backends.specs import row_shape
from em_kernels.backends.vocab_parallel import size_of
from em_kernels.linear.gradients import same_dtype
from em_kernels.linear.half import ready_dtype
from em_kernels.linear.plan import Linear, kept_shape
from em_kernels.ops.schemas import (
    AllReduce,
    CountTokens,
    EntropyDescent,
    EntropyTemperature,
    GatherAlike,
    LinearGrad,
    LinearGradInto,
    LinearLoss,
    LinearStats,
    LinearStatsFused,
    ScaleInplace,
    SoftmaxGrad,
    SoftmaxLoss,
    SoftmaxLossInplace,
    SoftmaxStats,
)


def empty_rows(like: Tensor, outputs: Sequence[str], spec: RowSpec) -> list[Tensor]:
    """Memory for what the statistics operators return, of the leading shape of `like`."""
    dtype = accumulate_dtype(like.dtype)
    return [
        like.new_empty(row_shape(name, spec, like.shape[:-1]), dtype=RESULT_DTYPES.get(name, dtype))
        for name in (*Saved._fields, *outputs)
    ]


def _fake_grads(
    call: LinearGrad | LinearLoss,
    result: Callable[[torch.dtype], torch.dtype] = same_dtype,
) -> list[Tensor]:
    hidden, weight, bias = call.hidden, call.weight, call.spec.bias
    inputs = (hidden, weight, weight if bias is None else bias)
    sizes = (hidden.shape, weight.shape, weight.shape[:1])
    made = [
        x.new_empty(size if need else 0, dtype=result(x.dtype))
        for x, size, need in zip(inputs, sizes, call.needs.inputs, strict=True)
    ]
    pairs = zip(call.low[:2], call.low[2:], strict=True)
    low = [(x, need) for x, need in pairs if x is not None]
    return made + [x.new_empty(x.shape if need else 0, dtype=result(x.dtype)) for x, need in low]


def softmax_stats(call: SoftmaxStats) -> list[Tensor]:
    return empty_rows(call.logits, call.outputs, call.spec)


def softmax_grad(call: SoftmaxGrad) -> list[Tensor]:
    return [call.logits.new_empty(call.logits.shape)]


def softmax_loss(call: SoftmaxLoss) -> list[Tensor]:
    return [
        *empty_rows(call.logits, call.outputs, call.spec),
        call.logits.new_empty(call.logits.shape),
    ]


def nothing(call: SoftmaxLossInplace | LinearGradInto | ScaleInplace) -> None:
    return None


def all_reduce(call: AllReduce) -> list[Tensor]:
    return [call.x.new_empty(call.x.shape)]


def count_tokens(call: CountTokens) -> list[Tensor]:
    shapes: tuple[Sequence[int], ...] = ((), (), call.counted.shape)
    return [call.counted.new_empty(shape, dtype=torch.int64) for shape in shapes]


def gather_alike(call: GatherAlike) -> list[Tensor]:
    return [call.x.new_empty(size_of(call.group), *call.x.shape)]


def entropy_temperature(call: EntropyTemperature) -> list[Tensor]:
    logits = call.logits
    return [logits.new_empty(logits.shape[:-1], dtype=accumulate_dtype(logits.dtype))]


def entropy_descent(call: EntropyDescent) -> list[Tensor]:
    logits = call.logits
    return [logits.new_empty(logits.shape, dtype=accumulate_dtype(logits.dtype))]


def linear_stats(call: LinearStats) -> list[Tensor]:
    rows = empty_rows(call.hidden, call.outputs, call.spec)
    if any((*call.needs.inputs, *call.low[2:])):
        linear = Linear.of(call.hidden, call.weight, call.chunk_tokens, call.logits_dtype)
        shape = kept_shape(linear, call.keep_logits)
        rows.append(call.hidden.new_empty(shape, dtype=linear.logits_dtype))
    return rows


def linear_stats_fused(call: LinearStatsFused) -> list[Tensor]:
    return empty_rows(call.hidden, call.outputs, call.spec)


def linear_grad(call: LinearGrad) -> list[Tensor]:
    return _fake_grads(call)


def linear_loss(call: LinearLoss) -> list[Tensor]:
    return [*empty_rows(call.hidden, call.outputs, call.spec), *_fake_grads(call, ready_dtype)]
