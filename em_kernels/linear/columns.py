"""Which vocabulary columns of a chunk's gradient are worth a matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels.backends.interface import Upstream

MOST_KEPT = 0.5  # of the columns: where more stay, one product with all of them is faster
BLOCK = 8192  # columns gathered at a time: what they take is beyond the workspace budget


def kept_columns(grad_logits: Tensor, upstream: Upstream, eps: float) -> Tensor | None:
    """Indices of the columns that hold an entry of at least eps times the largest of `upstream`.

    None stands for all of them: if more than MOST_KEPT are. A column with NaN is kept.
    """
    weights = [g.abs().amax() for g in upstream if g is not None]
    threshold = eps * torch.stack(weights).amax()
    peak = torch.maximum(grad_logits.amax(0), -grad_logits.amin(0)).to(threshold.dtype)
    kept = (~(peak < threshold)).nonzero()[:, 0]
    return None if kept.shape[0] > MOST_KEPT * grad_logits.shape[1] else kept
