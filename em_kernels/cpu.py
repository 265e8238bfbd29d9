"""The memory that the CPU kernels keep between calls."""

from em_kernels.backends.cpu import release_memory

__all__ = ["release_memory"]
