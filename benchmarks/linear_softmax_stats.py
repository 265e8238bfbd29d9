"""Entropy and log-probability from hidden states: forward, and forward + backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Case, Results, Sizes, our_impls
from benchmarks.peers import Function, linear_truth, peers
from em_kernels import linear_softmax_stats

FLOORS = {
    1: "one bare matrix product",
    2: "two bare matrix products",
    3: "three bare matrix products",
}
Run = Callable[[], Results]
Truth = dict[str, tuple[Tensor, Tensor]]


def make_hidden(
    sizes: Sizes, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, target, upstream gradients; logits from nearly uniform to peaked."""
    torch.manual_seed(0)
    spread = torch.linspace(0.5, 3, sizes.n, device=device)[:, None]
    hidden = (spread * torch.randn(sizes.n, sizes.d, device=device)).to(dtype)
    weight = (torch.randn(sizes.v, sizes.d, device=device) * sizes.d**-0.5).to(dtype)
    target = torch.randint(0, sizes.v, (sizes.n,), device=device)
    return hidden, weight, target, torch.randn(2, sizes.n, device=device)


def products(
    hidden: Tensor, weight: Tensor, backward: bool, frozen: bool = False
) -> Callable[[], None]:
    """The bare matrix products: logits, and with `backward` dX and, unless `frozen`, dW too, into
    given memory."""
    logits = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    grads = [torch.empty_like(hidden), None if frozen else torch.empty_like(weight)]

    def run():
        torch.mm(hidden, weight.T, out=logits)
        if backward:
            torch.mm(logits, weight, out=grads[0])
            if not frozen:
                torch.mm(logits.T, hidden, out=grads[1])

    return run


def bare_products(count: int, hidden: Tensor, weight: Tensor) -> dict[str, Any]:
    """Of a `Case` whose floor they are: 1 makes the logits, 2 also dX, 3 also dW."""
    return {
        "floor": (
            FLOORS[count],
            products(hidden, weight, backward=count > 1, frozen=count == 2),
        ),
        "bytes_moved": count * weight.nbytes,
        "flops": 2 * count * len(hidden) * weight.numel(),
    }


def ours(
    hidden: Tensor, weight: Tensor, target: Tensor, impl: str = "auto", **options
) -> tuple[Tensor, Tensor]:
    stats = linear_softmax_stats(hidden, weight, target, impl=impl, **options)
    return stats.logprob, stats.entropy


def fused(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    stats = linear_softmax_stats(hidden, weight, target, fuse_product=True)
    return stats.logprob, stats.entropy


def forward(function: Function, *inputs: Tensor):
    def run():
        with torch.no_grad():
            logprob, entropy = function(*inputs)
        return {"logprob": logprob, "entropy": entropy}

    return run


def forward_backward(
    function: Function, hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor
):
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]

    def run():
        logprob, entropy = function(*leaves, target)
        loss = (upstream[0] * logprob).sum() + (upstream[1] * entropy).sum()
        grads = torch.autograd.grad(loss, leaves)
        named = dict(zip(("grad_hidden", "grad_weight"), grads))
        return {"logprob": logprob, "entropy": entropy, **named}

    return run


def of_logprob(function: Function, hidden: Tensor, weight: Tensor, target: Tensor, upstream):
    """Forward and backward of the log-probabilities alone, the weight frozen, entropy a number."""
    leaf = hidden.detach().requires_grad_()

    def run():
        logprob, entropy = function(leaf, weight, target)
        (grad,) = torch.autograd.grad((upstream[0] * logprob).sum(), leaf)
        return {"logprob": logprob, "entropy": entropy, "grad_hidden": grad}

    return run


def backward(function: Function, hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor):
    """The gradients alone, each time from the same forward pass."""
    leaves, results = [x.detach().requires_grad_() for x in (hidden, weight)], []

    def run():
        if not results:
            results.extend(function(*leaves, target))
        given = [g.to(result.dtype) for g, result in zip(upstream, results, strict=True)]
        grads = torch.autograd.grad(results, leaves, given, retain_graph=True)
        return dict(zip(("grad_hidden", "grad_weight"), grads))

    return run


def gradient_bytes(hidden: Tensor, weight: Tensor) -> int:
    """Both gradients and, for 16-bit weights, the float32 accumulator of the weight's."""
    size = hidden.element_size()
    accumulator = 4 * weight.numel() if size < 4 else 0
    return size * (hidden.numel() + weight.numel()) + accumulator


def cases(sizes: Sizes, dtype: torch.dtype, device: str, compiled: bool) -> Iterator[Case]:
    hidden, weight, target, upstream = inputs = make_hidden(sizes, dtype, device)
    others, left_out = peers(linear=True, compiled=compiled, dtype=dtype)
    own = {name: partial(ours, impl=impl) for name, impl in our_impls(device).items()}
    functions = {**own, **others}
    truth = linear_truth(hidden, weight, target, *upstream)

    def case(
        name: str, count: int, truth: Truth, contenders: dict[str, Run], kept_bytes: int = 0
    ) -> Case:
        return Case(
            f"linear_softmax_stats {name}",
            sizes,
            dtype,
            device,
            contenders,
            truth=truth,
            left_out=left_out,
            kept_bytes=kept_bytes,
            **bare_products(count, hidden, weight),
        )

    with_fused = {**functions, "em_kernels fused": fused} if device == "cuda" else functions
    steps = {name: forward(f, *inputs[:3]) for name, f in with_fused.items()}
    yield case("forward", 1, {name: truth[name] for name in ("logprob", "entropy")}, steps)
    gradients = gradient_bytes(hidden, weight)
    kept = {"keep_logits=0": partial(ours, keep_logits=0)}
    kept["keep_logits=all"] = partial(ours, keep_logits=1 << 62)
    steps = {name: forward_backward(f, *inputs) for name, f in {**functions, **kept}.items()}
    yield case("forward + backward", 3, truth, steps, gradients)
    steps = {name: backward(functions[name], *inputs) for name in (*own, "eager")}
    of_gradients = {name: truth[name] for name in ("grad_hidden", "grad_weight")}
    yield case("backward", 3, of_gradients, steps, gradients)
    truth = linear_truth(hidden, weight, target, upstream[0], torch.zeros_like(upstream[1]))
    del truth["grad_weight"]
    number = {name: partial(f, entropy_requires_grad=False) for name, f in own.items()}
    steps = {name: of_logprob(f, *inputs) for name, f in {**functions, **number}.items()}
    name = "forward + backward of logprob, weight frozen"
    yield case(name, 2, truth, steps, hidden.nbytes)
