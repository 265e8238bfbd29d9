"""What a sampler leaves of rows, and their statistics, by textbook formulas in float64."""

import math

import pytest
import torch
from helpers import FAST_IMPLS, IMPLS

N, V = 9, 301
OUT = ("logprob", "entropy", "lse", "varentropy", "max_prob", "logit_mean", "kept_mass", "is_kept")
each_impl = pytest.mark.parametrize("impl", IMPLS)
fast_impl = pytest.mark.parametrize("impl", FAST_IMPLS)


def is_kept(z, top_k=None, top_p=None, min_p=None, sampler="transformers"):
    """Entry by entry, in float64, as the libraries' documentation has it; no ties at a border."""
    kept = torch.zeros(z.shape, dtype=torch.bool)
    for row, keep in zip(z.double(), kept):
        p = row.softmax(0)

        likely = torch.ones_like(keep) if min_p is None else p >= min_p * p.max()
        left = likely if sampler == "vllm" else torch.ones_like(keep)
        if top_k is not None and top_k < int(left.sum()):
            left = left & (row >= row[left].sort().values[-top_k])
        if top_p is not None:
            order = torch.where(left, p, 0).argsort(descending=True)
            share, total = 0.0, p[left].sum()
            for place in order.tolist():
                if left[place] and (share < top_p * total or share == 0):
                    keep[place] = True
                    share += p[place]
            left = keep.clone()
        keep[:] = left & likely
    return kept


def truth(x, target, kept, **transform):
    """Everything from the kept entries alone, differentiable."""
    z = x.double() / transform.get("temperature", 1.0)
    log_p = z.masked_fill(~kept, -math.inf).log_softmax(-1)
    p, safe = log_p.exp(), log_p.masked_fill(~kept, 0)
    entropy = -(p * safe).sum(-1)
    inside = kept.gather(-1, target[..., None])[..., 0]
    logprob = safe.gather(-1, target[..., None])[..., 0]
    count = kept.sum(-1)
    return {
        "logprob": torch.where(inside, logprob, -math.inf),
        "entropy": entropy,
        "lse": torch.where(kept, z, -math.inf).logsumexp(-1),
        "varentropy": (p * (safe + entropy[..., None]) ** 2).sum(-1),
        "max_prob": p.amax(-1),
        "logit_mean": torch.where(kept, z, 0).sum(-1) / count,
        "kept_mass": torch.where(kept, z.softmax(-1), 0).sum(-1),
        "is_kept": inside,
    }


def check(stats, want):
    for name, value in want.items():
        got = getattr(stats, name)
        if name == "is_kept":
            assert torch.equal(got.cpu(), value)
            continue
        assert torch.equal(got.isinf().cpu(), value.isinf()), name
        got, value = got[~got.isinf()], value[~value.isinf()]
        torch.testing.assert_close(got.double().cpu(), value, rtol=3e-6, atol=3e-6, msg=name)


def targets(z, kept):
    """Of the first rows kept ones, then any."""
    last = kept.double().mul(torch.arange(z.shape[-1])).argmax(-1)
    return torch.where(torch.arange(len(z)) < 5, last, torch.randint(0, z.shape[-1], (len(z),)))
