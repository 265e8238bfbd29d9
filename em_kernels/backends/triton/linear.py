"""Statistics of softmax(hidden @ weight.T) in one kernel that never writes a logit.

What a program does is in `tiles`; here is how it is launched.

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

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from em_kernels.backends.interface import RowSpec, Saved, accumulate_dtype
from em_kernels.backends.row_index import kept_rows
from em_kernels.backends.specs import select_rows
from em_kernels.backends.triton.launch import (
    UNFUSED,
    How,
    Outs,
    Plan,
    Rows,
    device_of,
    how_of,
    numbers,
)
from em_kernels.backends.triton.tiles import (
    MOMENTS,
    SECOND,
    Parts,
    Tile,
    finish,
    statistics_of_parts,
)

_ROOM_FOR_256 = 4 * (128 + 256) * 64 * 2  # four stages of two 16-bit operands


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

    u as in `em_kernels.reference` of the product in float32 (float64 for float64), not rounded in
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


def _stats(
    hidden: Tensor, weight: Tensor, spec: RowSpec, outputs: tuple[str, ...], names: tuple[str, ...]
) -> list[Tensor]:
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


def _launch(
    hidden: Tensor, weight: Tensor, spec: RowSpec, outputs: tuple[str, ...], outs: Any
) -> None:
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
        u_target=None if spec.target is None else outs.max.new_empty(count),
        rows=Rows(spec.bias, spec.target, None, spec.temperature_rows),
        splits=splits,
        valid=spec.valid_vocab,
        how=how,
        **numbers(spec),
    )
    with device_of(outs.max):
        statistics_of_parts[(triton.cdiv(count, tile.rows) * splits,)](
            hidden,
            weight,
            strides=strides,
            count=count,
            depth=depth,
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


def _parts(like: Tensor, how: How, count: int, splits: int) -> Parts:
    names = ["max", "r", "q", *(SECOND * how.second.value), *(MOMENTS * how.moments.value)]
    parts = {name: like.new_empty((count, splits)) for name in names}
    if how.top1.value:
        parts["argmax"] = like.new_empty((count, splits), dtype=torch.int32)
    return Parts(**parts)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a program may have; 0 off a GPU."""
    if device.type != "cuda":
        return 0
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
