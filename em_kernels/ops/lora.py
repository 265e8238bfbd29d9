"""The argument `lora` of the `linear_*` functions: what it may be, and what operators get."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from em_kernels.ops.arguments import check_logits
from em_kernels.ops.checks import check_device, check_number, check_whole
from em_kernels.ops.dtensor import local_operands
from em_kernels.ops.sources import NO_LOW, Low, copy_to_ranks


def low_part(
    hidden: Tensor, weight: Tensor, given: Mapping[str, Any], group: str | None = None
) -> Low:
    """x = scaling hidden @ A.T, (..., r), an ordinary product with its history, and B.

    `hidden` is the caller's, `weight` this rank's. With `group`, its name, the gradient of x, or of
    A where hidden's own backward sums, is summed over the ranks.
    """
    if given["lora"] is None:
        return NO_LOW
    a, b, scaling = _checked(hidden, weight, given["lora"], given["group"])
    if not given["allreduce_dgrad"]:
        a, group = copy_to_ranks(a, group), None
    told = given["product_dtype"]
    dtype = told or functools.reduce(torch.promote_types, (a.dtype, b.dtype), hidden.dtype)
    if told is None:
        x = linear(hidden.to(dtype), a.to(dtype)) * scaling
    else:
        with torch.autocast(hidden.device.type, enabled=False):
            x = linear(hidden.to(dtype), a.to(dtype)) * scaling
    return Low(copy_to_ranks(x, group), b)


def _checked(hidden: Tensor, weight: Tensor, lora: Any, group: Any) -> tuple[Tensor, Tensor, float]:
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        got = f"{len(lora)} of them" if isinstance(lora, (tuple, list)) else type(lora).__name__
        raise TypeError(f"lora must be (A, B, scaling), got {got}")
    a, b, scaling = lora
    _, a, _, cut = local_operands(hidden, a, None, None)
    if cut is not None:
        raise ValueError("lora: A must be whole on every rank, got one that is cut over a group")
    _, b, _, _ = local_operands(hidden, b, None, group)
    for name, factor in (("lora: A", a), ("lora: B", b)):
        check_whole(name, factor)
        check_logits(factor, name)
        check_device(name, factor, hidden)
    if a.dim() != 2 or a.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"lora: A must be (r, D) with D = {hidden.shape[-1]}, got shape {tuple(a.shape)}"
        )
    if b.shape != (weight.shape[0], a.shape[0]):
        raise ValueError(
            f"lora: B must be (V, r) = {(weight.shape[0], a.shape[0])}, got shape {tuple(b.shape)}"
        )
    check_number("lora: scaling", scaling, lambda v: True, "a number")
    return a, b, scaling
