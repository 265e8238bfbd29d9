"""What the methods minimise: short functions of tensors, free of any trainer."""

from em_kernels.objectives.em import (
    micro_batch_mean_weights,
    sequence_mean_weights,
    token_mean_weights,
)

__all__ = ["micro_batch_mean_weights", "sequence_mean_weights", "token_mean_weights"]
