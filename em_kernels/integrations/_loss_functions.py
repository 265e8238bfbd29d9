"""`compute_loss_func` of transformers' Trainer, from what a patched model returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from em_kernels.backends.interface import accumulate_dtype
from em_kernels.objectives.eaft import eaft_loss, linear_eaft_loss
from em_kernels.ops.checks import check_number
from em_kernels.ops.options import IGNORED
from em_kernels.ops.segments import next_token_targets
from em_kernels.ops.token_loss import token_loss

LossFunction = Callable[..., Tensor]
"""(outputs, labels, num_items_in_batch=None) -> loss, as `transformers.Trainer` calls it."""
WeightNames = Callable[[Tensor], dict[str, Any]]
"""(1 / n for every token that counts) -> the arguments of the loss that are made of it."""


def weighted_loss(nll: float, entropy: float, temperature: float) -> LossFunction:
    """sum_t (-nll logprob_t + entropy H_t) / num_items_in_batch."""

    def weights(weight: Tensor) -> dict[str, Any]:
        return dict(
            logprob_weight=-nll * weight if nll else None,
            entropy_weight=entropy * weight if entropy else None,
        )

    return _loss_function(token_loss, None, weights, temperature)


def eaft(k: int, alpha: float, temperature: float) -> LossFunction:
    """sum_t -w_t logprob_t / num_items_in_batch."""

    def weights(weight: Tensor) -> dict[str, Any]:
        return dict(token_weight=weight, k=k, alpha=alpha)

    return _loss_function(eaft_loss, linear_eaft_loss, weights, temperature)


def _loss_function(
    of_logits: Callable, of_hidden: Callable | None, weights: WeightNames, temperature: float
) -> LossFunction:
    check_number("temperature", temperature, lambda v: v > 0, "positive")

    def compute_loss(outputs, labels, num_items_in_batch=None) -> Tensor:
        _check_batch(outputs, labels)
        logits, call = outputs.get("head_call") or (outputs.logits, None)
        target = next_token_targets(labels).to(logits.device)
        dtype = logits.dtype if call is None else call.hidden.dtype
        weight = _token_weight(target, dtype, num_items_in_batch)
        arguments: dict[str, Any] = dict(
            temperature=temperature, outputs=(), mask=target != IGNORED, **weights(weight)
        )
        if call is None:
            return of_logits(logits, target, **arguments).loss
        return call.loss(logits, target, of_hidden, **arguments)

    return compute_loss


def _check_batch(outputs, labels: Tensor | None) -> None:
    if labels is None:
        raise ValueError("labels must be in the batch, -100 where a token does not count; got None")
    if outputs.get("aux_loss") is not None:
        raise ValueError(
            "outputs have an aux_loss, which this loss leaves out: set "
            "model.config.output_router_logits = False"
        )


def _token_weight(target: Tensor, dtype: torch.dtype, items) -> Tensor:
    """1 / n where there is a target, n over the whole accumulated batch; 0 elsewhere, n = 0 too."""
    counted = (target != IGNORED).to(accumulate_dtype(dtype))
    return torch.where(counted > 0, counted / item_count(target, items, target.device), 0)


def item_count(target: Tensor, items: Tensor | float | None, device: torch.device) -> Tensor:
    """The targets of this batch, or of the whole accumulated batch if `items` says how many."""
    if items is None:
        return (target != IGNORED).sum().clamp(min=1).to(device)
    return torch.as_tensor(items).to(device)
