"""Relative error of the entropy, and of its gradient, from almost certain rows to uniform ones.

    python -m benchmarks.accuracy --out benchmarks/results

Rows of float32 logits are built to have a given entropy; the truth is float64 on the same logits.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers import eager, trl
from em_kernels import softmax_stats

TARGETS = (1e-9, 1e-6, 1e-3, 0.1, 1.0, 5.0, 11.0)
Entropy = Callable[[Tensor], Tensor]


def entropy64(logits: Tensor) -> Tensor:
    """H of float64 logits, the maximum left out of the sums: exact to float64 for any H."""
    d = logits - logits.amax(-1, keepdim=True)
    top = d.argmax(-1, keepdim=True)
    e = d.exp().scatter(-1, top, 0)
    r = e.sum(-1)
    return torch.log1p(r) - (e * d).sum(-1) / (1 + r)


def rows_with_entropy(targets: tuple[float, ...], vocab: int) -> Tensor:
    """One float32 row per target: normal noise with one logit raised until H fits."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(targets), vocab, generator=generator, dtype=torch.float64)
    low = torch.zeros(len(targets), 1, dtype=torch.float64)
    high = torch.full_like(low, 60)
    goal = torch.tensor(targets, dtype=torch.float64)[:, None]
    for _ in range(60):
        middle = (low + high) / 2
        noise[:, 7:8] = middle
        above = entropy64(noise)[:, None] > goal
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return noise.float()


def gradient(entropy: Entropy, logits: Tensor) -> Tensor:
    x = logits.clone().requires_grad_()
    return torch.autograd.grad(entropy(x).sum(), x)[0].double()


def contenders() -> dict[str, Entropy]:
    found = {
        "em_kernels": lambda x: softmax_stats(x, outputs=("entropy",)).entropy,
        "eager, float32": lambda x: eager(x, x.new_zeros(len(x), dtype=torch.long))[1],
    }
    try:
        other = trl()
        found["TRL, float32"] = lambda x: other(x, x.new_zeros(len(x), dtype=torch.long))[1]
    except ImportError:
        pass
    return found


def measure(vocab: int) -> str:
    """Markdown: a row per entropy, errors of H / of the gradient per implementation."""
    logits = rows_with_entropy(TARGETS, vocab)
    truth = entropy64(logits.double())
    grad_truth = gradient(entropy64, logits.double())
    runs = contenders()
    lines = [
        f"Relative error of H / of its gradient (||error|| / ||gradient||), float32, V = {vocab}.",
        "",
        "| H | " + " | ".join(runs) + " |",
        "|---" * (len(runs) + 1) + "|",
    ]
    errors = []
    for run in runs.values():
        of_entropy = ((run(logits).double() - truth) / truth).abs()
        of_gradient = (gradient(run, logits) - grad_truth).norm(dim=-1) / grad_truth.norm(dim=-1)
        errors.append([f"{h:.0e} / {g:.0e}" for h, g in zip(of_entropy, of_gradient)])
    for i, value in enumerate(truth.tolist()):
        name = f"{value:.0e}" if value < 0.01 else f"{value:.3g}"
        lines.append(f"| {name} | " + " | ".join(column[i] for column in errors) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--v", type=int, default=151936, help="vocabulary")
    parser.add_argument("--out", type=Path, help="folder for accuracy.md")
    given = parser.parse_args(arguments)
    if given.v < math.exp(max(TARGETS)):
        parser.error(f"--v must be at least {math.ceil(math.exp(max(TARGETS)))}, got {given.v}")
    text = measure(given.v)
    print(text)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "accuracy.md").write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    main()
