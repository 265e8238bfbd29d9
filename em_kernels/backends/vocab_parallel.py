"""A vocabulary cut between the ranks of a process group: a backend made out of another one.

Every rank holds a slice of the vocabulary, in the order of the group's ranks. The wrapped backend
sees only that slice. Its statistics are exchanged in one collective per call (per chunk, from
hidden states) and merged by `merge`; its gradient is that of the whole rows' `Saved`. What that
leaves of the gradient of hidden states is this rank's share; autograd sums it (`all_reduce`).

All ranks must make the same calls with the same arguments, and with them the same collectives.
What can be told apart cheaply is compared before anything else is done, so that a mismatch is an
error on every rank and not a wait without end.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from em_kernels.backends import divergence as pairs
from em_kernels.backends.above import above
from em_kernels.backends.around import Around
from em_kernels.backends.choice import serving
from em_kernels.backends.interface import Backend, RowSpec, Saved, Upstream, accumulate_dtype
from em_kernels.backends.merge import SPREAD, merge, parts_of, sum_shards
from em_kernels.backends.moments import moments
from em_kernels.backends.pair import Divergence, PairOut, PairSaved, PairWeights, Side
from em_kernels.backends.specs import as_ids, select_rows, spec_of_slice, upstream_of_slice
from em_kernels.backends.units import inverse_temperature, units

_BLOCK_ENTRIES = 1 << 22  # of the float32 copy that counting makes
_ODD = 1_000_003
_ASKED = {"logit_away": "logit_mean", "logit_std": "logit_var"}  # of a backend, for `spreads`
_DIGITS = 256  # a mean of so many standard deviations has float32's digits of the spread left
_SHARED = (
    "number of tokens",
    "mask and ignored targets",
    "target",
    "numbers of each token (temperature, top_k, top_p, min_p, kept)",
    "options (dtype, impl, outputs, temperature, chunk_tokens, which inputs are frozen, ...)",
)


class Shards(NamedTuple):
    """How the real entries of a vocabulary lie on the ranks of a group."""

    group: dist.ProcessGroup
    rank: int
    ends: list[int]  # of each rank's entries; entries from `valid_vocab` on are left out
    widest: int
    sums_weight: bool  # whether a rank needs dW

    @property
    def start(self) -> int:
        return self.ends[self.rank - 1] if self.rank else 0

    @property
    def size(self) -> int:
        return self.ends[self.rank] - self.start


def resolve(name: str) -> dist.ProcessGroup:
    """The process group that torch.distributed registered under `name`."""
    return torch._C._distributed_c10d._resolve_process_group(cast(Any, name))


def size_of(name: str) -> int:
    """The number of ranks of the group."""
    return dist.get_world_size(resolve(name))


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum over the ranks; 16-bit numbers are added in float32 and rounded once."""
    total = x.to(accumulate_dtype(x.dtype), copy=True, memory_format=torch.contiguous_format)
    if total.numel():
        dist.all_reduce(total, group=resolve(group))
    return total.to(x.dtype)


def agree(
    spec: RowSpec,
    vocab: int,
    like: Tensor,
    options: tuple[Any, ...],
    needs_weight: bool = False,
) -> Shards:
    """Exchange the sizes of the shards; ValueError on every rank if they were called differently.

    `options` is whatever else must be the same; `like` has the rows and the device. Whether a rank
    `needs_weight`, its dW, may differ.
    """
    group = resolve(cast(str, spec.group))
    tokens = like.shape[:-1].numel()
    common = (*options, spec.temperature, spec.softcap, spec.logit_scale, spec.valid_vocab)
    common = (*common, spec.truncation is None, spec.min_p_first, spec.kept_ids is None)
    own = torch.tensor([vocab, tokens, 0, 0, 0, zlib.crc32(repr(common).encode()), needs_weight])
    own = own.to(like.device)
    place = torch.arange(1, tokens + 1, device=like.device)
    if spec.mask is not None:
        own[2] = (place * spec.mask).sum()
    if spec.target is not None:
        target = as_ids(spec.target)
        counted = target if spec.mask is None else target * spec.mask[:, None]
        number = torch.arange(1, target.shape[1] + 1, device=like.device)
        own[3] = (place[:, None] * number * counted).sum()
    for given in (spec.temperature_rows, spec.truncation, spec.kept_rows, spec.kept_ids):
        own[4] = own[4] * _ODD + _checksum(given, like.device)
    sizes, *shared, weights = gather(own, group).T.tolist()
    for name, values in zip(_SHARED, shared, strict=True):
        if len(set(values)) > 1:
            got = values if name == _SHARED[0] else f"checksums {values}"
            raise ValueError(f"group: every rank must be given the same {name}, got {got}")
    return _lay_out(group, sizes, spec.valid_vocab, any(weights))


def _checksum(numbers: Tensor | None, device: torch.device) -> Tensor:
    """Of their bits and places, int64, which may overflow."""
    if numbers is None:
        return torch.zeros((), dtype=torch.int64, device=device)
    bits = numbers.detach().to(torch.float64).reshape(-1).contiguous().view(torch.int64)
    return (torch.arange(1, bits.shape[0] + 1, device=device) * bits).sum()


def _lay_out(
    group: dist.ProcessGroup, sizes: list[int], valid_vocab: int, sums_weight: bool
) -> Shards:
    total = sum(sizes)
    valid = valid_vocab or total
    if valid > total:
        raise ValueError(
            f"valid_vocab must be in [1, {total}], the entries of all ranks, got {valid}"
        )
    if total == 0:
        raise ValueError("group: no rank has an entry of the vocabulary")
    ends = torch.tensor(sizes).cumsum(0).clamp(max=valid).tolist()
    return Shards(group, dist.get_rank(group), ends, max(sizes), sums_weight)


class VocabParallel(Around):
    """A backend over whole rows, of which `logits` are this rank's entries, around another.

    In the `RowSpec` it is given, target is global, valid_vocab the number of real entries here.
    """

    def __init__(self, inner: Backend, shards: Shards):
        super().__init__(inner)
        self.shards, self.counts = shards, True
        self.first_entry, self.widest_shard = shards.start, shards.widest
        self.entries, self.sums_weight = shards.ends[-1], shards.sums_weight
        self._ends: Tensor | None = None  # those of the shards, on the device: copied once a call

    @property
    def local(self) -> Backend:
        return self._inner

    def stats(self, logits: Tensor, spec: RowSpec, outputs: tuple[str, ...]) -> list[Tensor]:
        """[max, log1p_r, mean_d, *outputs] of the whole rows, each (N,), the same on all ranks."""
        names = parts_of(outputs)
        own = self._parts(logits, spec, names)
        every = gather(own, self.shards.group).to(torch.float64)
        parts = dict(zip(names, every.unbind(1)))
        owner = None
        if spec.target is not None:
            owner, known = self._owner(spec.target)
            parts["max"] = parts["max"].masked_fill(~known, torch.nan)
        wide = accumulate_dtype(logits.dtype)
        rows = merge(parts, owner, outputs, inverse_temperature(spec, wide))
        if spec.mask is not None:
            rows = rows.masked_fill(~spec.mask, 0)
        return [row.to(wide, copy=True) for row in rows.unbind()]

    def grad(
        self, logits: Tensor, spec: RowSpec, saved: Saved, upstream: Upstream, out: Tensor
    ) -> None:
        """This rank's part of d loss / d logits into `out`."""
        if spec.valid_vocab == 0:
            out.zero_()
            return
        upstream = upstream_of_slice(spec, upstream, self.first_entry, self.shards.size)
        self._inner.grad(logits, self._own_spec(spec), saved, upstream, out)

    def divergence_sums(
        self, own: Side, other: Side, saved: PairSaved, divergence: Divergence
    ) -> Tensor:
        """Of the whole rows: those of the ranks, added in their order in float64."""
        sums = torch.zeros(3, len(saved.gap), dtype=torch.float64, device=saved.gap.device)
        if own.spec.valid_vocab > 0:
            own, other = self._own_side(own), self._own_side(other)
            sums.copy_(pairs.sums(self._inner, own, other, saved, divergence))
        total: Tensor = gather(sums, self.shards.group).sum(0)
        return total

    def divergence_grad(
        self,
        own: Side,
        other: Side,
        saved: PairSaved,
        divergence: Divergence,
        weights: PairWeights,
        out: PairOut,
    ) -> bool:
        """This rank's part of either gradient."""
        if own.spec.valid_vocab == 0:
            for place in out:
                if place is not None:
                    place.zero_()
            return True
        own, other = self._own_side(own), self._own_side(other)
        pairs.grad(self._inner, own, other, saved, divergence, weights, out)
        return True

    def divergence_loss(self, *_: Any) -> None:
        """Left to `divergence.stats` and `grad`: both ask the ranks in between."""

    def _own_side(self, side: Side) -> Side:
        return side._replace(spec=self._own_spec(side.spec))

    def above(
        self,
        logits: Tensor,
        spec: RowSpec,
        levels: Tensor,
        top: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Of the whole rows, the same on all ranks; ids are global."""
        counts = torch.zeros_like(levels, dtype=torch.int64)
        sums = None if top is None else torch.zeros_like(levels, dtype=torch.float64)
        if spec.valid_vocab:
            own = None if ids is None else ids - self.first_entry
            counts, sums = above(self._inner, logits, self._own_spec(spec), levels, top, own)
        return self.total(counts), None if sums is None else self.total(sums)

    def total(self, x: Tensor) -> Tensor:
        return sum_shards(self.gathered(x))

    def gathered(self, x: Tensor) -> Tensor:
        return gather(x.contiguous(), self.shards.group)

    def _parts(self, logits: Tensor, spec: RowSpec, names: tuple[str, ...]) -> Tensor:
        """What this rank reports, (P, N): the inner backend's statistics; where it has no finite
        logit, max -inf and all else 0."""
        rows = logits.shape[:-1].numel()
        spread = sum(name in names for name in SPREAD)
        wide = torch.float64 if spread else accumulate_dtype(logits.dtype)
        if spec.valid_vocab == 0:
            own = torch.zeros(len(names), rows, dtype=wide, device=logits.device)
            own[0] = -torch.inf
            return own
        spec = self._own_spec(spec)
        counting = "count" in names
        asked = tuple(_ASKED.get(name, name) for name in names[len(Saved._fields) :])
        asked = asked[: len(asked) - counting]
        parts = self._inner.stats(logits, spec, asked)
        # A row without a finite logit is NaN here, as one with a NaN is: look which it was.
        present = count_present(self._inner, logits, spec, None if counting else parts[0])
        if spread:
            parts[-spread:] = spreads(logits, spec, parts[0], parts[-spread:])
        own = torch.stack([*parts, present] if counting else parts).to(wide)
        nothing = present == 0
        own.masked_fill_(nothing, 0)
        own[0].masked_fill_(nothing, -torch.inf)
        return own

    def _own_spec(self, spec: RowSpec) -> RowSpec:
        return spec_of_slice(spec, self.first_entry, self.shards.size)

    def _owner(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """(the rank that has the target, whether there is one)"""
        if self._ends is None:
            self._ends = torch.tensor(self.shards.ends, device=target.device)
        owner = torch.searchsorted(self._ends, target, right=True)
        known = (target >= 0) & (target < self.shards.ends[-1])
        return owner.clamp_(max=len(self.shards.ends) - 1), known


def spreads(logits: Tensor, spec: RowSpec, top: Tensor, given: list[Tensor]) -> list[Tensor]:
    """Of logit_mean, logit_var and logit_skew, as many as are given, the first `SPREAD` in float64.

    Rows of which the given ones are out of range, or have lost digits, are looked at again.
    """
    c = inverse_temperature(spec, top.dtype)
    mean, *more = given
    mean = mean.double() / c
    std = more[0].double().sqrt() / c if more else torch.zeros_like(mean)
    rows = [mean - top, std, *(skew.double() for skew in more[1:])]
    size, room = torch.maximum(mean.abs(), top.abs()), torch.finfo(top.dtype)
    good = (std * c > room.tiny**0.4) & (std * c < room.max**0.4) & (size < _DIGITS * std)
    good = good | ~top.isfinite()
    good = good if spec.mask is None else good | ~spec.mask
    again = (~good).nonzero()[:, 0]
    found = _each_block(logits, spec, again, _spread_of)
    return [row.index_copy(0, again, new) for row, new in zip(rows, found)]


def _spread_of(u: Tensor) -> Tensor:
    found = moments(u, u.amax(-1))
    unit = found.unit.double() / found.half
    return torch.stack([found.mean * unit, found.root * unit, found.skew.double()])


def count_present(backend: Backend, logits: Tensor, spec: RowSpec, top: Tensor | None) -> Tensor:
    """How many u of each row are not -inf, (N,) int64; -1 where `top` is given and not NaN.

    A kernel of another backend that serves the device, where one has it, waits for nothing.
    """
    device = logits.device
    for able in (backend, *(serving(device) if device.type != "cpu" else ())):
        if (counts := able.count_present(logits, spec, top)) is not None:
            return counts
    rows = logits.shape[:-1].numel()
    suspect = torch.arange(rows, device=device) if top is None else top.isnan().nonzero()[:, 0]
    counts = torch.full((rows,), -1, device=device)
    (found,) = _each_block(logits, spec, suspect, lambda u: (u != -torch.inf).sum(-1)[None])
    return counts.index_copy_(0, suspect, found)


def _each_block(
    logits: Tensor, spec: RowSpec, rows: Tensor, find: Callable[[Tensor], Tensor]
) -> Tensor:
    """What is found of u of `rows`, (.., R); some at a time, to bound the copies."""
    inner, vocab = logits.shape[1:]
    found = [
        find(units(logits[block // inner, block % inner], select_rows(spec, block)))
        for block in rows.split(max(1, _BLOCK_ENTRIES // vocab))
    ]
    return torch.cat(found, -1)


def gather(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all ranks, in their order, stacked."""
    world = dist.get_world_size(group)
    every = own.new_empty(world, *own.shape)
    if own.numel():
        dist.all_gather(list(every.unbind()), own, group)
    return every
