"""Megatron-Core: the cross entropy of logits cut over the vocabulary, under its own signatures.

    from megatron.core import tensor_parallel
    from em_kernels.integrations import megatron
    tensor_parallel.vocab_parallel_cross_entropy = megatron.vocab_parallel_cross_entropy

and with `cross_entropy_loss_fusion` (fusion "native")

    from megatron.core.models.common.language_module import language_module
    language_module.fused_vocab_parallel_cross_entropy = megatron.fused_vocab_parallel_cross_entropy

Source of the signatures: megatron/core/tensor_parallel/cross_entropy.py and
megatron/core/fusions/fused_cross_entropy.py.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from em_kernels.integrations._tensor_parallel import megatron_group, shard_stats


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """-log p_target of the whole vocabulary, per token; the logits are read where they are.

    Args:
        vocab_parallel_logits: (S, B, V / tp) or any (..., V / tp), this rank's shard.
        target: (S, B) integers in the whole vocabulary. Any other (-100) gives 0 and no gradient,
            where Megatron's number is one that its loss mask removes.
        label_smoothing: 0 only. Megatron's smooths over each rank's own shard, which is another
            loss for every number of ranks.
        tp_group: the ranks that have the vocabulary; None is Megatron's tensor-parallel group.

    Returns:
        (S, B) float32 (float64 for float64), differentiable in the logits.

    Raises:
        TypeError, ValueError: naming the argument and what was received.
        ImportError: no tp_group, and no Megatron-Core.
    """
    if label_smoothing != 0:
        raise ValueError(
            f"label_smoothing must be 0, got {label_smoothing!r}: leave it out here, or keep "
            "Megatron's own function, which smooths over each rank's shard"
        )
    group = megatron_group() if tp_group is None else tp_group
    return -shard_stats(vocab_parallel_logits, target, group, ("logprob",)).logprob


def fused_vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor, target: Tensor, tp_group: dist.ProcessGroup | None = None
) -> Tensor:
    """`vocab_parallel_cross_entropy` under the signature of Megatron's fused one."""
    return vocab_parallel_cross_entropy(vocab_parallel_logits, target, 0.0, tp_group)
