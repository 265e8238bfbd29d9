"""The Triton backend: the functions of `em_kernels.reference` as GPU kernels."""

from em_kernels.triton.launch import grad, loss, stats
from em_kernels.triton.scale import scale_

__all__ = ["grad", "loss", "narrows", "scale_", "stats"]

narrows = True
"""`grad` and `loss` take a 16-bit `out` for float32 logits, which may lie over them: row i of
`out` then begins at the byte where row i of the logits does."""
