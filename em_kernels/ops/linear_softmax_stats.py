"""Per-token statistics of softmax(hidden @ weight.T) without holding all the logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from em_kernels.backends.choice import fusing_names
from em_kernels.backends.interface import (
    ROW_OUTPUTS,
    RowSpec,
    TokenStats,
    accumulate_dtype,
    row_kernels_make,
)
from em_kernels.backends.row_index import is_exporting
from em_kernels.linear.low_rank import LowRank
from em_kernels.linear.plan import Needs
from em_kernels.ops.arguments import (
    check_accumulate_into,
    check_allreduce_dgrad,
    check_chunks,
    check_filter_eps,
    check_keep_logits,
    check_linear,
    check_outputs,
    make_spec,
    product_dtype_of,
)
from em_kernels.ops.checks import check_flag
from em_kernels.ops.chosen import served
from em_kernels.ops.dtensor import local_operands
from em_kernels.ops.lora import low_part
from em_kernels.ops.options import DEFAULTS, LinearStatsOptions, takes_options
from em_kernels.ops.registry import record
from em_kernels.ops.schemas import LinearStats
from em_kernels.ops.sources import FromHidden, Into, Low, copy_to_ranks
from em_kernels.ops.statistics import (
    Call,
    differentiable_outputs,
    low_needs,
    pack_stats,
    statistics,
    wanted_gradients,
)
from em_kernels.ops.truncate import LIMITS


@takes_options
def linear_softmax_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    **options: Unpack[LinearStatsOptions],
) -> TokenStats:
    """`softmax_stats(hidden @ weight.T)` with the logits of only `chunk_tokens` rows at a time.

    z = softcap(logit_scale * (hidden @ weight.T) + bias) / temperature; statistics, gradients and
    the arguments not named here as in `softmax_stats`. A product that is beyond the range of the
    logits' dtype is an infinite logit. Forward costs one matrix product, backward
    up to three more (the logits again, dX, dW); a frozen `hidden` or `weight` (requires_grad=False)
    costs neither its product nor memory. Where `hidden` alone has a gradient, and one output alone
    brings it (one of logprob, entropy and lse is asked for, or logprob or lse and an entropy
    without gradient), the row's gradient is its upstream gradient times a vector that is known in
    the forward pass: that makes it, in two products in all, and keeps it, (N, D).

    Args:
        hidden: (..., D), float32, bfloat16, float16 or float64.
        weight: (V, D), any of these dtypes, see `product_dtype`; under autocast both are cast,
            as in F.linear.
        target: as in `softmax_stats`.
        bias: (V,) or None; added in float32.
        mask: as in `softmax_stats`. On a GPU rows are left out of the products only where a mask
            is given: finding them waits for the device, once for forward and backward. Rows left
            out by `ignore_index` alone (or, in a loss, by a weight of 0) are multiplied, and
            answered with zeros: mask=target != ignore_index leaves them out. While a CUDA graph is
            captured all rows are multiplied. On a CPU, and with `group`, all that do not count are
            left out.
        group: as in `softmax_stats`: `weight` and `bias` are this rank's rows of the vocabulary,
            `hidden` is the same on every rank and its gradient is summed over the ranks, once. A
            weight that is a DTensor sharded on dimension 0 brings its own group if its mesh
            dimension is named "tp", "tensor", "tensor_parallel" or "vocab" or is that of `group`;
            sharded over another mesh (FSDP2) it is gathered, its gradient averaged.

    Returns, raises: as `softmax_stats`. Gradients of `weight` and `bias` are summed in float32
    (float64 for float64) and rounded once.
    """
    given = {**DEFAULTS, **options}
    check_allreduce_dgrad(given["allreduce_dgrad"], hidden)
    for name in ("entropy_requires_grad", "fuse_product"):
        check_flag(name, given[name])
    whole = weight
    hidden, weight, bias, given["group"] = local_operands(hidden, weight, bias, given["group"])
    own = hidden
    hidden, weight = product_operands(hidden, weight, bias, given)
    into = sum_of(given, whole, weight)
    check_keep_logits(given["keep_logits"])
    if given["fuse_product"]:
        _check_fused((hidden, weight, bias), given)
    spec = make_spec(hidden, weight.shape[0], target, given, bias, ids=True)
    outputs = check_outputs(options, target)
    spec, form = served(spec, outputs, hidden)
    if given["fuse_product"]:
        _check_fused_rows(spec, outputs, hidden)
    if is_exporting() and not given["fuse_product"]:
        low = LowRank(*low_part(own, weight, given))
        product = product_arguments(given)
        call = LinearStats(hidden, weight, spec, outputs, *product, low=low)
        rows: Sequence[Tensor] = record(call)
    else:
        low_rank = low_part(own, weight, given, spec.group)
        hidden = copy_to_ranks(hidden, spec.group if given["allreduce_dgrad"] else None)
        source = _source(hidden, weight, spec, outputs, given, into, low_rank)
        rows = statistics(Call(hidden, weight, spec, outputs, source, low_rank))
    return pack_stats(outputs, rows, form, given["entropy_requires_grad"])


def _source(
    hidden: Tensor,
    weight: Tensor,
    spec: RowSpec,
    outputs: tuple[str, ...],
    given: dict[str, Any],
    into: Into | None,
    low: Low,
) -> FromHidden:
    brings = differentiable_outputs(outputs, given["entropy_requires_grad"])
    needs = needs_of(brings, hidden, weight, spec, given)
    alone = (
        needs.inputs == (True, False, False) and len(brings) == 1 and given["filter_eps"] is None
    ) and low.x is None
    one = spec.target is None or spec.target.dim() < hidden.dim()
    single = brings[0] if alone and one else None
    keep, fused = given["keep_logits"], given["fuse_product"]
    product, of_low = product_arguments(given), low_needs(brings, low)
    return FromHidden(needs, *product, keep, fused, single, into, of_low)


def sum_of(given: Mapping[str, Any], weight: Tensor, local: Tensor) -> Into | None:
    """Where dW is to be added, checked; `local` is this rank's part of the caller's `weight`."""
    into = given["accumulate_into"]
    return None if into is None else Into(check_accumulate_into(into, weight, local), weight)


def needs_of(
    brings: Sequence[str],
    hidden: Tensor,
    weight: Tensor,
    spec: RowSpec,
    given: Mapping[str, Any],
) -> Needs:
    """What a backward pass will want, where a gradient may come for the names in `brings`."""
    of_hidden, of_weight, of_bias = wanted_gradients(brings, hidden, weight, spec.bias)
    return Needs(
        of_hidden, of_weight, of_bias, given["filter_eps"] if spec.numbers is None else None
    )


def product_arguments(given: Mapping[str, Any]) -> tuple[int | None, torch.dtype | None, str]:
    """(chunk_tokens, logits_dtype, impl), as the operators take them."""
    return given["chunk_tokens"], given["logits_dtype"], given["impl"]


def product_operands(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    given: Mapping[str, Any],
    prefix: str = "",
) -> tuple[Tensor, Tensor]:
    """(hidden in the dtype of the products, weight), checked; `prefix` is that of their names."""
    told = given["product_dtype"]
    if told is None:
        hidden, weight = autocast_inputs(hidden, weight)
    check_linear(hidden, weight, bias, given["group"] is not None, prefix)
    dtype = product_dtype_of(hidden, weight, told, prefix)
    check_chunks(given["chunk_tokens"], given["logits_dtype"], dtype)
    check_filter_eps(given.get("filter_eps"))
    return hidden.to(dtype), weight


def _check_fused(tensors: tuple[Tensor, Tensor, Tensor | None], given: Mapping[str, Any]) -> None:
    """What `fuse_product=True` cannot be combined with."""
    names = ("hidden", "weight", "bias")
    if torch.is_grad_enabled():
        for name, x in zip(names, tensors):
            if x is not None and x.requires_grad:
                raise ValueError(
                    f"fuse_product=True has no gradient, got {name} that requires grad: "
                    "call it under torch.no_grad()"
                )
    hidden, weight, _ = tensors
    if weight.dtype.itemsize > hidden.dtype.itemsize:
        raise ValueError(
            f"product_dtype must not be narrower than weight with fuse_product, got {hidden.dtype} "
            f"for a weight of {weight.dtype}"
        )
    wide = accumulate_dtype(hidden.dtype)
    allowed = {
        "group": (None,),
        "lora": (None,),
        "chunk_tokens": (None,),
        "logits_dtype": (None, wide),
        "impl": ("auto", *fusing_names()),
    }
    for name in (*LIMITS, "kept"):
        if given[name] is not None:
            raise ValueError(f"{name} must be None with fuse_product: there are no logits to cut")
    for name, values in allowed.items():
        if given[name] not in values:
            raise ValueError(
                f"{name} must be one of {values} with fuse_product, got {given[name]!r}"
            )


def _check_fused_rows(spec: RowSpec, outputs: tuple[str, ...], hidden: Tensor) -> None:
    if not row_kernels_make(outputs):
        raise ValueError(f"outputs must be among {ROW_OUTPUTS} with fuse_product, got {outputs}")
    if spec.target is not None and spec.target.dim() == hidden.dim():
        raise ValueError(
            f"target must be one id a row with fuse_product, got shape {tuple(spec.target.shape)}"
        )


def autocast_inputs(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What autocast does to the operands of a matrix product."""
    if not (isinstance(hidden, Tensor) and isinstance(weight, Tensor)):
        return hidden, weight
    device = hidden.device.type
    if device == "meta":  # which torch.is_autocast_enabled does not know
        return hidden, weight
    if not torch.is_autocast_enabled(device) or torch.float64 in (hidden.dtype, weight.dtype):
        return hidden, weight
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype)
