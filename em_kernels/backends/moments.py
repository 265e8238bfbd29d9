"""Moments of the logits of rows of any size: squares and cubes neither overflow nor vanish.

With m and l the largest and the least finite u of a row, h = 1/2 where m - l overflows and else 1,
and s a power of two that brings h (m - l) into [2, 4), all of these products are exact but for what
is denormal, and

    y_v = (h u_v - h m) s        mean, var and third the population moments of y
    mean u - m = mean / (h s)    std u = sqrt(var) / (h s)    skew = third / var^(3/2)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Of the finite entries of rows, (N,) each."""

    number: Tensor
    mean: Tensor  # of y
    root: Tensor  # of the variance of y
    skew: Tensor
    scale: Tensor  # s
    half: Tensor  # h

    def in_units(self, x: Tensor, c: float | Tensor) -> Tensor:
        """c times x, which is one in units of y, where x is as `mean` and `root`."""
        small = self.unit < 1  # the factors in an order in which only the last may leave the range
        first, second = torch.where(small, c, self.unit), torch.where(small, self.unit, c)
        return x * first * second / self.half

    def mean_units(self, top: Tensor) -> Tensor:
        """The mean of u."""
        return (top * self.half + self.mean * self.unit) / self.half

    @property
    def unit(self) -> Tensor:
        return self.scale.reciprocal()


def moments(u: Tensor, top: Tensor) -> Moments:
    """Of rows u (N, V) whose largest is `top` (N,), finite; no entry is NaN."""
    excluded = u == -math.inf
    number = (~excluded).sum(-1).to(u.dtype)
    with torch.no_grad():
        least = torch.where(excluded, top[:, None], u).amin(-1)
        half = torch.where((top - least).isinf(), 0.5, 1.0).to(u.dtype)
        scale = _scale(top * half - least * half)
    away = (u * half[:, None] - (top * half)[:, None]) * scale[:, None]
    y = away.masked_fill(excluded, 0)
    mean = y.sum(-1) / number
    away = (y - mean[:, None]).masked_fill(excluded, 0)
    rest = away.sum(-1) / number  # what rounding left of the sum
    mean, away = mean + rest, (away - rest[:, None]).masked_fill(excluded, 0)
    var = (away**2).sum(-1) / number
    third = (away**3).sum(-1) / number
    positive = torch.where(var > 0, var, 1)
    skew = torch.where(var > 0, third / positive**1.5, 0)
    root = torch.where(var > 0, positive.sqrt(), 0)
    return Moments(number, mean, root, skew, scale, half)


def _scale(size: Tensor) -> Tensor:
    """A power of two that brings `size` into [2, 4); what is denormal, below it."""
    size = size.clamp(min=4 * torch.finfo(size.dtype).tiny)
    mantissa, _ = torch.frexp(size)
    return mantissa / (size / 4)
