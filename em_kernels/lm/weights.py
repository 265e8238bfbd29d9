"""Weights that no result can be computed with, found before one is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from em_kernels.lm.fingerprint import is_packed
from em_kernels.lm.heads import ModelError


def check_not_nan(model, name: str | None = None) -> None:
    """Raise a ModelError that names the first parameter of the model that has a NaN."""
    _check(model, name, "NaN", Tensor.isnan)


def check_finite(model, name: str | None = None) -> None:
    """The same of one that has an infinity or a NaN, which a bias may have on purpose."""
    _check(model, name, "infinite or NaN", lambda value: ~value.isfinite())


@torch.no_grad()
def _check(model, name: str | None, what: str, is_bad: Callable[[Tensor], Tensor]) -> None:
    for parameter, value in _plain_floats(model):
        if value.sum().isfinite():  # it is not, with any of its parts
            continue
        count = int(is_bad(value).sum())
        if count:
            raise ModelError(
                f"{name or type(model).__name__} cannot be used: {count} of the "
                f"{value.numel()} numbers of its parameter {parameter} are {what}, as training "
                "that has diverged, or a damaged file, leaves them; take an earlier checkpoint"
            )


def _plain_floats(model) -> Iterator[tuple[str, Tensor]]:
    for name, value in model.named_parameters():
        wide = value.is_floating_point() and value.element_size() > 1
        if wide and not value.is_meta and not is_packed(value):
            yield name, value
