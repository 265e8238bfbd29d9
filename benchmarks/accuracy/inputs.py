"""Rows that have a given entropy, rounded to the dtype they are given in, and the float64 truth.

The truth is of the rounded numbers: 16-bit logits are the input, and from hidden states it is the
product of the rounded operands. Every row of one cell has the same H, up to that rounding; they
differ in spread and, as logits, in offset.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

ENTROPIES = (1e-12, 1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 4.0, math.inf)
TEMPERATURES = (0.3, 0.7, 1.0, 1.7)
SPREADS = (0.5, 1.0, 2.0, 3.0)  # standard deviations of the other logits, in nats
OFFSETS = (0.0, 12.0)  # added to every logit of a row: a softmax does not see it
ROWS, WIDTH = len(SPREADS) * len(OFFSETS), 256
BELOW_UNIFORM = 0.01  # what is taken for log V: at log V itself the gradient of H is 0
LIKELIEST = 7
LOSS_SCALE = {torch.float16: 1024.0}  # of the gradients, as float16 needs one


class Cell(NamedTuple):
    """What the rows of one measurement have in common."""

    source: str  # LOGITS, HIDDEN or FLOAT32_LOGITS
    dtype: torch.dtype
    vocab: int
    temperature: float
    entropy: float  # nats; infinite for as much as there can be


LOGITS, HIDDEN, FLOAT32_LOGITS = "logits", "hidden", "hidden, float32 logits"


class Truth(NamedTuple):
    """float64, per row; gradients are of the logits, and not multiplied by LOSS_SCALE."""

    entropy: Tensor
    logprob: Tensor
    grad_entropy: Tensor
    grad_logprob: Tensor


def truth(logits: Tensor, target: Tensor, temperature: float) -> Truth:
    """From float64 logits, the maximum left out of the sums: exact to float64 for any H."""
    d = (logits - logits.amax(-1, keepdim=True)) / temperature
    top = d.argmax(-1, keepdim=True)
    e = d.exp().scatter(-1, top, 0)
    r = e.sum(-1, keepdim=True)
    mean = (e * d).sum(-1, keepdim=True) / (1 + r)  # of d under p, the maximum's d being 0
    p = (e / (1 + r)).scatter(-1, top, 1 / (1 + r))
    others = -p.scatter(-1, top, -r / (1 + r))  # 1[v is the top] - p_v
    chosen = torch.zeros_like(p).scatter(-1, target[:, None], 1)
    of_logprob = torch.where(target[:, None] == top, others, chosen - p)
    logprob = d.gather(-1, target[:, None]) - r.log1p()
    return Truth(
        (r.log1p() - mean)[:, 0],
        logprob[:, 0],
        p * (mean - d) / temperature,
        of_logprob / temperature,
    )


def entropy(logits: Tensor) -> Tensor:
    return truth(logits, logits.argmax(-1), 1.0).entropy


def likeliest(logits: Tensor, rank: int) -> Tensor:
    """Of every row the id of that rank, from 0."""
    return logits.topk(rank + 1).indices[:, rank]


class Rows(NamedTuple):
    leaves: tuple[Tensor, ...]  # logits, or hidden and weight
    logits: Tensor  # float64, of the rounded leaves


def make_rows(cell: Cell) -> Rows:
    """ROWS rows of that entropy at that temperature."""
    if cell.source == LOGITS:
        plain = cell.temperature * plain_logits(cell.vocab, cell.entropy)
        offsets = torch.tensor(OFFSETS).repeat(len(SPREADS))[:, None]
        logits = (plain + offsets).to(cell.dtype)
        return Rows((logits,), logits.double())
    hidden = (cell.temperature * plain_hidden(cell.vocab, cell.entropy, cell.dtype)).to(cell.dtype)
    weight = head(cell.vocab, cell.dtype)
    return Rows((hidden, weight), hidden.double() @ weight.double().T)


@cache
def plain_logits(vocab: int, goal: float) -> Tensor:
    """Normal noise of every spread, each twice, with one logit raised until H fits at T = 1."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(ROWS, vocab, generator=generator, dtype=torch.float64)
    noise *= torch.tensor(SPREADS).double().repeat_interleave(len(OFFSETS))[:, None]
    noise[:, LIKELIEST] = 0
    one = torch.zeros_like(noise)
    one[:, LIKELIEST] = 1
    return mixed(noise, one, fitting(noise, one, goal))


@cache
def plain_hidden(vocab: int, goal: float, dtype: torch.dtype) -> Tensor:
    """As `plain_logits`: noise, and so much of the likeliest word's weight."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    noise *= torch.tensor(SPREADS).double().repeat_interleave(len(OFFSETS))[:, None]
    weight = head(vocab, dtype).double()
    word = weight[LIKELIEST] / weight[LIKELIEST].square().sum()
    share = fitting(noise @ weight.T, (weight @ word).expand(ROWS, vocab), goal)
    return mixed(noise, word.expand(ROWS, WIDTH), share)


@cache
def head(vocab: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(vocab, WIDTH, generator=generator) * WIDTH**-0.5).to(dtype)


def mixed(noise: Tensor, one: Tensor, share: Tensor) -> Tensor:
    """Less noise for a share below 0, more of `one` above: H falls with it, from log V to 0."""
    return noise * (1 + share.clamp(max=0)) + 200 * share.clamp(min=0) * one


def fitting(noise: Tensor, one: Tensor, goal: float) -> Tensor:
    """The share, (rows, 1), at which H of the logits is `goal`, by halving."""
    goal = min(goal, math.log(noise.shape[-1]) - BELOW_UNIFORM)
    low, high = (torch.full((len(noise), 1), x, dtype=torch.float64) for x in (-1.0, 1.0))
    for _ in range(50):
        middle = (low + high) / 2
        above = entropy(mixed(noise, one, middle))[:, None] > goal
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return low
