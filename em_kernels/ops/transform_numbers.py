"""The numbers that make z of logits, checked: temperature, softcap and logit_scale.

Their factors are float32 (float64 for float64 logits): a number that this does not hold, or holds
without digits, is refused by its name before it turns rows into NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from em_kernels.backends.interface import Numbers, accumulate_dtype
from em_kernels.ops.checks import RANGES, check_number, check_rows, check_size, is_graph_input


def transform_numbers(
    options: Mapping[str, Any], x: Tensor, prefix: str = ""
) -> tuple[Tensor | None, Numbers]:
    """(the temperature of each row or None, the numbers) of the options whose names begin so."""
    softcap, logit_scale = options[f"{prefix}softcap"], options[f"{prefix}logit_scale"]
    name, sizes = f"{prefix}temperature", RANGES[accumulate_dtype(x.dtype)]
    per_row, scalar = _temperature(options[name], x, name, sizes)
    if softcap is not None:
        check_number(f"{prefix}softcap", softcap, lambda v: v > 0, "positive or None", sizes)
    of_scale = f"{prefix}logit_scale"
    check_number(of_scale, logit_scale, lambda v: v < 0 or v > 0, "non-zero", sizes)
    if scalar != 1:
        check_size(f"{name}: {of_scale} / {name}", logit_scale / scalar, sizes)
    eps = options.get("filter_eps") or 0.0
    return per_row, Numbers(scalar, softcap or 0.0, logit_scale, eps)


def graph_inputs(numbers: Numbers) -> Tensor | None:
    """`RowSpec.numbers`: an operator's float argument would be a constant of torch.compile's graph,
    and every value another graph. None where they are constants."""
    if not torch.compiler.is_compiling() or not any(map(is_graph_input, numbers)):
        return None
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * value for value in numbers])


def _temperature(
    temperature: float | Tensor, x: Tensor, name: str, sizes: tuple[float, float]
) -> tuple[Tensor | None, float]:
    if not isinstance(temperature, Tensor):
        if isinstance(temperature, (int, float)):
            check_number(name, temperature, lambda v: v > 0, "positive", sizes)
            return None, temperature
        raise TypeError(f"{name} must be a float or a tensor, got {type(temperature).__name__}")
    check_rows(name, temperature, x)
    if not temperature.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {temperature.dtype}")
    if temperature.requires_grad:
        raise ValueError(f"{name} must not require grad: it is treated as a constant")
    return temperature.to(accumulate_dtype(x.dtype)), 1.0
