"""How a row comes into registers, and where it leaves them: 16 bytes a thread, in order.

Where rows begin at multiples of 16 bytes (`how.aligned`) that is one load. Else a thread takes its
16 bytes in words of 4, which are aligned but for rows of 16-bit numbers that begin in the middle of
one: there it takes a fifth and shifts. Which thread gets which entry is the same, and so are the
bits of a row wherever it begins. Gradients are stored 16 bytes a thread wherever they begin: an
entry's depends on no other, so those blocks begin at the first multiple of 16 bytes.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from em_kernels.backends.triton.elementary import INTERPRETED, compares_pairs, tanh_half
from em_kernels.backends.triton.logit_moments import INF, centred, no_moments
from em_kernels.backends.triton.moments import (
    add_entries,
    entries_of_lanes,
    merge_states,
    quarters,
)


@triton.constexpr_function
def per_thread(dtype):
    """How many entries 16 bytes are."""
    return 128 // dtype.primitive_bitwidth


@triton.jit
def interleave_4(parts):
    """a[0], b[0], c[0], d[0], a[1], ... of four tensors."""
    a, b, c, d = parts
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def load_words(x, start, size, block: tl.constexpr):
    """The first `size` (all, if None) of a block of 4-byte numbers."""
    four = 4 * tl.arange(0, block // 4)
    words = ()
    for j in tl.static_range(4):
        mask = None if size is None else four + j < size
        words = words + (tl.load(x + start + four + j, mask=mask),)
    return interleave_4(words)


@triton.jit
def funnel(low, high, right):
    """The low word of (high, low) >> right, 0 <= right < 32."""
    if not INTERPRETED and is_cuda():
        asm: tl.constexpr = "shf.r.wrap.b32 $0, $1, $2, $3;"
        word = tl.inline_asm_elementwise(
            asm, "=r,r,r,r", [low, high, right], tl.uint32, is_pure=True, pack=1
        )
    else:
        right = right.to(tl.uint32)
        word = (low >> right) | (high << 1 << (31 - right))
    return word


@triton.jit
def load_halves(x, start, size, block: tl.constexpr):
    """The first `size` (all, if None) of a block of 2-byte numbers; reads the words they lie in."""
    address = x.to(tl.int64)
    odd = ((address & 2) != 0).to(tl.int32)
    x = (address - 2 * odd).to(tl.pointer_type(tl.uint32)) + start // 2
    four = 4 * tl.arange(0, block // 8)
    words = ()
    halves = (block if size is None else size) + odd
    for j in tl.static_range(4):
        mask = None if size is None else 2 * (four + j) < halves
        words = words + (tl.load(x + four + j, mask=mask),)
    words = words + (tl.load(x + four + 4, mask=2 * (four + 4) < halves * odd),)
    shifted = ()
    for j in tl.static_range(4):
        shifted = shifted + (funnel(words[j], words[j + 1], 16 * odd),)
    words = interleave_4(shifted)
    return tl.interleave(words.to(tl.int16), (words >> 16).to(tl.int16))


@triton.jit
def load_block(x, start, size, how):
    """The first `size` (all, if None) of `how.block` entries from `start` on of the row `x`.

    `start` is even. What lies beyond `size` is undefined.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    if how.aligned or dtype.primitive_bitwidth == 64:
        lanes = tl.arange(0, how.block)
        each: tl.constexpr = per_thread(x.dtype.element_ty)
        mask = None if size is None else lanes // each < tl.cdiv(size, each)
        block = tl.load(x + start + lanes, mask=mask)
    elif dtype.primitive_bitwidth == 32:
        block = load_words(x, start, size, how.block)
    else:
        block = load_halves(x, start, size, how.block).to(dtype, bitcast=True)
    return block


@triton.jit
def whole_vectors(out, vocab, how):
    """(pointer to `first`, first, last): the entries [first, last) of the row `out` lie in whole,
    aligned vectors of 16 bytes; fewer than a vector lie before, and after."""
    each: tl.constexpr = per_thread(out.dtype.element_ty)
    first = 0
    if not how.aligned:
        address = out.to(tl.int64)
        begin = (address + 15) & -16
        first = tl.minimum(((begin - address) // (16 // each)).to(tl.int32), vocab)
        out = tl.multiple_of(begin.to(out.dtype), 16)
    return out, first, first + (vocab - first) // each * each


@triton.jit
def row_of(x, row, view, how):
    """Pointer to row i of the view (outer, inner, V); the offset is int64."""
    outer = row // view.inner
    inner = row - outer * view.inner
    offset = outer.to(tl.int64) * view.stride_outer + inner.to(tl.int64) * view.stride_inner
    if how.aligned:
        offset = tl.multiple_of(offset, per_thread(x.dtype.element_ty))
    return x + offset


@triton.jit
def row_constants(row, rows, by, softcap, gain, how):
    """(by, softcap, c); c is `gain`, over the row's temperature if rows have one, and NaN where
    that is no normal number."""
    c = tl.full((), gain, how.wide)
    if rows.temperature is not None:
        c = c / tl.load(rows.temperature + row).to(how.wide)
    least = 2.2250738585072014e-308 if how.wide == tl.float64 else 1.1754943508222875e-38
    c = tl.where((c >= least) & (c < INF), c, float("nan"))
    return tl.full((), by, how.wide), tl.full((), softcap, how.wide), c


@triton.jit
def transform(x, bias, constants, how):
    """u = softcap(by x + bias) and its derivative by `by x`; z is c u."""
    by, softcap, _ = constants
    u = x.to(how.wide)
    slope = by * 0 + 1
    if how.scaled:
        u = u * by
    if bias is not None:
        u += bias.to(how.wide)
    if how.capped:
        value, slope = tanh_half(u * (2 / softcap))
        u = tl.where(tl.abs(u) < INF, value * softcap, u)
    return u, slope


@triton.jit
def load_u(x, rows, first, start, size, constants, how):
    """`transform` of the first `size` (all, if None) of a block of a row, -inf beyond. The block
    begins with the entry `first + start`."""
    entries = load_block(x + first, start, size, how)
    lanes = tl.arange(0, how.block)
    bias = None
    if rows.bias is not None:
        mask = None if size is None else lanes < size
        bias = tl.load(rows.bias + first + start + lanes, mask=mask)
    u, slope = transform(entries, bias, constants, how)
    if size is not None:
        u = tl.where(lanes < size, u, -INF)
    return u, slope


@triton.jit
def load_compared(x, rows, start, size, constants, packed: tl.constexpr, how):
    """u as `add_entries` wants it: if `packed`, as it lies in memory."""
    if packed:
        u = load_block(x, start, size, how)
        if size is not None:
            u = tl.where(tl.arange(0, how.block) < size, u, -INF).to(u.dtype)
    else:
        u, _ = load_u(x, rows, 0, start, size, constants, how)
    return u


@triton.jit
def nothing_read(dtype: tl.constexpr, pairs: tl.constexpr, how):
    """The state of lanes before their first entry: max, sums, moments, index of the max."""
    zero = tl.zeros((how.block // 4,), how.wide)
    sums = (zero, zero, zero, zero, zero)
    argmax = entries_of_lanes(0, how.block, pairs)
    return (zero - INF).to(dtype), sums, no_moments(zero), argmax


@triton.jit
def closed(state, how):
    """The state at the end of a part, in `how.wide`."""
    held, sums, moments, argmax = state
    return held.to(how.wide), sums, centred(moments), argmax


@triton.jit
def read_row(x, rows, begin, end, constants, how):
    """The lanes' state after the entries [begin, end) of a row, moments as `centred`.

    It is joined from parts of `how.part` entries, each of which begins with nothing: so several
    programs come to the same bits. Steps of `slices` full blocks, then masked blocks.
    """
    raw: tl.constexpr = x.dtype.element_ty
    packed: tl.constexpr = how.paired and compares_pairs(raw)
    pairs: tl.constexpr = raw.primitive_bitwidth == 16
    c = constants[2]
    before = nothing_read(how.wide, pairs, how)
    state = nothing_read(raw if packed else how.wide, pairs, how)
    step: tl.constexpr = how.block * how.slices
    whole = begin + (end - begin) // step * step
    for start in range(begin, whole, step):
        slices = ()
        for k in tl.static_range(how.slices):
            u = load_compared(x, rows, start + k * how.block, None, constants, packed, how)
            slices = slices + quarters(u, pairs)
        state = add_entries(state, slices, start, c, pairs, how)
        if (start + step) % how.part == 0:
            before = merge_states(before, closed(state, how), c, how)
            state = nothing_read(raw if packed else how.wide, pairs, how)
    for start in range(whole, end, how.block):
        u = load_compared(x, rows, start, end - start, constants, packed, how)
        state = add_entries(state, quarters(u, pairs), start, c, pairs, how)
    return merge_states(before, closed(state, how), c, how)


@triton.constexpr_function
def numbers_of_a_lane(second, moments, top1):
    """How many numbers the state of a lane is."""
    return 3 + 3 * second + 6 * moments + top1


@triton.jit
def put_state(states, state, how):
    """Write down what the lanes of a program hold."""
    held, sums, moments, argmax = state
    values = (held, sums[0], sums[1])
    if how.second:
        values = values + sums[2:]
    if how.moments:
        values = values + moments
    if how.top1:
        values = values + (argmax.to(how.wide, bitcast=how.wide == tl.float32),)
    lanes = tl.arange(0, how.block // 4)
    for i in tl.static_range(len(values)):
        tl.store(states + i * (how.block // 4) + lanes, values[i])


@triton.jit
def load_state(states, pairs: tl.constexpr, how):
    """What `put_state` has written."""
    _, sums, moments, argmax = nothing_read(how.wide, pairs, how)
    lanes = tl.arange(0, how.block // 4)
    values = ()
    for i in tl.static_range(numbers_of_a_lane(how.second, how.moments, how.top1)):
        values = values + (tl.load(states + i * (how.block // 4) + lanes),)
    sums = values[1:3] + sums[2:]
    if how.second:
        sums = values[1:6]
    if how.moments:
        moments = values[3 + 3 * how.second : 9 + 3 * how.second]
    if how.top1:
        argmax = values[len(values) - 1].to(tl.int32, bitcast=how.wide == tl.float32)
    return values[0], sums, moments, argmax


@triton.jit
def last_to_arrive(arrived, parts):
    """Whether the other programs of this row have written down what they hold: then all of it can
    be read here. Which program that is changes nothing."""
    tl.debug_barrier()
    before = tl.atomic_add(arrived, 1)
    tl.debug_barrier()
    return before == parts - 1
