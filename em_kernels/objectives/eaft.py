"""EAFT: cross entropy weighted by how unsure the model is, so that it unlearns less."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from em_kernels.backends.interface import accumulate_dtype
from em_kernels.objectives._inputs import masked
from em_kernels.objectives.aggregation import aggregation_weight
from em_kernels.ops.arguments import check_logits
from em_kernels.ops.checks import (
    check_floating,
    check_int,
    check_number,
    check_rows,
    constant,
    count_mask,
)
from em_kernels.ops.options import (
    IGNORED,
    LinearTopOptions,
    ProductOptions,
    SumOptions,
    TopOptions,
    takes_options,
)
from em_kernels.ops.token_loss import TokenLoss, linear_token_loss, token_loss
from em_kernels.ops.top_logprobs import linear_top_logprobs, top_logprobs

TOP_K = 20


class LogitEaftOptions(TopOptions, total=False):
    outputs: tuple[str, ...]


class LinearEaftOptions(LinearTopOptions, ProductOptions, SumOptions, total=False):
    outputs: tuple[str, ...]


@torch.no_grad()
def eaft_weight(top_logprob: Tensor, mask: Tensor, *, alpha: float = 1.0) -> Tensor:
    """w_t = (H_t / ln K)^alpha, H the entropy of the K likeliest tokens, renormalised:

        q_j = p_j / sum_i p_i,   H = -sum_j q_j ln q_j,   j among the K of the largest p

    0 where the model is sure of one token, 1 where the K are equally likely. With alpha = 0 it is 1
    everywhere: plain cross entropy.

    Args:
        top_logprob: (..., K) floating point, log p of the K likeliest tokens (`top_logprobs`,
            `linear_top_logprobs`), K >= 2; -inf is a token of probability 0. No gradient.
        mask: (...) bool or numeric; where it is 0 the weight is 0, even from NaN.
        alpha: exponent, >= 0.

    Returns:
        (...) float32 (float64 for float64), in [0, 1] up to rounding, detached.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Diao et al., "Entropy-Adaptive Fine-Tuning: Resolving Confident Conflicts to Mitigate
    Forgetting" (2026), arXiv:2601.02151; K = 20, the exponent and the renormalised H are those of
    their code in LLaMA-Factory (`use_eaft_loss`), which divides by 3.0, ln 20 to 0.2 %. ln K for
    every K is this library's choice. Axolotl does not divide.
    """
    check_floating("top_logprob", top_logprob)
    check_number("alpha", alpha, lambda v: v >= 0, "at least 0")
    if top_logprob.dim() == 0 or top_logprob.shape[-1] < 2:
        raise ValueError(
            "top_logprob must be (..., K) of 2 tokens or more, whose entropy is not 0, got shape "
            f"{tuple(top_logprob.shape)}"
        )
    counted = count_mask(mask, top_logprob[..., 0])
    logprob = masked(top_logprob, counted[..., None])
    entropy = torch.special.entr(logprob.softmax(-1)).sum(-1)
    return masked((entropy / math.log(top_logprob.shape[-1])) ** alpha, counted)


@takes_options
def eaft_loss(
    logits: Tensor,
    target: Tensor,
    *,
    token_weight: Tensor | None = None,
    k: int = TOP_K,
    alpha: float = 1.0,
    **options: Unpack[LogitEaftOptions],
) -> TokenLoss:
    """`linear_eaft_loss` of logits that are there.

    Args:
        logits: (..., V), as in `softmax_stats`.
        target, token_weight, k, alpha, mask: as in `linear_eaft_loss`.

    Returns, raises, source: as `linear_eaft_loss`.
    """
    check_eaft(k, alpha)
    check_logits(logits)
    given: dict[str, Any] = dict(options)
    given["mask"], own = _of_tokens(logits, target, token_weight, given)
    top = top_logprobs(logits.detach(), k, **_among(given, TopOptions))
    weight = -own * eaft_weight(top.logprob, given["mask"], alpha=alpha)
    return token_loss(logits, target, logprob_weight=_as(logits, weight), **given)


@takes_options
def linear_eaft_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    k: int = TOP_K,
    alpha: float = 1.0,
    **options: Unpack[LinearEaftOptions],
) -> TokenLoss:
    """loss = -sum_t a_t w_t log p_t(target_t), w the constants of `eaft_weight`, without logits.

    In two passes, in each of which the logits of `chunk_tokens` rows are there at a time: the k
    likeliest tokens of every row, then the loss with its gradient. That is one matrix product more
    than the cross entropy of `linear_token_loss`.

    Args:
        hidden, weight, bias: as in `linear_softmax_stats`.
        target: (...) int64, the next token of the demonstration, `ignore_index` where none counts.
        token_weight: a, (...) constants, 0 where no token counts; None is the mean over the tokens
            that count, 1 / n. Of a batch that is cut, 1 / n of the whole batch.
        k: likeliest tokens whose entropy is taken, 2 or more.
        alpha: exponent of the entropy, >= 0; 0 is plain cross entropy.
        mask: (...) bool or numeric, tokens where it is 0 do not count; None is
            `target != ignore_index`.

    Returns:
        TokenLoss(loss, stats), as `linear_token_loss`: nothing of the weights is differentiated.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: as `eaft_weight`.
    """
    check_eaft(k, alpha)
    given: dict[str, Any] = dict(options)
    check_logits(hidden, "hidden")
    given["mask"], own = _of_tokens(hidden, target, token_weight, given)
    given["bias"] = bias
    top = linear_top_logprobs(hidden, weight, k, **_among(given, LinearTopOptions, "bias"))
    own = -own * eaft_weight(top.logprob, given["mask"], alpha=alpha)
    return linear_token_loss(hidden, weight, target, logprob_weight=_as(hidden, own), **given)


def check_eaft(k: int, alpha: float) -> None:
    check_int("k", k)
    if k < 2:
        raise ValueError(f"k must be 2 or more, of which the entropy is taken, got {k}")
    check_number("alpha", alpha, lambda v: v >= 0, "at least 0")


def _of_tokens(
    x: Tensor, target: Tensor, token_weight: Tensor | None, given: dict
) -> tuple[Tensor, Tensor]:
    """(the tokens that count, the weight of each in the loss); x is (..., V) or (..., D)"""
    check_rows("target", target, x)
    mask, ignored = given.get("mask"), given.get("ignore_index", IGNORED)
    check_int("ignore_index", ignored)
    counted = target != ignored
    if mask is not None:
        counted = counted & count_mask(mask, target)
    if token_weight is None:
        return counted, aggregation_weight(counted)
    check_rows("token_weight", token_weight, x)
    own = constant("token_weight", token_weight, accumulate_dtype(x.dtype))
    return counted, masked(own, counted)


def _among(given: dict, options: Any, *more: str) -> dict:
    return {name: x for name, x in given.items() if name in (*options.__annotations__, *more)}


def _as(x: Tensor, weight: Tensor) -> Tensor:
    return weight.to(accumulate_dtype(x.dtype))
