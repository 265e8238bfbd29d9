"""Operands of two dtypes against a cast weight, dW added to a float32 sum against `.grad`, and
float32 logits of 16-bit operands against 16-bit ones.

All are losses from hidden states, forward + backward; the second in MICRO micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.common import Case, Results, Sizes, our_impls
from benchmarks.linear_softmax_stats import bare_products, make_hidden, products
from benchmarks.peers import linear_truth, peers
from em_kernels import linear_entropy_loss

MICRO = 4


def eager(hidden: Tensor, weight: Tensor) -> Tensor:
    """The mean entropy, out of a product in the wider dtype."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    log_p = torch.log_softmax((hidden.to(dtype) @ weight.to(dtype).T).float(), -1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def step(loss_of: Callable[..., Tensor], hidden: Tensor, weight: Tensor):
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]

    def run() -> Results:
        loss = loss_of(*leaves)
        grads = torch.autograd.grad(loss, leaves)
        return {"loss": loss, "grad_hidden": grads[0], "grad_weight": grads[1]}

    return run


def accumulated(loss_of: Callable[..., Tensor], hidden: Tensor, weight: Tensor, how: str):
    """dW of all micro-batches: `how` is "into" a float32 matrix, "added" to it after each backward
    pass, or left in ".grad"."""
    weight = weight.detach().requires_grad_()
    total = None if how == ".grad" else torch.zeros_like(weight, dtype=torch.float32)

    def run() -> Results:
        weight.grad = None
        options = {"accumulate_into": total} if how == "into" else {}
        if total is not None:
            total.zero_()
        for part in hidden.chunk(MICRO):
            x = part.detach().requires_grad_()
            (loss_of(x, weight, **options) * (len(part) / len(hidden))).backward()
            if how == "added" and total is not None:
                total.add_(weight.grad)
                weight.grad = None
        return {"grad_weight": weight.grad if total is None else total}

    return run


def mixed_case(sizes: Sizes, dtype: torch.dtype, device: str, left_out: dict) -> Case:
    """Hidden states of `dtype`, a weight of the other of float32 and bfloat16."""
    hidden, weight, target, _ = make_hidden(sizes, dtype, device)
    other = torch.bfloat16 if dtype.itemsize > 2 else torch.float32
    weight, wider = weight.to(other), torch.promote_types(dtype, other)
    each = torch.full((sizes.n,), 1 / sizes.n, device=device)
    truth = linear_truth(hidden, weight, target, 0 * each, each)
    del truth["logprob"]
    index, entropy = truth.pop("entropy")
    if other.itemsize < dtype.itemsize:
        del truth["grad_weight"]  # rounded to 16 bits, where all else is held to float32
    contenders = {}
    for name, impl in our_impls(device).items():

        def own(x: Tensor, w: Tensor, impl: str = impl) -> Tensor:
            return linear_entropy_loss(x, w, impl=impl)

        def cast(x: Tensor, w: Tensor, impl: str = impl) -> Tensor:
            return linear_entropy_loss(x.to(wider), w.to(wider), impl=impl)

        contenders |= {name: step(own, hidden, weight)}
        contenders |= {f"{name}, weight cast": step(cast, hidden, weight)}
    return Case(
        name=f"linear_entropy_loss, weight of {str(other).removeprefix('torch.')}",
        sizes=sizes,
        dtype=dtype,
        device=device,
        contenders={**contenders, "eager": step(eager, hidden, weight)},
        floor=(
            "three bare matrix products",
            products(hidden.to(wider), weight.to(wider), backward=True),
        ),
        truth={"loss": (index, entropy.mean()), **truth},
        bytes_moved=3 * weight.numel() * weight.element_size(),
        flops=6 * sizes.n * sizes.v * sizes.d,
        kept_bytes=hidden.nbytes + weight.nbytes,
        left_out=left_out,
    )


def accumulating_case(sizes: Sizes, dtype: torch.dtype, device: str, left_out: dict) -> Case:
    hidden, weight, target, _ = make_hidden(sizes, dtype, device)
    each = torch.full((sizes.n,), 1 / sizes.n, device=device)
    truth = linear_truth(hidden, weight, target, 0 * each, each)
    contenders = {}
    for name, impl in our_impls(device).items():

        def own(x: Tensor, w: Tensor, impl: str = impl, **options) -> Tensor:
            return linear_entropy_loss(x, w, impl=impl, **options)

        contenders |= {name: accumulated(own, hidden, weight, "into")}
        contenders |= {f"{name}, .grad": accumulated(own, hidden, weight, ".grad")}
        contenders |= {f"{name}, .grad to float32": accumulated(own, hidden, weight, "added")}
    return Case(
        name=f"accumulate_into, {MICRO} micro-batches",
        sizes=sizes,
        dtype=dtype,
        device=device,
        contenders={**contenders, "eager": accumulated(eager, hidden, weight, ".grad")},
        truth={"grad_weight": truth["grad_weight"]},
        left_out=left_out,
        **bare_products(3, hidden, weight),
    )


def wide_case(sizes: Sizes, dtype: torch.dtype, device: str, left_out: dict) -> Case:
    """16-bit operands, logits in either dtype."""
    hidden, weight, target, _ = make_hidden(sizes, dtype, device)
    each = torch.full((sizes.n,), 1 / sizes.n, device=device)
    truth = linear_truth(hidden, weight, target, 0 * each, each)
    contenders = {}
    for name, impl in our_impls(device).items():
        for logits_dtype in (dtype, torch.float32):

            def own(x: Tensor, w: Tensor, impl=impl, logits_dtype=logits_dtype) -> Tensor:
                return linear_entropy_loss(x, w, impl=impl, logits_dtype=logits_dtype)

            kind = "" if logits_dtype == dtype else ", logits of float32"
            contenders |= {f"{name}{kind}": step(own, hidden, weight)}
    return Case(
        name="linear_entropy_loss, logits_dtype",
        sizes=sizes,
        dtype=dtype,
        device=device,
        contenders={**contenders, "eager": step(eager, hidden, weight)},
        truth={"grad_hidden": truth["grad_hidden"], "grad_weight": truth["grad_weight"]},
        kept_bytes=hidden.nbytes + weight.nbytes,
        left_out=left_out,
        **bare_products(3, hidden, weight),
    )


def cases(sizes: Sizes, dtype: torch.dtype, device: str, compiled: bool) -> Iterator[Case]:
    _, left_out = peers(linear=True, compiled=compiled, dtype=dtype)
    yield mixed_case(sizes, dtype, device, left_out)
    yield accumulating_case(sizes, dtype, device, left_out)
    if dtype.itemsize == 2:
        yield wide_case(sizes, dtype, device, left_out)
