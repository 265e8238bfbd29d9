"""What `filter_eps` saves and costs: time, columns left, and error against the exact gradients.

python -m benchmarks.filter_eps --out benchmarks/results     writes filter_eps.md there

Sure and peaked tokens have one likely word each, drawn by Zipf's law, so that tokens share words
as text does; the other logits are Gaussian with standard deviation 2, those of flat tokens with 3.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import environment, time_all
from em_kernels import linear_entropy_loss, linear_softmax_stats

EPS = (None, 1e-4, 1e-3, 1e-2)
VOCABULARIES = (32768, 151936)
KINDS = {"sure": (18, 26), "peaked": (10, 25), "flat": (0, 0)}  # logit of the likely word
HEADER = ("rows", "V", "dtype", "H", "filter_eps", "ms", "x exact", "columns", "dX", "dW")
LEGEND = """\
One `linear_entropy_loss` forward + backward. H: mean entropy in nats. columns: share of the rows
of dW that are not zero. dX, dW: ||out - exact|| / ||exact||, exact being filter_eps=None.
"""


def make(kind: str, n: int, v: int, d: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """hidden (n, d) and weight (v, d), rows of the weight of length about 1."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(v, d, generator=generator) * d**-0.5
    hidden = (3 if kind == "flat" else 2) * torch.randn(n, d, generator=generator)
    zipf = 1 / torch.arange(1.0, v + 1)
    likely = torch.multinomial(zipf, n, replacement=True, generator=generator)
    low, high = KINDS[kind]
    hidden += (low + (high - low) * torch.rand(n, 1, generator=generator)) * weight[likely]
    return [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]


def step(hidden: Tensor, weight: Tensor, eps: float | None):
    loss = linear_entropy_loss(hidden, weight, filter_eps=eps)
    return torch.autograd.grad(loss, (hidden, weight))


def rows_of(kind: str, v: int, dtype: torch.dtype, options: argparse.Namespace) -> list[tuple]:
    hidden, weight = make(kind, options.n, v, options.d, dtype, options.device)
    with torch.no_grad():
        entropy = linear_softmax_stats(hidden, weight).entropy.mean().item()
    runs = {str(eps): lambda eps=eps: step(hidden, weight, eps) for eps in EPS}
    exact = [grad.float() for grad in step(hidden, weight, None)]
    found = {}
    for eps in EPS:
        grads = step(hidden, weight, eps)
        errors = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(grads, exact)]
        found[str(eps)] = ((grads[1] != 0).any(1).float().mean().item(), *errors)
    seconds, _ = time_all(runs, options.device, options.repeats)
    name = str(dtype).removeprefix("torch.")
    return [
        (
            kind,
            str(v),
            name,
            f"{entropy:.2f}",
            eps,
            f"{seconds[eps] * 1e3:.0f}",
            f"{seconds['None'] / seconds[eps]:.2f}",
            f"{columns:.1%}",
            f"{dx:.1e}",
            f"{dw:.1e}",
        )
        for eps, (columns, dx, dw) in found.items()
    ]


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser("python -m benchmarks.filter_eps", description=__doc__)
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--d", type=int, default=896)
    parser.add_argument("--v", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="folder for filter_eps.md; printed only if left out")
    options = parser.parse_args(arguments)
    lines = [HEADER, ("---",) * len(HEADER)]
    for name in options.dtype:
        for v in options.v:
            for kind in KINDS:
                lines += rows_of(kind, v, getattr(torch, name), options)
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    facts = ", ".join(f"{k} {v}" for k, v in environment(options.device).items())
    text = f"# filter_eps\n\n{facts}, N={options.n}, D={options.d}\n\n{LEGEND}\n{table}\n"
    print(text)
    if options.out:
        (Path(options.out) / "filter_eps.md").write_text(text)
    return table


if __name__ == "__main__":
    main()
