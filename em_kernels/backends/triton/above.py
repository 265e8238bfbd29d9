"""How much of a row lies above given levels: `Backend.above`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from em_kernels.backends.interface import RowSpec
from em_kernels.backends.triton.elementary import exp
from em_kernels.backends.triton.launch import Rows, device_of, numbers, prepare
from em_kernels.backends.triton.logit_moments import INF
from em_kernels.backends.triton.moments import distance
from em_kernels.backends.triton.reads import load_u, row_constants, row_of

_AT_ONCE = 4  # levels of a program, which reads the row once for all of them


@triton.jit
def zeros(number, block, dtype):
    """A block of lanes a level, as a row is loaded: of one block of (levels, lanes) the compiler
    has another order, and moves every entry between threads."""
    blocks = ()
    for _ in tl.static_range(number):
        blocks = blocks + (tl.zeros((block,), dtype),)
    return blocks


@triton.jit
def load_each(values, place, left, other, number):
    loaded = ()
    for k in tl.static_range(number):
        loaded = loaded + (tl.load(values + place + k, mask=k < left, other=other),)
    return loaded


@triton.jit
def store_sums(out, place, left, blocks, dtype):
    for k in tl.static_range(len(blocks)):
        total = tl.sum(blocks[k].to(dtype), 0)
        tl.store(out + place + k, total, mask=k < left)


@triton.jit
def add_over(found, mass, u, e, lanes, level, before):
    """`found` and `mass` of each level with a block of the row; `e` may be None, or `before`."""
    counts, sums = (), ()
    for k in tl.static_range(len(level)):
        over = u > level[k]
        if before is not None:
            over = over | ((u == level[k]) & (lanes < before[k]))
        counts = counts + (found[k] + over.to(tl.int32),)
        if e is not None:
            sums = sums + (mass[k] + tl.where(over, e, 0),)
    return counts, sums


@triton.jit
def count_over(
    logits,
    view,
    rows,
    levels,
    top,
    ids,
    counts,
    sums,
    number,
    valid,
    by: tl.float64,
    softcap: tl.float64,
    gain: tl.float64,
    how,
    at_once: tl.constexpr,
):
    row = tl.program_id(0)
    first = tl.program_id(1) * at_once
    place, left = row.to(tl.int64) * number + first, number - first
    level = load_each(levels, place, left, INF, at_once)
    before, mass = None, ()
    if ids is not None:
        before = load_each(ids, place, left, 0, at_once)
    wanted = row >= 0
    if rows.mask is not None:
        wanted = tl.load(rows.mask + row) != 0
    found = zeros(at_once, how.block, tl.int32)
    if top is not None:
        mass = zeros(at_once, how.block, how.wide)
    if wanted:
        x = row_of(logits, row, view, how)
        constants = row_constants(row, rows, by, softcap, gain, how)
        for start in range(0, valid, how.block):
            u, _ = load_u(x, rows, 0, start, valid - start, constants, how)
            lanes = start + tl.arange(0, how.block)
            if top is not None:
                at = tl.load(top + row).to(how.wide)
                e = exp(distance(u, at, constants[2], how))
                found, mass = add_over(found, mass, u, e, lanes, level, before)
            else:
                found, _none = add_over(found, None, u, None, lanes, level, before)
    store_sums(counts, place, left, found, tl.int32)
    if top is not None:
        store_sums(sums, place, left, mass, tl.float64)


def above(
    logits: Tensor, spec: RowSpec, levels: Tensor, top: Tensor | None, ids: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """As `Backend.above`."""
    rows, number = levels.shape
    counts = torch.empty_like(levels, dtype=torch.int64)
    sums = None if top is None else torch.empty_like(levels, dtype=torch.float64)
    if counts.numel() == 0:
        return counts, sums
    at_once = min(_AT_ONCE, triton.next_power_of_2(number))
    with device_of(logits):
        count_over[(rows, triton.cdiv(number, at_once))](
            logits,
            rows=Rows(spec.bias, None, spec.mask, spec.temperature_rows),
            levels=levels.contiguous(),
            top=top,
            ids=None if ids is None else ids.contiguous(),
            counts=counts,
            sums=sums,
            number=number,
            valid=spec.valid_vocab,
            at_once=at_once,
            **numbers(spec),
            **prepare(logits, spec, ()),
        )
    return counts, sums
