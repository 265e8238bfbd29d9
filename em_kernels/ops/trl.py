"""The two functions of `trl.trainer.utils` and `trl.kernels`, with their signatures."""

from __future__ import annotations

from torch import Tensor

from em_kernels.ops.arguments import NEVER_IGNORED
from em_kernels.ops.softmax_stats import softmax_stats


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
    stats = softmax_stats(
        logits, index, temperature=temperature, mask=row_mask, ignore_index=NEVER_IGNORED
    )
    return stats.logprob, stats.entropy
