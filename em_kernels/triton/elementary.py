"""Elementary functions for Triton, accurate in float32 and float64, on a GPU and interpreted.

Triton's own `exp` is a hardware approximation in float32 (on NVIDIA ex2.approx, relative error
2^-22 plus |x| 2^-24) and it has no log1p, expm1 or tanh that the interpreter can run.
"""

import triton
import triton.language as tl


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
        series = 1 + x * series / (15 - k)
    return tl.where(x > -0.5, x * series, tl.exp(x) - 1)


@triton.jit
def reciprocal(w):
    """1 / w for 1 <= w <= 2 without a division.

    1 - w y starts as a Chebyshev polynomial, at most 1/99, and each of the Newton steps squares it.
    """
    y = (w * (32 * w - 144) + 210) * (1.0 / 99)
    for _ in tl.static_range(3 if w.dtype == tl.float64 else 2):
        y = y * (2 - w * y)
    return y


@triton.jit
def tanh(t):
    """tanh(t) and its derivative: (1 - e) / (1 + e) and 4 e / (1 + e)^2, e = exp(-2 |t|).

    In float32 the difference 1 - e is off by up to 2^-22, so small |t| take the Taylor series.
    """
    size = tl.abs(t)
    e = tl.exp(-2 * size)
    inverse = reciprocal(1 + e)
    large = tl.where(t < 0, e - 1, 1 - e) * inverse
    if t.dtype == tl.float64:
        value = large
    else:
        s = t * t
        series = (((62.0 / 2835 * s - 17.0 / 315) * s + 2.0 / 15) * s - 1.0 / 3) * s * t + t
        value = tl.where(size < 0.3, series, large)
    return value, 4 * e * inverse * inverse
