"""What the tests share: the backends there are, float64 truth, inputs, and errors."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

import em_kernels
from em_kernels.backends.choice import why_not
from em_kernels.backends.interface import OUTPUTS, RowSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DIFFERENTIABLE = ("logprob", "entropy", "lse")
BACKENDS = ("reference", "cpu", "triton", "cuda")
IMPLS = tuple(name for name in BACKENDS if em_kernels.backends()[name] == "available")
ON_CPU = tuple(name for name in BACKENDS if why_not(name, torch.device("cpu")) is None)
SLOW_INTERPRETER = not torch.cuda.is_available()
FAST_IMPLS = tuple(name for name in IMPLS if name != "triton" or not SLOW_INTERPRETER)
# PyTorch rounds an element at the end of memory (no full vector left) differently, and cuts one
# long row between threads: the bits of the reference do depend on the other rows.
ROWWISE_IMPLS = tuple(name for name in IMPLS if name != "reference")


def transformed(
    x: Tensor, *, bias=None, temperature=1.0, softcap=None, logit_scale=1.0, valid_vocab=None
) -> Tensor:
    """z of "The maths" in DESIGN.md, in float64."""
    u = logit_scale * x.double()
    if bias is not None:
        u = u + bias.double()
    if softcap is not None:
        u = softcap * torch.tanh(u / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.double()[..., None]
    return (u / temperature)[..., :valid_vocab]


def truth(x: Tensor, target: Tensor | None = None, **transform) -> dict[str, Tensor]:
    """Every output by its textbook formula in float64, differentiable in `x`; finite logits only.

    Textbook formulas are good enough in float64: at H = 1e-9 six digits are left.
    """
    z = transformed(x, **transform)
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    mean = z.mean(-1)
    centred = z - mean[..., None]
    variance = (centred**2).mean(-1)
    out = {
        "entropy": entropy,
        "lse": torch.logsumexp(z, -1),
        "varentropy": (p * (log_p + entropy[..., None]) ** 2).sum(-1),
        "collision": (p * p).sum(-1),
        "max_prob": p.amax(-1),
        "self_certainty": -math.log(z.shape[-1]) - log_p.mean(-1),
        "logit_mean": mean,
        "logit_var": variance,
        "logit_skew": torch.where(variance > 0, (centred**3).mean(-1) / variance**1.5, 0),
        "kept_mass": torch.ones_like(entropy),
    }
    if target is not None:
        out["logprob"] = log_p.gather(-1, target[..., None])[..., 0]
        out["is_top1"] = target == z.argmax(-1)
        out["rank"] = (z > z.gather(-1, target[..., None])).sum(-1)
        out["is_kept"] = out["logprob"] > -math.inf
        square = (p * p * log_p).sum(-1) + entropy * out["collision"]
        out["entropy_slope"] = square - out["logprob"].exp() * (out["logprob"] + entropy)
    return {name: out[name] for name in OUTPUTS if name in out}


def row_arguments(spec: RowSpec) -> tuple:
    """Its arguments of an operator that lie in their place, before those that came later."""
    return spec[: RowSpec._fields.index("truncation")]


def eager(x: Tensor, target: Tensor, **transform) -> dict[str, Tensor]:
    """What a user writes without this library, in the dtype of `x`: the error budget."""
    temperature = transform.get("temperature", 1.0)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(x.dtype)[..., None]
    z = x / temperature
    log_p = torch.log_softmax(z, -1)
    return {
        "logprob": log_p.gather(-1, target[..., None])[..., 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "lse": torch.logsumexp(z, -1),
    }


def gradient(values: dict[str, Tensor], upstream: dict[str, Tensor], *inputs: Tensor):
    """d(sum of upstream * value) / d input, for each input."""
    loss = sum((upstream[name].to(values[name].dtype) * values[name]).sum() for name in upstream)
    return torch.autograd.grad(loss, inputs)


def error(out: Tensor, ref: Tensor, scale: Tensor | None = None) -> float:
    """||out - ref|| / ||ref||, in float64; ||scale|| in place of ||ref|| where that is larger."""
    out, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    size = max(ref.norm().item(), 0.0 if scale is None else scale.norm().item())
    return (out - ref).norm().item() / max(size, 1e-300)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit; NaN equals NaN."""
    return (
        a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0))
    )


def each_impl(test):
    """The test with every backend, and new tensors where it wants them."""
    test = pytest.mark.parametrize("impl", FAST_IMPLS)(test)
    return pytest.mark.usefixtures("tensors_there")(test)


def random_logits(*shape: int, dtype=torch.float32, device=None, scale: float = 3.0) -> Tensor:
    return (scale * torch.randn(shape)).to(dtype).to(device)


def random_target(*shape: int, vocab: int, device=None) -> Tensor:
    return torch.randint(0, vocab, shape, device=device)


def random_upstream(*shape: int, dtype=torch.float32, device="cpu") -> dict[str, Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {name: torch.randn(shape, dtype=wide, device=device) for name in DIFFERENTIABLE}


def make_weights(kind, *lead, device="cpu"):
    weights = {}
    if kind != "logprob":
        weights["entropy_weight"] = torch.randn(lead, device=device)
    if kind != "entropy":
        weights["logprob_weight"] = torch.randn(lead, device=device)
    return weights


def make_linear(*lead, dim=16, vocab=301, dtype=torch.float32, device=None):
    hidden = random_logits(*lead, dim, dtype=dtype, device=device, scale=1.0)
    weight = random_logits(vocab, dim, dtype=dtype, device=device, scale=3 * dim**-0.5)
    return hidden.requires_grad_(), weight.requires_grad_()


def rows_of_entropy(entropies: Tensor, vocab: int) -> Tensor:
    """float32 logits (len(entropies), vocab) whose entropies are close to those given.

    Each row is one random row times the factor, found by bisection, that gives its entropy.
    """
    base = torch.randn(len(entropies), vocab, dtype=torch.float64)
    low, high = (
        torch.zeros(len(entropies), 1).double(),
        torch.full((len(entropies), 1), 1e4).double(),
    )
    for _ in range(80):
        middle = (low + high) / 2
        too_flat = truth(base * middle)["entropy"][:, None] > entropies.double()[:, None]
        low, high = torch.where(too_flat, middle, low), torch.where(too_flat, high, middle)
    return (base * high).float()


def corners_and_sample(count: int, *axes: tuple) -> list[tuple]:
    """Of a grid of cases those of the first and the last of each axis, and `count` others, drawn
    once and for all."""
    corners = list(itertools.product(*((axis[0], axis[-1]) for axis in axes)))
    others = [case for case in itertools.product(*axes) if case not in corners]
    return corners + random.Random(0).sample(others, count)


def product_flops(call) -> int:
    """Floating-point operations of the matrix products that `call()` runs."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], record_shapes=True) as profile:
        call()
    first_operand = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}
    total = 0
    for event in profile.events():
        if event.name in first_operand:
            left, right = event.input_shapes[first_operand[event.name] :][:2]
            total += 2 * left[0] * left[1] * right[1]
    return total
