"""NeMo-RL: log-probabilities and entropies of logits cut over the vocabulary.

    from nemo_rl.distributed import model_utils
    from em_kernels.integrations import nemo_rl
    for name in nemo_rl.__all__: setattr(model_utils, name, getattr(nemo_rl, name))

in every worker: `from_parallel_logits_to_logprobs`, its forms for packed sequences and DTensors and
the losses call these three by name, and go on to shift targets and to gather over context-parallel
ranks. For top-k and top-p in training NeMo-RL calls others, which stay its own.

A target outside the vocabulary gives 0 and no gradient, `inference_only` takes none, and
`chunk_size` says nothing where nothing is held in float32. Results are float32.

Source of the signatures: nemo_rl/distributed/model_utils.py.
"""

from __future__ import annotations

from torch import Tensor

from em_kernels.integrations._tensor_parallel import NAMES, shard_stats

__all__ = ["ChunkedDistributedEntropy", "ChunkedDistributedLogprob", "DistributedLogprob"]


class DistributedLogprob:
    """apply(logits (B, S, V / tp), targets (B, S), start, end, group, inference_only=False): log p
    of the targets, (B, S). The shards are equal, in the order of the ranks."""

    @staticmethod
    def apply(logits, target, start, end, group, inference_only=False, name="group") -> Tensor:
        return shard_stats(
            logits,
            target,
            group,
            names=(*NAMES[:2], name),
            gradient=not inference_only,
            span=(start, end),
            outputs=("logprob",),
        ).logprob


class ChunkedDistributedLogprob:
    """apply(logits, targets, start, end, chunk_size, tp_group, inference_only=False): the same."""

    @staticmethod
    def apply(logits, target, start, end, chunk_size, tp_group, inference_only=False) -> Tensor:
        rest = (tp_group, inference_only, "tp_group")
        return DistributedLogprob.apply(logits, target, start, end, *rest)


class ChunkedDistributedEntropy:
    """apply(logits, chunk_size, tp_group, inference_only=False): sum_v p_v log p_v, (B, S), which
    is the entropy with NeMo-RL's sign, -H."""

    @staticmethod
    def apply(logits, chunk_size, tp_group, inference_only=False) -> Tensor:
        wanted = not inference_only
        return -shard_stats(logits, None, tp_group, gradient=wanted, outputs=("entropy",)).entropy
