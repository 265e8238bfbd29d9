"""Entropy minimisation: the weight of every token's entropy in the loss.

The loss is sum_t w_t H_t with weights known before the forward pass, as `linear_token_loss` takes
them. Each function here maps a mask (B, T) of the tokens that count, as in `entropy_loss`, to
weights of that shape.

Source: Gao et al., "One-shot Entropy Minimization" (2025), arXiv:2505.20282.
"""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels.ops.checks import count_mask, got_int, is_int
from em_kernels.ops.reductions import reduction_weight


def token_mean_weights(mask: Tensor) -> Tensor:
    """w = mask / sum(mask): every token of the batch counts the same. float32; no token gives 0."""
    return reduction_weight(count_mask(mask), "token_mean", torch.float32)


def sequence_mean_weights(mask: Tensor) -> Tensor:
    """w_bt = mask_bt / (n_b B'), n_b the tokens of row b and B' the rows that have any: every
    answer counts the same, however long it is. float32."""
    return reduction_weight(count_mask(mask), "sequence_mean", torch.float32)


def micro_batch_mean_weights(mask: Tensor, micro_batch: int) -> Tensor:
    """The token mean of every `micro_batch` rows, then the mean over micro-batches.

    What accumulating the gradients of separately normalised micro-batches amounts to: tokens in a
    micro-batch of short answers count for more.
    """
    mask = count_mask(mask)
    if not is_int(micro_batch, 1):
        raise ValueError(f"micro_batch must be a positive int, got {got_int(micro_batch)}")
    parts = mask.split(micro_batch)
    return torch.cat([token_mean_weights(part) for part in parts]) / len(parts)
