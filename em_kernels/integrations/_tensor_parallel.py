"""Logits cut between tensor-parallel ranks, as trainers on Megatron hand them on."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from em_kernels.backends.interface import TokenStats
from em_kernels.integrations._labels import integer_labels
from em_kernels.ops.arguments import check_logits
from em_kernels.ops.checks import check_group, check_rows
from em_kernels.ops.options import IGNORED
from em_kernels.ops.softmax_stats import softmax_stats

NAMES = ("vocab_parallel_logits", "target", "tp_group")


def megatron_group() -> dist.ProcessGroup:
    """Megatron-Core's tensor-parallel group."""
    try:
        from megatron.core import parallel_state
    except ImportError as error:
        raise ImportError(
            "tp_group is Megatron-Core's where it is not given, and that is not installed: give it "
            "where the function takes it, else install megatron-core"
        ) from error
    return parallel_state.get_tensor_model_parallel_group()


def shard_stats(
    logits: Tensor,
    target: Tensor | None,
    group: Any,
    outputs: tuple[str, ...],
    names: tuple[str, str, str] = NAMES,
    gradient: bool = True,
    span: tuple[int, int] | None = None,
    **options: Any,
) -> TokenStats:
    """`softmax_stats` of the whole vocabulary from this rank's shard, as large as every other's.

    The logprob of a target outside the vocabulary is 0, without gradient. `names` are those that
    the caller has for logits, target and group, `span` where it takes this rank's entries to lie.
    """
    check_logits(logits, names[0])
    check_group(group, names[2])
    first = (0 if group is None else dist.get_rank(group)) * logits.shape[-1]
    if span not in (None, (first, first + logits.shape[-1])):
        raise ValueError(
            "vocab_start_index and vocab_end_index must be those of equal shards in the order of "
            f"the ranks, {first} and {first + logits.shape[-1]} here, got {span}"
        )
    several = group is not None and dist.get_world_size(group) > 1
    options |= {"group": group if several else None, "outputs": outputs}
    with torch.set_grad_enabled(gradient and torch.is_grad_enabled()):
        if target is None:
            return softmax_stats(logits, **options)
        check_rows(names[1], target, logits)
        target = integer_labels(target)
        vocab = logits.shape[-1] * (dist.get_world_size(group) if several else 1)
        known = (target >= 0) & (target < vocab)
        if outputs == ("logprob",):
            return softmax_stats(logits, target.masked_fill(~known, IGNORED), **options)
        stats = softmax_stats(logits, target.masked_fill(~known, 0), **options)
        return stats._replace(logprob=torch.where(known, stats.logprob, 0))
