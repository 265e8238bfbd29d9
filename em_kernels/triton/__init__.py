"""The Triton backend: the functions of `em_kernels.reference` as GPU kernels."""

from em_kernels.triton.launch import grad, loss, stats
from em_kernels.triton.scale import scale_

__all__ = ["grad", "loss", "scale_", "stats"]
