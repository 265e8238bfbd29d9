"""What the checks of `benchmarks.gpu_smoke` are given, and the float64 truth they are held to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from em_kernels.backends.availability import why_no_gpu
from em_kernels.backends.choice import why_not

DEVICE = "cuda"
# ||out - truth|| / ||truth|| of a gradient rounded to the dtype, with some room.
ROUNDING = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def unusable(impl: str) -> str | None:
    """Why there is nothing to check of a backend here; None where there is."""
    reason = why_no_gpu()
    return why_not(impl, torch.device(DEVICE)) if reason is None else f"no GPU is visible{reason}"


def draw(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows from nearly uniform to nearly certain, and targets."""
    logits = torch.randn(rows, vocab, device=DEVICE)
    logits *= torch.linspace(1, 6, rows, device=DEVICE)[:, None]
    return logits.to(dtype), torch.randint(0, vocab, (rows,), device=DEVICE)


def certain_rows(entropies: list[float], vocab: int = 8192) -> Tensor:
    """float32 rows whose entropies are close to those given."""
    base = torch.randn(len(entropies), vocab, device=DEVICE).double()
    wanted = torch.tensor(entropies, device=DEVICE).double()
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, 1e4)
    for _ in range(80):
        middle = (low + high) / 2
        log_p = torch.log_softmax(base * middle[:, None], -1)
        flat = -(log_p.exp() * log_p).sum(-1) > wanted
        low, high = torch.where(flat, middle, low), torch.where(flat, high, middle)
    return base * high[:, None]


def draw_hidden(rows: int, dim: int, vocab: int, dtype: torch.dtype):
    hidden = torch.randn(rows, dim, device=DEVICE)
    hidden *= torch.linspace(0.5, 3, rows, device=DEVICE)[:, None]
    weight = torch.randn(vocab, dim, device=DEVICE) * dim**-0.5
    target = torch.randint(0, vocab, (rows,), device=DEVICE)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target


def off(out: Tensor, truth: Tensor, scale: Tensor | None = None) -> float:
    """||out - truth|| over ||truth||, or over that of `scale` in its place."""
    out, truth = out.detach().double(), truth.detach().double()
    scale = truth if scale is None else scale.detach().double().to(out.device).expand_as(truth)
    error = ((out - truth).norm() / scale.norm().clamp_min(1e-300)).item()
    return error if error == error else float("inf")


def truth(logits: Tensor, target: Tensor, temperature: float = 1.0) -> dict[str, Tensor]:
    """float64, differentiable in `logits`."""
    z = logits.double() / temperature
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    centred = z - z.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1)
    logprob = log_p.gather(-1, target[:, None])[:, 0]
    collision = (p * p).sum(-1)
    square = (p * p * log_p).sum(-1) + entropy * collision
    return {
        "logprob": logprob,
        "entropy": entropy,
        "lse": torch.logsumexp(z, -1),
        "varentropy": (p * (log_p + entropy[:, None]) ** 2).sum(-1),
        "collision": collision,
        "max_prob": p.amax(-1),
        "self_certainty": -math.log(z.shape[-1]) - log_p.mean(-1),
        "logit_mean": z.mean(-1),
        "logit_var": variance,
        "logit_skew": (centred**3).mean(-1) / variance**1.5,
        "entropy_slope": square - logprob.exp() * (logprob + entropy),
        "is_top1": target == z.argmax(-1),
    }


def worst(errors: dict[str, float], limit: float, gradient: float = 0.0) -> tuple[bool, str]:
    """Of the statistics, and of those named grad... by their own limit."""
    limits = {name: gradient if name.startswith("grad") else limit for name in errors}
    good = all(error <= limits[name] for name, error in errors.items())
    return good, ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
