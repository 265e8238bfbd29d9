"""Per-token statistics of softmax(logits): the public function, its checks and its autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels.backends.interface import TokenStats
from em_kernels.ops.arguments import (
    check_entropy_requires_grad,
    check_logits,
    check_outputs,
    make_spec,
)
from em_kernels.ops.dtensor import local_logits
from em_kernels.ops.registry import record
from em_kernels.ops.schemas import SoftmaxStats
from em_kernels.ops.sources import FromLogits
from em_kernels.ops.statistics import Call, pack_stats, statistics


def softmax_stats(
    logits: Tensor,
    target: Tensor | None = None,
    *,
    outputs: tuple[str, ...] = ("logprob", "entropy"),
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    valid_vocab: int | None = None,
    group=None,
    impl: str = "auto",
    entropy_requires_grad: bool = True,
) -> TokenStats:
    """Entropy, log-probability and related statistics of every row of `logits`, in one pass.

    Per row, in float32 (float64 for float64 logits):

        z = softcap(logit_scale * logits) / temperature,   softcap(u) = c tanh(u / c)
        H = log1p(r) - q / (1 + r),   logprob_y = d_y - log1p(r),   lse = max z + log1p(r)
        d_v = z_v - max z,   r = sum exp(d_v),   q = sum exp(d_v) d_v   over all but the argmax

    Leaving the maximum out of r keeps H accurate, in relative terms, down to H = 1e-9.
    Gradients: dH/dz_v = p_v (q / (1 + r) - d_v); dlogprob/dz_v = 1[v = y] - p_v; dlse/dz_v = p_v.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64; row-strided views are read in
            place. A -inf logit has probability 0. A row with NaN, +inf or no finite logit is NaN.
        target: (...) int64 token ids y; needed by logprob, is_top1 and entropy_slope. An id outside
            the vocabulary is an error unless its row is ignored or masked: where -1 or a padding id
            stands for no token, say so by `ignore_index` or `mask`.
        outputs: names of `TokenStats` to compute; nothing else is computed. `logprob` of the
            default is left out where there is no target.
        temperature: positive, a float or a tensor of the leading shape; no gradient.
        softcap: c > 0 or None.
        logit_scale: non-zero factor on the logits.
        ignore_index: rows with this target are exact zeros, are not computed and get no gradient.
        mask: (...) bool or numeric; rows where it is 0 are treated the same way. It does not weigh:
            a floating mask that holds anything but 0 and 1 is an error. Nothing waits for the
            device to look at it.
        valid_vocab: only the first `valid_vocab` entries of a row count (a padded vocabulary).
        group: torch.distributed process group between whose ranks the vocabulary is cut. `logits`
            are then this rank's entries, in the order of the ranks and as many as it has, be it
            none; target and valid_vocab count in the whole vocabulary. Everything else, and the
            upstream gradients, must be the same on every rank, and so are the results, bit for bit.
            The ranks compare what they were given, which waits for the device. Logits that are a
            DTensor sharded on the vocabulary bring their own group.
        impl: "auto", "reference", "cpu", "triton" or "cuda".
        entropy_requires_grad: False takes `entropy` as a number only: it has no gradient.

    Returns:
        TokenStats of float32 (float64 for float64) tensors of the leading shape, each in memory of
        its own. `logprob`, `entropy` and `lse` are differentiable. Derivatives of their gradients
        (create_graph=True) are those of the definition, in plain PyTorch, and cost several arrays
        of the size of the logits; with `group` they are a RuntimeError, and torch.compile has none.
        torch.func's transforms and forward mode are refused.

    Raises:
        TypeError, ValueError: naming the argument and what was received. On a GPU, to spare a
            synchronisation, a target out of range gives NaN in its row instead, and a mask that
            weighs is a device-side assertion.

    Source: S. Kullback, Information Theory and Statistics (1959) for H and KL; Cui et al.,
    "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models" (2025),
    arXiv:2505.22617, its covariance theorem, for entropy_slope; Zhao et al., "Learning to Reason
    without External Rewards" (2025) for self_certainty.
    """
    check_entropy_requires_grad(entropy_requires_grad)
    logits, group = local_logits(logits, group)
    check_logits(logits, empty=group is not None)
    spec = make_spec(
        logits,
        logits.shape[-1],
        target,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        mask=mask,
        valid_vocab=valid_vocab,
        group=group,
        impl=impl,
    )
    outputs = check_outputs(outputs, target)
    if torch.compiler.is_exporting():  # a program keeps the operator and no autograd function
        rows = record(SoftmaxStats(logits, spec, outputs, impl))
    else:
        rows = statistics(Call(logits, None, spec, outputs, FromLogits(impl)))
    return pack_stats(outputs, rows, entropy_requires_grad)
