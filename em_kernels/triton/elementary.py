"""Elementary functions for Triton, accurate in float32 and float64, on a GPU and interpreted.

No kernel lets the compiler fuse a product with a later sum (`launch.UNFUSED`): z - max would not be
0 at the maximum. Where one instruction should do for both it is written `tl.fma`.

In float32 `exp` is the hardware's: on NVIDIA ex2.approx(x log2 e), relative error at most 2^-22
for the instruction and |x| 2^-24 for its argument. Everything else is built on it and on `log`
from there, because Triton's interpreter has no library of device functions.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def exp(x):
    """exp(x), 0 where it is below the normal numbers: saves three instructions in float32."""
    if INTERPRETED or x.dtype == tl.float64:
        value = tl.exp(x)
    else:
        value = libdevice.fast_expf(x)
    return value


@triton.jit
def log1p(r):
    """log(1 + r) for r >= 0, to rounding in relative terms: 2 atanh(r / (2 + r)) below 1/2."""
    s = r / (2 + r)
    square = s * s
    series = square * 0 + 1.0 / 25
    for k in tl.static_range(12):
        series = series * square + 1.0 / (23 - 2 * k)
    return tl.where(r < 0.5, 2 * s * series, tl.log(1 + r))


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, to rounding in relative terms: the Taylor series above -1/2."""
    series = x * 0 + 1.0
    for k in tl.static_range(14):
        series = 1 + x * series * (1.0 / (15 - k))
    return tl.where(x > -0.5, x * series, exp(x) - 1)


@triton.jit
def reciprocal(w):
    """1 / w for 1 <= w <= 2 without a division.

    1 - w y starts as the Chebyshev polynomial T_3(2 w - 3) / -99; a Newton step squares it.
    """
    y = tl.fma(tl.fma(w, 32.0 / 99, -144.0 / 99), w, 210.0 / 99)
    for _ in tl.static_range(3 if w.dtype == tl.float64 else 2):
        y = y * tl.fma(-w, y, 2.0)
    return y


@triton.jit
def tanh_half(s):
    """tanh(s / 2) and twice its derivative: 1 - 2 e / (1 + e) for s >= 0 and 4 e / (1 + e)^2,
    with e = exp(-|s|).

    In float32 the difference is off by up to 2^-23, so small |s| take the Taylor series.
    """
    e = exp(-tl.abs(s))
    inverse = reciprocal(1 + e)
    share = e * inverse
    size = tl.fma(share, -2.0, 1.0)
    value = tl.where(s < 0, -size, size)
    if s.dtype != tl.float64:
        square = s * s
        series = tl.fma(square, 31.0 / 725760, -17.0 / 40320)
        for k in tl.static_range(3):
            series = tl.fma(series, square, 1.0 / 240 if k == 0 else -1.0 / 24 if k == 1 else 0.5)
        value = tl.where(square < 0.36, series * s, value)
    return value, 4 * (share * inverse)
