"""The running sums over a row, one set per lane, and how they are put together.

A lane has seen some of the row's z. `hi` is the largest; `r`, `q`, `t` are the sums of exp(d),
exp(d) d and exp(d) d^2 over all the others, d = z - hi, and `c`, `b` those of exp(d)^2 and
exp(d)^2 d. Every z is compared with `hi` once and the smaller of the two joins the sums. So the
maximum is never in them, a tie counts once each, and r keeps its relative accuracy when it is
1e-12. All terms of a sum have one sign: nothing cancels.

Error budget of r, q and so of H, relative, in float32: 2^-22 for the exp instruction, |d| 2^-23 for
the rounding of d and of d log2(e), and at worst 2^-24 for each of the V / lanes additions (297 at
V = 151936 in bfloat16, 594 in float32). At d = -30 that is at most 4e-5, typically 1e-6.

Moments of z itself are kept per lane as sums of powers about the lane's first finite z (which
multiplies rounding by at most the number of entries the lane has seen) and merged by the formulas
of Chan et al. (1983) and Pebay (2008).
"""

import triton
import triton.language as tl

from em_kernels.triton.elementary import exp

INF = tl.constexpr(float("inf"))
# exp() of it is 0 and 0 times it is 0: the least distance from a maximum, in place of -inf.
FAR = tl.constexpr(-1e4)


@triton.jit
def finite_top(hi):
    """A maximum that can be subtracted: -inf, when nothing was seen, becomes the lowest number."""
    lowest = -1.7976931348623157e308 if hi.dtype == tl.float64 else -3.4028234663852886e38
    return tl.maximum(hi, lowest)


@triton.jit
def distance(z, top):
    """z - top, at least FAR; `top` is finite."""
    return tl.maximum(z - top, FAR)


@triton.jit
def rescale(sums, delta, how):
    """The sums about a maximum that is larger by -delta."""
    r, q, t, c, b = sums
    scale = exp(delta)
    if how.second:
        t = (t + delta * (2 * q + delta * r)) * scale
        b = (b + delta * c) * (scale * scale)
        c = c * (scale * scale)
    return r * scale, (q + delta * r) * scale, t, c, b


@triton.jit
def add_shifted(moments, slices):
    """Count and sums of powers of z - shift over finite z; the first of them is the shift."""
    shift, n, s1, s2, s3 = moments
    for k in tl.static_range(len(slices)):
        z = slices[k]
        shift = tl.where(shift > -INF, shift, z)
        u = tl.where(z > -INF, z - shift, 0)
        n += tl.where(z > -INF, 1, 0)
        s1 += u
        s2 += u * u
        s3 += u * u * u
    return shift, n, s1, s2, s3


@triton.jit
def quarters(z):
    """z[0::4], z[1::4], z[2::4], z[3::4]: of what one thread has loaded, so no data moves."""
    even, odd = tl.split(tl.reshape(z, (z.shape[0] // 2, 2)))
    first, third = tl.split(tl.reshape(even, (z.shape[0] // 4, 2)))
    second, fourth = tl.split(tl.reshape(odd, (z.shape[0] // 4, 2)))
    return first, second, third, fourth


@triton.jit
def absorb(state, slices, at, how):
    """The lanes' state after more entries of a row: the quarters of consecutive blocks, the first
    of which begins with the entries `at`."""
    hi, sums, moments, first = state
    before = hi
    losers = ()
    for k in tl.static_range(len(slices)):
        z = slices[k]
        if how.top1:
            first = tl.where(z > hi, at + k // 4 * how.block + k % 4, first)
        losers = losers + (tl.minimum(hi, z),)
        hi = tl.maximum(hi, z, propagate_nan=tl.PropagateNan.ALL)
    if how.moments:
        moments = add_shifted(moments, slices)
    top = finite_top(hi)
    r, q, t, c, b = rescale(sums, distance(before, top), how)
    for k in tl.static_range(len(slices)):
        d = tl.maximum(losers[k] - top, FAR)
        e = exp(d)
        r += e
        q += e * d
        if how.second:
            t += e * d * d
            c += e * e
            b += e * e * d
    return hi, (r, q, t, c, b), moments, first


@triton.jit
def merge(hi, sums, how):
    """Lanes -> row: max, r, q, sum of p-weights (d - E)^2, c, b; the max is NaN if unusable."""
    m = tl.max(hi, 0)
    unusable = tl.max(tl.where(hi < INF, 0, 1), 0)
    m = tl.where((unusable == 0) & (m > -INF), m, float("nan"))
    r, q, t, c, b = sums
    weight = 1 + r
    mean = q / weight
    spread = tl.maximum(t - q * mean, 0)

    delta = distance(finite_top(hi), finite_top(m))
    r, q, t, c, b = rescale(sums, delta, how)
    scale = exp(delta)
    ties = tl.sum(tl.where(hi == m, 1.0, 0.0), 0) - 1
    own = tl.where(hi == m, 0, scale)
    r = tl.sum(r + own, 0) + ties
    q = tl.sum(q + own * delta, 0)
    if how.second:
        away = delta + mean - q / (1 + r)
        t = tl.sum(scale * (spread + weight * away * away), 0)
        c = tl.sum(c + own * own, 0) + ties
        b = tl.sum(b + own * own * delta, 0)
    return m, r, q, t, c, b


@triton.jit
def merge_shifted(moments, m):
    """Lanes -> row: count, mean - m, and sums of (z - mean)^2 and (z - mean)^3."""
    shift, n, s1, s2, s3 = moments
    offset = s1 / tl.maximum(n, 1)
    second = tl.maximum(s2 - offset * s1, 0)
    third = s3 - offset * (3 * s2 - 2 * offset * s1)
    centre = tl.where(n > 0, shift - m + offset, 0)
    count = tl.sum(n, 0)
    mean = tl.sum(n * centre, 0) / count
    away = centre - mean
    third = tl.sum(third + away * (3 * second + n * away * away), 0)
    return count, mean, tl.sum(second + n * away * away, 0), third
