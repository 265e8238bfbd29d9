"""SkyRL: log-probabilities and entropies of whole logits, and of logits cut over the vocabulary.

    from skyrl.backends.skyrl_train.workers import model_wrapper
    from em_kernels.integrations import skyrl
    model_wrapper.logprobs_from_logits = skyrl.logprobs_from_logits
    model_wrapper.chunked_entropy_from_logits = skyrl.chunked_entropy_from_logits

and where it trains with Megatron, in its own skyrl.backends.skyrl_train.distributed.megatron
.model_utils, `DistributedLogprob` and `ChunkedDistributedLogprob`, which are NeMo-RL's, and
`vocab_parallel_entropy` and its weighted sum; the first of the two is verl's as well.

Source of the signatures: skyrl/backends/skyrl_train/utils/torch_utils.py and that module. Results
are float32, where SkyRL's can have the dtype of the logits; sizes of chunks say nothing here.
"""

from __future__ import annotations

from torch import Tensor

from em_kernels.integrations._tensor_parallel import megatron_group, shard_stats
from em_kernels.integrations.nemo_rl import ChunkedDistributedLogprob, DistributedLogprob

__all__ = ["ChunkedDistributedLogprob", "DistributedLogprob"]
ENTROPY = ("entropy",)
NAMES = ("logits", "labels", "tp_group")


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """log p_label, (...) for logits (..., V) and labels (...); a label outside the vocabulary gives
    0. The logits are never written to, whatever `inplace_backward` allows."""
    return shard_stats(logits, labels, None, ("logprob",), NAMES).logprob


def chunked_entropy_from_logits(
    logits: Tensor, requires_grad: bool = False, attention_mask=None, chunk_size: int = 1024
) -> Tensor:
    """The entropy, (B, S) for logits (B, S, V), 0 where `attention_mask` (B, S) is; without
    gradient unless `requires_grad`."""
    return shard_stats(
        logits, None, None, ENTROPY, NAMES, requires_grad, mask=attention_mask
    ).entropy


def vocab_parallel_entropy(
    vocab_parallel_logits: Tensor, chunk_size=None, chunk_memory_mb: int = 512
) -> Tensor:
    """The entropy, (...) for logits (..., V / tp) over Megatron's tensor-parallel group."""
    return shard_stats(vocab_parallel_logits, None, megatron_group(), ENTROPY).entropy


def vocab_parallel_entropy_weighted_sum(
    vocab_parallel_logits: Tensor, weights: Tensor, chunk_size=None, chunk_memory_mb: int = 512
) -> Tensor:
    """The sum of weights (S,) times the entropies of logits (..., S, V / tp), likewise."""
    return (vocab_parallel_entropy(vocab_parallel_logits) * weights).sum()
