"""The kernels of `linear`: a tile of hidden @ weight.T multiplied out and reduced in registers.

A program takes `tile.rows` rows and `tile.walk` tiles of the vocabulary in turn. It multiplies a
tile out in registers, reduces every row of it to a part (`moments.tile_part`), and joins that to
the part it keeps. The parts of a row, one for each `walk * entries` of the vocabulary, go to
memory, and `finish` merges them as `kernels.statistics` merges the lanes of a row. Which part an
entry belongs to depends on nothing but its index, so a row's bits do not depend on the other rows.
"""

from __future__ import annotations

from collections import namedtuple
from typing import NamedTuple

import triton
import triton.language as tl

from em_kernels.backends.triton.elementary import INTERPRETED
from em_kernels.backends.triton.kernels import put_row, row_constants, transform
from em_kernels.backends.triton.logit_moments import (
    INF,
    merge_moments,
    no_moments,
    tile_moments,
)
from em_kernels.backends.triton.moments import merge, tile_part


class Tile(NamedTuple):
    """A tile is `rows` x `entries` logits, multiplied out `depth` at a time along D."""

    rows: int
    entries: int
    depth: int
    walk: int  # tiles of the vocabulary a program goes through
    group: int  # row blocks that share what they read of `weight`
    cuts: int  # 2^cuts slices of a tile are reduced one after another, to save registers
    bulk: bool = False  # the operands are tensor descriptors, whose blocks the GPU copies by itself


SECOND = ("s", "c2", "t")
MOMENTS = ("shift", "unit", "count", "mean", "m2", "m3")
_PARTS = ("max", "r", "q", *SECOND, *MOMENTS, "argmax")
Parts = namedtuple("Parts", _PARTS, defaults=[None] * len(_PARTS))
"""The parts of all rows, each (N, parts): max, sums, moments of u, first argmax; None if unused."""


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
        b = b.to(a.dtype)  # a weight that is narrower
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
    """u of a tile in slices, -inf from `valid` on."""
    products = columns(acc, tile)
    slices = ()
    for k in tl.static_range(len(products)):
        bias = None
        if rows.bias is not None:
            entries = entries_of(begin, k, products)
            bias = tl.load(rows.bias + tl.minimum(entries, valid - 1))[None, :]
        u, _ = transform(products[k], bias, constants, how)
        if begin + tile.entries > valid:
            u = tl.where(before(valid - begin, k, products)[None, :], u, -INF)
        slices = slices + (u,)
    return slices


@triton.jit
def keep_target(u_target, slices, begin, y, row, inside, tile):
    """Store u at the targets that lie in this tile; most tiles have none."""
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
        tl.store(u_target + row, tl.sum(value, 1), mask=here)


@triton.jit
def find_first_max(slices, m, begin):
    """The index of the first entry of each row that equals `m`."""
    first = tl.full(slices[0].shape, 2147483647, tl.int32)
    for k in tl.static_range(len(slices)):
        entries = entries_of(begin, k, slices)
        first = tl.minimum(first, tl.where(slices[k] == m[:, None], entries[None, :], 2147483647))
    return tl.min(first, 1)


@triton.jit
def put_part(parts, at, inside, part, moments, argmax, how):
    m, sums = part
    tl.store(parts.max + at, tl.where(sums[0] == sums[0], m, float("nan")), mask=inside)
    tl.store(parts.r + at, sums[0], mask=inside)
    tl.store(parts.q + at, sums[1], mask=inside)
    if how.second:
        tl.store(parts.s + at, sums[2], mask=inside)
        tl.store(parts.c2 + at, sums[3], mask=inside)
        tl.store(parts.t + at, sums[4], mask=inside)
    if how.moments:
        tl.store(parts.shift + at, moments[0], mask=inside)
        tl.store(parts.unit + at, moments[1], mask=inside)
        tl.store(parts.count + at, moments[2], mask=inside)
        tl.store(parts.mean + at, moments[3], mask=inside)
        tl.store(parts.m2 + at, moments[4], mask=inside)
        tl.store(parts.m3 + at, moments[5], mask=inside)
    if how.top1:
        tl.store(parts.argmax + at, argmax, mask=inside)


@triton.jit(do_not_specialize=["count", "splits"])
def statistics_of_parts(
    hidden,
    weight,
    strides,
    rows,
    parts,
    u_target,
    count,
    depth,
    valid,
    splits,
    by: tl.float64,
    softcap: tl.float64,
    gain: tl.float64,
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
    by, softcap, c = row_constants(row, rows, by, softcap, gain, how)
    of_tile = c
    if rows.temperature is not None:
        of_tile = c[:, None]

    zero = tl.zeros((tile.rows,), how.wide)
    part = (zero - INF, (zero, zero, zero, zero, zero))
    moments = no_moments(zero)
    argmax = tl.zeros((tile.rows,), tl.int32)
    start = split * (tile.walk * tile.entries)
    stop = tl.minimum(start + tile.walk * tile.entries, valid)
    for begin in range(start, stop, tile.entries):
        acc = multiply(hidden, weight, strides, first, begin, count, valid, depth, how, tile)
        slices = tile_logits(acc, begin, rows, valid, (by, softcap, c), how, tile)
        if rows.target is not None:
            y = tl.load(rows.target + row)
            keep_target(u_target, slices, begin, y, row, inside, tile)
        found = tile_part(slices, of_tile, how)
        if how.top1:
            at = find_first_max(slices, found[0], begin)
            argmax = tl.where(found[0] > part[0], at, argmax)
        if how.moments:
            moments = merge_moments(moments, tile_moments(slices, found[0]))
        part = merge(part, found, c, how)
    put_part(parts, row.to(tl.int64) * splits + split, inside, part, moments, argmax, how)


@triton.jit
def load_lanes(pointer, at, inside, other, wide):
    if pointer is None:
        value = tl.zeros(at.shape, wide) + other
    else:
        value = tl.load(pointer + at, mask=inside, other=other)
    return value


@triton.jit(do_not_specialize=["splits"])
def finish(
    parts,
    u_target,
    rows,
    outs,
    splits,
    valid,
    by: tl.float64,
    softcap: tl.float64,
    gain: tl.float64,
    how,
    lanes: tl.constexpr,
):
    """Merge the parts of a row and store what was asked for."""
    row = tl.program_id(0)
    lane = tl.arange(0, lanes)
    inside = lane < splits
    at = row.to(tl.int64) * splits + lane
    held = load_lanes(parts.max, at, inside, -INF, how.wide)
    sums = ()
    for i in tl.static_range(1, 6):
        sums = sums + (load_lanes(parts[i], at, inside, 0.0, how.wide),)
    moments = ()
    for i in tl.static_range(6, 12):
        other = 1.0 if i == 7 else 0.0  # a unit
        moments = moments + (load_lanes(parts[i], at, inside, other, how.wide),)
    argmax = load_lanes(parts.argmax, at, inside, 0, tl.int32)
    y, known, u = None, None, None
    if rows.target is not None:
        y = tl.load(rows.target + row)
        known = (y >= 0) & (y < valid)
        u = tl.load(u_target + row)
    _, _, c = row_constants(row, rows, by, softcap, gain, how)
    put_row(outs, row, (held, sums, moments, argmax), y, known, u, c, how)
