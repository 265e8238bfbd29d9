"""Entropy, logprob and gradient of what top_k and top_p leave, from logits and hidden states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Case, Sizes, our_impls
from benchmarks.linear_softmax_stats import bare_products, gradient_bytes, make_hidden
from benchmarks.peers import sample
from benchmarks.softmax_stats import make_logits
from em_kernels import linear_token_loss, token_loss
from em_kernels.backends.truncation import find_border, is_outside

TEMPERATURE, TOP_K, TOP_P = 0.9, 50, 0.95
SAMPLER: dict[str, Any] = dict(temperature=TEMPERATURE, top_k=TOP_K, top_p=TOP_P)
OUTPUTS = ("logprob", "entropy")
Step = Callable[..., Tensor]  # of the leaves: the loss, sum of entropy - logprob over the tokens


def eager(logits: Tensor, target: Tensor) -> Tensor:
    """As transformers' generate has it: float32, warpers one after the other."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores: Any = logits.float()
    warpers = TemperatureLogitsWarper(TEMPERATURE), TopKLogitsWarper(TOP_K), TopPLogitsWarper(TOP_P)
    for warper in warpers:
        scores = warper(None, scores)
    log_p = scores.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p.isinf(), 0)).sum(-1)
    return (entropy - log_p.gather(-1, target[:, None])[:, 0]).mean()


def ours(function: Any, *given: Tensor, target: Tensor, impl: str) -> Tensor:
    weight = torch.full((len(target),), 1 / len(target), device=target.device)
    weights = dict(entropy_weight=weight, logprob_weight=-weight)
    loss: Tensor = function(*given, target, **weights, **SAMPLER, impl=impl, outputs=()).loss
    return loss


def step(loss_of: Step, *inputs: Tensor):
    leaves = [x.detach().requires_grad_() for x in inputs]

    def run():
        loss = loss_of(*leaves)
        first, *_ = torch.autograd.grad(loss, leaves)
        return {"loss": loss, "grad": first.abs().sum(-1)}

    return run


def truth(logits: Tensor, target: Tensor, weight: Tensor | None = None):
    """{"loss", "grad"} by textbook formulas in float64, a few rows at a time."""
    rows, total, gradients = sample(len(target), device=target.device), 0.0, {}
    limits = torch.tensor([[TOP_K, TOP_P, 0.0]], dtype=torch.float64, device=logits.device)
    for i, (row, y) in enumerate(zip(logits.split(1), target.split(1), strict=True)):
        z = (row.double() / TEMPERATURE).requires_grad_()
        outside = is_outside(z, find_border(z, limits, False))
        log_p = z.masked_fill(outside, -math.inf).log_softmax(-1)
        entropy = -(log_p.exp() * log_p.masked_fill(outside, 0)).sum()
        loss = (entropy - log_p[0, y[0]]) / len(target)
        total += loss.item()
        if i in rows.tolist():
            (grad,) = torch.autograd.grad(loss, z)
            grad = grad / TEMPERATURE
            gradients[i] = (grad if weight is None else grad @ weight.double()).abs().sum()
    return {
        "loss": (rows, torch.tensor(total, dtype=torch.float64)),
        "grad": (rows, torch.stack([gradients[i] for i in rows.tolist()])),
    }


def peers(compiled: bool) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        import transformers  # noqa: F401
    except ImportError:
        return {}, dict.fromkeys(("eager", "torch.compile"), "needs transformers")
    if not compiled:
        return {"eager": eager}, {"torch.compile": "--quick"}
    torch.compiler.reset()
    return {"eager": eager, "torch.compile": torch.compile(eager)}, {}


def cases(sizes: Sizes, dtype: torch.dtype, device: str, compiled: bool) -> Iterator[Case]:
    functions, left_out = peers(compiled)
    impls = our_impls(device)
    logits, _ = make_logits(sizes, dtype, device)
    target = logits.argmax(-1)  # one that is kept
    given = {name: partial(f, target=target) for name, f in functions.items()}
    own = {n: partial(ours, token_loss, target=target, impl=i) for n, i in impls.items()}
    copy, size = torch.empty_like(logits), logits.numel() * logits.element_size()
    common = dict(dtype=dtype, device=device, left_out=left_out)
    yield Case(
        name="truncated token_loss forward + backward",
        sizes=sizes._replace(d=0),
        contenders={name: step(f, logits) for name, f in {**own, **given}.items()},
        floor=("copy of the logits", lambda: copy.copy_(logits)),
        floor_bytes=2 * size,
        truth=truth(logits, target),
        bytes_moved=2 * size,
        kept_bytes=size,
        **common,
    )
    hidden, weight, _, _ = make_hidden(sizes, dtype, device)
    logits = hidden @ weight.T
    target = logits.argmax(-1)

    def from_hidden(f: Step) -> Step:
        return lambda hidden, weight: f(hidden @ weight.T, target)

    given = {name: from_hidden(f) for name, f in functions.items()}
    own = {n: partial(ours, linear_token_loss, target=target, impl=i) for n, i in impls.items()}
    yield Case(
        name="truncated linear_token_loss forward + backward",
        sizes=sizes,
        contenders={name: step(f, hidden, weight) for name, f in {**own, **given}.items()},
        truth=truth(logits, target, weight),
        kept_bytes=gradient_bytes(hidden, weight),
        **common,
        **bare_products(3, hidden, weight),
    )
