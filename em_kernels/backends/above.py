"""What lies above given levels of a row: the rank of a token, the mass that a sampler keeps.

`Backend.above` says what is counted. Whether u_v > level is a question of the last bit, in which
backends may differ: a level that is an entry's own u must come from the backend that counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels.backends.choice import REFERENCE, serving
from em_kernels.backends.interface import Backend, RowSpec


def counting(backend: Backend, device: torch.device) -> Backend:
    """The backend itself where it counts, else one that serves the device and does."""
    others = serving(device) if device.type != "cpu" else ()
    return next(able for able in (backend, *others, REFERENCE) if able.counts)


def above(
    backend: Backend,
    logits: Tensor,
    spec: RowSpec,
    levels: Tensor,
    top: Tensor | None = None,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`Backend.above` of any backend."""
    return counting(backend, logits.device).above(logits, spec, levels, top, ids)
