"""PEFT's LoRA on a head: whether its layer adds a plain low-rank product, and what that is."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_a(layer: object, module: str, name: str) -> bool:
    """isinstance, of a class whose package need not be there."""
    return isinstance(layer, getattr(sys.modules.get(module), name, ()))


def is_lora(layer: object) -> bool:
    """Whether it is PEFT's LoRA around an nn.Linear, with its own forward."""
    kind = getattr(sys.modules.get("peft.tuners.lora.layer"), "Linear", None)
    return kind is not None and type(layer) is kind


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def why_not_plain_lora(layer: Any) -> str | None:
    """What makes it more than scaling * (x @ A.T) @ B.T, and what to do; None if nothing does."""
    for adapter in _active(layer):
        variant = getattr(layer, "lora_variant", {}).get(adapter)
        if variant is not None:
            kind = type(variant).__qualname__.removesuffix("LinearVariant")
            return (
                f"the adapter {adapter!r} is not plain LoRA but {kind}: leave the head out of "
                "target_modules, or merge and unload"
            )
        dropout = layer.lora_dropout[adapter]
        if layer.training and getattr(dropout, "p", 0) > 0:
            return (
                f"the adapter {adapter!r} has lora_dropout={dropout.p}, which draws other hidden "
                "states for it: set lora_dropout=0, or leave the head out of target_modules"
            )
        inside = (layer.lora_A[adapter], layer.lora_B[adapter], dropout)
        if (reason := _why_not_plain(*inside)) is not None:
            return reason
    return _why_not_plain(layer.base_layer)


def _why_not_plain(*layers: nn.Module) -> str | None:
    for layer in layers:
        hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
        own = "forward" in layer.__dict__ and not hasattr(layer, "_hf_hook")  # accelerate's moves
        if hooked or own or type(layer) not in (nn.Linear, nn.Identity, nn.Dropout):
            kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
            return (
                f"a {kind} inside its LoRA is changed or has hooks, which would not be called: "
                "remove them, or put them on the head"
            )
    return None


def read_lora(
    layer: Any, bias: Tensor | None
) -> tuple[tuple[Tensor, Tensor, float], Tensor | None]:
    """((A, B, scaling), the bias with those of B); several adapters are one of all their ranks."""
    parts = [
        (layer.lora_A[name].weight, layer.lora_B[name], float(layer.scaling[name]))
        for name in _active(layer)
    ]
    for _, b, scaling in parts:
        if b.bias is not None:
            bias = scaling * b.bias if bias is None else bias + scaling * b.bias
    if len(parts) == 1:
        ((a, b, scaling),) = parts
        return (a, b.weight, scaling), bias
    a = torch.cat([scaling * a for a, _, scaling in parts])
    return (a, torch.cat([b.weight for _, b, _ in parts], 1), 1.0), bias
