"""The three kernels of one GPU backend, launched once each for a profiler to look at.

python -m benchmarks.gpu_kernels triton        statistics, gradient and loss of 2048 bfloat16 rows
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.gpu_truth import unusable
from em_kernels import entropy_loss, softmax_stats

N, V = 2048, 151936


def main(impl: str) -> None:
    logits = torch.randn(N, V, device="cuda").bfloat16().requires_grad_()
    target = torch.randint(0, V, (N,), device="cuda")
    stats = softmax_stats(logits, target, impl=impl)
    torch.autograd.grad((stats.entropy + stats.logprob).sum(), logits)
    torch.autograd.grad(entropy_loss(logits, impl=impl), logits)
    torch.cuda.synchronize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_kernels", allow_abbrev=False)
    parser.add_argument("impl", choices=("triton", "cuda"))
    chosen = parser.parse_args().impl
    if reason := unusable(chosen):
        parser.error(f"{chosen} cannot be used: {reason}")
    main(chosen)
