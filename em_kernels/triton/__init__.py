"""The Triton backend: the functions of `em_kernels.reference` as GPU kernels."""

from em_kernels.triton.launch import grad, loss, stats

__all__ = ["grad", "loss", "stats"]
