"""slime: log-probabilities and entropies of logits cut over the vocabulary.

    from slime.backends.megatron_utils import loss
    from em_kernels.integrations import slime
    loss.calculate_log_probs_and_entropy = slime.calculate_log_probs_and_entropy

Source of the signature: slime/utils/ppo_utils.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from em_kernels.integrations._tensor_parallel import shard_stats
from em_kernels.ops.checks import check_rows, check_shape


def calculate_log_probs_and_entropy(
    logits: Tensor,
    tokens: Tensor,
    tp_group: Any,
    with_entropy: bool = False,
    chunk_size: int = -1,
    log_prob_keep_mask: Tensor | None = None,
    with_entropy_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(log p_token as (T, 1), entropy as (T,) or None), float32; without a token (0,) both.

    Args: of `logits` (T, V / tp), this rank's shard, and `tokens` (T,), one outside the vocabulary
    gives 0; `tp_group` None is all ranks; among the entries of `log_prob_keep_mask` (T, V / tp) and
    the token is its log-probability, at the cost of a copy, the entropy among all; `chunk_size`
    says nothing here, where nothing is held in float32.
    """
    if logits.shape[0] == 0:
        return logits.new_zeros(0), logits.new_zeros(0) if with_entropy else None
    group = getattr(tp_group, "group", tp_group)  # slime's own, which it can make anew, has one
    group = dist.group.WORLD if group is None and dist.is_initialized() else group
    stats = partial(shard_stats, group=group, names=("logits", "tokens", "tp_group"))
    if log_prob_keep_mask is None:
        outputs = ("logprob", "entropy") if with_entropy else ("logprob",)
        found = stats(logits, tokens, outputs=outputs, entropy_requires_grad=with_entropy_grad)
        return found.logprob[:, None], found.entropy
    check_rows("tokens", tokens, logits)
    check_shape("log_prob_keep_mask", log_prob_keep_mask, logits)
    place = tokens - (0 if group is None else dist.get_rank(group)) * logits.shape[-1]
    own = torch.arange(logits.shape[-1], device=logits.device) == place[:, None]
    kept = torch.where(log_prob_keep_mask | own, logits, float("-inf"))
    logprob = stats(kept, tokens, outputs=("logprob",)).logprob[:, None]
    if not with_entropy:
        return logprob, None
    return logprob, stats(logits, None, gradient=with_entropy_grad, outputs=("entropy",)).entropy
