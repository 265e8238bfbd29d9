"""Statistics of softmax(hidden @ weight.T) in one kernel that never writes a logit.

A program takes `tile.rows` rows and `tile.walk` tiles of the vocabulary in turn. It multiplies a
tile out in registers, reduces every row of it to a part (`moments.tile_part`), and joins that to
the part it keeps. The parts of a row, one for each `walk * entries` of the vocabulary, go to
memory, and `finish` merges them as `kernels.statistics` merges the lanes of a row. Which part an
entry belongs to depends on nothing but its index, so a row's bits do not depend on the other rows.

From sm_90 on the GPU copies 16-bit operands to shared memory by itself, a block at a time, if rows
of `weight` begin at multiples of 16 bytes (`describable`): no thread computes an address of one.

What limits it, by arithmetic alone (bfloat16, sm_90, a tile of 128 x 256):

- The tensor cores need 128 * 256 * 64 / 2048 = 1024 clocks for a step of 64 along D, in which
  (128 + 256) * 64 * 2 = 48 KB come from L2: 48 bytes a clock and multiprocessor at their full rate.
- A logit costs 2 D / 4096 clocks in them, 2 at D = 4096, and then some 15 instructions at 128 a
  clock, 0.12 clocks, which nothing overlaps: one program fills a multiprocessor's registers.
- The programs that run at a time are those of `tile.group` row blocks, so `weight` comes from
  memory once per 2048 rows, and 2048 rows of `hidden` stay in L2 (16 MB at D = 4096).
"""

from __future__ import annotations

from collections import namedtuple
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from em_kernels._rows import kept_rows
from em_kernels._spec import RowSpec, Saved, accumulate_dtype, select_rows
from em_kernels.triton.elementary import INTERPRETED
from em_kernels.triton.kernels import put_row, row_constants, transform
from em_kernels.triton.launch import UNFUSED, Outs, Plan, Rows, device_of, how_of
from em_kernels.triton.moments import INF, join, join_moments, tile_moments, tile_part

_ROOM_FOR_256 = 4 * (128 + 256) * 64 * 2  # four stages of two 16-bit operands


class Tile(NamedTuple):
    """A tile is `rows` x `entries` logits, multiplied out `depth` at a time along D."""

    rows: int
    entries: int
    depth: int
    walk: int  # tiles of the vocabulary a program goes through
    group: int  # row blocks that share what they read of `weight`
    cuts: int  # 2^cuts slices of a tile are reduced one after another, to save registers
    bulk: bool = False  # the operands are tensor descriptors, whose blocks the GPU copies by itself


_SECOND = ("t", "c", "b")
_MOMENTS = ("n", "mean", "second", "third")
_PARTS = ("hi", "r", "q", *_SECOND, *_MOMENTS, "first")
Parts = namedtuple("Parts", _PARTS, defaults=[None] * len(_PARTS))
"""The parts of all rows, each (N, parts): max, sums, moments of z, first argmax; None if unused."""


@triton.jit
def assignment(program, row_blocks, splits, group):
    """(row block, part of the vocabulary): all of one group of row blocks before the next."""
    first = program // (group * splits) * group
    size = tl.minimum(row_blocks - first, group)
    within = program - first * splits
    return first + within % size, within // size


@triton.jit
def multiply(hidden, weight, strides, first, begin, count, valid, depth, how, tile):
    """Rows of `hidden` from `first` on times rows of `weight` from `begin` on, transposed, in
    `how.wide`.

    A descriptor gives 0 beyond its end; a pointer is not read there.
    """
    ks = tl.arange(0, tile.depth)
    acc = tl.zeros((tile.rows, tile.entries), how.wide)
    if not tile.bulk:
        rows = tl.minimum(first + tl.arange(0, tile.rows), count - 1)
        entries = tl.minimum(begin + tl.arange(0, tile.entries), valid - 1)
        x = (hidden + rows.to(tl.int64) * strides[0])[:, None]
        w = (weight + entries.to(tl.int64) * strides[2])[:, None]
    for k in range(0, depth, tile.depth):
        if tile.bulk:
            a, b = hidden.load([first, k]), weight.load([begin, k])
        else:
            at = (k + ks)[None, :].to(tl.int64)
            a = tl.load(x + at * strides[1], mask=at < depth, other=0)
            b = tl.load(w + at * strides[3], mask=at < depth, other=0)
        if INTERPRETED:  # it has no product of bfloat16 matrices
            a, b = a.to(how.wide), b.to(how.wide)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee", out_dtype=how.wide)
    return acc


@triton.jit
def columns(acc, tile):
    """The tile cut into 2^cuts slices, each of as many columns of its left half as of its right.

    Threads hold whole runs of columns of one half, so no data moves between them.
    """
    half: tl.constexpr = acc.shape[1] // 2
    slices = (tl.reshape(acc, (acc.shape[0], 2, half)),)
    for _ in tl.static_range(tile.cuts):
        parts = ()
        for k in tl.static_range(len(slices)):
            pairs = tl.reshape(slices[k], (acc.shape[0], 2, 2, slices[k].shape[2] // 2))
            parts = parts + tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        slices = parts
    flat = ()
    for k in tl.static_range(len(slices)):
        flat = flat + (tl.reshape(slices[k], (acc.shape[0], 2 * slices[k].shape[2])),)
    return flat


@triton.jit
def entries_of(begin, k, slices):
    """Which entries of the vocabulary slice k of a tile holds."""
    width: tl.constexpr = slices[0].shape[1] // 2
    run = k * width + tl.arange(0, width)
    halves = len(slices) * width * tl.arange(0, 2)
    return begin + tl.reshape(halves[:, None] + run[None, :], (2 * width,))


@triton.jit
def before(limit, k, slices):
    """Which entries of slice k come before entry `limit` of the tile.

    `entries_of` would do, but takes 64 registers through the whole loop; this is two and scalars.
    """
    width: tl.constexpr = slices[0].shape[1] // 2
    starts = k * width + len(slices) * width * tl.arange(0, 2)
    return tl.reshape(tl.arange(0, width)[None, :] < (limit - starts)[:, None], (2 * width,))


@triton.jit
def tile_logits(acc, begin, rows, valid, constants, how, tile):
    """z of a tile in slices, -inf from `valid` on."""
    products = columns(acc, tile)
    slices = ()
    for k in tl.static_range(len(products)):
        bias = None
        if rows.bias is not None:
            entries = entries_of(begin, k, products)
            bias = tl.load(rows.bias + tl.minimum(entries, valid - 1))[None, :]
        z, _ = transform(products[k], bias, constants, how)
        if begin + tile.entries > valid:
            z = tl.where(before(valid - begin, k, products)[None, :], z, -INF)
        slices = slices + (z,)
    return slices


@triton.jit
def keep_target(z_target, slices, begin, y, row, inside, tile):
    """Store z at the targets that lie in this tile; most tiles have none."""
    place = y - begin
    here = inside & (place >= 0) & (place < tile.entries)
    place = place.to(tl.int32)
    if tl.max(here.to(tl.int32), 0) > 0:
        width: tl.constexpr = slices[0].shape[1] // 2
        half: tl.constexpr = len(slices) * width
        value = slices[0]
        for k in tl.static_range(1, len(slices)):
            value = tl.where(((place & (half - 1)) // width == k)[:, None], slices[k], value)
        column = place // half * width + (place & (width - 1))
        value = tl.where(tl.arange(0, 2 * width)[None, :] == column[:, None], value, 0)
        tl.store(z_target + row, tl.sum(value, 1), mask=here)


@triton.jit
def first_at(slices, hi, begin):
    """The index of the first entry of each row that equals `hi`."""
    first = tl.full(slices[0].shape, 2147483647, tl.int32)
    for k in tl.static_range(len(slices)):
        entries = entries_of(begin, k, slices)
        first = tl.minimum(first, tl.where(slices[k] == hi[:, None], entries[None, :], 2147483647))
    return tl.min(first, 1)


@triton.jit
def put_part(parts, at, inside, part, moments, first, how):
    hi, sums = part
    tl.store(parts.hi + at, tl.where(sums[0] == sums[0], hi, float("nan")), mask=inside)
    tl.store(parts.r + at, sums[0], mask=inside)
    tl.store(parts.q + at, sums[1], mask=inside)
    if how.second:
        tl.store(parts.t + at, sums[2], mask=inside)
        tl.store(parts.c + at, sums[3], mask=inside)
        tl.store(parts.b + at, sums[4], mask=inside)
    if how.moments:
        tl.store(parts.n + at, moments[0], mask=inside)
        tl.store(parts.mean + at, moments[1], mask=inside)
        tl.store(parts.second + at, moments[2], mask=inside)
        tl.store(parts.third + at, moments[3], mask=inside)
    if how.top1:
        tl.store(parts.first + at, first, mask=inside)


@triton.jit(do_not_specialize=["count", "splits"])
def statistics_of_parts(
    hidden,
    weight,
    strides,
    rows,
    parts,
    z_target,
    count,
    depth,
    valid,
    splits,
    scale: tl.float64,
    softcap: tl.float64,
    temperature: tl.float64,
    how,
    tile,
):
    """The parts of `tile.rows` rows from `tile.walk` tiles of the vocabulary."""
    row_blocks = tl.cdiv(count, tile.rows)
    block, split = assignment(tl.program_id(0), row_blocks, splits, tile.group)
    first = block * tile.rows
    row = first + tl.arange(0, tile.rows)
    inside = row < count
    row = tl.minimum(row, count - 1)
    scale, softcap, inverse_t = row_constants(row, rows, scale, softcap, temperature, how)
    if rows.temperature is not None:
        inverse_t = inverse_t[:, None]

    zero = tl.zeros((tile.rows,), how.wide)
    part = (zero - INF, (zero, zero, zero, zero, zero))
    moments = (zero, zero, zero, zero)
    leader = tl.zeros((tile.rows,), tl.int32)
    start = split * (tile.walk * tile.entries)
    stop = tl.minimum(start + tile.walk * tile.entries, valid)
    for begin in range(start, stop, tile.entries):
        acc = multiply(hidden, weight, strides, first, begin, count, valid, depth, how, tile)
        slices = tile_logits(acc, begin, rows, valid, (scale, softcap, inverse_t), how, tile)
        if rows.target is not None:
            y = tl.load(rows.target + row)
            keep_target(z_target, slices, begin, y, row, inside, tile)
        found = tile_part(slices, how)
        if how.top1:
            at = first_at(slices, found[0], begin)
            leader = tl.where(found[0] > part[0], at, leader)
        if how.moments:
            moments = join_moments(moments, tile_moments(slices))
        part = join(part, found, how)
    put_part(parts, row.to(tl.int64) * splits + split, inside, part, moments, leader, how)


@triton.jit
def load_lanes(pointer, at, inside, other, wide):
    if pointer is None:
        value = tl.zeros(at.shape, wide) + other
    else:
        value = tl.load(pointer + at, mask=inside, other=other)
    return value


@triton.jit(do_not_specialize=["splits"])
def finish(parts, z_target, rows, outs, splits, valid, how, lanes: tl.constexpr):
    """Merge the parts of a row and store what was asked for."""
    row = tl.program_id(0)
    lane = tl.arange(0, lanes)
    inside = lane < splits
    at = row.to(tl.int64) * splits + lane
    hi = load_lanes(parts.hi, at, inside, -INF, how.wide)
    sums = ()
    for i in tl.static_range(1, 6):
        sums = sums + (load_lanes(parts[i], at, inside, 0.0, how.wide),)
    mean = load_lanes(parts.mean, at, inside, 0.0, how.wide)
    n = load_lanes(parts.n, at, inside, 0.0, how.wide)
    second = load_lanes(parts.second, at, inside, 0.0, how.wide)
    third = load_lanes(parts.third, at, inside, 0.0, how.wide)
    first = load_lanes(parts.first, at, inside, 0, tl.int32)
    y, known, z = None, None, None
    if rows.target is not None:
        y = tl.load(rows.target + row)
        known = (y >= 0) & (y < valid)
        z = tl.load(z_target + row)
    put_row(outs, row, (hi, sums, (mean, n, n * 0, second, third), first), y, known, z, how)


class Launch(NamedTuple):
    tile: Tile
    num_warps: int
    num_stages: int


def plan(dtype: torch.dtype, light: bool, shared_memory: int) -> Launch:
    """The tile, whatever the shapes, and as many stages, up to 4, as fit into shared memory.

    `light` says that no bias, softcap, argmax or higher moment needs registers beside a tile of
    256.
    """
    if dtype.itemsize == 2 and light and shared_memory >= _ROOM_FOR_256:
        tile = Tile(128, 256, 64, walk=4, group=16, cuts=4)
    elif dtype.itemsize == 2:
        tile = Tile(128, 128, 64, walk=8, group=16, cuts=2)
    elif dtype.itemsize == 4:
        tile = Tile(64, 128, 32, walk=8, group=32, cuts=0)
    else:
        tile = Tile(64, 64, 16, walk=16, group=32, cuts=0)
    stage = (tile.rows + tile.entries) * tile.depth * dtype.itemsize
    return Launch(tile, 8, max(1, min(4, shared_memory // stage)))


def linear_stats(
    hidden: Tensor, weight: Tensor, spec: RowSpec, outputs: tuple[str, ...]
) -> list[Tensor]:
    """[max, log1p_r, mean_d, *outputs], each (N,), of hidden (N, D) @ weight (V, D)^T.

    z as in `em_kernels.reference` of the product in float32 (float64 for float64), not rounded in
    between. float32 operands are multiplied in float32, not in TF32.
    """
    names, wide = (*Saved._fields, *outputs), accumulate_dtype(hidden.dtype)
    index, spec = kept_rows(spec, hidden.shape[0])
    if index is None:
        rows = _stats(hidden, weight, spec, outputs, names)
        return rows if spec.mask is None else [torch.where(spec.mask, row, 0) for row in rows]
    picked = select_rows(spec, index)
    rows = _stats(aligned(hidden, index), weight, picked, outputs, names)
    every = [hidden.new_zeros(hidden.shape[0], dtype=wide) for _ in names]
    return [row.index_copy_(0, index, value) for row, value in zip(every, rows)]


def _stats(hidden: Tensor, weight: Tensor, spec: RowSpec, outputs, names) -> list[Tensor]:
    wide = accumulate_dtype(hidden.dtype)
    results = {name: hidden.new_empty(hidden.shape[0], dtype=wide) for name in names}
    if hidden.shape[0] > 0:
        _launch(hidden, weight, spec, outputs, Outs(**results))
    return list(results.values())


def aligned(hidden: Tensor, index: Tensor | None = None) -> Tensor:
    """A copy of `hidden` or of its rows `index` that can be described."""
    count, depth = len(hidden if index is None else index), hidden.shape[1]
    room = 16 // hidden.element_size()
    out = hidden.new_empty(count, triton.cdiv(depth, room) * room)[:, :depth]
    return out.copy_(hidden) if index is None else torch.index_select(hidden, 0, index, out=out)


def describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can be made of a matrix: rows whole and at 16 bytes each."""
    rows_aligned = x.stride(0) > 0 and x.stride(0) * x.element_size() % 16 == 0
    return x.stride(1) == 1 and rows_aligned and x.data_ptr() % 16 == 0


def _launch(hidden, weight, spec: RowSpec, outputs, outs: Outs) -> None:
    count, depth = hidden.shape
    how = how_of(hidden.dtype, spec, outputs, Plan(0, 0, 0))
    heavy = (how.capped, how.second, how.moments, how.top1)
    light = spec.bias is None and not any(flag.value for flag in heavy)
    tile, num_warps, num_stages = plan(hidden.dtype, light, shared_memory(hidden.device))
    splits = triton.cdiv(spec.valid_vocab, tile.walk * tile.entries)
    strides = (*hidden.stride(), *weight.stride())
    if copies_blocks(hidden.device, hidden.dtype) and describable(weight):
        tile = tile._replace(bulk=True)
        hidden = hidden if describable(hidden) else aligned(hidden)
        hidden = descriptor(hidden, count, tile.rows, tile.depth)
        weight = descriptor(weight, spec.valid_vocab, tile.entries, tile.depth)
        strides = (0, 0, 0, 0)
    common = dict(
        parts=_parts(outs.max, how, count, splits),
        z_target=None if spec.target is None else outs.max.new_empty(count),
        rows=Rows(spec.bias, spec.target, None, spec.temperature_rows),
        splits=splits,
        valid=spec.valid_vocab,
        how=how,
    )
    with device_of(outs.max):
        statistics_of_parts[(triton.cdiv(count, tile.rows) * splits,)](
            hidden,
            weight,
            strides=strides,
            count=count,
            depth=depth,
            scale=spec.logit_scale,
            softcap=spec.softcap,
            temperature=spec.temperature,
            tile=Tile(*map(tl.constexpr, tile)),
            num_warps=num_warps,
            num_stages=num_stages,
            **UNFUSED,
            **common,
        )
        lanes = triton.next_power_of_2(splits)
        finish[(count,)](outs=outs, lanes=lanes, num_warps=1, **UNFUSED, **common)


def descriptor(x: Tensor, count: int, rows: int, depth: int) -> TensorDescriptor:
    """The first `count` rows of x in blocks of `rows` x `depth`."""
    return TensorDescriptor(x, [count, x.shape[1]], list(x.stride()), [rows, depth])


def copies_blocks(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether blocks are copied to shared memory by the engine that NVIDIA GPUs have since sm_90.

    Only where tensor cores read them there: float32 and float64 take more registers that way. The
    interpreter copies what is written in Triton.
    """
    if dtype.itemsize > 2 or device.type != "cuda":
        return device.type != "cuda"
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _parts(like: Tensor, how, count: int, splits: int) -> Parts:
    names = ["hi", "r", "q", *(_SECOND * how.second.value), *(_MOMENTS * how.moments.value)]
    parts = {name: like.new_empty((count, splits)) for name in names}
    if how.top1.value:
        parts["first"] = like.new_empty((count, splits), dtype=torch.int32)
    return Parts(**parts)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a program may have; 0 off a GPU."""
    if device.type != "cuda":
        return 0
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
