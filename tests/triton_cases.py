"""The calls whose Triton kernels are compiled for GPUs that are not here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch

from em_kernels.backends.interface import (
    ROW_OUTPUTS,
    Descent,
    Goal,
    RowSpec,
    Saved,
    Upstream,
    accumulate_dtype,
)
from em_kernels.backends.triton import launch, linear
from em_kernels.backends.triton.backend import Triton

backend = Triton()
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # of a program
VOCAB, ODD = 151936, 151665  # rows that begin at multiples of 16 bytes, and anywhere


def cases(arch: int) -> Iterator[tuple[str, Callable]]:
    """Every kernel, plain, narrowing and with everything on; on sm_90 also float64 and all
    outputs."""
    for dtype in (torch.bfloat16, torch.float32):
        for capped in (False, True):
            yield from calls(dtype, capped, ("logprob", "entropy"))
    for dtype in (torch.bfloat16, torch.float32):
        yield from calls(dtype, False, ("logprob", "entropy"), ODD)
    yield from shared()
    yield from narrowing()
    yield from controls()
    yield from counted()
    yield from products(arch)
    if arch == 90:
        yield from calls(torch.float64, True, ("logprob", "entropy"))
        yield next(calls(torch.bfloat16, True, ROW_OUTPUTS))


def calls(
    dtype: torch.dtype, capped: bool, outputs: tuple[str, ...], vocab: int = VOCAB
) -> Iterator[tuple[str, Callable]]:
    logits = torch.empty(1, 16, vocab, dtype=dtype)
    row = torch.zeros(16, dtype=accumulate_dtype(dtype))
    spec = RowSpec(target=torch.zeros(16, dtype=torch.int64), valid_vocab=vocab)
    if capped:
        spec = spec._replace(
            bias=torch.zeros(VOCAB, dtype=dtype),
            mask=torch.ones(16, dtype=torch.bool),
            temperature_rows=row,
            softcap=30.0,
            logit_scale=0.5,
        )
    up, saved = Upstream(row, row), Saved(row, row, row)
    name = "-".join([str(dtype).removeprefix("torch."), "full" if capped else "plain"])
    name += "-all" if outputs == ROW_OUTPUTS else ""
    name += "-odd" if vocab == ODD else ""
    yield f"stats-{name}", lambda: backend.stats(logits, spec, outputs)
    yield f"grad-{name}", lambda: backend.grad(logits, spec, saved, up, torch.empty_like(logits))
    yield f"loss-{name}", lambda: backend.loss(logits, spec, up, outputs, logits)


def narrowing() -> Iterator[tuple[str, Callable]]:
    """float32 logits overwritten with a bfloat16 gradient."""
    logits, row = torch.empty(1, 16, VOCAB), torch.zeros(16)
    out = logits.view(torch.bfloat16)[..., :VOCAB]
    spec = RowSpec(target=torch.zeros(16, dtype=torch.int64), valid_vocab=VOCAB)
    up, saved = Upstream(row, row), Saved(row, row, row)
    yield "grad-narrow", lambda: backend.grad(logits, spec, saved, up, out)
    yield "loss-narrow", lambda: backend.loss(logits, spec, up, ("logprob", "entropy"), out)


def controls() -> Iterator[tuple[str, Callable]]:
    """A row gone through until its entropy is what it should be."""
    logits = torch.empty(1, 16, VOCAB, dtype=torch.bfloat16)
    goal, way = Goal(0.3, 0.1, 0.05, 12), Descent(0.3, 1.0, 10)
    yield "temperature-bfloat16", lambda: backend.find_temperature(logits, goal)
    yield "descent-float32", lambda: backend.descend(logits.float(), way)


def counted() -> Iterator[tuple[str, Callable]]:
    """What lies above levels: as many as a program takes, their masses too; of one, ids before it
    too."""
    levels, ids = torch.zeros(16, 4), torch.zeros(16, 1, dtype=torch.int64)
    for dtype, vocab in ((torch.bfloat16, VOCAB), (torch.float32, VOCAB), (torch.float32, ODD)):
        logits, spec = torch.empty(1, 16, vocab, dtype=dtype), RowSpec(valid_vocab=vocab)
        name = str(dtype).removeprefix("torch.") + "-odd" * (vocab == ODD)

        def masses(logits=logits, spec=spec):
            return backend.above(logits, spec, levels, levels[:, 0].contiguous())

        def places(logits=logits, spec=spec):
            return backend.above(logits, spec, levels[:, :1], None, ids)

        yield f"above-{name}", masses
        yield f"above_ids-{name}", places


def shared() -> Iterator[tuple[str, Callable]]:
    """Rows that several programs share."""
    logits = torch.empty(1, 16, VOCAB, dtype=torch.bfloat16)
    spec = RowSpec(target=torch.zeros(16, dtype=torch.int64), valid_vocab=VOCAB)

    def call():
        with patch.object(launch, "multiprocessors", lambda device: 132):
            backend.stats(logits, spec, ("logprob", "entropy"))

    yield "stats-bfloat16-shared", call


def products(arch: int) -> Iterator[tuple[str, Callable]]:
    """The product and the statistics in one kernel."""
    yield "linear-bfloat16-plain", lambda: product(arch, torch.bfloat16, False)
    yield "linear-bfloat16-full", lambda: product(arch, torch.bfloat16, True)
    if arch == 90:
        yield "linear-bfloat16-all", lambda: product(arch, torch.bfloat16, False, ROW_OUTPUTS)
        yield "linear-float32-plain", lambda: product(arch, torch.float32, False)
        yield "linear-float64-plain", lambda: product(arch, torch.float64, False)


def product(arch: int, dtype: torch.dtype, full: bool, outputs=("logprob", "entropy")) -> None:
    hidden, weight = torch.empty(256, 512, dtype=dtype), torch.empty(VOCAB, 512, dtype=dtype)
    row = torch.ones(256, dtype=accumulate_dtype(dtype))
    spec = RowSpec(target=torch.zeros(256, dtype=torch.int64), valid_vocab=VOCAB)
    if full:
        bias, mask = torch.zeros(VOCAB, dtype=dtype), torch.ones(256, dtype=torch.bool)
        spec = spec._replace(bias=bias, mask=mask, temperature_rows=row, softcap=30.0)
    products_of(arch, hidden, weight, spec, outputs)


def products_of(arch: int, hidden, weight, spec: RowSpec, outputs: tuple[str, ...]) -> None:
    with (
        patch.object(linear, "shared_memory", lambda device: SHARED_MEMORY[arch]),
        patch.object(
            linear, "copies_blocks", lambda device, dtype: arch >= 90 and dtype.itemsize == 2
        ),
    ):
        linear.linear_stats(hidden, weight, spec, outputs)


SCALES = {
    "temperature": dict(temperature=0.7),
    "rows": dict(temperature_rows=torch.ones(16)),
    "scale": dict(logit_scale=0.3),
    "bias": dict(bias=torch.zeros(VOCAB), temperature=0.7),
    "softcap": dict(softcap=30.0, temperature=0.7),
}


def scaled(arch: int) -> Iterator[tuple[str, Callable]]:
    """Every kernel with each way to z = u c, where z - max could become u c - max, rounded once."""
    row, target = torch.zeros(16), torch.zeros(16, dtype=torch.int64)
    up, saved = Upstream(row, row), Saved(row, row, row)
    logits, outputs = torch.empty(1, 16, VOCAB), ("logprob", "entropy", "logit_skew")
    hidden, weight = torch.empty(16, 64).bfloat16(), torch.empty(VOCAB, 64).bfloat16()
    narrow = logits.view(torch.bfloat16)[..., :VOCAB]
    for name, options in SCALES.items():
        s = RowSpec(target=target, valid_vocab=VOCAB, **options)
        yield f"stats-{name}", lambda s=s: backend.stats(logits, s, outputs)
        yield f"grad-{name}", lambda s=s: backend.grad(logits, s, saved, up, logits)
        yield f"loss-{name}", lambda s=s: backend.loss(logits, s, up, outputs, logits)
        yield f"narrow-{name}", lambda s=s: backend.loss(logits, s, up, outputs, narrow)
        yield f"linear-{name}", lambda s=s: products_of(arch, hidden, weight, s, outputs)
    yield from controls()
