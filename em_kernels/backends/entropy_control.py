"""Rows of logits brought to an entropy: the loops behind `inference`, of calls to any backend.

A backend may do a whole loop in one launch, in a method of the same name. On a GPU none of them
waits for the device: rows that need no more are masked, and cost nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels.backends import row_index
from em_kernels.backends.interface import (
    Backend,
    Descent,
    Goal,
    RowSpec,
    Upstream,
    accumulate_dtype,
)


def find_temperature(backend: Backend, logits: Tensor, goal: Goal) -> Tensor:
    """The temperature of every row of logits (outer, inner, V): (N,), 1 where H <= threshold."""
    if (found := backend.find_temperature(logits, goal)) is not None:
        return found
    spec = RowSpec(valid_vocab=logits.shape[-1])
    entropy = backend.stats(logits, spec, ("entropy",))[-1]
    above = entropy > goal.threshold  # False for NaN
    target = (goal.ratio * entropy).clamp(min=goal.threshold)
    low, high = torch.full_like(entropy, goal.minimum), torch.ones_like(entropy)
    for _ in range(0 if _none_left(above) else goal.iterations):
        middle = (low + high) / 2
        row_spec = spec._replace(mask=above, temperature_rows=middle)
        too_low = backend.stats(logits, row_spec, ("entropy",))[-1] < target
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return torch.where(above, low, torch.ones_like(low))


def descend(backend: Backend, z: Tensor, descent: Descent) -> Tensor:
    """The rows z (outer, inner, V), contiguous, after the descent, which may overwrite them."""
    if (found := backend.descend(z, descent)) is not None:
        return found
    spec = RowSpec(valid_vocab=z.shape[-1])
    weights = Upstream(entropy=z.new_ones(z.shape[:-1].numel(), dtype=accumulate_dtype(z.dtype)))
    gradient = torch.empty_like(z)
    for _ in range(descent.steps):
        entropy = backend.loss(z, spec, weights, ("entropy",), gradient)[-1]
        above = entropy > descent.threshold  # False for NaN, and for the 0 of a masked row
        if _none_left(above):
            break
        lower = z - descent.learning_rate * gradient
        z = torch.where(above.view(*z.shape[:-1], 1), lower, z)
        spec = spec._replace(mask=above)
    return z


def _none_left(rows: Tensor) -> bool:
    return row_index.is_free_to_look(rows) and not bool(rows.any())
