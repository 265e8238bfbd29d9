"""From a call to kernel arguments: which program does how much of a row, and what it is passed."""

from __future__ import annotations

import math
from collections import namedtuple
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from em_kernels.backends.interface import (
    NEEDS_LOGIT_MOMENTS,
    NEEDS_SECOND_ORDER,
    ROW_OUTPUTS,
    RowSpec,
    Saved,
    Upstream,
    accumulate_dtype,
    empty_rows,
)
from em_kernels.backends.triton import kernels
from em_kernels.backends.triton.reads import numbers_of_a_lane
from em_kernels.backends.units import is_plain

_LOAD_BYTES = 16
_MAX_ROWS = 2**31 - 1  # of a launch grid
UNFUSED = {"enable_fp_fusion": False}  # `elementary` says why


class Plan(NamedTuple):
    """A step of the loop over a row is `slices` loads of `block` entries by `num_warps` warps.

    A part of a row is `part` entries, some number of steps: what a program reads where there are
    too few rows.
    """

    block: int
    slices: int
    num_warps: int
    part: int = 32768


@cache
def plan(vocab: int, dtype: torch.dtype, capped: bool = False, warp: int = 32) -> Plan:
    """16-byte loads, four in flight per thread, 256 threads where the row is long enough.

    That is 3 or 4 programs per multiprocessor: one merges its lanes while others load. With a
    softcap two loads, because its registers would leave fewer programs. Nothing else decides, so
    a row's bits do not depend on the other rows of the call.
    """
    per_warp = warp * _LOAD_BYTES // dtype.itemsize
    num_warps = min(256 // warp, triton.next_power_of_2(triton.cdiv(vocab, per_warp)))
    return Plan(per_warp * num_warps, 2 if capped else 4, num_warps)


class View(NamedTuple):
    """Row i lies at (i // inner) * stride_outer + (i % inner) * stride_inner.

    Where one stride is enough, `inner` is more than any number of rows: kernels are compiled anew
    for some values of their integers, and the number of rows should not be one of them.
    """

    inner: int
    stride_outer: int
    stride_inner: int

    @classmethod
    def of(cls, x: Tensor) -> View:
        outer, inner, _ = x.shape
        stride_outer, stride_inner, _ = x.stride()
        if inner == 1:
            return cls(_MAX_ROWS, 0, stride_outer)
        if outer == 1 or stride_outer == inner * stride_inner:
            return cls(_MAX_ROWS, 0, stride_inner)
        return cls(inner, stride_outer, stride_inner)


class Rows(NamedTuple):
    """The tensors of a RowSpec."""

    bias: Tensor | None
    target: Tensor | None
    mask: Tensor | None
    temperature: Tensor | None


_NAMES = (*Saved._fields, *ROW_OUTPUTS)
Outs = namedtuple("Outs", _NAMES, defaults=[None] * len(_NAMES))  # type: ignore[misc]
"""Where the results go, None where not asked for: Saved and then ROW_OUTPUTS."""


class How(NamedTuple):
    """What is fixed when a kernel is compiled, each a tl.constexpr."""

    wide: tl.constexpr
    capped: tl.constexpr
    scaled: tl.constexpr  # `by` is not 1
    tempered: tl.constexpr  # c is not 1
    paired: tl.constexpr  # u is x, and 16-bit ones are compared two at a time
    second: tl.constexpr
    moments: tl.constexpr
    top1: tl.constexpr
    block: tl.constexpr
    slices: tl.constexpr
    part: tl.constexpr
    aligned: tl.constexpr


class Shared(NamedTuple):
    """Where the programs of a row write down what their lanes hold, and how many have."""

    states: Tensor
    arrived: Tensor


def stats(logits: Tensor, spec: RowSpec, outputs: tuple[str, ...]) -> list[Tensor]:
    """[max, log1p_r, mean_d, *outputs], each (N,); as `em_kernels.backends.reference.stats`."""
    outs = empty_rows(logits, outputs)
    _launch(kernels.statistics, logits, spec, outputs, outs=Outs(**outs))
    return list(outs.values())


def grad(logits: Tensor, spec: RowSpec, saved: Saved, upstream: Upstream, out: Tensor) -> None:
    """The gradient of the logits into `out`; as `em_kernels.backends.reference.grad`.

    `out` may be the logits, or narrower and begin at the same bytes, row for row.
    """
    _launch(kernels.gradient, logits, spec, (), **_into(out), saved=saved, up=upstream)


def loss(
    logits: Tensor, spec: RowSpec, upstream: Upstream, outputs: tuple[str, ...], out: Tensor
) -> list[Tensor]:
    """`stats` and then `grad` in one launch; as `em_kernels.backends.reference.loss`."""
    outs = empty_rows(logits, outputs)
    arguments = dict(outs=Outs(**outs), up=upstream)
    _launch(kernels.loss, logits, spec, outputs, **_into(out), **arguments)
    return list(outs.values())


def _into(out: Tensor) -> dict[str, Any]:
    return {"out": out, "out_view": View.of(out)}


def how_of(
    dtype: torch.dtype,
    spec: RowSpec,
    outputs: tuple[str, ...],
    sizes: Plan,
    aligned: bool = True,
) -> How:
    by, gain = units(spec)
    tempered = spec.temperature_rows is not None or gain != 1
    paired = by == 1 and is_plain(spec)
    return _how(dtype, spec.softcap > 0, by != 1, tempered, paired, outputs, sizes, aligned)


def units(spec: RowSpec) -> tuple[float, float]:
    """by of u = softcap(by x + bias), and gain of z = c u: c is gain, over the row's temperature if
    rows have their own. `backends.units` says which they are."""
    by, gain = spec.logit_scale, 1.0
    if is_plain(spec):
        by, gain = math.copysign(1.0, spec.logit_scale), abs(spec.logit_scale)
    if spec.temperature_rows is None:
        gain = gain / spec.temperature if spec.temperature else math.nan
    return by, gain


def numbers(spec: RowSpec) -> dict[str, float]:
    """What `reads.row_constants` is made from."""
    by, gain = units(spec)
    return {"by": by, "softcap": spec.softcap, "gain": gain}


@cache
def _how(
    dtype: torch.dtype,
    capped: bool,
    scaled: bool,
    tempered: bool,
    paired: bool,
    outputs: tuple[str, ...],
    sizes: Plan,
    aligned: bool,
) -> How:
    """Made once: Triton looks a kernel up by comparing constexprs, in Python, and need not compare
    an object with itself."""
    values = How(
        wide=tl.float64 if dtype == torch.float64 else tl.float32,
        capped=capped,
        scaled=scaled,
        tempered=tempered,
        paired=paired,
        second=bool(NEEDS_SECOND_ORDER.intersection(outputs)),
        moments=bool(NEEDS_LOGIT_MOMENTS.intersection(outputs)),
        top1="is_top1" in outputs,
        block=sizes.block,
        slices=sizes.slices,
        part=sizes.part,
        aligned=aligned,
    )
    return How(*map(tl.constexpr, values))


def _launch(
    kernel: Any, logits: Tensor, spec: RowSpec, outputs: tuple[str, ...], **arguments: Any
) -> None:
    count = logits.shape[0] * logits.shape[1]
    if count == 0:
        return
    written = [arguments["out"]] if "out" in arguments else []
    prepared = prepare(logits, spec, outputs, *written)
    programs = count
    if kernel is kernels.statistics:
        shared = _programs(logits, count, spec.valid_vocab, prepared["how"])
        programs, arguments["shared"] = shared
    with device_of(logits):
        kernel[(programs,)](
            logits,
            rows=Rows(spec.bias, spec.target, spec.mask, spec.temperature_rows),
            vocab=logits.shape[2],
            valid=spec.valid_vocab,
            **numbers(spec),
            **prepared,
            **arguments,
        )


def prepare(
    logits: Tensor, spec: RowSpec, outputs: tuple[str, ...], *written: Tensor
) -> dict[str, Any]:
    """What every kernel over the rows of `logits` is given; some also write the rows of others."""
    sizes = plan(spec.valid_vocab, logits.dtype, spec.softcap > 0, warp_size())
    how = how_of(logits.dtype, spec, outputs, sizes, aligned(logits, *written))
    return dict(view=View.of(logits), how=how, num_warps=sizes.num_warps, **UNFUSED)


def _programs(logits: Tensor, count: int, valid: int, how: How) -> tuple[int, Shared | None]:
    """How many programs: one a row, or one for each part of it where those leave most of the GPU
    without work."""
    parts = triton.cdiv(valid, how.part.value)
    if parts == 1 or count >= 2 * multiprocessors(logits.device):
        return count, None
    numbers = numbers_of_a_lane(how.second.value, how.moments.value, how.top1.value)
    shape = (count * parts, numbers, how.block.value // 4)
    states = logits.new_empty(shape, dtype=accumulate_dtype(logits.dtype))
    return count * parts, Shared(states, logits.new_zeros(count, dtype=torch.int32))


def multiprocessors(device: torch.device) -> int:
    """0 off a GPU."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def warp_size() -> int:
    """Threads of a warp of the GPU that Triton compiles for, 32 where there is none."""
    try:
        return _warp_size_of(driver.active)
    except RuntimeError:
        return 32


@cache
def _warp_size_of(active: Any) -> int:
    size: int = active.get_current_target().warp_size
    return size


def aligned(*tensors: Tensor) -> bool:
    """Whether all their rows begin at multiples of 16 bytes."""
    return not any(
        x.data_ptr() % _LOAD_BYTES or any(n * x.itemsize % _LOAD_BYTES for n in x.stride()[:-1])
        for x in tensors
    )


def device_of(x: Tensor) -> AbstractContextManager[None]:
    """Kernels run on the current device; make it the tensor's."""
    current: AbstractContextManager[None] = torch.cuda.device_of(x)
    return current
