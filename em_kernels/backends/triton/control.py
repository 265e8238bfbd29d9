"""`backends.entropy_control` in one launch: a program goes through its row until it is done."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from em_kernels.backends.interface import Descent, Goal, RowSpec, accumulate_dtype
from em_kernels.backends.triton.elementary import exp, log1p
from em_kernels.backends.triton.launch import Rows, device_of, prepare
from em_kernels.backends.triton.moments import distance, merge_lanes
from em_kernels.backends.triton.reads import load_u, read_row, row_of

PLAIN = Rows(None, None, None, None)


@triton.jit
def row_state(x, rows, vocab, c, how):
    """max, log1p(r), E of the row at `x`; H is log1p(r) - E."""
    held, sums, _, _ = read_row(x, rows, 0, vocab, (c * 0 + 1, c * 0, c), how)
    m, r, q, _, _, _ = merge_lanes(held, sums, c, how)
    r = tl.where(m == m, r, float("nan"))
    return m, log1p(r), q / (1 + r)


@triton.jit
def row_entropy(x, rows, vocab, c, how):
    _, log1p_r, mean_d = row_state(x, rows, vocab, c, how)
    return log1p_r - mean_d


@triton.jit
def bisection(
    logits,
    view,
    rows,
    found,
    vocab,
    threshold: tl.float64,
    ratio: tl.float64,
    minimum: tl.float64,
    iterations,
    how,
):
    row = tl.program_id(0)
    x = row_of(logits, row, view, how)
    one = tl.full((), 1, how.wide)
    least = tl.full((), threshold, how.wide)
    entropy = row_entropy(x, rows, vocab, one, how)
    target = tl.maximum(tl.full((), ratio, how.wide) * entropy, least)
    temperature = one
    if entropy > least:
        low = tl.full((), minimum, how.wide)
        high = one
        for _ in range(iterations):
            middle = (low + high) / 2
            too_low = row_entropy(x, rows, vocab, 1 / middle, how) < target
            low = tl.where(too_low, middle, low)
            high = tl.where(too_low, high, middle)
        temperature = low
    tl.store(found + row, temperature)


@triton.jit
def step_down(x, rows, vocab, m, log1p_r, mean_d, rate, how):
    """z - rate dH/dz over a row."""
    lanes = tl.arange(0, how.block)
    constants = (rate * 0 + 1, rate * 0, rate * 0 + 1)
    b = exp(-log1p_r)
    a = mean_d * b
    for start in range(0, vocab, how.block):
        at = start + lanes
        z, _ = load_u(x, rows, 0, start, vocab - start, constants, how)
        d = distance(z, m, constants[2], how)
        tl.store(x + at, z - rate * (exp(d) * tl.fma(-b, d, a)), mask=at < vocab)


@triton.jit
def descent(
    logits, view, rows, vocab, threshold: tl.float64, learning_rate: tl.float64, steps, how
):
    x = row_of(logits, tl.program_id(0), view, how)
    one = tl.full((), 1, how.wide)
    least = tl.full((), threshold, how.wide)
    rate = tl.full((), learning_rate, how.wide)
    left = tl.full((), steps, tl.int32)
    while left > 0:
        m, log1p_r, mean_d = row_state(x, rows, vocab, one, how)
        left -= 1
        if log1p_r - mean_d > least:
            # Threads read and write other entries of the row: none before all are through.
            tl.debug_barrier()
            step_down(x, rows, vocab, m, log1p_r, mean_d, rate, how)
            tl.debug_barrier()
        else:
            left = left * 0


def find_temperature(logits: Tensor, goal: Goal) -> Tensor:
    """As `em_kernels.backends.entropy_control.find_temperature`."""
    count = logits.shape[0] * logits.shape[1]
    found = torch.empty(count, dtype=accumulate_dtype(logits.dtype), device=logits.device)
    options = dict(found=found, **goal._asdict())
    _launch(bisection, logits, RowSpec(temperature=goal.minimum), **options)
    return found


def descend(z: Tensor, way: Descent) -> Tensor:
    """As `em_kernels.backends.entropy_control.descend`; overwrites `z`."""
    _launch(descent, z, RowSpec(), **way._asdict())
    return z


def _launch(kernel, logits: Tensor, spec: RowSpec, **arguments) -> None:
    outer, inner, vocab = logits.shape
    if outer * inner == 0:
        return
    prepared = prepare(logits, spec._replace(valid_vocab=vocab), ("entropy",))
    # A loop over loops over a row has no registers left for it.
    prepared["how"] = prepared["how"]._replace(paired=tl.constexpr(False))
    with device_of(logits):
        kernel[(outer * inner,)](logits, rows=PLAIN, vocab=vocab, **prepared, **arguments)
