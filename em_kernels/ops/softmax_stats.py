"""Per-token statistics of softmax(logits): the public function, its checks and its autograd."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import Unpack

from em_kernels.backends.interface import TokenStats
from em_kernels.backends.row_index import is_exporting
from em_kernels.ops.arguments import (
    NEVER_IGNORED,
    check_logits,
    check_outputs,
    make_spec,
)
from em_kernels.ops.checks import check_flag, check_tensor
from em_kernels.ops.chosen import served
from em_kernels.ops.dtensor import local_logits
from em_kernels.ops.options import DEFAULTS, StatsOptions, takes_options
from em_kernels.ops.registry import record
from em_kernels.ops.schemas import SoftmaxStats
from em_kernels.ops.sources import FromLogits
from em_kernels.ops.statistics import Call, pack_stats, statistics


@takes_options
def softmax_stats(
    logits: Tensor, target: Tensor | None = None, **options: Unpack[StatsOptions]
) -> TokenStats:
    """Entropy, log-probability and related statistics of every row of `logits`, in one pass.

    Per row, in float32 (float64 for float64 logits):

        z = softcap(logit_scale * logits) / temperature = c u,   softcap(x) = s tanh(x / s)
        d_v = c (u_v - max u),   r = sum exp(d_v),   q = sum exp(d_v) d_v   over all but the argmax
        H = log1p(r) - q / (1 + r),   logprob_y = d_y - log1p(r),   lse = c max u + log1p(r)
        rank_y = |{v: u_v > u_y}|, -1 in a row without probabilities

    Without softcap and bias u is logits, or -logits where logit_scale is negative, and c
    |logit_scale| / temperature; with them c is 1 / temperature.

    Leaving the maximum out of r keeps H accurate, in relative terms, down to H = 1e-9.
    Gradients: dH/dz_v = p_v (q / (1 + r) - d_v); dlogprob/dz_v = 1[v = y] - p_v; dlse/dz_v = p_v.

    Beyond the range of float32 (float64 for float64 logits):

    - Finite logits have their softmax, however large z is: the maximum is taken off before the
      product. Two logits whose difference is beyond the range are infinitely far apart.
    - logit_scale * logits + bias that is beyond it counts as an infinite logit: NaN in its row, or
      probability 0.
    - lse, logprob, self_certainty, logit_mean and logit_var are infinite where no float holds them,
      and logit_var is 0 where it is smaller than any; their gradients are as ever. logit_skew has
      no unit, and is right at any size.
    - temperature, softcap, |logit_scale| and logit_scale / temperature must be numbers which, with
      their inverses, it holds: from 1.18e-38 to 8.51e37. A row of another temperature is NaN on a
      GPU, where the values of a tensor are not looked at.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64; row-strided views are read in
            place. A -inf logit has probability 0. A row with NaN, +inf or no finite logit is NaN.
        target: (...) int64 token ids y, needed by logprob, is_top1, entropy_slope and rank; or K
            ids a row, (..., K), of which logprob, is_top1 and rank are then (..., K) too. An id
            that is `ignore_index` pads a row of fewer: its logprob and rank are 0, and the row is
            left out by `mask` alone. An id may be there twice. An id outside
            the vocabulary is an error unless its row is ignored or masked: where -1 or a padding id
            stands for no token, say so by `ignore_index` or `mask`.

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
    given = {**DEFAULTS, **options}
    check_flag("entropy_requires_grad", given["entropy_requires_grad"])
    logits, given["group"] = local_logits(logits, given["group"])
    check_logits(logits, empty=given["group"] is not None)
    spec = make_spec(logits, logits.shape[-1], target, given, ids=True)
    outputs, impl = check_outputs(options, target), given["impl"]
    spec, form = served(spec, outputs, logits)
    if is_exporting():  # a program keeps the operator and no autograd function
        rows: Sequence[Tensor] = record(SoftmaxStats(logits, spec, outputs, impl))
    else:
        rows = statistics(Call(logits, None, spec, outputs, FromLogits(impl)))
    return pack_stats(outputs, rows, form, given["entropy_requires_grad"])


def entropy_from_logits(logits: Tensor) -> Tensor:
    """H = -sum_v p_v log p_v of softmax(logits), in nats: (..., V) -> (...), differentiable.

    As TRL's function of the same name; the result is float32 (float64 for float64 logits) whatever
    the dtype of the logits. Errors as in `softmax_stats`.
    """
    return softmax_stats(logits, outputs=("entropy",)).entropy


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    temperature: float | Tensor = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(log p_index, H) of softmax(logits / temperature), both (...) and differentiable.

    As `trl.kernels.selective_log_softmax_and_entropy`: rows where `row_mask` is 0 are skipped and
    give zeros. Results are float32 (float64 for float64). Unlike there an index of -100 is an error
    unless its row is masked. Errors as in `softmax_stats`.
    """
    check_tensor("index", index)
    stats = softmax_stats(
        logits, index, temperature=temperature, mask=row_mask, ignore_index=NEVER_IGNORED
    )
    return stats.logprob, stats.entropy
