"""Entropy and log-probability from logits: forward, and forward + backward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.common import Case, Sizes, our_impls
from benchmarks.peers import Function, logits_gradient, moments, peers, sample
from em_kernels import softmax_stats


def make_logits(sizes: Sizes, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Rows from nearly uniform to nearly certain, as the tokens of a language model are."""
    torch.manual_seed(0)
    logits = torch.randn(sizes.n, sizes.v, device=device)
    logits *= torch.linspace(1, 6, sizes.n, device=device)[:, None]
    return logits.to(dtype), torch.randint(0, sizes.v, (sizes.n,), device=device)


def ours(logits: Tensor, target: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    stats = softmax_stats(logits, target, impl=impl)
    return stats.logprob, stats.entropy


def forward(function: Function, logits: Tensor, target: Tensor):
    def run():
        with torch.no_grad():
            logprob, entropy = function(logits, target)
        return {"logprob": logprob, "entropy": entropy}

    return run


def forward_backward(function: Function, logits: Tensor, target: Tensor, upstream: Tensor):
    leaf = logits.detach().requires_grad_()

    def run():
        logprob, entropy = function(leaf, target)
        loss = (upstream[0] * logprob).sum() + (upstream[1] * entropy).sum()
        (grad,) = torch.autograd.grad(loss, leaf)
        return {"logprob": logprob, "entropy": entropy, "grad": grad}

    return run


def backward(function: Function, logits: Tensor, target: Tensor, upstream: Tensor):
    """The gradient alone, each time from the same forward pass."""
    leaf, results = logits.detach().requires_grad_(), []

    def run():
        if not results:
            results.extend(function(leaf, target))
        given = [g.to(result.dtype) for g, result in zip(upstream, results, strict=True)]
        return {"grad": torch.autograd.grad(results, leaf, given, retain_graph=True)[0]}

    return run


def cases(sizes: Sizes, dtype: torch.dtype, device: str, compiled: bool) -> Iterator[Case]:
    sizes = sizes._replace(d=0)
    logits, target = make_logits(sizes, dtype, device)
    others, left_out = peers(linear=False, compiled=compiled, dtype=dtype)
    own = {name: partial(ours, impl=impl) for name, impl in our_impls(device).items()}
    functions = {**own, **others}
    rows = sample(sizes.n, device=device)
    _, logprob, entropy = moments(logits[rows], target[rows])
    truth = {"logprob": (rows, logprob), "entropy": (rows, entropy)}
    copy, size = torch.empty_like(logits), logits.numel() * logits.element_size()
    common = dict(sizes=sizes, dtype=dtype, device=device, left_out=left_out)
    common["floor"] = ("copy of the logits", lambda: copy.copy_(logits))
    common["floor_bytes"] = 2 * size
    yield Case(
        name="softmax_stats forward",
        contenders={name: forward(f, logits, target) for name, f in functions.items()},
        truth=truth,
        bytes_moved=size,
        **common,
    )
    upstream = torch.randn(2, sizes.n, device=device)
    grad = logits_gradient(logits[rows], target[rows], upstream[0][rows], upstream[1][rows])
    yield Case(
        name="softmax_stats forward + backward",
        contenders={
            name: forward_backward(f, logits, target, upstream) for name, f in functions.items()
        },
        truth={**truth, "grad": (rows, grad)},
        bytes_moved=3 * size,
        kept_bytes=size,
        **common,
    )
    yield Case(
        name="softmax_stats backward",
        contenders={
            name: backward(functions[name], logits, target, upstream) for name in (*own, "eager")
        },
        truth={"grad": (rows, grad)},
        bytes_moved=2 * size,
        kept_bytes=size,
        **common,
    )
