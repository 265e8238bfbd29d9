"""Mean, variance and skewness of the finite u of a row: its running sums, and their merge.

A lane keeps sums of powers of (u - shift) / unit, where `shift` is its first finite u (which
multiplies rounding by at most the number of entries the lane has seen) and `unit` a power of two
not far below the largest |u - shift|: so neither cubes of 1e20 nor of denormal numbers leave the
range, and scaling rounds nothing that counts. Parts are merged by the formulas of Chan et al.
(1983) and Pebay (2008), in the larger unit of the two.

Together these are, of lanes or rows: shift, unit, count, s1, s2, s3 while entries are added; once
`centred`, and of tiles, shift, unit, count, mean, m2, m3, the last three about the shift and in
units.
"""

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))


@triton.jit
def power_below(size, v):
    """The greatest power of two <= size that, as its inverse, is a normal number, at least one, and
    so large that v over it is no more than what its digits tell apart."""
    if size.dtype == tl.float64:
        size = tl.maximum(size, tl.where(v > -INF, tl.abs(v), 0) * 2.0**-53)
        bits = size.to(tl.int64, bitcast=True) & 0x7FF0000000000000
        power = bits.to(tl.float64, bitcast=True)
        power = tl.minimum(tl.maximum(power, 2.2250738585072014e-308), 4.49423283715579e307)
    else:
        size = tl.maximum(size, tl.where(v > -INF, tl.abs(v), 0) * 2.0**-24)
        bits = size.to(tl.int32, bitcast=True) & 0x7F800000
        power = bits.to(tl.float32, bitcast=True)
        power = tl.minimum(tl.maximum(power, 1.1754943508222875e-38), 8.507059173023462e37)
    return power


@triton.jit
def inverse_power(power):
    """1 / power, of what `power_below` gives."""
    if power.dtype == tl.float64:
        bits = 0x7FE0000000000000 - power.to(tl.int64, bitcast=True)
        inverse = bits.to(tl.float64, bitcast=True)
    else:
        bits = 0x7F000000 - power.to(tl.int32, bitcast=True)
        inverse = bits.to(tl.float32, bitcast=True)
    return inverse


@triton.jit
def half_apart(u, v):
    """|u - v| / 2, which is finite; 0 where v is -inf."""
    return tl.where(v > -INF, tl.abs(0.5 * u - 0.5 * v), 0)


@triton.jit
def away_from(v, distance, unit):
    """v + unit distance, which is finite where unit distance may not be."""
    part, whole = tl.minimum(inverse_power(unit), 1), tl.maximum(unit, 1)
    return (v * part + distance * tl.minimum(unit, 1)) * whole


@triton.jit
def no_moments(zero):
    return zero - INF, power_below(zero, zero), zero, zero, zero, zero


@triton.jit
def add_shifted(moments, slices, how):
    """The sums with the finite u among more entries of each lane."""
    shift, own, count, s1, s2, s3 = moments
    for k in tl.static_range(len(slices)):
        shift = tl.where(shift > -INF, shift, slices[k].to(how.wide))
    least, most = shift, shift
    for k in tl.static_range(len(slices)):
        u = slices[k].to(how.wide)
        least = tl.minimum(least, tl.where(u > -INF, u, shift))
        most = tl.maximum(most, u)
    size = tl.maximum(half_apart(most, shift), half_apart(least, shift))
    unit = tl.maximum(own, power_below(size, shift))
    inverse = inverse_power(unit)
    by, base = own * inverse, tl.where(shift > -INF, shift, 0) * inverse
    s1, s2, s3 = s1 * by, s2 * (by * by), s3 * (by * by * by)
    for k in tl.static_range(len(slices)):
        u = slices[k].to(how.wide)
        away = tl.where(u > -INF, u * inverse - base, 0)
        count += tl.where(u > -INF, 1, 0)
        s1 += away
        s2 = tl.fma(away, away, s2)
        s3 = tl.fma(away * away, away, s3)
    return shift, unit, count, s1, s2, s3


@triton.jit
def centred(moments):
    """Sums of powers about the shift -> mean, and sums of powers about that."""
    shift, unit, count, s1, s2, s3 = moments
    mean = s1 / tl.maximum(count, 1)
    m2 = tl.maximum(s2 - mean * s1, 0)
    return shift, unit, count, mean, m2, s3 - mean * (3 * s2 - 2 * mean * s1)


@triton.jit
def tile_moments(slices, top):
    """`centred` of every row of a tile, whose maximum is `top`."""
    zero = tl.zeros_like(slices[0])
    count, mean, least, m2, m3 = zero, zero, zero + top[:, None], zero, zero
    for k in tl.static_range(len(slices)):
        finite = slices[k] > -INF
        count += tl.where(finite, 1.0, 0.0)
        least = tl.minimum(least, tl.where(finite, slices[k], top[:, None]))
    count = tl.sum(count, 1)
    unit = power_below(half_apart(tl.min(least, 1), top), top)
    inverse = inverse_power(unit)
    base = (tl.where(count > 0, top, 0) * inverse)[:, None]
    for k in tl.static_range(len(slices)):
        mean += tl.where(slices[k] > -INF, slices[k] * inverse[:, None] - base, 0)
    mean = tl.sum(mean, 1) / tl.maximum(count, 1)
    for k in tl.static_range(len(slices)):
        away = slices[k] * inverse[:, None] - base - mean[:, None]
        away = tl.where(slices[k] > -INF, away, 0)
        m2 = tl.fma(away, away, m2)
        m3 = tl.fma(away * away, away, m3)
    return top, unit, count, mean, tl.sum(m2, 1), tl.sum(m3, 1)


@triton.jit
def in_unit(moments, unit):
    """Mean and sums in another unit, not less than theirs."""
    _, own, _, mean, m2, m3 = moments
    by = own * inverse_power(unit)
    return mean * by, m2 * (by * by), m3 * (by * by * by)


@triton.jit
def merge_moments(one, other):
    """`centred` of two parts -> of both, about the shift of the first.

    A part that has seen nothing changes no bit of the other.
    """
    count_1, count_2 = one[2], other[2]
    shift = tl.where(count_1 > 0, one[0], other[0])
    later = tl.where(count_2 > 0, other[0], shift)
    unit = power_below(half_apart(later, shift), shift)
    unit = tl.maximum(unit, tl.maximum(one[1], other[1]))
    mean_1, m2_1, m3_1 = in_unit(one, unit)
    mean_2, m2_2, m3_2 = in_unit(other, unit)
    inverse = inverse_power(unit)
    mean_2 += tl.where(shift > -INF, later * inverse - shift * inverse, 0)
    count = count_1 + count_2
    share_1 = count_1 / tl.maximum(count, 1)
    share_2 = count_2 / tl.maximum(count, 1)
    delta = mean_2 - mean_1
    spread = delta * delta * count_1 * share_2
    skew = 3 * (share_1 * m2_2 - share_2 * m2_1) + spread * (share_1 - share_2)
    mean = mean_1 + delta * share_2
    return shift, unit, count, mean, m2_1 + m2_2 + spread, m3_1 + m3_2 + delta * skew


@triton.jit
def merge_lane_moments(moments, m):
    """Lanes, as `centred`, -> row: unit, count, mean about the maximum, and sums of powers about
    the mean."""
    shift, own, count, _, _, _ = moments
    unit = tl.max(tl.maximum(own, power_below(half_apart(m, shift), shift)), 0)
    inverse = inverse_power(unit)
    mean, m2, m3 = in_unit(moments, unit)
    centre = tl.where(count > 0, shift * inverse - m * inverse + mean, 0)
    total = tl.sum(count, 0)
    mean = tl.sum(count * centre, 0) / total
    away = centre - mean
    m3 = tl.sum(m3 + away * (3 * m2 + count * away * away), 0)
    return unit, total, mean, tl.sum(m2 + count * away * away, 0), m3
