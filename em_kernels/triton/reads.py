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

from em_kernels.triton.elementary import INTERPRETED


@triton.jit
def per_thread(x):
    """How many entries 16 bytes are, of what the pointer `x` points to."""
    return 128 // x.dtype.element_ty.primitive_bitwidth


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
        each = per_thread(x)
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
    each = per_thread(out)
    first = 0
    if not how.aligned:
        address = out.to(tl.int64)
        begin = (address + 15) & -16
        first = tl.minimum(((begin - address) // (16 // each)).to(tl.int32), vocab)
        out = tl.multiple_of(begin.to(out.dtype), 16)
    return out, first, first + (vocab - first) // each * each
