"""The running sums over a row, one set per lane, and how they are put together.

A lane holds the largest u it has seen of the row, `held`, and the sums of the others, whose names
are those of csrc/softmax_moments.h. Every u is compared with `held` once and the smaller of the two
joins the sums. So the maximum is never in them, a tie counts once each, and r keeps its relative
accuracy when it is 1e-12. All terms of a sum have one sign: nothing cancels. z is c u, and is never
made: d = c (u - max), where the difference comes first and is exact for neighbours of the maximum.

Error budget of r, q and so of H, relative, in float32: 2^-22 for the exp instruction, |d| 2^-23 for
the rounding of d and of d log2(e), and at worst 2^-24 for each of the V / lanes additions (297 at
V = 151936 in bfloat16, 594 in float32). At d = -30 that is at most 4e-5, typically 1e-6.

Moments of u itself are in `logit_moments`.
"""

import triton
import triton.language as tl

from em_kernels.backends.triton.elementary import exp, larger, smaller
from em_kernels.backends.triton.logit_moments import INF, add_shifted, merge_moments

# exp() of it is 0 and 0 times it is 0: the least distance from a maximum, in place of -inf.
FAR = tl.constexpr(-1e4)


@triton.jit
def finite_top(m):
    """A maximum that can be subtracted: -inf, when nothing was seen, becomes the lowest number."""
    lowest = -1.7976931348623157e308 if m.dtype == tl.float64 else -3.4028234663852886e38
    return tl.maximum(m, lowest)


@triton.jit
def near(d):
    """d, at least FAR; NaN becomes it too."""
    return tl.maximum(d, FAR)


@triton.jit
def apart_by(u, top, c, how):
    """d = c (u - top), -inf where u is."""
    d = u - top
    if how.tempered:
        d = d * c
    return d


@triton.jit
def distance(u, top, c, how):
    """d, at least FAR; `top` is finite."""
    return near(apart_by(u, top, c, how))


@triton.jit
def rebase(sums, delta, how):
    """The sums about a maximum that is larger by -delta."""
    r, q, s, c2, t = sums
    e = exp(delta)
    if how.second:
        s = tl.fma(delta, tl.fma(delta, r, 2 * q), s) * e
        t = tl.fma(delta, c2, t) * (e * e)
        c2 = c2 * (e * e)
    return r * e, tl.fma(delta, r, q) * e, s, c2, t


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
def add_entries(state, slices, start, c, pairs: tl.constexpr, how):
    """The lanes' state after more entries of a row: the quarters of consecutive blocks, the first
    of which begins with the entry `start`."""
    held, sums, moments, argmax = state
    before = held.to(how.wide)
    losers = ()
    for k in tl.static_range(len(slices)):
        u = slices[k]
        if how.top1:
            at = start + k // 4 * how.block + entries_of_lanes(k % 4, how.block, pairs)
            argmax = tl.where(u > held, at, argmax)
        losers = losers + (smaller(held, u).to(how.wide),)
        held = larger(held, u)
    if how.moments:
        moments = add_shifted(moments, slices, how)
    top = finite_top(held.to(how.wide))
    r, q, s, c2, t = rebase(sums, distance(before, top, c, how), how)
    for k in tl.static_range(len(slices)):
        d = distance(losers[k], top, c, how)
        e = exp(d)
        r += e
        q = tl.fma(e, d, q)
        if how.second:
            s = tl.fma(e * d, d, s)
            c2 = tl.fma(e, e, c2)
            t = tl.fma(e * e, d, t)
    return held, (r, q, s, c2, t), moments, argmax


@triton.jit
def merge_lanes(held, sums, c, how):
    """Lanes -> row: max, r, q, sum of p-weights (d - E)^2, c2, t; the max is NaN if unusable."""
    m = tl.max(held, 0)
    unusable = tl.max(tl.where(held < INF, 0, 1), 0)
    m = tl.where((unusable == 0) & (m > -INF), m, float("nan"))
    if how.tempered:
        m = tl.where(c == c, m, float("nan"))
    r, q, s, c2, t = sums
    mass = 1 + r
    mean_d = q / mass
    spread = tl.maximum(s - q * mean_d, 0)

    delta = distance(held, finite_top(m), c, how)
    r, q, s, c2, t = rebase(sums, delta, how)
    e = exp(delta)
    ties = tl.sum(tl.where(held == m, 1.0, 0.0), 0) - 1
    own = tl.where(held == m, 0, e)
    r = tl.sum(r + own, 0) + ties
    q = tl.sum(q + own * delta, 0)
    if how.second:
        away = delta + mean_d - q / (1 + r)
        s = tl.sum(e * (spread + mass * away * away), 0)
        c2 = tl.sum(c2 + own * own, 0) + ties
        t = tl.sum(t + own * own * delta, 0)
    return m, r, q, s, c2, t


@triton.jit
def merge_states(one, other, c, how):
    """The lanes' states of two parts of a row -> of both, entry by entry; `one` comes first.

    A lane that has seen nothing changes no bit of the other.
    """
    m, sums = merge(one[:2], other[:2], c, how)
    moments, argmax = one[2], one[3]
    if how.moments:
        moments = merge_moments(moments, other[2])
    if how.top1:
        argmax = tl.where(other[0] > one[0], other[3], argmax)
    return m, sums, moments, argmax


@triton.jit
def tile_part(slices, c, how):
    """(max, sums) of every row of a tile (rows, entries), cut into slices: one part of that row.

    A NaN makes r NaN; where all entries are -inf, r is some number.
    """
    m = slices[0]
    for k in tl.static_range(1, len(slices)):
        m = tl.maximum(m, slices[k])
    m = tl.max(m, 1)
    top = finite_top(m)[:, None]
    zero = tl.zeros_like(slices[0])
    r, q, s, c2, t, ties = zero, zero, zero, zero, zero, zero
    for k in tl.static_range(len(slices)):
        leads = slices[k] == m[:, None]
        d = apart_by(slices[k], top, c, how)
        d = tl.maximum(d, FAR, propagate_nan=tl.PropagateNan.ALL)
        d = tl.where(leads, FAR, d)
        e = exp(d)
        ties += tl.where(leads, 1.0, 0.0)
        r += e
        q = tl.fma(e, d, q)
        if how.second:
            s = tl.fma(e * d, d, s)
            c2 = tl.fma(e, e, c2)
            t = tl.fma(e * e, d, t)
    ties = tl.sum(ties, 1) - 1
    sums = (tl.sum(r, 1) + ties, tl.sum(q, 1), tl.sum(s, 1), tl.sum(c2, 1) + ties, tl.sum(t, 1))
    return m, sums


@triton.jit
def merge(one, other, c, how):
    """(max, sums) of two parts of a row -> of both; the lesser maximum joins the sums.

    A part that has seen nothing changes no bit of the other.
    """
    m = larger(one[0], other[0])
    leads = other[0] > one[0]
    sums, lesser = (), ()
    for i in tl.static_range(5):
        sums = sums + (tl.where(leads, other[1][i], one[1][i]),)
        lesser = lesser + (tl.where(leads, one[1][i], other[1][i]),)
    delta = distance(tl.where(leads, one[0], other[0]), finite_top(m), c, how)
    lesser = (lesser[0] + 1, lesser[1], lesser[2], lesser[3] + 1, lesser[4])
    r, q, s, c2, t = rebase(lesser, delta, how)
    return m, (sums[0] + r, sums[1] + q, sums[2] + s, sums[3] + c2, sums[4] + t)
