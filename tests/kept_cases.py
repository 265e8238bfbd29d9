"""Kept sets of a sampler as tests look at them."""

from __future__ import annotations

import torch

from em_kernels.lm.kept_sets import KeptSets


def dense(sets: KeptSets) -> torch.Tensor:
    """(..., vocab) bool, from what the operators are given."""
    ids, offsets = sets.ids()
    kept = torch.zeros(sets.length.numel(), sets.vocab, dtype=torch.bool)
    for place, (start, end) in enumerate(zip(offsets.tolist(), offsets[1:].tolist())):
        own = ids[start:end]
        assert len(own.unique()) == len(own)
        kept[place, own] = True
    return kept.view(*sets.shape, sets.vocab)
