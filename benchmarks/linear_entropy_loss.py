"""The entropy-minimisation loss from hidden states, forward + backward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.common import Case, Sizes, our_impls
from benchmarks.linear_softmax_stats import bare_products, gradient_bytes, make_hidden
from benchmarks.peers import Function, linear_truth, peers
from em_kernels import linear_entropy_loss


def step(loss_of, hidden: Tensor, weight: Tensor):
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]

    def run():
        loss = loss_of(*leaves)
        grads = torch.autograd.grad(loss, leaves)
        return {"loss": loss, "grad_hidden": grads[0], "grad_weight": grads[1]}

    return run


def mean_entropy(function: Function, target: Tensor):
    """The loss a peer's operator gives."""
    return lambda hidden, weight: function(hidden, weight, target)[1].mean()


def cases(sizes: Sizes, dtype: torch.dtype, device: str, compiled: bool) -> Iterator[Case]:
    hidden, weight, target, _ = make_hidden(sizes, dtype, device)
    functions, left_out = peers(linear=True, compiled=compiled, dtype=dtype)
    own = {n: partial(linear_entropy_loss, impl=i) for n, i in our_impls(device).items()}
    losses = {**own, **{name: mean_entropy(f, target) for name, f in functions.items()}}
    each = torch.full((sizes.n,), 1 / sizes.n, device=device)
    truth = linear_truth(hidden, weight, target, 0 * each, each)
    del truth["logprob"]
    index, entropy = truth.pop("entropy")
    yield Case(
        name="linear_entropy_loss forward + backward",
        sizes=sizes,
        dtype=dtype,
        device=device,
        contenders={name: step(loss, hidden, weight) for name, loss in losses.items()},
        truth={"loss": (index, entropy.mean()), **truth},
        kept_bytes=gradient_bytes(hidden, weight),
        left_out=left_out,
        **bare_products(3, hidden, weight),
    )
