"""How much of a row lies above given levels: `Backend.above`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from em_kernels.backends.interface import RowSpec
from em_kernels.backends.triton.elementary import exp
from em_kernels.backends.triton.launch import Rows, device_of, prepare
from em_kernels.backends.triton.moments import INF, distance
from em_kernels.backends.triton.reads import load_z, row_constants, row_of

_AT_ONCE = 4  # levels of a program, which reads the row once for all of them


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
    scale: tl.float64,
    softcap: tl.float64,
    temperature: tl.float64,
    how,
    at_once: tl.constexpr,
):
    row = tl.program_id(0)
    k = tl.program_id(1) * at_once + tl.arange(0, at_once)
    place = row.to(tl.int64) * number + k
    inside = k < number
    level = tl.load(levels + place, mask=inside, other=INF).to(how.wide)[:, None]
    before = None
    if ids is not None:
        before = tl.load(ids + place, mask=inside, other=0)[:, None]
    wanted = row >= 0
    if rows.mask is not None:
        wanted = tl.load(rows.mask + row) != 0
    found = tl.zeros((at_once, how.block), tl.int32)
    mass = tl.zeros((at_once, how.block), how.wide)
    if wanted:
        x = row_of(logits, row, view, how)
        constants = row_constants(row, rows, scale, softcap, temperature, how)
        for start in range(0, valid, how.block):
            z, _ = load_z(x, rows, 0, start, valid - start, constants, how)
            over = z[None, :] > level
            if ids is not None:
                entries = start + tl.arange(0, how.block)[None, :]
                over = over | ((z[None, :] == level) & (entries < before))
            found += over.to(tl.int32)
            if top is not None:
                e = exp(distance(z, tl.load(top + row).to(how.wide)))
                mass += tl.where(over, e[None, :], 0)
    tl.store(counts + place, tl.sum(found, 1), mask=inside)
    if top is not None:
        tl.store(sums + place, tl.sum(mass.to(tl.float64), 1), mask=inside)


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
            scale=spec.logit_scale,
            softcap=spec.softcap,
            temperature=spec.temperature,
            at_once=at_once,
            **prepare(logits, spec, ()),
        )
    return counts, sums
