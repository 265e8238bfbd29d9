"""Memory of a CPU that was freed, given back to the system."""

from __future__ import annotations

import ctypes

BLOCK_BYTES = 1 << 20
_M_MMAP_THRESHOLD = -3  # malloc.h


def give_back_freed() -> bool:
    """Have the C library give every block of 1 MiB or more back as soon as it is freed.

    glibc does so from a threshold on, which rises to the largest block that was freed, 32 MiB at
    most. What is smaller lies in a heap that shrinks from its end alone: of 4,096 tokens of a 0.5 B
    model it holds 1 GB that nobody uses. This fixes the threshold for the rest of the process, see
    mallopt(3). False where the C library has no such thing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return mallopt(_M_MMAP_THRESHOLD, BLOCK_BYTES) == 1
