"""Which rows are multiplied, and when the values of a tensor may be looked at.

On a GPU rows are left out of the products only where the caller gave a mask: finding them waits for
the device, once a call. Rows left out by an ignored target or a weight of 0 alone are multiplied,
and answered with zeros by the kernels. So is every row while a CUDA graph is captured, in which
nothing can wait. On a CPU looking costs nothing, and every row that is left out is left out there.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from em_kernels.backends.interface import RowSpec


def has_values(x: Tensor | None) -> TypeGuard[Tensor]:
    """Whether `x` is a tensor whose values can be looked at: in a trace none can."""
    return not torch.compiler.is_compiling() and type(x) is Tensor and not x.is_meta


def is_free_to_look(x: Tensor) -> bool:
    """Whether the values of `x` can be looked at without waiting for a device."""
    return x.device.type == "cpu"


def is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph of the work on `x` is being captured."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def is_exporting() -> bool:
    """Whether torch.export traces this; torch 2.11's own function says so of all it compiles."""
    return torch.compiler._is_exporting_flag


def kept_rows(spec: RowSpec, count: int) -> tuple[Tensor | None, RowSpec]:
    """(indices of the rows to multiply, None for all `count`; their spec).

    The mask it still holds is of rows that are multiplied though they do not count.
    """
    index = _find(spec)
    if index is None:
        return None, spec
    return None if index.shape[0] == count else index, spec._replace(mask=None)


def with_index(spec: RowSpec) -> RowSpec:
    """The spec for a forward and a backward pass, which need the rows looked for only once.

    A mask without values, as in a trace, is left to the operators. Rows that a captured forward
    pass has multiplied are multiplied in its backward pass too, which may not be captured.
    """
    if not has_values(spec.mask):
        return spec
    compact = spec.compact and not is_capturing(spec.mask)
    return spec._replace(index=_find(spec), compact=compact)


def _find(spec: RowSpec) -> Tensor | None:
    mask = spec.mask
    if spec.index is not None or mask is None:
        return spec.index
    if is_capturing(mask) or not (spec.compact or is_free_to_look(mask)):
        return None
    return mask.reshape(-1).nonzero()[:, 0]
