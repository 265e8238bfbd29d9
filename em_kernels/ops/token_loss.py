"""Losses whose per-token weights are known in advance: the gradient is made in the forward pass.

From hidden states that takes three matrix products instead of four, and nothing of the size of the
vocabulary is kept or computed twice.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Unpack

from em_kernels.backends.interface import (
    RowSpec,
    TokenStats,
    Upstream,
    accumulate_dtype,
    serializable,
)
from em_kernels.backends.row_index import is_exporting
from em_kernels.linear.low_rank import LowRank
from em_kernels.ops.arguments import (
    check_allreduce_dgrad,
    check_logits,
    check_outputs,
    make_spec,
    row_mask,
)
from em_kernels.ops.checks import check_flag, check_rows, check_shape, check_tensor, constant
from em_kernels.ops.chosen import Form, served
from em_kernels.ops.dtensor import local_logits, local_operands
from em_kernels.ops.forward_gradient import Call, all_outputs, loss, remember, with_loss
from em_kernels.ops.linear_softmax_stats import (
    needs_of,
    product_arguments,
    product_operands,
    sum_of,
)
from em_kernels.ops.lora import low_part
from em_kernels.ops.options import (
    DEFAULTS,
    ChunkOptions,
    EntropyOptions,
    LinearEntropyOptions,
    RowOptions,
    takes_options,
)
from em_kernels.ops.reductions import Sequences, reduction_weight
from em_kernels.ops.registry import record
from em_kernels.ops.schemas import LinearStats, SoftmaxStats
from em_kernels.ops.sources import FromHidden, FromLogits, copy_to_ranks
from em_kernels.ops.statistics import Call as StatisticsCall
from em_kernels.ops.statistics import low_needs, statistics


@serializable
class TokenLoss(NamedTuple):
    """A scalar loss with its gradient ready, and the detached statistics of the same pass."""

    loss: Tensor
    stats: TokenStats


@takes_options
def token_loss(
    logits: Tensor,
    target: Tensor | None = None,
    *,
    entropy_weight: Tensor | None = None,
    logprob_weight: Tensor | None = None,
    inplace: bool = False,
    **options: Unpack[RowOptions],
) -> TokenLoss:
    """loss = sum_i entropy_weight_i H_i + logprob_weight_i logprob_i, gradient included.

    With weights w_i = mask_i / sum(mask) on H it is entropy minimisation; with logprob_weight
    = -1/n and entropy_weight = lambda/n it is SFT + lambda H; with logprob_weight = -A_i / n the
    on-policy policy gradient.

    Args:
        logits, target: as in `softmax_stats`.
        entropy_weight, logprob_weight: (...) constants (no gradient), at least one of them;
            `logprob_weight` needs a target, and is (..., K) as that where it is: the loss is then
            summed over k too. A token with no weight is treated as masked: it is
            not computed and its statistics are 0. Where a weight times a statistic, or times
            logit_scale / temperature, is beyond float32 (float64), the loss is infinite or NaN, or
            the token's gradient.
        inplace: may overwrite the memory of `logits` with their gradient.

    Returns:
        TokenLoss(loss, stats): a float32 (float64) scalar, and the detached `TokenStats` asked
        for in `outputs`. Its second derivative is as that of `softmax_stats`; since a loss keeps
        nothing for it, it needs the tensors it was given still in memory and as they were, and is
        a RuntimeError without them.

    Raises:
        TypeError, ValueError: naming the argument and what was received.
    """
    given = {**DEFAULTS, **options}
    check_flag("inplace", inplace)
    logits, given["group"] = local_logits(logits, given["group"])
    check_logits(logits, empty=given["group"] is not None)
    spec = make_spec(logits, logits.shape[-1], target, given, ids=True)
    weights, spec = _weigh(logits, spec, entropy_weight, logprob_weight)
    outputs, impl = check_outputs(options, target), given["impl"]
    spec, form = served(spec, outputs, logits)
    weights = form.weights(weights)
    if is_exporting():
        names = all_outputs(outputs, weights)
        rows = record(SoftmaxStats(logits, spec, names, impl))
        return _pack_loss(outputs, form, with_loss(outputs, names, rows, weights, spec))
    needed = torch.is_grad_enabled() and logits.requires_grad
    source = FromLogits(impl, needed, inplace and not torch.compiler.is_compiling())
    memory = remember((logits, None, None), spec, weights, logits.dtype)
    return _pack_loss(
        outputs, form, loss(Call(logits, None, spec, weights, outputs, source, memory))
    )


@takes_options
def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    entropy_weight: Tensor | None = None,
    logprob_weight: Tensor | None = None,
    **options: Unpack[ChunkOptions],
) -> TokenLoss:
    """`token_loss(hidden @ weight.T)` in three matrix products, a chunk of rows at a time.

    On a GPU rows are left out of the products only where a `mask` is given, which waits for the
    device, once; `mask=target != ignore_index` leaves out the ignored. Memory beyond inputs and
    gradients: the logits of `chunk_tokens` rows and, for 16-bit weights cut into several chunks,
    one float32 accumulator of the weight's shape. Gradients of float16 operands are float32 until
    backward has multiplied them by the loss scale, and rounded once.

    Args:
        hidden, weight, bias, group: as in `linear_softmax_stats`.
        target, entropy_weight, logprob_weight: as in `token_loss`; the weights are the upstream
            gradients of `filter_eps`.

    Returns, raises: as `token_loss`.
    """
    given = {**DEFAULTS, **options}
    check_allreduce_dgrad(given["allreduce_dgrad"], hidden)
    whole = weight
    hidden, weight, bias, given["group"] = local_operands(hidden, weight, bias, given["group"])
    own = hidden, weight, bias
    hidden, weight = product_operands(hidden, weight, bias, given)
    into = sum_of(given, whole, weight)
    spec = make_spec(hidden, weight.shape[0], target, given, bias, ids=True)
    weights, spec = _weigh(hidden, spec, entropy_weight, logprob_weight)
    outputs = check_outputs(options, target)
    spec, form = served(spec, outputs, hidden)
    weights = form.weights(weights)
    if is_exporting():
        names = all_outputs(outputs, weights)
        part = LowRank(*low_part(own[0], weight, given))
        arguments = hidden, weight, spec, names, *product_arguments(given)
        rows = record(LinearStats(*arguments, low=part))
        return _pack_loss(outputs, form, with_loss(outputs, names, rows, weights, spec))
    needs = needs_of(("loss",), hidden, weight, spec, given)
    low = low_part(own[0], weight, given, spec.group)
    hidden = copy_to_ranks(hidden, spec.group if given["allreduce_dgrad"] else None)
    product, of_low = product_arguments(given), low_needs(("loss",), low)
    if into is not None and needs.weight:  # what the gradient is multiplied by is not known yet
        names = all_outputs(outputs, weights)
        source = FromHidden(needs, *product, keep_logits=None, into=into, low_needs=of_low)
        made = statistics(StatisticsCall(hidden, weight, spec, names, source, low))
        return _pack_loss(outputs, form, with_loss(outputs, names, made, weights, spec))
    source = FromHidden(needs, *product, low_needs=of_low)
    memory = remember(own, spec, weights, hidden.dtype, low)
    call = Call(hidden, weight, spec, weights, outputs, source, memory, low)
    return _pack_loss(outputs, form, loss(call))


@takes_options
def entropy_loss(
    logits: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: str | float = "token_mean",
    segment_ids: Tensor | None = None,
    token_group: dist.ProcessGroup | None = None,
    **options: Unpack[EntropyOptions],
) -> Tensor:
    """The entropy-minimisation loss: the reduced entropy of softmax(z / T) over masked tokens.

    token_mean:     sum_t mask_t H_t / sum_t mask_t
    sequence_mean:  the mean over each sequence, then over the sequences that have a token
    sum:            sum_t mask_t H_t;  a float c: sum_t mask_t H_t / c

    No token at all gives 0. A sequence is a row of the mask (its last dimension), or what
    `segment_ids` say.

    With a `token_group` the means are those over the tokens of all its ranks, and the result is
    this rank's part of one: L_r = sum over its own tokens of w_t H_t, of which sum_r L_r is the
    mean. Gradients summed over the ranks are then those of the mean. DDP and FSDP average them
    over their W ranks: give them W L_r.

    Args:
        logits, mask: as in `softmax_stats`.
        reduction: one of the names above, or c > 0, of which and of 1 / c float32 (float64 for
            float64 logits) has a number: from 1.18e-38 to 8.51e37.
        segment_ids: (...) integers: tokens with equal ids are one sequence, in whatever rows and
            on whatever ranks of `token_group` they lie, so that ids must differ between all
            sequences of all ranks. Tokens of a negative id are padding, masked in every reduction.
            `segment_ids_from_cu_seqlens` and `segment_ids_from_position_ids` make them.
        token_group: torch.distributed process group of the ranks that have other tokens
            (data or context parallel; each may have its own number of them, or none). Without
            `segment_ids` their rows are other sequences. Every rank must make the call; all but
            "sum" and a float exchange counts, which waits for the device.

    Source: Gao et al., "One-shot Entropy Minimization" (2025), arXiv:2505.20282: token_mean.
    """
    check_logits(logits, empty=options.get("group") is not None)
    reduced = _reduced(logits, mask, reduction, segment_ids, token_group)
    return token_loss(logits, outputs=(), **reduced, **options).loss


@takes_options
def linear_entropy_loss(
    hidden: Tensor,
    weight: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    reduction: str | float = "token_mean",
    segment_ids: Tensor | None = None,
    token_group: dist.ProcessGroup | None = None,
    **options: Unpack[LinearEntropyOptions],
) -> Tensor:
    """`entropy_loss(hidden @ weight.T)` in three matrix products; never holds all the logits.

    Rows where a `mask` is 0 are left out of them; on a GPU finding the others waits for the device.

    Args:
        hidden, weight, bias, group: as in `linear_softmax_stats`.
        mask, reduction, segment_ids, token_group: as in `entropy_loss`.
    """
    check_logits(hidden, "hidden")
    reduced = _reduced(hidden, mask, reduction, segment_ids, token_group)
    return linear_token_loss(hidden, weight, bias=bias, outputs=(), **reduced, **options).loss


def _shown(value: object) -> str:
    """A tensor by its shape, not its numbers: `lora` and `accumulate_into` are large."""
    if isinstance(value, Tensor):
        return f"<{tuple(value.shape)}, {value.dtype}>"
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    return repr(value)


class EntropyLoss(nn.Module):
    """`entropy_loss` with its options fixed; call it with (logits, mask=None, segment_ids=None)."""

    @takes_options
    def __init__(
        self,
        *,
        reduction: str | float = "token_mean",
        token_group: dist.ProcessGroup | None = None,
        **options: Unpack[EntropyOptions],
    ) -> None:
        super().__init__()
        self.options = _fixed(reduction, token_group, options)

    def forward(
        self, logits: Tensor, mask: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> Tensor:
        return entropy_loss(logits, mask, segment_ids=segment_ids, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={_shown(value)}" for name, value in self.options.items())


class LinearEntropyLoss(EntropyLoss):
    """`linear_entropy_loss` with its options fixed; call it with (hidden, weight, mask, bias,
    segment_ids)."""

    @takes_options
    def __init__(
        self,
        *,
        reduction: str | float = "token_mean",
        token_group: dist.ProcessGroup | None = None,
        **options: Unpack[LinearEntropyOptions],
    ) -> None:
        super().__init__()
        self.options = _fixed(reduction, token_group, options)

    def forward(  # type: ignore[override]  # it is a loss of other inputs
        self,
        hidden: Tensor,
        weight: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        return linear_entropy_loss(
            hidden, weight, mask, bias=bias, segment_ids=segment_ids, **self.options
        )


def _fixed(reduction: str | float, token_group: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    across = {} if token_group is None else {"token_group": token_group}
    return {"reduction": reduction, **across, "temperature": DEFAULTS["temperature"], **options}


def _weigh(
    x: Tensor, spec: RowSpec, entropy_weight: Any, logprob_weight: Tensor | None
) -> tuple[Upstream, RowSpec]:
    """Check the weights; return them and the spec, with weightless rows masked out.

    The weight of a `_Reduction` is 0 in no row of the mask.
    """
    if entropy_weight is None and logprob_weight is None:
        raise ValueError("entropy_weight or logprob_weight must be given, got None for both")
    if logprob_weight is not None and spec.target is None:
        raise ValueError("logprob_weight needs a target, got target=None")
    reduced = isinstance(entropy_weight, _Reduction)
    if isinstance(entropy_weight, _Reduction):
        entropy_weight = entropy_weight.weight
    weights, mask = [], spec.mask
    for name, weight in (("logprob_weight", logprob_weight), ("entropy_weight", entropy_weight)):
        if weight is not None:
            if name == "logprob_weight" and spec.target is not None:
                check_tensor(name, weight)
                check_shape(name, weight, spec.target)
            else:
                check_rows(name, weight, x)
            weight = constant(name, weight, accumulate_dtype(x.dtype))
        weights.append(weight)
    if not reduced:
        given = [w != 0 for w in weights if w is not None]
        rows = [w.any(-1) if w.dim() == x.dim() else w for w in given]
        weighted = functools.reduce(torch.logical_or, rows)
        mask = weighted if mask is None else mask & weighted
    return Upstream(*weights), spec._replace(mask=mask)


class _Reduction(NamedTuple):
    """The weight of every token in a reduced loss."""

    weight: Tensor


def _reduced(
    x: Tensor,
    mask: Tensor | None,
    reduction: str | float,
    segment_ids: Tensor | None,
    token_group: dist.ProcessGroup | None,
) -> dict[str, Any]:
    """The arguments of `token_loss` that make it the reduced entropy."""
    mask = row_mask(x, None, 0, mask)
    counted = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask
    sequences = Sequences.of(segment_ids, token_group, counted)
    if segment_ids is not None:
        counted = mask = sequences.without_padding(counted)
    weight = reduction_weight(counted, reduction, accumulate_dtype(x.dtype), sequences)
    return {"entropy_weight": _Reduction(weight), "mask": mask}


def _pack_loss(outputs: tuple[str, ...], form: Form, results: tuple[Tensor, ...]) -> TokenLoss:
    total, *values = results
    return TokenLoss(total, form.results(dict(zip(outputs, values))))
