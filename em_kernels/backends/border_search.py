"""The border of a kept set found by counting, without sorting: for rows that ranks share.

What lies above some levels of a row, a number and a mass (`Backend.above`), is a sum over its
entries, and so over shards and over ranks, which all come to the same border. Levels are floats in
the order of their bits: each pass leaves a sixteenth of the interval in which the border must be,
and after a fixed number of passes it is one float. Nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from em_kernels.backends.truncation import Border, Limits

# (levels (N, K), ids (N, K) or None) -> counts, sums, as `Backend.above`, of whole rows
Above = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
_BITS = 4  # of the interval, a pass
_WAYS = 1 << _BITS


def search(
    above: Above,
    top: Tensor,
    truncation: Tensor,
    min_p_first: bool,
    vocab: int,
    c: float | Tensor,
) -> Border:
    """`find_border` of rows whose largest u is `top` (N,), NaN where a row cannot be computed."""
    limits = Limits.of(truncation)
    usable = top.isfinite()
    top = torch.where(usable, top, 0)
    least = torch.full_like(top, -torch.inf)
    top_k = limits.top_k.nan_to_num().clamp(min=1)
    level_k = _first_level(lambda counts, _: counts < top_k[:, None], above, least, top)
    level_m = limits.level_of_min_p(top, c)
    base = torch.maximum(level_k, level_m) if min_p_first else level_k
    _, (total,) = _unbound(above(_before(base)[:, None], None))
    mass = limits.mass(total, top.dtype)
    some = limits.top_p < 1
    level_p = _first_level(lambda _, sums: sums < mass[:, None], above, base, top)
    first = _first_of_ties(above, level_p, c * (level_p.double() - top.double()), mass, vocab)
    level = torch.maximum(base, torch.where(some, level_p, base))
    level = torch.maximum(level, level_m)
    first = torch.where((level == level_p) & some, first, 0)
    return limits.border(torch.where(usable, top, torch.nan), level, first)


def _first_of_ties(above: Above, level: Tensor, d: Tensor, mass: Tensor, vocab: int) -> Tensor:
    """The least id that top_p keeps of the entries at its level, of which each is e^d: those of the
    highest ids, as many as have less than `mass` before them, and one."""
    (over, upto), (before, _) = _unbound(above(torch.stack([level, _before(level)], 1), None))
    kept = ((mass - before) / d.exp()).ceil().clamp(min=1)
    left_out = (upto - over - kept).clamp(min=0)
    low, high = torch.zeros_like(over), torch.full_like(over, vocab - 1)

    def found(counts: Tensor, _: Tensor) -> Tensor:
        return counts - over[:, None] > left_out[:, None]

    bits = max(1, vocab.bit_length())
    return _least(
        found, lambda ids: above(level[:, None].expand(ids.shape), ids + 1), low, high, bits
    )


def _first_level(
    holds: Callable[[Tensor, Tensor], Tensor], above: Above, low: Tensor, high: Tensor
) -> Tensor:
    """The least float from `low` to `high` of which counts and sums hold; those of `high` do."""
    bits = 8 * high.itemsize
    key = _least(holds, lambda keys: above(_float(keys, high), None), _key(low), _key(high), bits)
    return _float(key, high)


def _least(
    holds: Callable[[Tensor, Tensor], Tensor],
    ask: Callable[[Tensor], tuple[Tensor, Tensor]],
    low: Tensor,
    high: Tensor,
    bits: int,
) -> Tensor:
    """The least integer of each interval of which what is asked holds; of the last one it does."""
    places = torch.arange(1, _WAYS, device=low.device)
    for _ in range(bits // _BITS + 3):
        size = high - low  # which 64 bits may not hold: then it is negative
        wide = (high >> _BITS) - (low >> _BITS)
        step = (torch.where(size < 0, wide, size >> _BITS) + 1)[:, None]
        tried = torch.minimum(low[:, None] + step * places - 1, high[:, None])
        failed = (~holds(*ask(tried))).sum(1, keepdim=True)  # the first ones
        low = torch.minimum(low + (step * failed)[:, 0], high)
        end = tried.gather(1, failed.clamp(max=_WAYS - 2))[:, 0]
        high = torch.where(failed[:, 0] < _WAYS - 1, end, high)
    return high


def _key(x: Tensor) -> Tensor:
    """An int64 in the order of the floats."""
    bits = x.view(torch.int32 if x.itemsize == 4 else torch.int64)
    least = torch.iinfo(bits.dtype).min
    return torch.where(bits < 0, least - bits, bits).to(torch.int64)


def _float(key: Tensor, like: Tensor) -> Tensor:
    bits = key.to(torch.int32 if like.itemsize == 4 else torch.int64)
    least = torch.iinfo(bits.dtype).min
    return torch.where(bits < 0, least - bits, bits).view(like.dtype)


def _before(level: Tensor) -> Tensor:
    """The next smaller float; -inf of itself."""
    return torch.nextafter(level, torch.full_like(level, -torch.inf))


def _unbound(found: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    counts, sums = found
    return counts.unbind(1), sums.unbind(1)
