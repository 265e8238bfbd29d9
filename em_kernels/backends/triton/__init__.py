"""The Triton backend: the functions of `em_kernels.backends.reference` as GPU kernels."""

from em_kernels.backends.triton.control import descend, find_temperature
from em_kernels.backends.triton.elementary import INTERPRETED
from em_kernels.backends.triton.launch import grad, loss, stats
from em_kernels.backends.triton.presence import count_present
from em_kernels.backends.triton.scale import scale_

__all__ = [
    "count_present",
    "descend",
    "find_temperature",
    "grad",
    "interpreted",
    "loss",
    "narrows",
    "scale_",
    "stats",
]

interpreted = bool(INTERPRETED.value)
"""Whether the kernels run in Triton's interpreter: what TRITON_INTERPRET said, as Triton reads it,
when they were imported."""

narrows = True
"""`grad` and `loss` take a 16-bit `out` for float32 logits, which may lie over them: row i of
`out` then begins at the byte where row i of the logits does."""
