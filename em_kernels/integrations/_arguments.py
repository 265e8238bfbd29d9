"""Arguments of the switches, and what replaced functions are given, as the operators want it."""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels._checks import FLOAT_DTYPES

_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


def check_logits_dtype(logits_dtype: torch.dtype | None) -> None:
    """What `linear_softmax_stats` can take for some hidden states."""
    if logits_dtype is not None and not isinstance(logits_dtype, torch.dtype):
        raise TypeError(
            f"logits_dtype must be a torch.dtype or None, got {type(logits_dtype).__name__}"
        )
    if logits_dtype not in (None, *FLOAT_DTYPES):
        raise ValueError(f"logits_dtype must be one of {FLOAT_DTYPES} or None, got {logits_dtype}")


def logits_dtype_named(text: str, source: str) -> torch.dtype | None:
    """The dtype that `text`, the value of `source`, names; None for ""."""
    if text and text not in _NAMES:
        raise ValueError(f"{source} must be one of {tuple(_NAMES)} or empty, got {text!r}")
    return _NAMES.get(text)


def flat_temperature(temperature: float | Tensor, tokens: Tensor) -> float | Tensor:
    """One number, 0-dim or not, for all tokens, or one for each of `tokens`, flattened."""
    if not isinstance(temperature, Tensor):
        return temperature
    if temperature.numel() == 1:
        temperature = temperature.reshape(()).expand(tokens.shape)
    return temperature.reshape(-1)
