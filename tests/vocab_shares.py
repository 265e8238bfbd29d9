"""One rank's share of the vocabulary, and what the vocabulary-parallel calls are drawn from."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from helpers import DIFFERENTIABLE
from torch import Tensor

VOCAB = 63
SIZES = {2: (40, 23), 3: (30, 5, 28)}
INF, NAN = math.inf, math.nan


class Share(NamedTuple):
    """How much of the vocabulary this process holds."""

    group: object = None
    rank: int = 0
    sizes: tuple[int, ...] | None = None  # None is all of it

    def part(self, x: Tensor, dim: int = -1) -> Tensor:
        """This process's part of `x`: a leaf that asks for its gradient."""
        if self.sizes is not None:
            x = x.split(self.sizes, dim)[self.rank]
        return x.detach().clone().requires_grad_()


WHOLE = Share()


def own_share(sizes: tuple[int, ...] | None = None) -> Share:
    return Share(dist.group.WORLD, dist.get_rank(), sizes or SIZES[dist.get_world_size()])


def with_gradients(values: dict, upstream: dict, parts: dict, copies: dict | None = None):
    """(values and gradients of `copies`, gradients of `parts`: name -> (tensor, dim))."""
    copies = copies or {}
    loss = sum((upstream[name] * values[name]).sum() for name in upstream if name in values)
    leaves = [*copies.values(), *(x for x, _ in parts.values())]
    gradients = torch.autograd.grad(loss, leaves)
    same = {name: value.detach() for name, value in values.items()}
    same |= {f"d {name}": g for name, g in zip(copies, gradients)}
    own = {
        f"d {name}": (g, dim)
        for (name, (_, dim)), g in zip(parts.items(), gradients[len(copies) :])
    }
    return same, own


def draw_upstream(*shape, dtype=torch.float32):
    return {name: torch.randn(shape, dtype=dtype) for name in DIFFERENTIABLE}


def draw_rows(dtype=torch.float32, vocab=VOCAB):
    """Logits (2, 9, vocab) with targets all over the vocabulary, and upstream gradients."""
    torch.manual_seed(1)
    logits = (3 * torch.randn(2, 9, vocab)).to(dtype)
    target = torch.linspace(0, vocab - 1, 18).long().view(2, 9)
    logits[0, :4].scatter_(1, target[0, :4, None], 9.0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return logits, target, draw_upstream(2, 9, dtype=wide)


class Head(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor


def draw_head(share, dtype=torch.float32, dim=8):
    torch.manual_seed(4)
    hidden = torch.randn(2, 9, dim).to(dtype).requires_grad_()
    weight, bias = torch.randn(VOCAB, dim).to(dtype), torch.randn(VOCAB).to(dtype)
    target = torch.linspace(0, VOCAB - 1, 18).long().view(2, 9)
    return Head(hidden, share.part(weight, 0), share.part(bias, 0)), target


def head_gradients(values, upstream, head):
    parts = {"weight": (head.weight, 0), "bias": (head.bias, 0)}
    return with_gradients(values, upstream, parts, {"hidden": head.hidden})


def ids_of(target):
    """Five ids a row, repeated, on several ranks, and padding."""
    ids = torch.stack([target, (target + 31) % VOCAB, target, (target * 7) % VOCAB, target], -1)
    ids[0, :, 4] = -100
    return ids


OF_IDS = ("logprob", "entropy", "lse", "is_top1", "rank")
