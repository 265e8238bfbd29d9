"""Softmax entropy, log-probability and their gradients, fused: from logits or hidden @ weight.T."""

from typing import TYPE_CHECKING

from em_kernels.backends.interface import TokenStats
from em_kernels.ops.covariance import (
    clip_cov_mask,
    high_entropy_mask,
    kl_cov_mask,
    linear_token_covariance,
    token_covariance,
)
from em_kernels.ops.divergence import (
    TokenDivergence,
    WeightedDivergence,
    divergence,
    divergence_loss,
    divergence_stats,
    linear_divergence,
    linear_divergence_loss,
    linear_divergence_stats,
)
from em_kernels.ops.linear_softmax_stats import linear_softmax_stats
from em_kernels.ops.segments import (
    next_token_targets,
    segment_ids_from_cu_seqlens,
    segment_ids_from_position_ids,
)
from em_kernels.ops.softmax_stats import (
    entropy_from_logits,
    selective_log_softmax_and_entropy,
    softmax_stats,
)
from em_kernels.ops.token_loss import (
    EntropyLoss,
    LinearEntropyLoss,
    TokenLoss,
    entropy_loss,
    linear_entropy_loss,
    linear_token_loss,
    token_loss,
)
from em_kernels.ops.top_logprobs import TopLogprobs, linear_top_logprobs, top_logprobs

if TYPE_CHECKING:  # a module that can be called, which type checkers do not know
    from em_kernels.backends.choice import backends
else:
    from em_kernels import backends

__version__ = "0.1.0"
__all__ = [
    "EntropyLoss",
    "LinearEntropyLoss",
    "TokenDivergence",
    "TokenLoss",
    "TokenStats",
    "TopLogprobs",
    "WeightedDivergence",
    "backends",
    "clip_cov_mask",
    "divergence",
    "divergence_loss",
    "divergence_stats",
    "entropy_from_logits",
    "entropy_loss",
    "high_entropy_mask",
    "kl_cov_mask",
    "linear_divergence",
    "linear_divergence_loss",
    "linear_divergence_stats",
    "linear_entropy_loss",
    "linear_softmax_stats",
    "linear_token_covariance",
    "linear_token_loss",
    "linear_top_logprobs",
    "next_token_targets",
    "segment_ids_from_cu_seqlens",
    "segment_ids_from_position_ids",
    "selective_log_softmax_and_entropy",
    "softmax_stats",
    "token_covariance",
    "token_loss",
    "top_logprobs",
]
