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

from em_kernels.backends.triton.elementary import exp, larger, smaller

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
        t = tl.fma(delta, tl.fma(delta, r, 2 * q), t) * scale
        b = tl.fma(delta, c, b) * (scale * scale)
        c = c * (scale * scale)
    return r * scale, tl.fma(delta, r, q) * scale, t, c, b


@triton.jit
def add_shifted(moments, slices, how):
    """Count and sums of powers of z - shift over finite z; the first of them is the shift."""
    shift, n, s1, s2, s3 = moments
    for k in tl.static_range(len(slices)):
        z = slices[k].to(how.wide)
        shift = tl.where(shift > -INF, shift, z)
        u = tl.where(z > -INF, z - shift, 0)
        n += tl.where(z > -INF, 1, 0)
        s1 += u
        s2 = tl.fma(u, u, s2)
        s3 = tl.fma(u * u, u, s3)
    return shift, n, s1, s2, s3


@triton.jit
def quarters(z, pairs: tl.constexpr):
    """The first, second, third and fourth entry of every lane in a block.

    A lane has four consecutive entries; with `pairs`, two lanes have every other of eight. A thread
    has loaded all of them, so no data moves.
    """
    size: tl.constexpr = z.shape[0]
    if pairs:
        z = tl.reshape(tl.permute(tl.reshape(z, (size // 8, 4, 2)), (0, 2, 1)), (size,))
    even, odd = tl.split(tl.reshape(z, (size // 2, 2)))
    first, third = tl.split(tl.reshape(even, (size // 4, 2)))
    second, fourth = tl.split(tl.reshape(odd, (size // 4, 2)))
    return first, second, third, fourth


@triton.jit
def entries_of_lanes(k, block: tl.constexpr, pairs: tl.constexpr):
    """Which entries of a block `quarters` gives the lanes k-th."""
    lanes = tl.arange(0, block // 4)
    if pairs:
        at = lanes // 2 * 8 + lanes % 2 + 2 * k
    else:
        at = 4 * lanes + k
    return at


@triton.jit
def absorb(state, slices, start, pairs: tl.constexpr, how):
    """The lanes' state after more entries of a row: the quarters of consecutive blocks, the first
    of which begins with the entry `start`."""
    hi, sums, moments, first = state
    before = hi.to(how.wide)
    losers = ()
    for k in tl.static_range(len(slices)):
        z = slices[k]
        if how.top1:
            at = start + k // 4 * how.block + entries_of_lanes(k % 4, how.block, pairs)
            first = tl.where(z > hi, at, first)
        losers = losers + (smaller(hi, z).to(how.wide),)
        hi = larger(hi, z)
    if how.moments:
        moments = add_shifted(moments, slices, how)
    top = finite_top(hi.to(how.wide))
    r, q, t, c, b = rescale(sums, distance(before, top), how)
    for k in tl.static_range(len(slices)):
        d = tl.maximum(losers[k] - top, FAR)
        e = exp(d)
        r += e
        q = tl.fma(e, d, q)
        if how.second:
            t = tl.fma(e * d, d, t)
            c = tl.fma(e, e, c)
            b = tl.fma(e * e, d, b)
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

    delta = distance(hi, finite_top(m))
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
def centred(moments):
    """Sums of powers about the shift -> shift, count, mean - shift, and sums of (z - mean)^2 and
    (z - mean)^3."""
    shift, n, s1, s2, s3 = moments
    offset = s1 / tl.maximum(n, 1)
    second = tl.maximum(s2 - offset * s1, 0)
    return shift, n, offset, second, s3 - offset * (3 * s2 - 2 * offset * s1)


@triton.jit
def merge_shifted(moments, m):
    """Lanes, as `centred`, -> row: count, mean - m, and sums of (z - mean)^2 and (z - mean)^3."""
    shift, n, offset, second, third = moments
    centre = tl.where(n > 0, shift - m + offset, 0)
    count = tl.sum(n, 0)
    mean = tl.sum(n * centre, 0) / count
    away = centre - mean
    third = tl.sum(third + away * (3 * second + n * away * away), 0)
    return count, mean, tl.sum(second + n * away * away, 0), third


@triton.jit
def join_lanes(one, other, how):
    """The lanes' states of two parts of a row -> of both, entry by entry; the first comes first.

    A lane that has seen nothing changes no bit of the other.
    """
    hi, sums = join(one[:2], other[:2], how)
    moments, first = one[2], one[3]
    if how.moments:
        shift = tl.where(moments[1] > 0, moments[0], other[2][0])
        away = tl.where(other[2][1] > 0, other[2][0] - shift, 0)
        later = (other[2][1], away + other[2][2], other[2][3], other[2][4])
        moments = (shift,) + join_moments(moments[1:], later)
    if how.top1:
        first = tl.where(other[0] > one[0], other[3], first)
    return hi, sums, moments, first


@triton.jit
def tile_part(slices, how):
    """(max, sums) of every row of a tile (rows, entries), cut into slices: one part of that row.

    A NaN makes r NaN; where all entries are -inf, r is some number.
    """
    hi = slices[0]
    for k in tl.static_range(1, len(slices)):
        hi = tl.maximum(hi, slices[k])
    hi = tl.max(hi, 1)
    top = finite_top(hi)[:, None]
    zero = tl.zeros_like(slices[0])
    r, q, t, c, b, ties = zero, zero, zero, zero, zero, zero
    for k in tl.static_range(len(slices)):
        leads = slices[k] == hi[:, None]
        d = tl.maximum(slices[k] - top, FAR, propagate_nan=tl.PropagateNan.ALL)
        d = tl.where(leads, FAR, d)
        e = exp(d)
        ties += tl.where(leads, 1.0, 0.0)
        r += e
        q = tl.fma(e, d, q)
        if how.second:
            t = tl.fma(e * d, d, t)
            c = tl.fma(e, e, c)
            b = tl.fma(e * e, d, b)
    ties = tl.sum(ties, 1) - 1
    sums = (tl.sum(r, 1) + ties, tl.sum(q, 1), tl.sum(t, 1), tl.sum(c, 1) + ties, tl.sum(b, 1))
    return hi, sums


@triton.jit
def join(one, other, how):
    """(max, sums) of two parts of a row -> of both; the lesser maximum joins the sums.

    A part that has seen nothing changes no bit of the other.
    """
    hi = larger(one[0], other[0])
    leads = other[0] > one[0]
    sums, lesser = (), ()
    for i in tl.static_range(5):
        sums = sums + (tl.where(leads, other[1][i], one[1][i]),)
        lesser = lesser + (tl.where(leads, one[1][i], other[1][i]),)
    d = distance(tl.where(leads, one[0], other[0]), finite_top(hi))
    r, q, t, c, b = rescale((lesser[0] + 1, lesser[1], lesser[2], lesser[3] + 1, lesser[4]), d, how)
    return hi, (sums[0] + r, sums[1] + q, sums[2] + t, sums[3] + c, sums[4] + b)


@triton.jit
def tile_moments(slices):
    """Count, mean, sums of (z - mean)^2 and (z - mean)^3 of the finite z of every row of a tile."""
    n, mean = tl.zeros_like(slices[0]), tl.zeros_like(slices[0])
    second, third = tl.zeros_like(slices[0]), tl.zeros_like(slices[0])
    for k in tl.static_range(len(slices)):
        n += tl.where(slices[k] > -INF, 1.0, 0.0)
        mean += tl.where(slices[k] > -INF, slices[k], 0)
    n = tl.sum(n, 1)
    mean = tl.sum(mean, 1) / tl.maximum(n, 1)
    for k in tl.static_range(len(slices)):
        u = tl.where(slices[k] > -INF, slices[k] - mean[:, None], 0)
        second = tl.fma(u, u, second)
        third = tl.fma(u * u, u, third)
    return n, mean, tl.sum(second, 1), tl.sum(third, 1)


@triton.jit
def join_moments(one, other):
    """Count, mean, sums of (z - mean)^2 and (z - mean)^3 of two parts -> of both (Pebay, 2008)."""
    n_1, mean_1, second_1, third_1 = one
    n_2, mean_2, second_2, third_2 = other
    n = n_1 + n_2
    share_1 = n_1 / tl.maximum(n, 1)
    share_2 = n_2 / tl.maximum(n, 1)
    away = mean_2 - mean_1
    spread = away * away * n_1 * share_2
    skew = 3 * (share_1 * second_2 - share_2 * second_1) + spread * (share_1 - share_2)
    return n, mean_1 + away * share_2, second_1 + second_2 + spread, third_1 + third_2 + away * skew
