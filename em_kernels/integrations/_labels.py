"""Labels outside the vocabulary, as the replaced functions answer them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from em_kernels.backends.interface import MaybeNone, TokenStats
from em_kernels.backends.row_index import has_values, is_capturing
from em_kernels.ops.statistics import wanted_gradients


def integer_labels(labels: Tensor) -> Tensor:
    """int64 for integers of any size, as the replaced functions take them."""
    exact = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    return labels.to(torch.int64) if exact else labels


def known_labels(labels: Tensor, vocab: int, ignored: int) -> tuple[Tensor, Tensor]:
    """(labels with 0 for each that is neither in the vocabulary nor `ignored`, which are)."""
    labels = integer_labels(labels)
    known = (labels >= 0) & (labels < vocab) | (labels == ignored)
    return labels.masked_fill(~known, 0), known


def stats_of_known(
    call: Callable[..., TokenStats],
    labels: Tensor,
    known: Tensor,
    outputs: tuple[str, ...],
    few: bool,
) -> TokenStats:
    """`call(labels, outputs=outputs)`, with the logprob of an unknown label -log sum exp z.

    Kernels that look for the label among the logits leave its logit 0 where it is not there, so
    that this remains: finite, for the caller to mask.

    Args:
        call: `linear_softmax_stats` of some hidden states.
        known: of `known_labels`, which gave the labels too.
        few: whether no other output has a gradient, and no head: lse, which has one, is then asked
            for by itself and where it counts alone, so that logprob takes two products. On a GPU
            looking whether that is anywhere waits for the device.
    """
    if few:
        stats = call(labels, outputs=outputs)
        if can_look(known) and known.all():
            return stats
        lse = call(None, outputs=("lse",), mask=~known).lse
    else:
        stats = call(labels, outputs=(*outputs, "lse"))
        lse = stats.lse
    return stats._replace(logprob=torch.where(known, stats.logprob, -lse))


def can_look(x: Tensor) -> bool:
    """Whether `x` has values, and may be waited for."""
    return has_values(x) and not is_capturing(x)


def is_frozen(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a backward pass will want the gradient of the hidden states and not of the head."""
    return wanted_gradients(["logprob"], hidden, weight, bias) == (True, False, False)


class _Number(torch.autograd.Function):
    @staticmethod
    def forward(ctx, entropy, _):
        ctx.set_materialize_grads(False)
        return entropy.view_as(entropy)

    @staticmethod
    def backward(ctx, grad):
        if grad is not None and grad.any():
            raise RuntimeError(
                "the loss differentiates the entropy, which entropy_requires_grad=False takes as a "
                "number: switch over without it"
            )
        return None, None


def as_number(entropy: Tensor | None, logprob: Tensor) -> Tensor | MaybeNone:
    """The entropy, which has no gradient, so that a gradient other than 0 that comes for it is an
    error and not lost; the loss gets its gradient through `logprob`."""
    if entropy is None or torch.compiler.is_compiling() or not logprob.requires_grad:
        return entropy
    return _Number.apply(entropy, logprob)
