"""Labels outside the vocabulary, as the replaced functions answer them."""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels._spec import TokenStats


def known_labels(labels: Tensor, vocab: int, ignored: int) -> tuple[Tensor, Tensor]:
    """(labels with 0 for each that is neither in the vocabulary nor `ignored`, which are)."""
    known = (labels >= 0) & (labels < vocab) | (labels == ignored)
    return torch.where(known, labels, 0), known


def logprob_of_known(stats: TokenStats, known: Tensor) -> Tensor:
    """Kernels that look for the label among the logits leave its logit 0 where it is not there, so
    that -log sum exp z remains: finite, for the caller to mask."""
    return torch.where(known, stats.logprob, -stats.lse)
