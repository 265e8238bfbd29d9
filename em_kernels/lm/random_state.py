"""A random state of one's own: what a run draws depends on its seed and on nothing around it."""

from __future__ import annotations

import random

import torch


class RandomState:
    """The states of Python's, NumPy's and torch's global generators; `with` puts them in place.

    Outside the `with` block the caller's generators are as they were.
    """

    def __init__(self, seed: int):
        around = _capture()
        _seed(seed)
        self.state = _capture()
        _restore(around)

    def __enter__(self) -> RandomState:
        self._around = _capture()
        _restore(self.state)
        return self

    def __exit__(self, *_) -> None:
        self.state = _capture()
        _restore(self._around)


def _seed(seed: int) -> None:
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _capture() -> dict:
    """Made of numbers, strings and tensors only, so that it loads with weights_only=True."""
    import numpy

    kind, keys, *rest = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore(state: dict) -> None:
    import numpy

    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
