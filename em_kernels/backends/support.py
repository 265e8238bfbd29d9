"""Truncated support: a backend that sees only what a sampler kept, made out of another one.

Entries outside of the kept set (`truncation`) get the logit of which u is -inf, in
memory of ours, and the backend below does the rest by the rules it has for -inf: probability 0,
gradient 0, the second derivative. Logits of the caller are never written: they are copied a piece
of rows at a time, or to where their gradient will be.

The backward pass does not search again. It gets the borders that the forward pass found, and finds
the same entries outside, since it has the same logits to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from em_kernels.backends import reference, row_index
from em_kernels.backends.around import Around
from em_kernels.backends.border_search import search
from em_kernels.backends.interface import (
    BORDER,
    Backend,
    RowSpec,
    Saved,
    Upstream,
    accumulate_dtype,
)
from em_kernels.backends.specs import has_support, select_rows, spec_of_slice, without_support
from em_kernels.backends.truncation import Border, find_border, find_border_among, is_outside
from em_kernels.backends.units import inverse_temperature, of_rows, units

PIECE_BYTES = {"cpu": 8 << 20, "gpu": 64 << 20}  # of copies of rows, in float32
LARGEST = 1024  # entries of a row that are looked at first
SORTED_ENTRIES = 8 * LARGEST  # rows of fewer are sorted at once
SORTED_ROWS = 8  # at a time
_MADE = frozenset({"kept_mass", "is_kept", *BORDER})  # here


class Support(Around):
    """The wrapped backend's kernels over the kept entries of rows; see the module.

    `owned`: the logits lie in memory of ours, and may be written.
    """

    def __init__(self, inner: Backend, owned: bool):
        super().__init__(inner)
        self._owned = owned

    @property
    def local(self) -> Backend:
        return Support(self._inner.local, self._owned)

    def stats(self, logits: Tensor, spec: RowSpec, outputs: tuple[str, ...]) -> list[Tensor]:
        if self._owned or not has_support(spec):
            return self._stats(logits, spec, outputs)
        found = [
            self._stats(piece, picked, outputs)
            for piece, picked in _copies(logits, spec, self.widest_shard)
        ]
        return found[0] if len(found) == 1 else [torch.cat(rows) for rows in zip(*found)]

    def grad(
        self, logits: Tensor, spec: RowSpec, saved: Saved, upstream: Upstream, out: Tensor
    ) -> None:
        """`upstream` is that of `kept_upstream`."""
        x = self._writable(logits, spec, out)
        # Kept logits were cut in the forward pass: nothing changes that autograd should count.
        self._cut(x.data, spec)
        self._inner.grad(x, without_support(spec), saved, upstream, out)

    def loss(
        self,
        logits: Tensor,
        spec: RowSpec,
        upstream: Upstream,
        outputs: tuple[str, ...],
        out: Tensor,
    ) -> list[Tensor]:
        x, inner, bare = self._writable(logits, spec, out), self._inner, without_support(spec)
        whole = self._whole(x, bare, outputs)
        border, names = self._cut(x, spec), _asked(outputs)
        if upstream.logprob is None or not has_support(spec):
            rows = inner.loss(x, bare, upstream, names, out)
        else:
            names = names if "logprob" in names else ("logprob", *names)
            rows = inner.stats(x, bare, names)
            kept = rows[len(Saved._fields) + names.index("logprob")] != -math.inf
            upstream = upstream._replace(logprob=torch.where(kept, upstream.logprob, 0))
            inner.grad(x, bare, Saved(*rows[:3]), upstream, out)
        return _results(rows, names, spec, whole, border, outputs)

    def _stats(self, x: Tensor, spec: RowSpec, outputs: tuple[str, ...]) -> list[Tensor]:
        """`stats` of logits that may be written."""
        bare, names = without_support(spec), _asked(outputs)
        whole = self._whole(x, bare, outputs)
        border = self._cut(x, spec)
        rows = self._inner.stats(x, bare, names)
        return _results(rows, names, spec, whole, border, outputs)

    def _whole(self, x: Tensor, bare: RowSpec, outputs: tuple[str, ...]) -> Saved | None:
        """Of the rows before they are cut, where that is asked for."""
        return Saved(*self._inner.stats(x, bare, ())) if "kept_mass" in outputs else None

    def _writable(self, logits: Tensor, spec: RowSpec, out: Tensor) -> Tensor:
        """The logits, in memory that may be written: their own, or that of their gradient."""
        same = out.data_ptr() == logits.data_ptr() and out.stride() == logits.stride()
        if self._owned or not has_support(spec) or same:
            return logits
        return out.copy_(logits)

    def _cut(self, x: Tensor, spec: RowSpec) -> Border | None:
        """Leave the kept entries in x; the border, where it is one."""
        inner = self._inner
        own = spec_of_slice(spec, inner.first_entry, spec.valid_vocab)
        if spec.kept_rows is not None:
            keep_set(x, own)
            return None
        if own.border is not None:
            level, first, _ = own.border.unbind(-1)
            fill_outside(x, own, Border(level, first))
            return None
        if spec.truncation is None:
            return None
        return cut(x, spec) if inner.entries is None else self._cut_shard(x, spec, inner.entries)

    def _cut_shard(self, x: Tensor, spec: RowSpec, entries: int) -> Border:
        """`cut` where ranks share rows: what is found by counting is the same on all of them."""
        inner, bare = self._inner, without_support(spec)
        assert spec.truncation is not None
        top = inner.stats(x, bare, ())[0]
        largest = torch.where(top.isfinite(), top, 0)

        def above(levels: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
            own = None if ids is None else ids - inner.first_entry
            # As `fill_outside` has u: to the last bit.
            counts, sums = reference.above(x, bare, levels, largest, own)
            assert sums is not None
            return inner.total(counts), inner.total(sums)

        c = inverse_temperature(bare, top.dtype)
        border = search(above, top, spec.truncation, spec.min_p_first, entries, c)
        own = Border(border.level, border.first - inner.first_entry)
        fill_outside(x, spec, own)
        return border


def _asked(outputs: tuple[str, ...]) -> tuple[str, ...]:
    """Of the backend below."""
    own = tuple(name for name in outputs if name not in _MADE)
    return ("logprob", *own) if "is_kept" in outputs and "logprob" not in own else own


def _results(
    rows: list[Tensor],
    names: tuple[str, ...],
    spec: RowSpec,
    whole: Saved | None,
    border: Border | None,
    outputs: tuple[str, ...],
) -> list[Tensor]:
    """[*saved, *outputs] of the rows of the backend below."""
    saved, values = Saved(*rows[:3]), dict(zip(names, rows[3:], strict=True))
    zero = saved.max - saved.max  # or NaN
    if whole is not None:
        apart = (saved.max - whole.max) * inverse_temperature(spec, zero.dtype)
        share = apart + (saved.log1p_r - whole.log1p_r)
        values["kept_mass"] = _where_counted(share.exp().clamp(max=1), spec)
    if "is_kept" in outputs:
        kept = (values["logprob"] != -math.inf).to(zero.dtype) + zero
        values["is_kept"] = _where_counted(kept, spec)
    if BORDER[0] in outputs:
        level, first = (zero.clone(), zero.clone()) if border is None else border
        values.update(zip(BORDER, (level, first.to(zero.dtype))))
    return [*saved, *(values[name] for name in outputs)]


def _where_counted(row: Tensor, spec: RowSpec) -> Tensor:
    return row if spec.mask is None else torch.where(spec.mask, row, 0)


def kept_upstream(spec: RowSpec, upstream: Upstream) -> Upstream:
    """No gradient of the logprob of a target that is not kept, as the forward pass noted it."""
    if spec.border is None or upstream.logprob is None:
        return upstream
    return upstream._replace(logprob=torch.where(spec.border[:, 2] > 0, upstream.logprob, 0))


def cut(x: Tensor, spec: RowSpec) -> Border:
    """Find the borders of rows, and fill what is outside."""
    found = []
    for piece, picked in pieces(x, spec):
        assert picked.truncation is not None
        u, c = units(piece, picked), inverse_temperature(picked, accumulate_dtype(piece.dtype))
        border = _found(u, picked.truncation, picked.min_p_first, c)
        _fill(piece, picked, is_outside(u, border))
        found.append(border)
    return Border(*(torch.cat(parts) for parts in zip(*found)))


def _found(u: Tensor, truncation: Tensor, min_p_first: bool, c: float | Tensor) -> Border:
    """`find_border`; where looking costs nothing, rows are sorted only if their largest entries do
    not say where it is."""
    if u.shape[-1] < SORTED_ENTRIES or not row_index.is_free_to_look(u):
        return find_border(u, truncation, min_p_first, c)
    top_k = truncation[:, 0].max().item() if len(u) else 1
    count = LARGEST if not top_k <= LARGEST // 4 else max(64, 4 * int(top_k))
    border, known = find_border_among(u, truncation, min_p_first, count, c)
    for rows in (~known).nonzero()[:, 0].split(SORTED_ROWS):
        level, first = find_border(u[rows], truncation[rows], min_p_first, of_rows(c, rows))
        border.level[rows], border.first[rows] = level, first
    return border


def fill_outside(x: Tensor, spec: RowSpec, border: Border) -> None:
    """Fill what is outside of borders that were found before."""
    start = 0
    for piece, picked in pieces(x, spec):
        u = units(piece, picked)
        own = slice(start, start + u.shape[0])
        level, first = border.level[own].to(u.dtype), border.first[own]
        _fill(piece, picked, is_outside(u, Border(level, first)))
        start = own.stop


def keep_set(x: Tensor, spec: RowSpec) -> None:
    """Fill all but the ids of `kept_ids` that are in `kept_rows`; nothing waits for a device."""
    ids, (start, end) = spec.kept_ids, spec.kept_rows.unbind(-1)  # type: ignore[union-attr]
    assert ids is not None
    count, (inner, vocab) = start.shape[0], (x.shape[1], spec.valid_vocab)
    low, high = 0, ids.shape[0]
    if count and row_index.is_free_to_look(start):  # rows come in their order
        low, high = int(start[0]), int(end[-1])
    ids, place = ids[low:high], torch.arange(low, high, device=ids.device)
    row = (torch.searchsorted(start.contiguous(), place, right=True) - 1).clamp_(min=0)
    if count == 0 or vocab == 0:
        return
    good = (place >= start[row]) & (place < end[row]) & (ids >= 0) & (ids < vocab)
    row, ids = torch.where(good, row, 0), torch.where(good, ids, 0)
    outer_step, inner_step, _ = x.stride()
    at = row // inner * outer_step + row % inner * inner_step + ids
    rest = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()
    flat = x.as_strided((rest,), (1,))
    kept, fill = flat[at], _filling(spec)
    x[..., :vocab] = fill
    # What is not of these rows is written as the filling, which changes nothing.
    flat.scatter_reduce_(0, at, torch.where(good, kept, fill), "amax" if fill < 0 else "amin")


def _filling(spec: RowSpec) -> float:
    """The logit whose u is -inf."""
    return -math.inf if spec.logit_scale > 0 else math.inf


def _fill(piece: Tensor, spec: RowSpec, outside: Tensor) -> None:
    shape = (*piece.shape[:2], outside.shape[-1])
    piece[..., : shape[-1]].masked_fill_(outside.view(shape), _filling(spec))


def _copies(x: Tensor, spec: RowSpec, widest: int | None) -> Iterator[tuple[Tensor, RowSpec]]:
    """Copies of rows, (1, rows, V), and their spec, as `pieces`; as many at a time on all ranks
    that share them, of which one has `widest` entries."""
    rows, inner = x.shape[:2].numel(), max(1, x.shape[1])
    most = _most_rows(x, x.shape[-1] if widest is None else widest)
    for start in range(0, max(1, rows), most):
        own = slice(start, min(start + most, rows))
        at = torch.arange(own.start, own.stop, device=x.device)
        yield x[at // inner, at % inner][None], select_rows(spec, own)


def _most_rows(x: Tensor, vocab: int) -> int:
    memory = PIECE_BYTES["cpu" if x.device.type == "cpu" else "gpu"]
    return max(1, memory // (4 * max(1, vocab)))


def pieces(x: Tensor, spec: RowSpec) -> Iterator[tuple[Tensor, RowSpec]]:
    """Rows (outer, inner, V) and their spec, as many at a time as PIECE_BYTES hold; one at least,
    empty where there is none."""
    outer, inner, vocab = x.shape
    most = _most_rows(x, vocab)
    if outer * inner <= most:
        yield x, spec
        return
    if inner <= most:
        step = most // inner
        for first in range(0, outer, step):
            own = slice(first * inner, min(first + step, outer) * inner)
            yield x[first : first + step], select_rows(spec, own)
        return
    for row in range(outer):
        for first in range(0, inner, most):
            own = slice(row * inner + first, row * inner + min(first + most, inner))
            yield x[row : row + 1, first : first + most], select_rows(spec, own)
