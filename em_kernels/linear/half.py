"""float16: numbers below 6e-8 are 0 there, and those above 65504 infinite.

The gradient of a loss that is made in the forward pass is of the size of its weights, 1 / N for a
mean, until backward multiplies it by the loss scale that keeps float16 gradients in range. So the
weights are multiplied by a power of two first, which is exact, and the results divided by it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from em_kernels.backends.interface import Numbers, RowSpec, Upstream
from em_kernels.backends.specs import pick, select_rows

# |d loss / d logit| <= 5 |weight| |logit_scale| / T: p |log p + H| <= 3.1 at any V below 2^18.
LARGEST = 10  # the largest of the products on the right but 5 becomes 2^10 or more, below 2^11


def ready_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a gradient that is to be multiplied yet: float32 for float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def upstream_scale(
    upstream: Upstream, spec: RowSpec, dtype: torch.dtype, lead: int
) -> Tensor | None:
    """The power of two for logits or operands of `dtype`, 0-d float32; None where none is needed.

    Rows have `lead` dimensions; the weights of several ids of a row add up.

    1 where no weight of a row that counts is finite and not 0. Nothing waits for the device.
    """
    if dtype != torch.float16:
        return None
    sizes_of = [g.detach().abs() for g in upstream if g is not None]
    given = [g.sum(-1) if g.dim() > lead else g for g in sizes_of]
    sizes = torch.stack(given).amax(0) * _slope(spec, given[0].device)
    counted = sizes.isfinite() if spec.mask is None else sizes.isfinite() & spec.mask
    sizes = torch.where(counted, sizes, 0).flatten()
    return power_of_two(torch.cat([sizes, sizes.new_zeros(1)]).amax())


def power_of_two(size: Tensor) -> Tensor:
    """2^k with size 2^k in [2^LARGEST, 2^(LARGEST + 1)), as float32 holds it; 1 for a size of 0."""
    exponent = (size.float().view(torch.int32) >> 23) - 127
    bits = (127 + LARGEST - exponent).clamp(1, 253) << 23
    return torch.where(size > 0, bits.view(torch.float32), 1.0)


def rows_scale(
    upstream: Upstream, spec: RowSpec, index: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """`upstream_scale` of the rows of `index`, None for all."""
    if index is not None and dtype == torch.float16:
        spec, upstream = select_rows(spec, index), pick(upstream, index)
    return upstream_scale(upstream, spec, dtype, 1)


def unscaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale.reciprocal()


def scale_rows(upstream: Upstream, scale: Tensor | None) -> Upstream:
    if scale is None:
        return upstream
    return Upstream(*(None if g is None else g * scale for g in upstream))


def _slope(spec: RowSpec, device: torch.device) -> float | Tensor:
    """|logit_scale| / T, one or of each row."""
    temperature: Any = spec.temperature
    logit_scale: Any = spec.logit_scale
    if spec.numbers is not None:
        given = spec.numbers.to(device, torch.float32)
        temperature = given[Numbers._fields.index("temperature")]
        logit_scale = given[Numbers._fields.index("logit_scale")]
    if spec.temperature_rows is not None:
        temperature = spec.temperature_rows
    slope: float | Tensor = abs(logit_scale) / temperature
    return slope
