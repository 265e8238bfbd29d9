"""Divergences of two softmax distributions: the public functions and their checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from em_kernels.backends.interface import RowSpec, TokenStats, accumulate_dtype, serializable
from em_kernels.backends.pair import KINDS, Divergence, OtherSpec, PairSaved
from em_kernels.backends.row_index import is_exporting
from em_kernels.ops.arguments import (
    check_allreduce_dgrad,
    check_device,
    check_logits,
    check_number,
    check_rows,
    graph_inputs,
    make_spec,
    output_names,
    transform_numbers,
)
from em_kernels.ops.divergence_autograd import (
    Asked,
    HeadPairs,
    LogitPairs,
    Operands,
    PairSource,
    PerToken,
    Weighted,
    needs_of,
    per_token,
    weighted,
    weighted_sum,
)
from em_kernels.ops.dtensor import local_logits, local_operands
from em_kernels.ops.linear_softmax_stats import product_arguments, product_operands
from em_kernels.ops.options import (
    DEFAULTS,
    DivergenceOptions,
    LinearDivergenceOptions,
    takes_options,
)
from em_kernels.ops.registry import record
from em_kernels.ops.sources import copy_to_ranks

_Names = tuple[str, ...]


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
    given, logits, other_logits, asked = _checked_logits(
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
    given, logits, other_logits, asked = _checked_logits(
        logits, other_logits, outputs, other_outputs, options
    )
    weights, asked = _weigh(logits, token_weight, asked)
    _check_some_gradient(logits=logits, other_logits=other_logits)
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
    given, operands, asked = _checked_heads(
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
    given, operands, asked = _checked_heads(
        (hidden, weight, other_hidden, other_weight), outputs, other_outputs, options
    )
    weights, asked = _weigh(operands.x, token_weight, asked)
    named = dict(zip(("hidden", "weight", "other_hidden", "other_weight"), operands))
    _check_some_gradient(**named, bias=asked.spec.bias, other_bias=asked.other.bias)
    source = HeadPairs(_needs(operands, asked), *product_arguments(given))
    return _weighted(_on_ranks(operands, asked.spec, given), asked, source, weights)


def _checked_logits(
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


def _checked_heads(
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


def _weigh(x: Tensor, token_weight: Tensor, asked: Asked) -> tuple[Tensor, Asked]:
    """The weights, and a spec that leaves out the rows of weight 0."""
    check_rows("token_weight", token_weight, x)
    if token_weight.requires_grad:
        raise ValueError("token_weight must not require grad: it is a constant; detach it")
    mask, counted = asked.spec.mask, token_weight != 0
    spec = asked.spec._replace(mask=counted if mask is None else mask & counted)
    return token_weight.to(accumulate_dtype(x.dtype)), asked._replace(spec=spec)


def _check_some_gradient(**inputs: Tensor | None) -> None:
    if not torch.is_grad_enabled() or is_exporting():
        return
    if not any(x is not None and x.requires_grad for x in inputs.values()):
        names = " or ".join(inputs)
        raise ValueError(
            f"{names} must require grad for a loss to have a gradient, got none that does: call "
            "it under torch.no_grad() for its value"
        )


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
        rows = record(source.statistics(operands, asked))[len(PairSaved._fields) :]
        return _pack([rows[0], *(row.detach() for row in rows[1:])], asked)
    return _pack(per_token(PerToken(operands, *asked, source)), asked)


def _weighted(
    operands: Operands, asked: Asked, source: PairSource, weights: Tensor
) -> WeightedDivergence:
    if is_exporting():
        rows = record(source.statistics(operands, asked))[len(PairSaved._fields) :]
        results = [weighted_sum(rows[0], weights), *(row.detach() for row in rows)]
    else:
        results = weighted(Weighted(operands, *asked, source, weights))
    total, *rows = results
    return WeightedDivergence(total, *_pack(rows, asked))


def _pack(rows: Sequence[Tensor], asked: Asked) -> TokenDivergence:
    value, *stats = rows
    count = len(asked.outputs)
    own = TokenStats(**dict(zip(asked.outputs, stats[:count], strict=True)))
    other = TokenStats(**dict(zip(asked.other_outputs, stats[count:], strict=True)))
    return TokenDivergence(value, own, other)
