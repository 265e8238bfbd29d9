"""The k likeliest tokens of a row and their log-probabilities: functions and operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from em_kernels.backends.interface import Backend, RowSpec, accumulate_dtype, serializable
from em_kernels.backends.specs import as_rows
from em_kernels.backends.top_ids import top_logprobs as find_top
from em_kernels.linear import chunks
from em_kernels.linear.low_rank import LowRank
from em_kernels.ops.arguments import check_logits, make_spec
from em_kernels.ops.checks import check_int
from em_kernels.ops.dtensor import local_logits, local_operands
from em_kernels.ops.linear_softmax_stats import product_arguments, product_operands
from em_kernels.ops.lora import low_part
from em_kernels.ops.options import DEFAULTS, LinearTopOptions, TopOptions, takes_options
from em_kernels.ops.registry import Operator, define, record
from em_kernels.ops.schemas import LinearTopCall, TopCall
from em_kernels.ops.serve import serve, serve_linear


@serializable
class TopLogprobs(NamedTuple):
    """ids: (..., k) int64. logprob: (..., k) float32 (float64 for float64), in nats."""

    ids: Tensor
    logprob: Tensor


@takes_options
def top_logprobs(logits: Tensor, k: int, **options: Unpack[TopOptions]) -> TopLogprobs:
    """The k likeliest tokens of softmax(z) of every row, and log p of each, without gradient.

        z = softcap(logit_scale * logits) / temperature
        ids = the k of the largest z, in descending order, the lower id first where u are equal
        logprob_j = z_{ids_j} - lse z

    It is what is stored of a teacher or of the policy that sampled, to be a label later:
    `softmax_stats` with target=ids has the student's log-probabilities, with their gradient, and
    `objectives.ppl.topk_label_kl` the KL. The log-probabilities here are those that it would give.

    Args:
        logits: (..., V), as in `softmax_stats`.
        k: in [1, V], or up to `valid_vocab`; with `group` up to the whole vocabulary.
        ignore_index: what stands for ids in rows where `mask` is 0; their logprob is 0.

    Returns:
        TopLogprobs. Entries of probability 0 come last, by their ids, with logprob -inf. In a row
        with NaN, +inf or no finite logit logprob is NaN, and the ids mean nothing.

    Raises:
        TypeError, ValueError: naming the argument and what was received.
    """
    given = {**DEFAULTS, **options}
    _check_k(k)
    logits, given["group"] = local_logits(logits, given["group"])
    check_logits(logits, empty=given["group"] is not None)
    spec = make_spec(logits, logits.shape[-1], None, given)
    return _found(TopCall(logits.detach(), spec, k, given["impl"]), given)


@takes_options
def linear_top_logprobs(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    **options: Unpack[LinearTopOptions],
) -> TopLogprobs:
    """`top_logprobs(hidden @ weight.T)` with the logits of only `chunk_tokens` rows at a time.

    z = softcap(logit_scale * (hidden @ weight.T) + bias) / temperature. One matrix product; what is
    kept of a chunk is (rows, k). `linear_softmax_stats` of these ids, k > 1, has the same bits
    where it multiplies in the same chunks.

    Args:
        hidden, weight, bias: as in `linear_softmax_stats`; none gets a gradient.
        k, ignore_index: as in `top_logprobs`.

    Returns, raises: as `top_logprobs`.
    """
    given = {**DEFAULTS, **options}
    _check_k(k)
    with torch.no_grad():
        hidden, weight, bias, given["group"] = local_operands(hidden, weight, bias, given["group"])
        own = hidden
        hidden, weight = product_operands(hidden, weight, bias, given)
        spec = make_spec(hidden, weight.shape[0], None, given, bias)
        low = LowRank(*low_part(own, weight, given, spec.group))
        call = LinearTopCall(hidden, weight, spec, k, *product_arguments(given), low)
        return _found(call, given)


def _found(call: TopCall | LinearTopCall, given: Mapping[str, Any]) -> TopLogprobs:
    with torch.no_grad():
        ids, logprob = record(call)
    mask = call.spec.mask
    if mask is not None:
        ids = torch.where(mask[..., None], ids, given["ignore_index"])
    return TopLogprobs(ids, logprob)


def _check_k(k: int) -> None:
    check_int("k", k)
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")


def _top(call: TopCall) -> list[Tensor]:
    logits, k = call.logits, call.k
    module, spec = serve(call.impl, logits, logits.shape[-1], call.spec, options=(k,))
    _check_entries(k, module, spec)
    return _shaped(find_top(module, as_rows(logits), spec, k), logits.shape[:-1])


def _linear_top(call: LinearTopCall) -> list[Tensor]:
    hidden, k = call.hidden, call.k
    module, spec, linear = serve_linear(call, (), (k,))
    _check_entries(k, module, spec)
    with torch.autocast(hidden.device.type, enabled=False):
        found = chunks.top_logprobs(linear, spec, k, module)
    return _shaped(found, hidden.shape[:-1])


def _check_entries(k: int, module: Backend, spec: RowSpec) -> None:
    entries = spec.valid_vocab if module.entries is None else module.entries
    if k > entries:
        raise ValueError(f"k must be at most {entries}, the entries of the vocabulary, got {k}")


def _shaped(found: Sequence[Tensor], shape: torch.Size) -> list[Tensor]:
    return [torch.ops.aten._unsafe_view(x, (*shape, x.shape[-1])) for x in found]


def _fake(call: TopCall | LinearTopCall) -> list[Tensor]:
    x = call[0]
    kinds = torch.int64, accumulate_dtype(x.dtype)
    return [x.new_empty((*x.shape[:-1], call.k), dtype=kind) for kind in kinds]


define("top_logprobs", Operator(TopCall, _top, _fake))
define("linear_top_logprobs", Operator(LinearTopCall, _linear_top, _fake))
