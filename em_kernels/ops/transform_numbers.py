"""The numbers that make z of logits, checked: temperature, softcap and logit_scale.

Their factors are float32 (float64 for float64 logits): a number that this does not hold, or holds
without digits, is refused by its name before it turns rows into NaN.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from em_kernels.backends.interface import Numbers, accumulate_dtype
from em_kernels.ops.checks import check_number, check_range, check_rows, is_graph_input


def transform_numbers(
    options: Mapping[str, Any], x: Tensor, prefix: str = ""
) -> tuple[Tensor | None, Numbers]:
    """(the temperature of each row or None, the numbers) of the options whose names begin so."""
    softcap, logit_scale = options[f"{prefix}softcap"], options[f"{prefix}logit_scale"]
    of_temperature, dtype = f"{prefix}temperature", accumulate_dtype(x.dtype)
    per_row, scalar = _temperature(options[of_temperature], x, of_temperature)
    if softcap is not None:
        _check_factor(f"{prefix}softcap", softcap, lambda v: v > 0, "positive or None", dtype)
    name = f"{prefix}logit_scale"
    _check_factor(name, logit_scale, lambda v: v < 0 or v > 0, "non-zero", dtype)
    check_range(f"{of_temperature}: {name} / {of_temperature}", logit_scale / scalar, dtype)
    eps = options.get("filter_eps") or 0.0
    return per_row, Numbers(scalar, softcap or 0.0, logit_scale, eps)


def _check_factor(
    name: str, value: float, good: Callable[[float], bool], rule: str, dtype: torch.dtype
) -> None:
    check_number(name, value, good, rule, sys.float_info.max)
    check_range(name, value, dtype)


def graph_inputs(numbers: Numbers) -> Tensor | None:
    """`RowSpec.numbers`: an operator's float argument would be a constant of torch.compile's graph,
    and every value another graph. None where they are constants."""
    if not torch.compiler.is_compiling() or not any(map(is_graph_input, numbers)):
        return None
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * value for value in numbers])


def _temperature(temperature: float | Tensor, x: Tensor, name: str) -> tuple[Tensor | None, float]:
    if not isinstance(temperature, Tensor):
        if isinstance(temperature, (int, float)):
            dtype = accumulate_dtype(x.dtype)
            _check_factor(name, temperature, lambda v: v > 0, "positive", dtype)
            return None, temperature
        raise TypeError(f"{name} must be a float or a tensor, got {type(temperature).__name__}")
    check_rows(name, temperature, x)
    if not temperature.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {temperature.dtype}")
    if temperature.requires_grad:
        raise ValueError(f"{name} must not require grad: it is treated as a constant")
    return temperature.to(accumulate_dtype(x.dtype)), 1.0
