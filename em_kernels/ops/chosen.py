"""Chosen ids of a row as callers give them, (..., K), and as the operators take them.

One id that was given as (..., 1) is served as (...): by the kernels' own pass, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels.backends.interface import OF_IDS, PADDING, RowSpec, TokenStats, Upstream
from em_kernels.backends.specs import has_support

_OF_ONE = ("entropy_slope", "is_kept")


class Form(NamedTuple):
    """What is left to do to results of ids: to put a dimension of K = 1 back."""

    padding: Tensor | None = None  # (..., 1)

    def weights(self, weights: Upstream) -> Upstream:
        """Per-token weights as the operators take them."""
        if weights.logprob is None or self.padding is None:
            return weights
        return weights._replace(logprob=_counted(self.padding, weights.logprob)[..., 0])

    def results(self, stats: Mapping[str, Tensor]) -> TokenStats:
        return TokenStats(**{name: self._result(name, x) for name, x in stats.items()})

    def _result(self, name: str, x: Tensor) -> Tensor:
        if name not in OF_IDS or self.padding is None:
            return x
        x = x[..., None]
        bad = x < 0 if name == "rank" else x.isnan()  # it is the row's, padding or not
        return _counted(self.padding & ~bad, x)


def served(spec: RowSpec, outputs: tuple[str, ...], x: Tensor) -> tuple[RowSpec, Form]:
    """The spec as operators take it, x (..., D); ValueError for what several ids do not have."""
    target = spec.target
    if target is None or target.dim() < x.dim():
        return spec, Form()
    for name in _OF_ONE:
        if name in outputs:
            raise ValueError(
                f"outputs: {name!r} is of one id a row, got a target of shape "
                f"{tuple(target.shape)}; give target (...) or leave it out"
            )
    if has_support(spec):
        raise ValueError(
            "target must be one id a row where top_k, top_p, min_p or a kept set is given, got "
            f"shape {tuple(target.shape)}"
        )
    if target.shape[-1] > 1:
        return spec, Form()
    padding = target == PADDING
    return spec._replace(target=_counted(padding, target)[..., 0]), Form(padding)


def _counted(padding: Tensor, x: Tensor) -> Tensor:
    return torch.where(padding, torch.zeros_like(x), x)
