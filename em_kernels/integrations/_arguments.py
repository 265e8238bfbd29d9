"""Arguments of the switches, and what replaced functions are given, as the operators want it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels.ops.arguments import FLOAT_DTYPES
from em_kernels.ops.checks import check_flag

_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
_FLAGS = {"1": True, "true": True, "0": False, "false": False}


class HeadSettings(NamedTuple):
    """What a switch was given for all calls from hidden states: `linear_softmax_stats`'s own."""

    logits_dtype: torch.dtype | None = None
    entropy_requires_grad: bool = True


def head_settings(logits_dtype: torch.dtype | None, entropy_requires_grad: bool) -> HeadSettings:
    """The settings, if `linear_softmax_stats` can take them for some hidden states."""
    check_flag("entropy_requires_grad", entropy_requires_grad)
    if logits_dtype is not None and not isinstance(logits_dtype, torch.dtype):
        raise TypeError(
            f"logits_dtype must be a torch.dtype or None, got {type(logits_dtype).__name__}"
        )
    if logits_dtype not in (None, *FLOAT_DTYPES):
        raise ValueError(f"logits_dtype must be one of {FLOAT_DTYPES} or None, got {logits_dtype}")
    return HeadSettings(logits_dtype, entropy_requires_grad)


def check_none_of_ours(kwargs: dict) -> None:
    """What a patched model leaves to its own forward, which takes any name and says nothing."""
    for name in kwargs:
        if name.startswith("em_"):
            raise TypeError(
                "a patched model takes em_outputs, em_temperature and em_entropy_requires_grad, "
                f"got {name}"
            )


def logits_dtype_named(text: str, source: str) -> torch.dtype | None:
    """The dtype that `text`, the value of `source`, names; None for ""."""
    if text and text not in _NAMES:
        raise ValueError(f"{source} must be one of {tuple(_NAMES)} or empty, got {text!r}")
    return _NAMES.get(text)


def flag_named(text: str, source: str) -> bool:
    """The bool that `text`, the value of `source`, names."""
    if text.lower() not in _FLAGS:
        raise ValueError(f"{source} must be one of {tuple(_FLAGS)} or empty, got {text!r}")
    return _FLAGS[text.lower()]


def temperature_of(temperature: float | Tensor, tokens: Tensor) -> float | Tensor:
    """A tensor of one number, or of one for each token, in the shape of `tokens`."""
    if not isinstance(temperature, Tensor):
        return temperature
    if temperature.numel() == 1:
        return temperature.reshape(()).expand(tokens.shape)
    same = temperature.numel() == tokens.numel()
    return temperature.reshape(tokens.shape) if same else temperature
