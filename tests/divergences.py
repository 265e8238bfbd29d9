"""Divergences for the tests: textbook formulas in float64, calls by name, and pairs of rows."""

from __future__ import annotations

import math

import torch
from helpers import random_logits, transformed
from torch import Tensor

KINDS = (("forward_kl", 0.5), ("reverse_kl", 0.5), ("js", 0.5), ("js", 0.1), ("js", 0.97))
KIND_NAMES = tuple(f"{kind}-{beta}" for kind, beta in KINDS)
OWN = dict(temperature=0.7, softcap=5.0, logit_scale=1.3)
OTHER = dict(other_temperature=1.4, other_softcap=9.0, other_logit_scale=-0.8)


def textbook(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> Tensor:
    """Of log-probabilities, all finite."""
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward_kl":
        return (q * (log_q - log_p)).sum(-1)
    if kind == "reverse_kl":
        return (p * (log_p - log_q)).sum(-1)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    of_q, of_p = (q * (log_q - log_m)).sum(-1), (p * (log_p - log_m)).sum(-1)
    return beta * of_q + (1 - beta) * of_p


def truth(
    x: Tensor,
    y: Tensor,
    kind: str,
    beta: float,
    *,
    bias: Tensor | None = None,
    other_bias: Tensor | None = None,
    valid_vocab: int | None = None,
    **options,
) -> Tensor:
    """The divergence of two rows of logits in float64, with the options of the public functions."""
    names = ("temperature", "softcap", "logit_scale")
    given = {name: options[name] for name in names if name in options}
    other = {name: options[f"other_{name}"] for name in names if f"other_{name}" in options}
    other.setdefault("temperature", given.get("temperature", 1.0))
    z = transformed(x, bias=bias, valid_vocab=valid_vocab, **given)
    w = transformed(y, bias=other_bias, valid_vocab=valid_vocab, **other)
    return textbook(z.log_softmax(-1), w.log_softmax(-1), kind, beta)


def gradients(value: Tensor, tensors, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    total = value.sum() if upstream is None else (value * upstream).sum()
    return torch.autograd.grad(total, tensors)


def draw_pair(*shape: int, apart: float = 3.0, **options) -> tuple[Tensor, Tensor]:
    """Two rows of logits that differ by so much."""
    x = random_logits(*shape, **options)
    return x, (x + apart * random_logits(*shape, **options) / 4).to(x.dtype)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]
