"""Entropy minimisation of the embedded model with weights and moments of 4, 2 and 1 bytes.

    python -m benchmarks.narrow --out benchmarks/results

Each run has the same seed and prompt, and so the same first answers; the reference is float32. What
its steps lose is seen with the published learning rate, of which a step is less than half the
distance between neighbours in bfloat16.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from unittest import mock

import torch

from em_kernels import tiny_math
from em_kernels.lm.models import load_model
from em_kernels.tiny_math.demo import em_config
from em_kernels.trainer import run as trainer_run
from em_kernels.trainer import train

FILE = "narrow.md"
RATE = 2e-5
ARMS = {
    "float32": {},
    "bfloat16 (autocast)": dict(dtype="bfloat16"),
    "float32, moments in bfloat16": dict(optimizer_dtype="bfloat16"),
    "float32, moments in 8 bits": dict(optimizer_dtype="8bit"),
    "pure_bfloat16": dict(dtype="pure_bfloat16"),
    "pure_bfloat16, moments in 8 bits": dict(dtype="pure_bfloat16", optimizer_dtype="8bit"),
    "pure_bfloat16 with torch's AdamW": dict(dtype="pure_bfloat16"),
}
PLAIN = "pure_bfloat16 with torch's AdamW"


def start() -> torch.Tensor:
    return flat(load_model(str(tiny_math.model_path()), "cpu")[0])


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def nearest(parameters, lr, weight_decay, states, seed):
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)


def trained(arm: str, rate: float, updates: int, responses: int) -> dict:
    chosen = dict(model=str(tiny_math.model_path()), learning_rate=rate, updates=updates)
    chosen |= dict(responses=responses, micro_batch=responses, **ARMS[arm])
    optimizer = nearest if arm == PLAIN else trainer_run.make_adamw
    with mock.patch.object(trainer_run, "make_adamw", optimizer):
        result = train(em_config(**chosen), progress=False)
    return {"lines": result.metrics, "moved": flat(result.model)}


def table(rate: float, updates: int, responses: int) -> str:
    found = {arm: trained(arm, rate, updates, responses) for arm in ARMS}
    begin = {False: start(), True: start().bfloat16().double()}
    full = found["float32"]["moved"] - begin[False]
    lines = [
        f"| learning rate {rate:g} | entropy, update 1 | entropy, update {updates} | "
        "way of the weights, along float32's | their distance from float32's |",
        "|---|---:|---:|---:|---:|",
    ]
    for arm, run in found.items():
        way = run["moved"] - begin[arm.startswith("pure")]
        entropies = [run["lines"][i]["mean_entropy"] for i in (0, -1)]
        along = float(way @ full / (full @ full))
        apart = float((way - full).norm() / full.norm())
        cells = [arm, *(f"{x:.4f}" for x in entropies), f"{along:.3f}", f"{apart:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--out", default="benchmark-output")
    options = parser.parse_args(arguments)
    head = (
        f"# Weights and moments in few bytes\n\n{options.updates} updates of {options.responses} "
        "answers, embedded model, seed 0. The way of the weights is the change of them all; along "
        "float32's is its component there over float32's length, 1 where nothing is lost.\n"
    )
    path = Path(options.out) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}\n{table(RATE, options.updates, options.responses)}\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
