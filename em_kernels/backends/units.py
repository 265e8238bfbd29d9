"""Logits in the units in which they are compared, u, and what takes them to those of z, c.

    without bias and softcap   u = sign(logit_scale) x                      c = |logit_scale| / T
    with bias or softcap       u = softcap(logit_scale x + bias)            c = 1 / T
    z = c u                    softcap(y) = s tanh(y / s)

Maxima are found and subtracted in u, and one product follows: d_v = c (u_v - max u). So a plain row
is not rounded before the subtraction, which is exact near the maximum, and a finite z that no float
holds is never made. Levels and borders (`truncation`) and `Saved.max` are in u too.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from em_kernels.backends.interface import RowSpec, accumulate_dtype


def is_plain(spec: RowSpec) -> bool:
    """Whether u is x but for its sign."""
    return spec.bias is None and not spec.softcap and spec.logit_scale != 0


def units(logits: Tensor, spec: RowSpec) -> Tensor:
    """u over the valid vocabulary: (N, valid_vocab)."""
    rows = logits.reshape(logits.shape[:-1].numel(), logits.shape[-1])  # a shard may have no entry
    x = rows[:, : spec.valid_vocab]
    x = x.to(accumulate_dtype(x.dtype))
    if is_plain(spec):
        return x if spec.logit_scale > 0 else -x
    u = x * spec.logit_scale
    if spec.bias is not None:
        u = u + spec.bias[: spec.valid_vocab].to(u.dtype)
    if not spec.softcap:
        return u
    return torch.where(u.isinf(), u, spec.softcap * torch.tanh(u / spec.softcap))


def inverse_temperature(spec: RowSpec, dtype: torch.dtype) -> float | Tensor:
    """c as `dtype`, that of u, holds it: of all rows, or (N,)."""
    scale = abs(spec.logit_scale) if is_plain(spec) else 1.0
    if spec.temperature_rows is not None:
        return (scale / spec.temperature_rows.double()).to(dtype)
    c = scale / spec.temperature if spec.temperature else math.inf
    return c if dtype == torch.float64 else ctypes.c_float(c).value


def distance(u: Tensor, top: Tensor, c: float | Tensor) -> Tensor:
    """d = c (u - top) of entries (N, V)."""
    return (u - top[:, None]) * column(c)


def is_good(c: float | Tensor, dtype: torch.dtype) -> bool | Tensor:
    """Whether c and 1 / c have all digits; a temperature not positive and finite gives none."""
    least = torch.finfo(dtype).tiny
    return (c >= least) & (c <= 1 / least)


def column(c: float | Tensor) -> float | Tensor:
    """c beside entries (N, V)."""
    return c[:, None] if isinstance(c, Tensor) else c


def of_rows(c: float | Tensor, rows: Tensor | slice) -> float | Tensor:
    return c[rows] if isinstance(c, Tensor) else c


def slope(u: Tensor, spec: RowSpec) -> Tensor | float:
    """dz/dx at entries (N, V): sign(logit_scale) c, or logit_scale c (1 - tanh^2)."""
    c = column(inverse_temperature(spec, u.dtype))
    if is_plain(spec):
        return math.copysign(1.0, spec.logit_scale) * c
    if not spec.softcap:
        return spec.logit_scale * c
    tanh = (u / spec.softcap).masked_fill(u == -math.inf, -1)
    return spec.logit_scale * (1 - tanh * tanh) * c
