"""Per-token statistics of softmax(hidden @ weight.T) without holding all the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels.backends.interface import TokenStats, accumulate_dtype
from em_kernels.linear.plan import Needs
from em_kernels.ops.arguments import (
    check_allreduce_dgrad,
    check_cut,
    check_entropy_requires_grad,
    check_filter_eps,
    check_keep_logits,
    check_linear,
    check_outputs,
    make_spec,
)
from em_kernels.ops.dtensor import local_operands
from em_kernels.ops.registry import record
from em_kernels.ops.schemas import LinearStats
from em_kernels.ops.sources import FromHidden, copy_to_ranks
from em_kernels.ops.statistics import (
    Call,
    differentiable_outputs,
    pack_stats,
    statistics,
    wanted_gradients,
)


def linear_softmax_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    outputs: tuple[str, ...] = ("logprob", "entropy"),
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    valid_vocab: int | None = None,
    group=None,
    allreduce_dgrad: bool = True,
    impl: str = "auto",
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype | None = None,
    filter_eps: float | None = None,
    keep_logits: int | None = None,
    fuse_product: bool = False,
    entropy_requires_grad: bool = True,
) -> TokenStats:
    """`softmax_stats(hidden @ weight.T)` with the logits of only `chunk_tokens` rows at a time.

    z = softcap(logit_scale * (hidden @ weight.T) + bias) / temperature; statistics, gradients and
    the arguments not named here as in `softmax_stats`. Forward costs one matrix product, backward
    up to three more (the logits again, dX, dW); a frozen `hidden` or `weight` (requires_grad=False)
    costs neither its product nor memory. Where `hidden` alone has a gradient, and one output alone
    brings it (one of logprob, entropy and lse is asked for, or logprob or lse and an entropy
    without gradient), the row's gradient is its upstream gradient times a vector that is known in
    the forward pass: that makes it, in two products in all, and keeps it, (N, D).

    Args:
        hidden: (..., D), float32, bfloat16, float16 or float64.
        weight: (V, D), the dtype of `hidden`; under autocast both are cast, as in F.linear.
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
        allreduce_dgrad: with a group, whether the gradient of `hidden` is summed over the ranks
            here. False leaves it partial, this rank's share, for a `hidden` whose own backward
            sums it, as that of Megatron's gather_from_sequence_parallel_region (sequence
            parallel) and copy_to_tensor_model_parallel_region does. The same on every rank; the
            name is that of Megatron's ColumnParallelLinear.
        chunk_tokens: rows per chunk, the one limit of memory: None fits the logits of a chunk into
            160 MiB on a CPU, 1 GiB on a GPU, 256 MiB there where no gradient follows. Where that is
            faster, all rows and some columns of the vocabulary take the place of several chunks, in
            as much memory: for the gradient, for which dW is then never summed in float32, but dX
            is (N, D); on a CPU, without a group and in float32 or float64, for the logits too.
        logits_dtype: dtype the product is rounded to: float32 or that of `hidden`. None is float32
            where the device's product gives it out of 16-bit inputs at full speed (CUDA), else the
            dtype of `hidden`.
        keep_logits: bytes of logits that may be kept from the forward to the backward pass, which
            then need not multiply them again: where all N rows fit, N * V entries of the dtype of
            the logits, rows padded to 16 entries, three products in all instead of four.
            Kept are whole chunks of rows, or blocks of columns of all rows, from the first on;
            memory is taken for as many rows as the bytes hold, and held until the graph is freed.
            None keeps as many as a chunk takes anyway, or `chunk_tokens` rows; 0 keeps none, as a
            call without gradient, one whose gradient is made in the forward pass, and an exported
            program. Whatever is kept, the results have the same bits.
        filter_eps: None is exact, and an exported program always is. Else, in (0, 1), columns of
            the vocabulary are left out of the products of dX and dW, chunk by chunk, where
            |dz| < filter_eps w in every row of the chunk; dz is the gradient of
            hidden @ weight.T, w the largest upstream gradient by magnitude in the chunk. With L
            the columns left out,
                |dX_i - exact| <= filter_eps w sum_{v in L} |weight_v|       for every token i
                |dW_v - exact| <= filter_eps sum_chunks w sum_i |hidden_i|   for every column v
            entry by entry and to rounding; statistics and the gradient of `bias` stay exact.
            Finding the columns waits for the device, once a chunk, and is left out while a CUDA
            graph is captured. It pays where rows are peaked; a row spread over many more than 1 /
            filter_eps words can lose its whole gradient.
        fuse_product: True multiplies and reduces in one Triton kernel, which keeps no logits at
            all, only about 12 bytes a token for every 1024 entries of the vocabulary and, where
            rows are left out, a copy of the others; the logits are never rounded. Without
            gradients only, and without `group`, `chunk_tokens` and another `impl`.
        entropy_requires_grad: False takes `entropy` as a number only: it has no gradient, which
            with a frozen `weight` and `bias` saves a product (see above). The same on every rank of
            a group, and so is what is frozen. With `filter_eps` no gradient is made in the forward
            pass.

    Returns, raises: as `softmax_stats`. Gradients of `weight` and `bias` are summed in float32
    (float64 for float64) and rounded once.
    """
    check_allreduce_dgrad(allreduce_dgrad, hidden)
    check_entropy_requires_grad(entropy_requires_grad)
    hidden, weight, bias, group = local_operands(hidden, weight, bias, group)
    hidden, weight = autocast_inputs(hidden, weight)
    check_linear(hidden, weight, bias, empty=group is not None)
    check_cut(chunk_tokens, logits_dtype, hidden)
    check_filter_eps(filter_eps)
    check_keep_logits(keep_logits)
    if fuse_product:
        _check_fused((hidden, weight, bias), group, chunk_tokens, logits_dtype, impl)
    spec = make_spec(
        hidden,
        weight.shape[0],
        target,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        mask=mask,
        valid_vocab=valid_vocab,
        group=group,
        impl=impl,
        bias=bias,
        filter_eps=filter_eps,
    )
    outputs = check_outputs(outputs, target)
    if torch.compiler.is_exporting() and not fuse_product:
        cut = (chunk_tokens, logits_dtype, impl)
        rows = record(LinearStats(hidden, weight, spec, outputs, *cut))
        return pack_stats(outputs, rows, entropy_requires_grad)
    hidden = copy_to_ranks(hidden, spec.group if allreduce_dgrad else None)
    sources = differentiable_outputs(outputs, entropy_requires_grad)
    wanted = wanted_gradients(sources, hidden, weight, bias)
    alone = wanted == (True, False, False) and len(sources) == 1 and filter_eps is None
    source = FromHidden(
        Needs(*wanted, filter_eps if spec.numbers is None else None),
        chunk_tokens,
        logits_dtype,
        impl,
        keep_logits,
        fuse_product,
        single=sources[0] if alone else None,
    )
    rows = statistics(Call(hidden, weight, spec, outputs, source))
    return pack_stats(outputs, rows, entropy_requires_grad)


def _check_fused(tensors, group, chunk_tokens, logits_dtype, impl) -> None:
    """What `fuse_product=True` cannot be combined with."""
    names = ("hidden", "weight", "bias")
    if torch.is_grad_enabled():
        for name, x in zip(names, tensors):
            if x is not None and x.requires_grad:
                raise ValueError(
                    f"fuse_product=True has no gradient, got {name} that requires grad: "
                    "call it under torch.no_grad()"
                )
    wide = accumulate_dtype(tensors[0].dtype)
    refused = {
        "group": (group, (None,)),
        "chunk_tokens": (chunk_tokens, (None,)),
        "logits_dtype": (logits_dtype, (None, wide)),
        "impl": (impl, ("auto", "triton")),
    }
    for name, (value, allowed) in refused.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed} with fuse_product, got {value!r}")


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
