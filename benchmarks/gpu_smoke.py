"""Every public function of one GPU backend, at the size of a language model, against float64.

    python -m benchmarks.gpu_smoke triton [--from N]

A line per check, printed when it is known: `ok` or `FAILED`, its name, the error it found; `skip`
where it says nothing about that backend. A check that raises fails alone; after one that costs the
device this process ends, and another can go on behind it. The exit code is 1 if one failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

from benchmarks import gpu_checks as checks
from benchmarks.common import is_lost
from benchmarks.gpu_checks import ODD, V, certain, from_hidden, statistics, vast
from benchmarks.gpu_truth import DEVICE, unusable

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FIRST_ORDER = ("logprob", "entropy", "lse", "max_prob")
# Check -> why it is run for Triton alone: what it runs is the same whatever the backend.
TRITON_ALONE = {
    "linear_softmax_stats fused": "fuse_product is a kernel of Triton's, checked with triton",
    "wide products": "they are torch's own, checked with triton",
}


def main(impl: str, first: int = 0) -> int:
    failed, skipped, names = 0, 0, [*CHECKS][first:]
    for number, name in enumerate(names, first):
        if impl != "triton" and name in TRITON_ALONE:
            skipped += 1
            print(f"skip   {impl} {name}: {TRITON_ALONE[name]}", flush=True)
            continue
        good, said = outcome(CHECKS[name], impl)
        failed += not good
        print(f"{'ok' if good else 'FAILED':6} {impl} {name}: {said}", flush=True)
        if not good and is_lost(DEVICE):
            print(f"the device is lost; --from {number + 1} goes on", flush=True)
            return 1
    print(f"{len(names) - skipped} checks, {failed} failed", flush=True)
    return 1 if failed else 0


def outcome(check: Callable, impl: str) -> tuple[bool, str]:
    torch.manual_seed(0)
    try:
        good, said = check(impl)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as reason:
        return False, f"{type(reason).__name__}: {' '.join(str(reason).split())[:300]}"
    return bool(good), said


def spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CHECKS = {
    **{f"statistics {spelled(d)} V={V}": statistics(d, V) for d in DTYPES},
    **{f"statistics {spelled(d)} V={ODD}": statistics(d, ODD) for d in DTYPES},
    "statistics bfloat16, first order, T=0.7": statistics(torch.bfloat16, V, 0.7, FIRST_ORDER),
    "statistics float32, T=0.7": statistics(torch.float32, ODD, 0.7),
    **{f"certain rows, T={t}": certain(t) for t in (1.0, 0.7, 0.5, 1.3)},
    "logits of 3e38, T=0.5": vast(torch.float32, temperature=0.5),
    "logits of 3e38, logit_scale=-2": vast(torch.bfloat16, logit_scale=-2.0),
    "token_loss at full size": checks.loss_twice,
    "masked rows": checks.masked,
    "strided rows": checks.strided,
    "softcap, scale, padded vocabulary, row temperatures": checks.transforms,
    "bad rows": checks.bad_rows,
    "side stream": checks.side_stream,
    "wide products": checks.wide_products,
    **{
        f"linear_token_loss {spelled(d)} V=32001": from_hidden(d, 1024, 32001, True) for d in DTYPES
    },
    "linear_token_loss float16 N=8192": from_hidden(torch.float16, 8192, 16384, True),
    "linear_token_loss bfloat16, chunks": from_hidden(
        torch.bfloat16, 4096, 32000, True, chunk_tokens=640
    ),
    "linear_softmax_stats bfloat16": from_hidden(torch.bfloat16, 2048, 32001, False),
    "linear_softmax_stats float16": from_hidden(torch.float16, 2048, 32001, False),
    "linear_softmax_stats fused": checks.fused,
    "inplace": checks.inplace,
    "linear_token_covariance": checks.covariance,
    "logits processors": checks.processors,
    "CUDA graph of logits": checks.graph_of_logits,
    "CUDA graph of hidden states": checks.graph_of_hidden,
}


def command(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu_smoke", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("impl", choices=("triton", "cuda"))
    said = "leave out the first N checks"
    parser.add_argument("--from", dest="first", type=int, default=0, metavar="N", help=said)
    options = parser.parse_args(arguments)
    if reason := unusable(options.impl):
        print(f"FAILED {options.impl} cannot be used: {reason}\n1 checks, 1 failed")
        return 1
    return main(options.impl, options.first)


if __name__ == "__main__":
    sys.exit(command())
