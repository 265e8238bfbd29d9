"""Divergences of two softmax distributions: the public functions and their checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from em_kernels.backends.interface import RowSpec, TokenStats, serializable
from em_kernels.backends.pair import PairSaved
from em_kernels.backends.row_index import is_exporting
from em_kernels.ops.divergence_arguments import (
    check_some_gradient,
    checked_heads,
    checked_logits,
    weigh,
)
from em_kernels.ops.divergence_autograd import (
    Asked,
    HeadPairs,
    LogitPairs,
    Operands,
    Pairs,
    PairSource,
    needs_of,
    per_token,
    weighted,
    weighted_sum,
)
from em_kernels.ops.linear_softmax_stats import product_arguments
from em_kernels.ops.options import DivergenceOptions, LinearDivergenceOptions, takes_options
from em_kernels.ops.registry import record
from em_kernels.ops.sources import copy_to_ranks

_SAVED = len(PairSaved._fields)


@serializable
class TokenDivergence(NamedTuple):
    """Per token, of the leading shape: the divergence, and detached statistics of either side."""

    divergence: Tensor
    stats: TokenStats
    other_stats: TokenStats


@serializable
class WeightedDivergence(NamedTuple):
    """A scalar loss with its gradient ready, and what the same pass gave, detached."""

    loss: Tensor
    divergence: Tensor
    stats: TokenStats
    other_stats: TokenStats


@takes_options
def divergence(
    logits: Tensor, other_logits: Tensor, **options: Unpack[DivergenceOptions]
) -> Tensor:
    """The divergence of softmax(logits) = p from softmax(other_logits) = q, of every row, in nats.

    With z and w the logits of the two sides as in `softmax_stats` (softcap, scale, temperature):

        "forward_kl"   KL(q || p) = sum_v q_v (log q_v - log p_v)
        "reverse_kl"   KL(p || q)
        "js"           beta KL(q || m) + (1 - beta) KL(p || m),   m = beta q + (1 - beta) p

    Logits of any finite size have the divergence of their softmaxes. It is infinite where log p_v -
    log q_v is beyond the range of float32 (float64) at an entry that it is weighed by.

    q is the teacher or the reference. As in TRL and Liger, "js" with beta 0 is the forward KL and
    with beta 1 the reverse KL, which the formula, divided by beta (1 - beta), tends to; beta 0.5 is
    the Jensen-Shannon divergence. It is summed as KL(p || m) = sum_v p_v (e^-u_v - 1 + u_v), with
    u_v = log(p_v / m_v): no term is negative, so a divergence of 1e-9 keeps its digits.

    Gradients, in z and in w, each times the slope of its side:

        forward KL   p - q                                      q (log(q / p) - KL)
        reverse KL   p (log(p / q) - KL)                        q - p
        js           (1 - beta) p (log(p / m) - KL(p || m))     beta q (log(q / m) - KL(q || m))

    Args:
        logits, other_logits: (..., V), of one shape; a dtype each, float32, bfloat16, float16 or
            float64. -inf is probability 0: it adds nothing where both sides have it, and makes
            the KL infinite that weighs the other side's probability there; that row's gradients
            are then 0, but for those that are p - q. A row with NaN, +inf or no finite logit, on
            either side, is NaN.
        target: (...) int64 token ids, for `ignore_index` alone.

    Returns:
        (...) float32 (float64 for float64), differentiable in both sides. Derivatives of the
        gradients are those of the definition, in plain PyTorch; with `group` a RuntimeError.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source: Kullback and Leibler, "On Information and Sufficiency" (1951); Lin, "Divergence measures
    based on the Shannon entropy" (1991); Agarwal et al., "On-Policy Distillation of Language
    Models: Learning from Self-Generated Mistakes" (2024), arXiv:2306.13649, for beta.
    """
    return divergence_stats(logits, other_logits, **options).divergence


@takes_options
def divergence_stats(
    logits: Tensor,
    other_logits: Tensor,
    *,
    outputs: tuple[str, ...] = (),
    other_outputs: tuple[str, ...] = (),
    **options: Unpack[DivergenceOptions],
) -> TokenDivergence:
    """`divergence`, with statistics of either side out of the same pass.

    Args:
        outputs, other_outputs: names of `TokenStats` for the first side and for the other,
            detached; the entropy of a teacher is other_outputs=("entropy",).
        target: (...) int64 token ids, of both sides, for `ignore_index` and what needs a target.

    Returns, raises: as `divergence`.
    """
    given, logits, other_logits, asked = checked_logits(
        logits, other_logits, outputs, other_outputs, options
    )
    needs = logits.requires_grad, other_logits.requires_grad
    operands = Operands(logits, None, other_logits, None)
    return _per_token(operands, asked, LogitPairs(needs, given["impl"]))


@takes_options
def divergence_loss(
    logits: Tensor,
    other_logits: Tensor,
    *,
    token_weight: Tensor,
    outputs: tuple[str, ...] = (),
    other_outputs: tuple[str, ...] = (),
    **options: Unpack[DivergenceOptions],
) -> WeightedDivergence:
    """loss = sum_i token_weight_i D_i, whose gradient is made in the forward pass.

    Args:
        token_weight: (...) constants (no gradient). A token with weight 0 is treated as masked: it
            is not computed and reports 0.
        outputs, other_outputs: as in `divergence_stats`.
        target: as in `divergence_stats`.

    Returns:
        WeightedDivergence(loss, divergence, stats, other_stats): a float32 (float64) scalar, the
        D_i and the statistics detached. The gradient has no derivative: a RuntimeError.

    Raises:
        TypeError, ValueError: as `divergence`; and where nothing requires grad though gradients
            are recorded: call it under torch.no_grad() for the value alone.
    """
    given, logits, other_logits, asked = checked_logits(
        logits, other_logits, outputs, other_outputs, options
    )
    weights, asked = weigh(logits, token_weight, asked)
    check_some_gradient(logits=logits, other_logits=other_logits)
    recording = torch.is_grad_enabled()
    needs = recording and logits.requires_grad, recording and other_logits.requires_grad
    operands = Operands(logits, None, other_logits, None)
    return _weighted(operands, asked, LogitPairs(needs, given["impl"]), weights)


@takes_options
def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    other_hidden: Tensor,
    other_weight: Tensor,
    **options: Unpack[LinearDivergenceOptions],
) -> Tensor:
    """`divergence(hidden @ weight.T, other_hidden @ other_weight.T)`, a chunk of rows at a time.

    Forward costs a matrix product for each head. Backward multiplies both again and makes dX and
    dW of each head that requires grad; a frozen one costs no product more and no memory.

    Args:
        hidden, weight: (..., D) and (V, D), as in `linear_softmax_stats`.
        other_hidden, other_weight: (..., D') and (V, D') of the other head: the same tokens and
            the same vocabulary, D' and dtype its own.
        chunk_tokens: rows per chunk. None fits the logits of both heads, of a chunk, into 160 MiB
            on a CPU and 1 GiB on a GPU.
        group: `weight`, `other_weight` and the biases are this rank's rows of the vocabulary, cut
            alike; hidden states are the same on every rank, and their gradients are summed over the
            ranks. Weights that are DTensors are read as in `linear_softmax_stats`.
        target: (...) int64 token ids, for `ignore_index` alone.

    Returns, raises: as `divergence`.
    """
    pair = hidden, weight, other_hidden, other_weight
    return linear_divergence_stats(*pair, **options).divergence


@takes_options
def linear_divergence_stats(
    hidden: Tensor,
    weight: Tensor,
    other_hidden: Tensor,
    other_weight: Tensor,
    *,
    outputs: tuple[str, ...] = (),
    other_outputs: tuple[str, ...] = (),
    **options: Unpack[LinearDivergenceOptions],
) -> TokenDivergence:
    """`linear_divergence`, with statistics of either side out of the same pass.

    Args:
        hidden, weight, other_hidden, other_weight, chunk_tokens, group: as in `linear_divergence`.
        outputs, other_outputs: as in `divergence_stats`.
        target: as in `divergence_stats`.

    Returns, raises: as `divergence`.
    """
    given, operands, asked = checked_heads(
        (hidden, weight, other_hidden, other_weight), outputs, other_outputs, options
    )
    source = HeadPairs(_needs(operands, asked), *product_arguments(given))
    return _per_token(_on_ranks(operands, asked.spec, given), asked, source)


@takes_options
def linear_divergence_loss(
    hidden: Tensor,
    weight: Tensor,
    other_hidden: Tensor,
    other_weight: Tensor,
    *,
    token_weight: Tensor,
    outputs: tuple[str, ...] = (),
    other_outputs: tuple[str, ...] = (),
    **options: Unpack[LinearDivergenceOptions],
) -> WeightedDivergence:
    """`divergence_loss` of two heads, in four matrix products where one of them is frozen, in six
    where none is.

    Memory beyond inputs and gradients: the logits of `chunk_tokens` rows of both heads and, for
    16-bit weights cut into several chunks, a float32 accumulator of each weight's shape.

    Args:
        hidden, weight, other_hidden, other_weight, chunk_tokens, group: as in `linear_divergence`.
        token_weight, outputs, other_outputs: as in `divergence_loss`.
        target: as in `divergence_stats`.

    Returns, raises: as `divergence_loss`.
    """
    given, operands, asked = checked_heads(
        (hidden, weight, other_hidden, other_weight), outputs, other_outputs, options
    )
    weights, asked = weigh(operands.x, token_weight, asked)
    named = dict(zip(("hidden", "weight", "other_hidden", "other_weight"), operands))
    check_some_gradient(**named, bias=asked.spec.bias, other_bias=asked.other.bias)
    source = HeadPairs(_needs(operands, asked), *product_arguments(given))
    return _weighted(_on_ranks(operands, asked.spec, given), asked, source, weights)


def _needs(operands: Operands, asked: Asked) -> Any:
    own = operands.x, operands.weight, asked.spec.bias
    other = operands.other_x, operands.other_weight, asked.other.bias
    return needs_of(own), needs_of(other)


def _on_ranks(operands: Operands, spec: RowSpec, given: Mapping[str, Any]) -> Operands:
    """The hidden states, whose gradients are summed over the ranks of a group."""
    if is_exporting() or not given["allreduce_dgrad"]:  # an operator sums them by itself
        return operands
    own, other = (copy_to_ranks(x, spec.group) for x in (operands.x, operands.other_x))
    return operands._replace(x=own, other_x=other)


def _per_token(operands: Operands, asked: Asked, source: PairSource) -> TokenDivergence:
    if is_exporting():  # a program keeps the operator and no autograd function
        rows = record(source.statistics(operands, asked))[_SAVED:]
        return _pack([rows[0], *(row.detach() for row in rows[1:])], asked)
    return _pack(per_token(Pairs(operands, *asked, source))[_SAVED:], asked)


def _weighted(
    operands: Operands, asked: Asked, source: PairSource, weights: Tensor
) -> WeightedDivergence:
    if is_exporting():
        rows = record(source.statistics(operands, asked))[_SAVED:]
        results = [weighted_sum(rows[0], weights), *(row.detach() for row in rows)]
    else:
        results = weighted(Pairs(operands, *asked, source, weights))
    total, *rows = results
    return WeightedDivergence(total, *_pack(rows, asked))


def _pack(rows: Sequence[Tensor], asked: Asked) -> TokenDivergence:
    value, *stats = rows
    count = len(asked.outputs)
    own = TokenStats(**dict(zip(asked.outputs, stats[:count], strict=True)))
    other = TokenStats(**dict(zip(asked.other_outputs, stats[count:], strict=True)))
    return TokenDivergence(value, own, other)
