"""The divergence of two heads as a loss, forward + backward to the first pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.common import Case, Sizes, our_impls
from benchmarks.linear_softmax_stats import gradient_bytes, make_hidden, products
from em_kernels import linear_divergence_loss

Pair = tuple[Tensor, Tensor, Tensor, Tensor]  # hidden, weight, and those of the other head
Loss = Callable[..., Tensor]  # of a pair, its mean over the tokens
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "js": 0.5}
SAMPLE, TRUTH_ROWS = 16, 64


def ours(kind: str, impl: str, *pair: Tensor) -> Tensor:
    rows = pair[0].shape[0]
    weight = torch.full((rows,), 1 / rows, device=pair[0].device)
    return linear_divergence_loss(*pair, kind=kind, token_weight=weight, impl=impl).loss


def eager(kind: str, hidden: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor) -> Tensor:
    """What a careful user writes without a library, in float32."""
    own = (hidden @ weight.T).float().log_softmax(-1)
    its = (other @ other_weight.T).float().log_softmax(-1)
    if kind != "js":
        pair = (own, its) if kind == "forward_kl" else (its, own)
        return functional.kl_div(*pair, reduction="sum", log_target=True) / len(hidden)
    mixture = torch.logaddexp(own, its) - torch.log(torch.tensor(2.0, device=own.device))
    kls = (functional.kl_div(mixture, x, reduction="sum", log_target=True) for x in (own, its))
    return sum(kls) / (2 * len(hidden))


def trl(kind: str) -> Loss:
    function = import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def run(hidden, weight, other, other_weight):
        heads = hidden, weight, None, other, other_weight, None
        return function.apply(*heads, BETAS[kind])[0].mean()

    return run


def liger(kind: str, compiled: bool) -> Loss:
    module = import_module("liger_kernel.chunked_loss")
    loss = module.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETAS[kind], compiled=compiled
    )

    def run(hidden, weight, other, other_weight):
        target = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        return loss(hidden, weight, other, other_weight, target)

    return run


def contenders(kind: str, device: str, compiled: bool) -> tuple[dict[str, Loss], dict[str, str]]:
    found: dict[str, Loss] = {n: partial(ours, kind, impl) for n, impl in our_impls(device).items()}
    found["eager"], left_out = partial(eager, kind), {}
    for name, make in (("TRL", partial(trl, kind)), ("Liger", partial(liger, kind, compiled))):
        try:
            found[name] = make()
        except (ImportError, AttributeError) as reason:
            left_out[name] = f"{type(reason).__name__}: {reason}"
    if compiled:
        found["torch.compile"] = torch.compile(partial(eager, kind))
    else:
        left_out["torch.compile"] = "--quick"
    return found, left_out


def step(loss_of: Loss, pair: Pair):
    leaves = [x.detach().requires_grad_() for x in pair[:2]]

    def run():
        loss = loss_of(*leaves, *pair[2:])
        grads = torch.autograd.grad(loss, leaves)
        return {"loss": loss, "grad_hidden": grads[0], "grad_weight": grads[1]}

    return run


def truth(kind: str, pair: Pair) -> dict[str, tuple[Tensor, Tensor]]:
    """Of float32 logits in float64, some rows at a time."""
    hidden, weight, other, other_weight = (x.float() for x in pair)
    rows, index = len(hidden), torch.arange(min(SAMPLE, len(hidden)), device=hidden.device)
    columns = torch.arange(SAMPLE, device=hidden.device)
    total, of_weight = 0.0, torch.zeros(SAMPLE, weight.shape[1], dtype=torch.float64)
    for own in torch.arange(rows, device=hidden.device).split(TRUTH_ROWS):
        z = (hidden[own] @ weight.T).double().requires_grad_()
        w = (other[own] @ other_weight.T).double()
        value = textbook(kind, z.log_softmax(-1), w.log_softmax(-1)) / rows
        (g,) = torch.autograd.grad(value, z)
        total += value.item()
        of_weight += (g[:, :SAMPLE].T @ hidden[own].double()).cpu()
        if own[0] == 0:
            of_hidden = (g[:SAMPLE].float() @ weight).double()
    scalar = torch.tensor(total, dtype=torch.float64)
    return {
        "loss": (index, scalar),
        "grad_hidden": (index, of_hidden),
        "grad_weight": (columns, of_weight),
    }


def textbook(kind: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward_kl":
        return (q * (log_q - log_p)).sum()
    if kind == "reverse_kl":
        return (p * (log_p - log_q)).sum()
    log_m = ((p + q) / 2).log()
    return ((p * (log_p - log_m)).sum() + (q * (log_q - log_m)).sum()) / 2


def floor(pair: Pair) -> Callable[[], None]:
    """The logits of both heads, dX and dW of the first."""
    own, its = products(*pair[:2], backward=True), products(*pair[2:], backward=False)
    return lambda: (own(), its())


def cases(sizes: Sizes, dtype: torch.dtype, device: str, compiled: bool) -> Iterator[Case]:
    hidden, weight, _, _ = make_hidden(sizes, dtype, device)
    pair = hidden, weight, (hidden + torch.randn_like(hidden)).to(dtype), weight.clone()
    for kind in BETAS:
        losses, left_out = contenders(kind, device, compiled)
        yield Case(
            name=f"linear_divergence_loss {kind} forward + backward",
            sizes=sizes,
            dtype=dtype,
            device=device,
            contenders={name: step(loss, pair) for name, loss in losses.items()},
            floor=("four bare matrix products", floor(pair)),
            truth=truth(kind, pair),
            bytes_moved=4 * weight.numel() * weight.element_size(),
            flops=8 * sizes.n * sizes.v * sizes.d,
            kept_bytes=gradient_bytes(hidden, weight),
            left_out=left_out,
        )
