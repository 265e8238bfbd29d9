"""Random numbers that depend on a key alone: the seed of a run, and what they are for."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(*key: int) -> int:
    """A seed of 63 bits for a key of integers, as (seed, update, row); others have another."""
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Python's, NumPy's and torch's global generators as the key decides; then as they were."""
    import numpy

    python, arrays, cpu = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    seed = seed_of(*key)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
