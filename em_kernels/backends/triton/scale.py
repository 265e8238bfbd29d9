"""A tensor times a number that is on the GPU, in place: no work where the number is 1."""

import triton
import triton.language as tl
from torch import Tensor

from em_kernels.backends.triton.launch import UNFUSED, device_of

BLOCK = 4096
PROGRAMS = 2048  # few enough that a launch with nothing to do costs microseconds


@triton.jit
def scale(x, factor, count, block: tl.constexpr):
    by = tl.load(factor)
    if by != 1:
        first = tl.program_id(0).to(tl.int64) * block
        step = tl.num_programs(0).to(tl.int64) * block
        for start in range(first, count, step):
            at = start + tl.arange(0, block)
            value = tl.load(x + at, mask=at < count)
            tl.store(x + at, value.to(by.dtype) * by, mask=at < count)


def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor, x contiguous and factor a tensor of one number; rounded once."""
    if x.numel() > 0:
        programs = min(PROGRAMS, triton.cdiv(x.numel(), BLOCK))
        with device_of(x):
            scale[(programs,)](x, factor, x.numel(), BLOCK, num_warps=8, **UNFUSED)
