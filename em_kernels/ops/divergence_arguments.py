"""Argument checks of divergences, and their translation to what is asked of a pair of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from em_kernels.backends.interface import RowSpec, accumulate_dtype
from em_kernels.backends.pair import KINDS, Divergence, OtherSpec
from em_kernels.backends.row_index import is_exporting
from em_kernels.ops.arguments import (
    check_allreduce_dgrad,
    check_logits,
    make_spec,
    output_names,
)
from em_kernels.ops.checks import check_device, check_number, check_rows, constant
from em_kernels.ops.divergence_autograd import Asked, Operands
from em_kernels.ops.dtensor import local_logits, local_operands
from em_kernels.ops.linear_softmax_stats import product_operands
from em_kernels.ops.options import DEFAULTS
from em_kernels.ops.transform_numbers import graph_inputs, transform_numbers

_Names = tuple[str, ...]


def checked_logits(
    logits: Tensor,
    other_logits: Tensor,
    outputs: _Names,
    other_outputs: _Names,
    options: Mapping[str, Any],
) -> tuple[dict[str, Any], Tensor, Tensor, Asked]:
    given: dict[str, Any] = {**DEFAULTS, **options, "bias": None, "other_bias": None}
    logits, group = local_logits(logits, given["group"])
    other_logits, given["group"] = local_logits(other_logits, group, "other_logits")
    empty = given["group"] is not None
    check_logits(logits, empty=empty)
    check_logits(other_logits, "other_logits", empty=empty)
    if other_logits.shape != logits.shape:
        raise ValueError(
            f"other_logits must have the shape of logits, {tuple(logits.shape)}, of one "
            f"vocabulary, got shape {tuple(other_logits.shape)}"
        )
    check_device("other_logits", other_logits, logits)
    asked = _asked(logits, logits.shape[-1], outputs, other_outputs, given)
    return given, logits, other_logits, asked


def checked_heads(
    pair: tuple[Tensor, Tensor, Tensor, Tensor],
    outputs: _Names,
    other_outputs: _Names,
    options: Mapping[str, Any],
) -> tuple[dict[str, Any], Operands, Asked]:
    given: dict[str, Any] = {**DEFAULTS, **options}
    hidden, weight, other_hidden, other_weight = pair
    for own in (hidden, other_hidden):
        check_allreduce_dgrad(given["allreduce_dgrad"], own)
    bias, other_bias, group = given["bias"], given["other_bias"], given["group"]
    hidden, weight, bias, group = local_operands(hidden, weight, bias, group)
    other_hidden, other_weight, other_bias, other_group = local_operands(
        other_hidden, other_weight, other_bias, group, "other_"
    )
    if other_group is not group:
        raise ValueError("other_weight must be cut over the vocabulary as weight is")
    given |= {"group": group, "bias": bias, "other_bias": other_bias}
    hidden, weight = product_operands(hidden, weight, bias, given)
    other_hidden, other_weight = product_operands(
        other_hidden, other_weight, other_bias, given, "other_"
    )
    _check_match(hidden, weight, other_hidden, other_weight)
    asked = _asked(hidden, weight.shape[0], outputs, other_outputs, given)
    return given, Operands(hidden, weight, other_hidden, other_weight), asked


def _check_match(
    hidden: Tensor, weight: Tensor, other_hidden: Tensor, other_weight: Tensor
) -> None:
    if other_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"other_hidden must have the leading shape of hidden, {tuple(hidden.shape[:-1])}, got "
            f"shape {tuple(other_hidden.shape)}"
        )
    if other_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"other_weight must have the {weight.shape[0]} rows of weight, one for each entry of "
            f"the vocabulary, got shape {tuple(other_weight.shape)}: cut both to the vocabulary "
            "that they share"
        )
    check_device("other_hidden", other_hidden, hidden)


def _asked(
    x: Tensor, vocab: int, outputs: _Names, other_outputs: _Names, given: Mapping[str, Any]
) -> Asked:
    kind = _checked_kind(given["kind"], given["beta"])
    target = given["target"]
    if target is not None:
        check_rows("target", target, x)
    spec = make_spec(x, vocab, target, given, given["bias"])
    names = output_names(outputs, target is not None)
    other_names = output_names(other_outputs, target is not None, "other_outputs")
    return Asked(spec, _other_spec(x, spec, given), kind, names, other_names)


def _other_spec(x: Tensor, spec: RowSpec, given: Mapping[str, Any]) -> OtherSpec:
    temperature = given["other_temperature"]
    if temperature is None:
        temperature = given["temperature"]
    given = {**given, "other_temperature": temperature}
    per_row, numbers = transform_numbers(given, x, "other_")
    tensor = graph_inputs(numbers)
    temperature, softcap, logit_scale, _ = numbers if tensor is None else type(numbers)()
    others = float(temperature), float(softcap), float(logit_scale)
    return OtherSpec(given["other_bias"], per_row, *others, tensor)


def _checked_kind(kind: str, beta: float) -> Divergence:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    check_number("beta", beta, lambda v: 0 <= v <= 1, "in [0, 1]")
    if kind == "js" and beta in (0, 1):
        return Divergence("forward_kl" if beta == 0 else "reverse_kl")
    return Divergence(kind, float(beta))


def weigh(x: Tensor, token_weight: Tensor, asked: Asked) -> tuple[Tensor, Asked]:
    """The weights, and a spec that leaves out the rows of weight 0."""
    check_rows("token_weight", token_weight, x)
    weights = constant("token_weight", token_weight, accumulate_dtype(x.dtype))
    mask, counted = asked.spec.mask, token_weight != 0
    spec = asked.spec._replace(mask=counted if mask is None else mask & counted)
    return weights, asked._replace(spec=spec)


def check_some_gradient(**inputs: Tensor | None) -> None:
    if not torch.is_grad_enabled() or is_exporting():
        return
    if not any(x is not None and x.requires_grad for x in inputs.values()):
        names = " or ".join(inputs)
        raise ValueError(
            f"{names} must require grad for a loss to have a gradient, got none that does: call "
            "it under torch.no_grad() for its value"
        )
