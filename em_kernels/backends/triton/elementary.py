"""Elementary functions for Triton, accurate in float32 and float64, on a GPU and interpreted.

No kernel lets the compiler fuse a product with a later sum (`launch.UNFUSED`): kernels of different
outputs must round alike. Where one instruction should do for both it is written `tl.fma`.

In float32 `exp` is the hardware's: on NVIDIA ex2.approx(x log2 e), relative error at most 2^-22
for the instruction and |x| 2^-24 for its argument. Everything else is built on it and on `log`
from there, because Triton's interpreter has no library of device functions.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.target_info import cuda_capability_geq, is_cuda

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def exp(x):
    """exp(x), 0 where it is below the normal numbers: saves three instructions in float32."""
    if INTERPRETED or x.dtype == tl.float64:
        value = tl.exp(x)
    else:
        value = libdevice.fast_expf(x)
    return value


@triton.constexpr_function
def compares_pairs(dtype):
    """Whether one instruction compares two numbers of that type."""
    return not INTERPRETED and dtype.primitive_bitwidth == 16 and cuda_capability_geq(8, 0)


@triton.jit
def of_pairs(x, y, instruction: tl.constexpr):
    """`instruction` of two numbers of 16 bits at a time: it is "max" or "min", with its options."""
    pair: tl.constexpr = ".bf16x2" if x.dtype == tl.bfloat16 else ".f16x2"
    asm: tl.constexpr = instruction + pair + " $0, $1, $2;"
    return tl.inline_asm_elementwise(asm, "=r,r,r", [x, y], x.dtype, is_pure=True, pack=2)


@triton.jit
def larger(x, y):
    """max(x, y), NaN if either is."""
    if x.dtype.primitive_bitwidth == 16:
        value = of_pairs(x, y, "max.NaN")
    else:
        value = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    return value


@triton.jit
def smaller(x, y):
    """min(x, y), the other if one is NaN."""
    if x.dtype.primitive_bitwidth == 16:
        value = of_pairs(x, y, "min")
    else:
        value = tl.minimum(x, y)
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
    """1 / w for 1 <= w <= 2 without a division, relative error at most 2^-23 in float32.

    On NVIDIA that is the hardware's instruction. Elsewhere 1 - w y starts as the Chebyshev
    polynomial T_3(2 w - 3) / -99, and a Newton step squares it.
    """
    if not INTERPRETED and is_cuda() and w.dtype == tl.float32:
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [w], tl.float32, is_pure=True, pack=1
        )
    else:
        y = tl.fma(tl.fma(w, 32.0 / 99, -144.0 / 99), w, 210.0 / 99)
        for _ in tl.static_range(3 if w.dtype == tl.float64 else 2):
            y = y * tl.fma(-w, y, 2.0)
    return y


@triton.jit
def signed(size, x):
    """size >= 0 with the sign of x."""
    if x.dtype == tl.float32:
        sign = x.to(tl.int32, bitcast=True) & -2147483648
        value = (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    else:
        value = tl.where(x < 0, -size, size)
    return value


@triton.jit
def tanh_half(s):
    """tanh(s / 2) and twice its derivative: 1 - 2 e / (1 + e) for s >= 0 and 4 e / (1 + e)^2,
    with e = exp(-|s|).

    The difference would lose the digits of small ones: in float64 they are -expm1(-s) / (1 + e).
    In float32 |s| < 0.6 take a polynomial, minimax to 2^-26. Above, the error is at most 2^-25 and
    twice that of e / (1 + e): relative to which it is 2^-22 and |s| 2^-23 for the exp, over 1 + e,
    2^-23 for the reciprocal and 2^-23 for two more roundings. That makes 2^-21.5 at s = 0.6,
    2^-22.3 at s = 2 and 2^-25 from s = 8 on.
    """
    e = exp(-tl.abs(s))
    inverse = reciprocal(1 + e)
    share = e * inverse
    size = tl.fma(share, -2.0, 1.0)
    if s.dtype != tl.float64:
        square = s * s
        series = tl.fma(square, -3.92351492e-4, 4.16018052e-3)
        series = tl.fma(tl.fma(series, square, -4.16662025e-2), square, 0.499999995)
        size = tl.where(square < 0.36, series * tl.abs(s), size)
    else:
        size = tl.where(e > 0.7, -expm1(-tl.abs(s)) * inverse, size)
    return signed(size, s), 4 * (share * inverse)
