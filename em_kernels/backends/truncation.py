"""The kept set of a row: what a sampler leaves of a distribution before it draws from it.

With u and c as in `units`, temperature included, m = max_v u_v and p = softmax(c u):

    top_k   keeps u_v >= the k-th largest u: all that tie with it too
    min_p   keeps u_v >= m + log(min_p) / c, which is p_v >= min_p max p
    top_p   goes through what is left in falling order of u, equal ones in falling order of v, and
            keeps an entry while those before it have less than top_p of the mass of what is left;
            it keeps the first

In the order of transformers (`LogitsProcessorList` of generate) top_k is first, top_p counts the
mass of what top_k left, and min_p is last; in that of vLLM min_p is first, and top_p counts the
mass of what min_p and top_k left. These are the only differences: a ratio to max p does not change
when others are left out. What is kept is a border, a level of u and the first id kept at it:

    v is kept where u_v > level, or u_v = level and v >= first

top_p within two roundings of z (2 eps) counts as reached, and m + log(min_p) / c is rounded to the
dtype of u: probabilities that were taken as logarithms fall on the side on which they were meant.

Sources: Fan et al., "Hierarchical Neural Story Generation" (2018), arXiv:1805.04833, for top_k;
Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020), arXiv:1904.09751, for top_p;
Nguyen et al., "Turning Up the Heat: Min-p Sampling" (2024), arXiv:2407.01082.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels.backends.units import distance, of_rows

_BLOCK = 16  # entries


class Border(NamedTuple):
    """Where the kept set of each row ends, (N,) each."""

    level: Tensor  # of the dtype of u; -inf keeps all of a row, +inf nothing
    first: Tensor  # int64


class Limits(NamedTuple):
    """The columns of `RowSpec.truncation`, (N,) float64; what is not asked for keeps everything."""

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    @classmethod
    def of(cls, truncation: Tensor) -> Limits:
        return cls(*truncation.unbind(-1))

    def good(self) -> Tensor:
        """Where a row has limits that can be; NaN is none."""
        top_k, top_p, min_p = self
        return (top_k >= 1) & (top_p > 0) & (top_p <= 1) & (min_p >= 0) & (min_p <= 1)

    def level_of_min_p(self, top: Tensor, c: float | Tensor) -> Tensor:
        return (top.double() + self.min_p.log() / c).to(top.dtype)

    def mass(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        """Less than this of the mass of what is left is before an entry that top_p keeps."""
        return (self.top_p - 2 * torch.finfo(dtype).eps) * total

    def border(self, top: Tensor, level: Tensor, first: Tensor) -> Border:
        """With the rules of rows that cannot be computed: one that has no finite maximum is left as
        it is, and of one with bad limits nothing is left."""
        usable, good = top.isfinite(), self.good()
        level = torch.where(usable, level, -torch.inf).masked_fill(~good, torch.inf)
        return Border(level, torch.where(usable & good, first, 0))


def find_border(
    u: Tensor, truncation: Tensor, min_p_first: bool, c: float | Tensor = 1.0
) -> Border:
    """The border of rows u (N, V) with a c for all or (N,), by sorting them: the definition."""
    value, ids = u.detach().sort(dim=-1, stable=True)  # NaN is last
    return _border(_Sorted(value, ids, u.shape[-1], None), truncation, min_p_first, c)[0]


def find_border_among(
    u: Tensor, truncation: Tensor, min_p_first: bool, count: int, c: float | Tensor = 1.0
) -> tuple[Border, Tensor]:
    """(`find_border`, where it is known): from the `count` largest of each row and the sum of the
    whole one alone. Known is a border above the least of them."""
    u, vocab = u.detach(), u.shape[-1]
    ids = _largest(u, count).sort(-1).values
    value, order = u.gather(-1, ids).sort(dim=-1, stable=True)
    total = torch.zeros(len(u), dtype=torch.float64, device=u.device)
    wide = (truncation[:, 0] > count).nonzero()[:, 0]  # of the others top_p counts what is here
    d = distance(u[wide], value[wide, -1], of_rows(c, wide))
    total[wide] = d.exp().sum(-1, dtype=torch.float64)
    largest = _Sorted(value, ids.gather(-1, order), vocab, total)
    return _border(largest, truncation, min_p_first, c)


def _largest(u: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest entries of each row, (N, count), in any order: they lie in blocks
    of entries a stride apart whose maxima are the largest, and few blocks are looked into."""
    vocab = u.shape[-1]
    size = max(1, min(_BLOCK, vocab // (2 * count)))
    stride = vocab // size
    maxima = u[:, : size * stride].view(len(u), size, stride).amax(1)
    first = maxima.topk(count, sorted=False).indices
    ids = (first[:, None] + torch.arange(0, size * stride, stride)[:, None]).flatten(1)
    rest = torch.arange(size * stride, vocab).expand(len(u), -1)
    ids = torch.cat([ids, rest], 1)
    return ids.gather(1, u.gather(1, ids).topk(count, sorted=False).indices)


class _Sorted(NamedTuple):
    """The largest entries of rows in rising order, equal ones in that of their ids."""

    value: Tensor  # (N, C)
    ids: Tensor
    vocab: int
    total: Tensor | None  # the mass of whole rows, where some are not here


def _border(
    rows: _Sorted, truncation: Tensor, min_p_first: bool, c: float | Tensor
) -> tuple[Border, Tensor]:
    limits, (value, ids, vocab, whole) = Limits.of(truncation), rows
    top, count = value[:, -1], value.shape[-1]
    least = torch.full_like(top, -torch.inf) if whole is not None else value[:, 0]
    top_k = limits.top_k.nan_to_num().clamp(1, vocab).long()
    place = (count - top_k).clamp(min=0)
    level_k = value.gather(1, place[:, None])[:, 0]
    level_k = torch.where(top_k < vocab, level_k, least)
    level_m = limits.level_of_min_p(top, c)
    base = torch.maximum(level_k, level_m) if min_p_first else level_k
    mass = distance(value.double(), top.double(), c).exp().masked_fill(value < base[:, None], 0)
    upto = mass.flip(-1).cumsum(-1)
    before = torch.nn.functional.pad(upto[:, :-1], (1, 0))  # in falling order
    total = upto[:, -1]
    if whole is not None:  # all that base leaves is here, or all there is
        total = torch.where((base > least) | (top_k <= count), total, whole)
    kept = (before < limits.mass(total, value.dtype)[:, None]).sum(-1).clamp(min=1)
    some = limits.top_p < 1
    last = (count - kept)[:, None]
    level_p, first = value.gather(1, last)[:, 0], ids.gather(1, last)[:, 0]
    level_p = torch.where(some, level_p, least)
    level = torch.maximum(torch.maximum(level_k, level_m), level_p)
    first = torch.where((level == level_p) & some, first, 0)
    end = value[:, 0]  # what is above this is all here
    known = ((base > end) | (base == -torch.inf)) & ((level > end) | (level == -torch.inf))
    return limits.border(top, level, first), known | ~top.isfinite() | ~limits.good()


def is_outside(u: Tensor, border: Border) -> Tensor:
    """Which entries of u (N, V) are not kept; a NaN is not outside."""
    level, ids = border.level[:, None], torch.arange(u.shape[-1], device=u.device)
    return (u < level) | ((u == level) & (ids < border.first[:, None]))


def is_in_set(u: Tensor, kept_ids: Tensor, kept_rows: Tensor) -> Tensor:
    """Which entries of u (N, V) have their ids in kept_ids[start:end] of their row."""
    lengths = kept_rows[:, 1] - kept_rows[:, 0]
    row = torch.arange(u.shape[0], device=u.device).repeat_interleave(lengths)
    within = torch.arange(row.shape[0], device=u.device)
    within = within - (lengths.cumsum(0) - lengths)[row]
    inside = torch.zeros(u.shape, dtype=torch.bool, device=u.device)
    inside[row, kept_ids[kept_rows[row, 0] + within]] = True
    return inside
