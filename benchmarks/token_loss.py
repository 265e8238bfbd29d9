"""The entropy-minimisation loss from logits, forward + backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.common import Case, Sizes, our_impls
from benchmarks.peers import Function, logits_gradient, moments, peers, sample
from benchmarks.softmax_stats import make_logits
from em_kernels import entropy_loss


def step(function: Function, logits: Tensor, target: Tensor):
    """The mean entropy of a peer's operator, and its gradient."""
    leaf = logits.detach().requires_grad_()

    def run():
        loss = function(leaf, target)[1].mean()
        return {"loss": loss, "grad": torch.autograd.grad(loss, leaf)[0]}

    return run


def our_step(logits: Tensor, impl: str):
    leaf = logits.detach().requires_grad_()

    def run():
        loss = entropy_loss(leaf, impl=impl)
        return {"loss": loss, "grad": torch.autograd.grad(loss, leaf)[0]}

    return run


def our_inplace_step(logits: Tensor, impl: str):
    """Overwrites its logits: each call gets them afresh, and that copy is timed with it."""
    memory = torch.empty_like(logits)

    def run():
        leaf = memory.copy_(logits).detach().requires_grad_()
        loss = entropy_loss(leaf, inplace=True, impl=impl)
        return {"loss": loss, "grad": torch.autograd.grad(loss, leaf)[0]}

    return run


def our_steps(logits: Tensor, device: str) -> dict:
    steps = {}
    for name, impl in our_impls(device).items():
        steps[name] = our_step(logits, impl)
        steps[f"{name} inplace, with a copy"] = our_inplace_step(logits, impl)
    return steps


def cases(sizes: Sizes, dtype: torch.dtype, device: str, compiled: bool) -> Iterator[Case]:
    sizes = sizes._replace(d=0)
    logits, target = make_logits(sizes, dtype, device)
    functions, left_out = peers(linear=False, compiled=compiled, dtype=dtype)
    rows = sample(sizes.n, device=device)
    entropies = [moments(x, y)[2] for x, y in zip(logits.split(32), target.split(32))]
    weight = torch.full((len(rows),), 1 / sizes.n, device=device)
    grad = logits_gradient(logits[rows], target[rows], 0 * weight, weight)
    copy, size = torch.empty_like(logits), logits.numel() * logits.element_size()
    yield Case(
        name="token_loss (entropy_loss) forward + backward",
        sizes=sizes,
        dtype=dtype,
        device=device,
        contenders={
            **our_steps(logits, device),
            **{name: step(f, logits, target) for name, f in functions.items()},
        },
        floor=("copy of the logits", lambda: copy.copy_(logits)),
        floor_bytes=2 * size,
        truth={"loss": (rows, torch.cat(entropies).mean()), "grad": (rows, grad)},
        bytes_moved=2 * size,
        kept_bytes=size,
        left_out=left_out,
    )
