"""What the operators return as tensors without values: `torch.compile` and friends trace these."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from em_kernels.backends.interface import RowSpec, Saved, Upstream, accumulate_dtype
from em_kernels.linear.half import ready_dtype
from em_kernels.linear.plan import Linear, Needs, kept_shape
from em_kernels.ops.schemas import take_later


def empty_rows(like: Tensor, outputs: tuple[str, ...]) -> list[Tensor]:
    """Memory for what the statistics operators return, of the leading shape of `like`."""
    dtype = accumulate_dtype(like.dtype)
    return [
        like.new_empty(like.shape[:-1], dtype=torch.bool if name == "is_top1" else dtype)
        for name in (*Saved._fields, *outputs)
    ]


def _fake_grads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: Needs,
    result: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype,
) -> list[Tensor]:
    sizes = (hidden.shape, weight.shape, weight.shape[:1])
    return [
        x.new_empty(size if need else 0, dtype=result(x.dtype))
        for x, size, need in zip((hidden, weight, weight if bias is None else bias), sizes, needs)
    ]


def softmax_stats(logits: Tensor, *args) -> list[Tensor]:
    return empty_rows(logits, args[-2])


def softmax_grad(logits: Tensor, *args) -> list[Tensor]:
    return [logits.new_empty(logits.shape)]


def softmax_loss(logits: Tensor, *args) -> list[Tensor]:
    return [*empty_rows(logits, args[-2]), logits.new_empty(logits.shape)]


def softmax_loss_inplace(logits: Tensor, rows: list[Tensor], *args) -> None:
    return None


def all_reduce(x: Tensor, group: str) -> list[Tensor]:
    return [x.new_empty(x.shape)]


def scale_inplace(x: Tensor, factor: Tensor, impl: str) -> None:
    return None


def entropy_temperature(logits: Tensor, *args) -> list[Tensor]:
    return [logits.new_empty(logits.shape[:-1], dtype=accumulate_dtype(logits.dtype))]


def entropy_descent(logits: Tensor, *args) -> list[Tensor]:
    return [logits.new_empty(logits.shape, dtype=accumulate_dtype(logits.dtype))]


def linear_stats(hidden: Tensor, weight: Tensor, *args) -> list[Tensor]:
    outputs, chunk, dtype, _, *later = args[len(RowSpec._fields) :]
    needs, keep = take_later(RowSpec(), later)
    rows = empty_rows(hidden, outputs)
    if needs is not None:
        linear = Linear.cut(hidden, weight, chunk, dtype)
        rows.append(hidden.new_empty(kept_shape(linear, *keep or [0]), dtype=linear.logits_dtype))
    return rows


def linear_stats_fused(hidden: Tensor, weight: Tensor, *args) -> list[Tensor]:
    return empty_rows(hidden, args[-1])


def linear_grad(hidden: Tensor, weight: Tensor, *args) -> list[Tensor]:
    start = len(RowSpec._fields) + len(Saved._fields) + len(Upstream._fields)
    return _fake_grads(hidden, weight, args[0], Needs(*args[start : start + 4]))


def linear_loss(hidden: Tensor, weight: Tensor, *args) -> list[Tensor]:
    needs = Needs(*args[-8:-4])
    grads = _fake_grads(hidden, weight, args[0], needs, ready_dtype)
    return [*empty_rows(hidden, args[-4]), *grads]
