"""The kernels, one program per row: `statistics`, `gradient`, and `loss`, which is both in turn.

Arguments that go together travel as NamedTuples (`launch` defines them): `view`, where the rows
lie; `rows`, the tensors of a RowSpec; `up`, those of an Upstream; `outs`, the results asked for;
`how`, what is fixed when a kernel is compiled. An absent tensor is None and costs nothing.
"""

import triton
import triton.language as tl

from em_kernels._spec import OUTPUTS, Saved
from em_kernels.triton.elementary import exp, expm1, log1p, tanh_half
from em_kernels.triton.moments import (
    INF,
    absorb,
    distance,
    merge,
    merge_shifted,
    quarters,
)

RESULTS = tl.constexpr(len(Saved._fields) + len(OUTPUTS))


@triton.jit
def row_offset(row, view):
    """Where row i of the view (outer, inner, V) begins, in elements, as int64."""
    outer = row // view.inner
    inner = row - outer * view.inner
    return outer.to(tl.int64) * view.stride_outer + inner.to(tl.int64) * view.stride_inner


@triton.jit
def is_counted(row, rows):
    counted = row >= 0
    if rows.mask is not None:
        counted = tl.load(rows.mask + row) != 0
    return counted


@triton.jit
def row_constants(row, rows, scale, softcap, temperature, how):
    """(logit_scale, softcap, 1 / T); NaN for a temperature that is not positive and finite."""
    t = tl.full((), temperature, how.wide)
    if rows.temperature is not None:
        t = tl.load(rows.temperature + row).to(how.wide)
    inverse_t = tl.where((t > 0) & (t < INF), 1 / t, float("nan"))
    return tl.full((), scale, how.wide), tl.full((), softcap, how.wide), inverse_t


@triton.jit
def transform(x, bias, constants, how):
    """z = softcap(scale x + bias) / T and d softcap(u) / du."""
    scale, softcap, inverse_t = constants
    u = x.to(how.wide)
    slope = scale * 0 + 1
    if how.scaled:
        if bias is None and not how.capped:
            u = u * (scale * inverse_t)
        else:
            u = u * scale
    if bias is not None:
        u += bias.to(how.wide)
    if how.capped:
        value, slope = tanh_half(u * (2 / softcap))
        u = tl.where(tl.abs(u) < INF, value * (softcap * inverse_t), u)
    elif bias is not None and how.scaled:
        u = u * inverse_t
    return u, slope


@triton.jit
def load_z(x, rows, at, mask, constants, how):
    """`transform` of the entries `at` of a row, -inf where there is a mask and it is False."""
    bias = None
    if mask is None:
        if rows.bias is not None:
            bias = tl.load(rows.bias + at)
        z, slope = transform(tl.load(x + at), bias, constants, how)
    else:
        if rows.bias is not None:
            bias = tl.load(rows.bias + at, mask=mask, other=0)
        z, slope = transform(tl.load(x + at, mask=mask, other=0), bias, constants, how)
        z = tl.where(mask, z, -INF)
    return z, slope


@triton.jit
def load_target(x, row, rows, valid, constants, how):
    """y, whether it is in range, and z and d softcap / du there."""
    y = tl.load(rows.target + row)
    known = (y >= 0) & (y < valid)
    y = tl.where(known, y, 0).to(tl.int32)
    z, slope = load_z(x, rows, y, None, constants, how)
    return y, known, z, slope


@triton.jit
def read_row(x, rows, valid, constants, how):
    """The lanes' state after a whole row: steps of `slices` full blocks, then masked blocks."""
    lanes = tl.arange(0, how.block)
    four = 4 * tl.arange(0, how.block // 4)
    zero = tl.zeros((how.block // 4,), how.wide)
    sums = (zero, zero, zero, zero, zero)
    state = (zero - INF, sums, (zero - INF, zero, zero, zero, zero), four)
    whole = valid // (how.block * how.slices) * (how.block * how.slices)
    for start in range(0, whole, how.block * how.slices):
        slices = ()
        for k in tl.static_range(how.slices):
            z, _ = load_z(x, rows, start + k * how.block + lanes, None, constants, how)
            slices = slices + quarters(z)
        state = absorb(state, slices, start + four, how)
    for start in range(whole, valid, how.block):
        at = start + lanes
        z, _ = load_z(x, rows, at, at < valid, constants, how)
        state = absorb(state, quarters(z), start + four, how)
    return state


@triton.jit
def put(pointer, row, value):
    if pointer is not None:
        tl.store(pointer + row, value)


@triton.jit
def put_zeros(outs, row):
    for i in tl.static_range(RESULTS):
        put(outs[i], row, 0.0)


@triton.jit
def put_second_order(outs, row, r, q, t, c, b, d_target):
    """varentropy, collision, entropy_slope; the last is grouped so that nothing cancels when the
    target is the maximum."""
    norm = 1 + r
    mean_d = q / norm
    put(outs.varentropy, row, t / norm)
    put(outs.collision, row, (1 + c) / (norm * norm))
    if outs.entropy_slope is not None:
        d = distance(d_target, 0.0)
        e = exp(d)
        value = mean_d * ((e - 1) + e * r - c) + b - e * d * norm
        put(outs.entropy_slope, row, value / (norm * norm))


@triton.jit
def put_moments(outs, row, moments, m, log1p_r):
    """Mean, variance and skewness of the finite z, and KL(uniform || p)."""
    count, mean, second, third = merge_shifted(moments, m)
    var = second / count
    put(outs.logit_mean, row, m + mean)
    put(outs.logit_var, row, var)
    put(outs.logit_skew, row, tl.where(var == 0, 0, third / count / (var * tl.sqrt(var))))
    put(outs.self_certainty, row, log1p_r - mean - tl.log(count))


@triton.jit
def put_row(outs, row, state, y, known, z_target, how):
    """Merge the lanes, store what was asked for, return (max, log1p(r), E)."""
    hi, sums, moments, first = state
    m, r, q, t, c, b = merge(hi, sums, how)
    if y is not None:
        m = tl.where(known, m, float("nan"))
    r = tl.where(m == m, r, float("nan"))
    log1p_r = log1p(r)
    mean_d = q / (1 + r)
    put(outs.max, row, m)
    put(outs.log1p_r, row, log1p_r)
    put(outs.mean_d, row, mean_d)
    put(outs.entropy, row, log1p_r - mean_d)
    put(outs.lse, row, m + log1p_r)
    put(outs.max_prob, row, 1 / (1 + r))
    if y is not None:
        put(outs.logprob, row, z_target - m - log1p_r)
    if how.top1:
        index = tl.min(tl.where(hi == m, first, 2147483647), 0)
        put(outs.is_top1, row, tl.where(m == m, tl.where(index == y, 1.0, 0.0), float("nan")))
    if how.second:
        put_second_order(outs, row, r, q, t, c, b, m if y is None else z_target - m)
    if how.moments:
        put_moments(outs, row, moments, m, log1p_r)
    return m, log1p_r, mean_d


@triton.jit
def gradient_terms(row, up, m, log1p_r, mean_d, constants):
    """dz/dx before the softcap, and a, b of the gradient exp(d) (a - b d) of all entries."""
    scale, _, inverse_t = constants
    factor = tl.where(m == m, scale * inverse_t, float("nan"))
    a = factor * 0
    b = factor * 0
    if up.entropy is not None:
        b = tl.load(up.entropy + row).to(m.dtype)
        a += b * mean_d
    if up.lse is not None:
        a += tl.load(up.lse + row)
    if up.logprob is not None:
        a -= tl.load(up.logprob + row)
    norm = factor * exp(-log1p_r)
    return factor, a * norm, b * norm


@triton.jit
def target_gradient(row, up, d, slope, factor, log1p_r, mean_d):
    """The gradient at the target, where 1 - p_y is -expm1(log p_y): exact as p_y -> 1."""
    p = exp(distance(d, 0.0) - log1p_r)
    g = -expm1(d - log1p_r) * tl.load(up.logprob + row)
    if up.entropy is not None:
        g += tl.load(up.entropy + row) * p * (mean_d - distance(d, 0.0))
    if up.lse is not None:
        g += tl.load(up.lse + row) * p
    return g * factor * slope


@triton.jit
def entry_gradient(z, slope, is_target, terms, up, how):
    """exp(d) (a - b d) softcap', or at the target what `target_gradient` says."""
    m, a, b, _, g_target = terms
    d = distance(z, m)
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
    lanes = tl.arange(0, how.block)
    y = terms[3]
    whole = valid // (how.block * how.slices) * (how.block * how.slices)
    for start in range(0, whole, how.block * how.slices):
        slices = ()
        for k in tl.static_range(how.slices):
            at = start + k * how.block + lanes
            slices = slices + (load_z(x, rows, at, None, constants, how),)
        if narrows and outruns_reads(start, how.block * how.slices):
            tl.debug_barrier()
        for k in tl.static_range(how.slices):
            base = start + k * how.block
            z, slope = slices[k]
            g = entry_gradient(z, slope, lanes == y - base, terms, up, how)
            tl.store(out + base + lanes, g)
    for start in range(whole, vocab, how.block):
        at = start + lanes
        z, slope = load_z(x, rows, at, at < valid, constants, how)
        if narrows:
            tl.debug_barrier()
        g = entry_gradient(z, slope, at == y, terms, up, how)
        tl.store(out + at, tl.where(at < valid, g, 0), mask=at < vocab)


@triton.jit
def write_zeros(out, vocab, how):
    lanes = tl.arange(0, how.block)
    zero = tl.zeros((how.block,), how.wide)
    for start in range(0, vocab, how.block):
        tl.store(out + start + lanes, zero, mask=start + lanes < vocab)


@triton.jit
def statistics(
    logits,
    view,
    rows,
    outs,
    vocab,
    valid,
    scale: tl.float64,
    softcap: tl.float64,
    temperature: tl.float64,
    how,
):
    row = tl.program_id(0)
    if is_counted(row, rows):
        x = logits + row_offset(row, view)
        constants = row_constants(row, rows, scale, softcap, temperature, how)
        y, known, z_target = None, None, None
        if rows.target is not None:
            y, known, z_target, _ = load_target(x, row, rows, valid, constants, how)
        state = read_row(x, rows, valid, constants, how)
        put_row(outs, row, state, y, known, z_target, how)
    else:
        put_zeros(outs, row)


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
    scale: tl.float64,
    softcap: tl.float64,
    temperature: tl.float64,
    how,
):
    row = tl.program_id(0)
    out += row_offset(row, out_view)
    if is_counted(row, rows):
        x = logits + row_offset(row, view)
        constants = row_constants(row, rows, scale, softcap, temperature, how)
        m = tl.load(saved.max + row)
        log1p_r = tl.load(saved.log1p_r + row)
        mean_d = tl.load(saved.mean_d + row)
        factor, a, b = gradient_terms(row, up, m, log1p_r, mean_d, constants)
        terms = (m, a, b, -1, 0.0)
        if up.logprob is not None:
            y, _, z, slope = load_target(x, row, rows, valid, constants, how)
            # No thread may overwrite the target's logit, in place, before all have read it.
            tl.debug_barrier()
            g = target_gradient(row, up, z - m, slope, factor, log1p_r, mean_d)
            terms = (m, a, b, y, g)
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
    scale: tl.float64,
    softcap: tl.float64,
    temperature: tl.float64,
    how,
):
    row = tl.program_id(0)
    out += row_offset(row, out_view)
    if is_counted(row, rows):
        x = logits + row_offset(row, view)
        constants = row_constants(row, rows, scale, softcap, temperature, how)
        y, known, z_target, slope = None, None, None, None
        if rows.target is not None:
            y, known, z_target, slope = load_target(x, row, rows, valid, constants, how)
        state = read_row(x, rows, valid, constants, how)
        m, log1p_r, mean_d = put_row(outs, row, state, y, known, z_target, how)
        factor, a, b = gradient_terms(row, up, m, log1p_r, mean_d, constants)
        terms = (m, a, b, -1, 0.0)
        if up.logprob is not None:
            d = z_target - m
            g = target_gradient(row, up, d, slope, factor, log1p_r, mean_d)
            terms = (m, a, b, y, g)
        write_gradient(x, out, rows, up, vocab, valid, constants, terms, how)
    else:
        put_zeros(outs, row)
        write_zeros(out, vocab, how)
