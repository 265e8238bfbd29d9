"""The compiled CPU kernels: csrc/cpu/bindings.cpp."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

BLOCK: int
_Spec: TypeAlias = tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, float, float, float, int
]

def new_parts(rows: int) -> Tensor: ...
def stats(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    mask: Tensor | None,
    temperature_rows: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    valid_vocab: int,
    outputs: Sequence[str],
    parts: Tensor | None,
    first: int,
    /,
) -> list[Tensor]: ...
def grad(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    mask: Tensor | None,
    temperature_rows: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    valid_vocab: int,
    max: Tensor,
    log1p_r: Tensor,
    mean_d: Tensor,
    g_logprob: Tensor | None,
    g_entropy: Tensor | None,
    g_lse: Tensor | None,
    out: Tensor,
    /,
) -> None: ...
def loss(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    mask: Tensor | None,
    temperature_rows: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    valid_vocab: int,
    g_logprob: Tensor | None,
    g_entropy: Tensor | None,
    g_lse: Tensor | None,
    outputs: Sequence[str],
    out: Tensor,
    /,
) -> list[Tensor]: ...
def above(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    mask: Tensor | None,
    temperature_rows: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    valid_vocab: int,
    levels: Tensor,
    top: Tensor | None,
    ids: Tensor | None,
    /,
) -> tuple[Tensor, Tensor | None]: ...
def divergence_sums(
    logits: Tensor,
    spec: _Spec,
    other_logits: Tensor,
    other_spec: _Spec,
    kind: str,
    mixed: float,
    saved: Sequence[Tensor],
    /,
) -> Tensor: ...
def divergence_grad(
    logits: Tensor,
    spec: _Spec,
    other_logits: Tensor,
    other_spec: _Spec,
    kind: str,
    mixed: float,
    saved: Sequence[Tensor],
    weights: Tensor | None,
    other_weights: Tensor | None,
    out: Tensor | None,
    other_out: Tensor | None,
    /,
) -> None: ...
def divergence_loss(
    logits: Tensor,
    spec: _Spec,
    other_logits: Tensor,
    other_spec: _Spec,
    kind: str,
    mixed: float,
    weights: Tensor | None,
    other_weights: Tensor | None,
    out: Tensor | None,
    other_out: Tensor | None,
    outputs: Sequence[str],
    other_outputs: Sequence[str],
    /,
) -> list[Tensor]: ...
def add_product(total: Tensor, grad_logits: Tensor, x: Tensor, add: bool, /) -> bool: ...
def product(out: Tensor, x: Tensor, w: Tensor, /) -> bool: ...
def empty(shape: Sequence[int], dtype: torch.dtype, /) -> Tensor: ...
def release_memory() -> None: ...
def isa_levels() -> list[str]: ...
def set_isa(name: str, /) -> None: ...
def get_isa() -> str: ...
def compiler() -> str: ...
