"""The kernels, one program per row: `statistics`, `gradient`, and `loss`, which is both in turn.

Arguments that go together travel as NamedTuples (`launch` defines them): `view`, where the rows
lie; `rows`, the tensors of a RowSpec; `up`, those of an Upstream; `outs`, the results asked for;
`how`, what is fixed when a kernel is compiled. An absent tensor is None and costs nothing.
"""

import triton
import triton.language as tl

from em_kernels.backends.interface import ROW_OUTPUTS, Saved
from em_kernels.backends.triton.elementary import exp, expm1, log1p
from em_kernels.backends.triton.logit_moments import away_from, merge_lane_moments
from em_kernels.backends.triton.moments import apart_by, distance, merge_lanes, merge_states, near
from em_kernels.backends.triton.reads import (
    last_to_arrive,
    load_state,
    load_u,
    nothing_read,
    numbers_of_a_lane,
    per_thread,
    put_state,
    read_row,
    row_constants,
    row_of,
    transform,
    whole_vectors,
)

RESULTS = tl.constexpr(len(Saved._fields) + len(ROW_OUTPUTS))


@triton.jit
def is_counted(row, rows):
    counted = row >= 0
    if rows.mask is not None:
        counted = tl.load(rows.mask + row) != 0
    return counted


@triton.jit
def load_target(x, row, rows, valid, constants, how):
    """y, whether it is in range, and u and its slope there."""
    y = tl.load(rows.target + row)
    known = (y >= 0) & (y < valid)
    y = tl.where(known, y, 0).to(tl.int32)
    bias = None if rows.bias is None else tl.load(rows.bias + y)
    u, slope = transform(tl.load(x + y), bias, constants, how)
    return y, known, u, slope


@triton.jit
def put(pointer, row, value):
    if pointer is not None:
        tl.store(pointer + row, value)


@triton.jit
def put_zeros(outs, row):
    for i in tl.static_range(RESULTS):
        put(outs[i], row, 0.0)


@triton.jit
def put_second_order(outs, row, r, q, s, c2, t, d_target):
    """varentropy, collision, entropy_slope; the last is grouped so that nothing cancels when the
    target is the maximum."""
    mass = 1 + r
    mean_d = q / mass
    put(outs.varentropy, row, s / mass)
    put(outs.collision, row, (1 + c2) / (mass * mass))
    if outs.entropy_slope is not None:
        d = near(d_target)
        e = exp(d)
        value = mean_d * ((e - 1) + e * r - c2) + t - e * d * mass
        put(outs.entropy_slope, row, value / (mass * mass))


@triton.jit
def put_moments(outs, row, moments, m, c, log1p_r):
    """Mean, variance and skewness of the z that are finite, and KL(uniform || p)."""
    unit, count, mean, m2, m3 = merge_lane_moments(moments, m)
    var = m2 / count
    low, high = unit * tl.minimum(c, 1), tl.maximum(c, 1)  # c unit may be infinite
    spread = tl.sqrt(var) * low * high
    put(outs.logit_mean, row, c * away_from(m, mean, unit))
    put(outs.logit_var, row, spread * spread)
    put(outs.logit_skew, row, tl.where(var == 0, 0, m3 / count / (var * tl.sqrt(var))))
    put(outs.self_certainty, row, log1p_r - mean * low * high - tl.log(count))


@triton.jit
def put_row(outs, row, state, y, known, u_target, c, how):
    """Merge the lanes, store what was asked for, return (max, log1p(r), E)."""
    held, sums, moments, argmax = state
    m, r, q, s, c2, t = merge_lanes(held, sums, c, how)
    if y is not None:
        m = tl.where(known, m, float("nan"))
    r = tl.where(m == m, r, float("nan"))
    log1p_r = log1p(r)
    mean_d = q / (1 + r)
    put(outs.max, row, m)
    put(outs.log1p_r, row, log1p_r)
    put(outs.mean_d, row, mean_d)
    put(outs.entropy, row, log1p_r - mean_d)
    put(outs.lse, row, c * m + log1p_r)
    put(outs.max_prob, row, 1 / (1 + r))
    d_target = m
    if y is not None:
        d_target = apart_by(u_target, m, c, how)
        put(outs.logprob, row, d_target - log1p_r)
    if how.top1:
        index = tl.min(tl.where(held == m, argmax, 2147483647), 0)
        put(outs.is_top1, row, tl.where(m == m, tl.where(index == y, 1.0, 0.0), float("nan")))
    if how.second:
        put_second_order(outs, row, r, q, s, c2, t, d_target)
    if how.moments:
        put_moments(outs, row, moments, m, c, log1p_r)
    return m, log1p_r, mean_d


@triton.jit
def gradient_terms(row, up, m, log1p_r, mean_d, constants):
    """dz/dx before the softcap, and a, b of the gradient exp(d) (a - b d) of all entries."""
    by, _, c = constants
    factor = tl.where(m == m, by * c, float("nan"))
    a = factor * 0
    b = factor * 0
    if up.entropy is not None:
        b = tl.load(up.entropy + row).to(m.dtype)
        a += b * mean_d
    if up.lse is not None:
        a += tl.load(up.lse + row)
    if up.logprob is not None:
        a -= tl.load(up.logprob + row)
    share = factor * exp(-log1p_r)
    return factor, a * share, b * share


@triton.jit
def target_gradient(row, up, d, slope, factor, log1p_r, mean_d):
    """The gradient at the target, where 1 - p_y is -expm1(log p_y): exact as p_y -> 1."""
    p = exp(near(d) - log1p_r)
    g = -expm1(d - log1p_r) * tl.load(up.logprob + row)
    if up.entropy is not None:
        g += tl.load(up.entropy + row) * p * (mean_d - near(d))
    if up.lse is not None:
        g += tl.load(up.lse + row) * p
    return g * factor * slope


@triton.jit
def entry_gradient(u, slope, is_target, terms, up, how):
    """exp(d) (a - b d) softcap', or at the target what `target_gradient` says."""
    m, a, b, _, g_target, c = terms
    d = distance(u, m, c, how)
    g = exp(d)
    if up.entropy is None:
        g = g * a
    else:
        g = g * tl.fma(-b, d, a)
    if how.capped:
        g = g * slope
    if up.logprob is not None:
        g = tl.where(is_target, g_target, g)
    return g


@triton.jit
def outruns_reads(start, step):
    """Whether the stores of a narrowing step may reach entries no barrier says are read.

    Step k = start / step writes the bytes of steps up to k / 2, so a barrier between the loads and
    the stores of steps 0, 1, 3, 7, 15, ... covers every step up to the next of them.
    """
    return ((start + step) & start) == 0


@triton.jit
def write_gradient(x, out, rows, up, vocab, valid, constants, terms, how):
    """The gradient of a row; 0 beyond `valid`.

    `out` may lie over `x`. If both are equally wide, a lane rereads only its own entries. If `out`
    is half as wide, entry j is written over entry j // 2: all lanes must have read it.
    """
    narrows = out.dtype.element_ty.primitive_bitwidth < x.dtype.element_ty.primitive_bitwidth
    each: tl.constexpr = per_thread(out.dtype.element_ty)
    lanes = tl.arange(0, how.block)
    step: tl.constexpr = how.block * how.slices
    vectors, first, last = whole_vectors(out, vocab, how)
    write_edge(x, out, 0, first, rows, up, valid, constants, terms, how)
    y = terms[3] - first
    size, count = last - first, tl.minimum(valid, last) - first
    whole = tl.maximum(count, 0) // step * step
    for start in range(0, whole, step):
        slices = ()
        for k in tl.static_range(how.slices):
            block = load_u(x, rows, first, start + k * how.block, None, constants, how)
            slices = slices + (block,)
        if narrows and outruns_reads(start, step):
            tl.debug_barrier()
        for k in tl.static_range(how.slices):
            base = start + k * how.block
            u, slope = slices[k]
            g = entry_gradient(u, slope, lanes == y - base, terms, up, how)
            tl.store(vectors + base + lanes, g)
    for start in range(whole, size, how.block):
        u, slope = load_u(x, rows, first, start, count - start, constants, how)
        if narrows:
            tl.debug_barrier()
        g = entry_gradient(u, slope, lanes == y - start, terms, up, how)
        g = tl.where(lanes < count - start, g, 0)
        tl.store(vectors + start + lanes, g, mask=lanes // each < (size - start) // each)
    write_edge(x, out, last, vocab, rows, up, valid, constants, terms, how)


@triton.jit
def write_edge(x, out, begin, end, rows, up, valid, constants, terms, how):
    """The gradient of the entries [begin, end), fewer than 16 bytes."""
    at = begin + tl.arange(0, 8)
    mask = at < tl.minimum(end, valid)
    bias = None
    if rows.bias is not None:
        bias = tl.load(rows.bias + at, mask=mask)
    u, slope = transform(tl.load(x + at, mask=mask), bias, constants, how)
    if out.dtype.element_ty.primitive_bitwidth < x.dtype.element_ty.primitive_bitwidth:
        tl.debug_barrier()
    g = entry_gradient(u, slope, at == terms[3], terms, up, how)
    tl.store(out + at, tl.where(mask, g, 0), mask=at < end)


@triton.jit
def write_zeros(out, vocab, how):
    vectors, first, last = whole_vectors(out, vocab, how)
    each: tl.constexpr = per_thread(out.dtype.element_ty)
    lanes, edge = tl.arange(0, how.block), tl.arange(0, 8)
    zero = tl.zeros((how.block,), how.wide)
    for start in range(0, last - first, how.block):
        inside = lanes // each < (last - first - start) // each
        tl.store(vectors + start + lanes, zero, mask=inside)
    tl.store(out + edge, tl.zeros((8,), how.wide), mask=edge < first)
    tl.store(out + last + edge, tl.zeros((8,), how.wide), mask=last + edge < vocab)


@triton.jit
def statistics(
    logits,
    view,
    rows,
    outs,
    shared,
    vocab,
    valid,
    by: tl.float64,
    softcap: tl.float64,
    gain: tl.float64,
    how,
):
    """One program a row; with `shared`, one for each part of a row, the last of which merges."""
    row = tl.program_id(0)
    parts = tl.cdiv(valid, how.part)
    part = 0
    if shared is not None:
        part = row % parts
        row = row // parts
    if is_counted(row, rows):
        x = row_of(logits, row, view, how)
        constants = row_constants(row, rows, by, softcap, gain, how)
        if shared is None:
            state = read_row(x, rows, 0, valid, constants, how)
            finish_row(x, row, state, rows, outs, valid, constants, how)
        else:
            begin = part * how.part
            end = tl.minimum(begin + how.part, valid)
            state = read_row(x, rows, begin, end, constants, how)
            pairs: tl.constexpr = x.dtype.element_ty.primitive_bitwidth == 16
            numbers: tl.constexpr = numbers_of_a_lane(how.second, how.moments, how.top1)
            size: tl.constexpr = numbers * (how.block // 4)
            states = shared.states + row.to(tl.int64) * parts * size
            put_state(states + part * size, state, how)
            if last_to_arrive(shared.arrived + row, parts):
                state = nothing_read(how.wide, pairs, how)
                for i in range(parts):
                    state = merge_states(
                        state, load_state(states + i * size, pairs, how), constants[2], how
                    )
                finish_row(x, row, state, rows, outs, valid, constants, how)
    else:
        put_zeros(outs, row)


@triton.jit
def finish_row(x, row, state, rows, outs, valid, constants, how):
    y, known, u_target = None, None, None
    if rows.target is not None:
        y, known, u_target, _ = load_target(x, row, rows, valid, constants, how)
    put_row(outs, row, state, y, known, u_target, constants[2], how)


@triton.jit
def gradient(
    logits,
    view,
    out,
    out_view,
    rows,
    saved,
    up,
    vocab,
    valid,
    by: tl.float64,
    softcap: tl.float64,
    gain: tl.float64,
    how,
):
    row = tl.program_id(0)
    out = row_of(out, row, out_view, how)
    if is_counted(row, rows):
        x = row_of(logits, row, view, how)
        constants = row_constants(row, rows, by, softcap, gain, how)
        m = tl.load(saved.max + row)
        log1p_r = tl.load(saved.log1p_r + row)
        mean_d = tl.load(saved.mean_d + row)
        factor, a, b = gradient_terms(row, up, m, log1p_r, mean_d, constants)
        terms = (m, a, b, -1, 0.0, constants[2])
        if up.logprob is not None:
            y, _, u, slope = load_target(x, row, rows, valid, constants, how)
            # No thread may overwrite the target's logit, in place, before all have read it.
            tl.debug_barrier()
            d = apart_by(u, m, constants[2], how)
            g = target_gradient(row, up, d, slope, factor, log1p_r, mean_d)
            terms = (m, a, b, y, g, constants[2])
        write_gradient(x, out, rows, up, vocab, valid, constants, terms, how)
    else:
        write_zeros(out, vocab, how)


@triton.jit
def loss(
    logits,
    view,
    out,
    out_view,
    rows,
    outs,
    up,
    vocab,
    valid,
    by: tl.float64,
    softcap: tl.float64,
    gain: tl.float64,
    how,
):
    row = tl.program_id(0)
    if is_counted(row, rows):
        x = row_of(logits, row, view, how)
        constants = row_constants(row, rows, by, softcap, gain, how)
        y, known, u_target, slope = None, None, None, None
        if rows.target is not None:
            y, known, u_target, slope = load_target(x, row, rows, valid, constants, how)
        state = read_row(x, rows, 0, valid, constants, how)
        m, log1p_r, mean_d = put_row(outs, row, state, y, known, u_target, constants[2], how)
        out = row_of(out, row, out_view, how)
        factor, a, b = gradient_terms(row, up, m, log1p_r, mean_d, constants)
        terms = (m, a, b, -1, 0.0, constants[2])
        if up.logprob is not None:
            d = apart_by(u_target, m, constants[2], how)
            g = target_gradient(row, up, d, slope, factor, log1p_r, mean_d)
            terms = (m, a, b, y, g, constants[2])
        write_gradient(x, out, rows, up, vocab, valid, constants, terms, how)
    else:
        put_zeros(outs, row)
        write_zeros(row_of(out, row, out_view, how), vocab, how)
