"""What an argument may be: strategies for what it takes, and for what it must refuse.

A `Kind` draws both for a `Place`, which says how large the call is. What must be refused has to end
in a TypeError or ValueError that names the argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import hypothesis.strategies as st
import torch
from helpers import DTYPES
from torch import Tensor

from em_kernels.backends.interface import accumulate_dtype

INF, NAN = math.inf, math.nan
Draw = Callable[[st.SearchStrategy], Any]


class Place(NamedTuple):
    """The size of a call: rows of the leading shape, each of `vocab` logits or `dim` hidden states.

    given: the arguments drawn so far, by name.
    """

    draw: Draw
    lead: tuple[int, ...]
    vocab: int
    dim: int
    dtype: torch.dtype
    given: dict[str, Any]

    def pick(self, values: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(list(values)))

    def number(self, low: float, high: float) -> float:
        return self.draw(st.floats(low, high, allow_nan=False))

    def whole(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def yes(self) -> bool:
        return self.draw(st.booleans())

    @property
    def wide(self) -> torch.dtype:
        return accumulate_dtype(self.dtype)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        torch.manual_seed(self.whole(0, 2**31))
        return (scale * torch.randn(shape)).to(dtype or self.dtype)


class Kind(NamedTuple):
    """good: draws what is taken. bad: all that there is to be refused, of which one is drawn."""

    good: Callable[[Place], Any]
    bad: Callable[[Place], Sequence[Any]]

    def or_none(self) -> Kind:
        """None is taken too."""

        def good(place: Place) -> Any:
            return self.good(place) if place.yes() else None

        return Kind(good, lambda place: [x for x in self.bad(place) if x is not None])


def other_shapes(x: Tensor) -> list[Tensor]:
    """Tensors like x of shapes that do not fit its own."""
    longer = x.new_ones((*x.shape[:-1], x.shape[-1] + 1)) if x.dim() else x.new_ones(3)
    return [longer, x[None].expand(2, *x.shape)]


def elsewhere(x: Tensor) -> list[Any]:
    """The same values as something that no kernel can read."""
    return [x.to_sparse()] if x.dim() else []


NO_TENSORS = (None, 1.0, 3, "x", [1.0], object())
NO_NUMBERS = (None, "1", True, [1.0], 1j, object())
NO_INTS = (None, "1", True, 1.5, NAN, [1], 1 << 63)


def tensors(
    make: Callable[[Place], Tensor],
    *bad: Callable[[Tensor], Any],
    values: Sequence[Callable[[Tensor], Any]] = (),
    fits: bool = True,
) -> Kind:
    """`bad`, `values`: made of a good one, whose values a tensor of none does not have. `fits`: its
    shape and device are those of another argument."""

    def refused(place: Place) -> list[Any]:
        x = make(place)
        others = [*other_shapes(x), x.to("meta")] if fits else []
        changes = (*bad, *values) if x.numel() else bad
        array = [] if x.dtype == torch.bfloat16 else [x.numpy()]
        return [*NO_TENSORS, *array, *elsewhere(x), *others, *(change(x) for change in changes)]

    return Kind(make, refused)


def complex_of(x: Tensor) -> Tensor:
    return x.to(torch.complex64)


def requiring(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def numbers(low: float, high: float, *bad: Any, bounded: bool = True) -> Kind:
    """`bounded`: infinity is refused."""
    infinite = [INF, 10**400] if bounded else []
    return Kind(
        lambda place: place.number(low, high), lambda _: [*NO_NUMBERS, NAN, *infinite, *bad]
    )


def wholes(low: int, high: int | str, *bad: Any) -> Kind:
    """`high`: a number, or the name of a field of `Place`."""

    def good(place: Place) -> int:
        return place.whole(low, high if isinstance(high, int) else max(low, getattr(place, high)))

    return Kind(good, lambda _: [*NO_INTS, *bad])


def choices(values: Sequence[Any]) -> Kind:
    return Kind(lambda place: place.pick(values), lambda _: ["nothing", 7, object(), [], ("x",)])


FLAG = Kind(lambda place: place.yes(), lambda _: [None, 1, 0, "yes", [], torch.ones(2)])


# Of the functions of logits


def logits(place: Place) -> Tensor:
    return place.normal(*place.lead, place.vocab, scale=place.number(0, 8))


def hidden(place: Place) -> Tensor:
    return place.normal(*place.lead, place.dim)


def weight(place: Place) -> Tensor:
    return place.normal(place.vocab, place.dim, scale=place.number(0, 4))


def bias(place: Place) -> Tensor:
    return place.normal(place.vocab, dtype=place.pick(DTYPES))


def rows(place: Place) -> Tensor:
    return place.normal(*place.lead, dtype=place.wide)


def positive_rows(place: Place) -> Tensor:
    return place.normal(*place.lead, dtype=place.wide).abs() + 0.25


def valid_vocab(place: Place) -> int:
    return place.given.get("valid_vocab") or place.vocab


def target(place: Place, ignored: float = 0.3) -> Tensor:
    torch.manual_seed(place.whole(0, 2**31))
    ids = torch.randint(0, valid_vocab(place), place.lead)
    if place.yes():
        ids[torch.rand(place.lead) < ignored] = place.given.get("ignore_index", -100)
    return ids


def ids(place: Place) -> Tensor:
    """One id a row, or several of them."""
    own = target(place)
    return own if place.yes() else torch.stack([own, own.flip(0) if own.dim() else own], -1)


def mask(place: Place) -> Tensor:
    torch.manual_seed(place.whole(0, 2**31))
    drawn = torch.rand(place.lead) < place.pick((0.0, 0.5, 1.0))
    return drawn.to(place.pick((torch.bool, torch.int64, torch.float32, torch.uint8)))


def temperature(place: Place) -> float | Tensor:
    return place.number(0.25, 4) if place.yes() else positive_rows(place)


def bad_temperature(place: Place) -> list[Any]:
    x = positive_rows(place)
    changed = [x.int(), complex_of(x), requiring(x), *other_shapes(x), *elsewhere(x), x.to("meta")]
    values = [x * 0, x * NAN, -x, x * INF] if x.numel() else []
    return [*NO_NUMBERS, 0, 0.0, -1.0, NAN, INF, 10**400, *changed, *values]


def limit(low: float, high: float, whole: bool, *bad: Any) -> Kind:
    """top_k, top_p, min_p: a number or one a row."""
    dtype = torch.int64 if whole else torch.float32

    def good(place: Place) -> Any:
        if place.yes():
            return place.whole(int(low), int(high)) if whole else place.number(low, high)
        torch.manual_seed(place.whole(0, 2**31))
        drawn = low + (high - low) * torch.rand(place.lead)
        return drawn.to(dtype)

    def refused(place: Place) -> list[Any]:
        x = torch.ones(place.lead, dtype=dtype)
        other = x.float() if whole else x.long()
        shapes = [other, x.bool(), *other_shapes(x), *elsewhere(x)]
        values = [x * b for b in bad if place.lead.count(0) == 0 and isinstance(b, (int, float))]
        values = values if place.given.get("mask") is None else []
        return ["1", True, [1], object(), NAN, INF, *bad, *shapes, *values]

    return Kind(good, refused).or_none()


def kept(place: Place) -> tuple[Tensor, Tensor]:
    """What a sampler kept of each row: some of its ids in any order, one at least."""
    torch.manual_seed(place.whole(0, 2**31))
    entries, count = valid_vocab(place), math.prod(place.lead)
    sets = [torch.randperm(entries)[: 1 + i % entries] for i in range(count)]
    offsets = torch.tensor([0, *(len(s) for s in sets)]).cumsum(0)
    return torch.cat([torch.empty(0, dtype=torch.int64), *sets]), offsets


def bad_kept(place: Place) -> list[Any]:
    ids, offsets = kept(place)
    wrong = [(ids,), "ids", 3, ids, (ids, None), (ids.float(), offsets), (ids, offsets.int())]
    wrong += [(ids[None], offsets), (ids, offsets[1:]), (ids.to("meta"), offsets)]
    if len(ids):
        wrong += [(ids, offsets + 1)]
        wrong += [(ids + place.vocab, offsets), (ids - place.vocab, offsets)]
        wrong += [(ids, torch.zeros_like(offsets)), (torch.cat([ids, ids]), offsets)]
    return wrong


def lora(place: Place) -> tuple[Tensor, Tensor, float]:
    rank = place.whole(1, 4)
    dtypes = [place.pick((torch.float32, place.dtype)) for _ in range(2)]
    down = place.normal(rank, place.dim, dtype=dtypes[0])
    return down, place.normal(place.vocab, rank, dtype=dtypes[1]), place.number(-2, 2)


def bad_lora(place: Place) -> list[Any]:
    down, up, scaling = lora(place)
    wrong = [(down,), "lora", 1.0, (down, up), (up, None, 1.0), (down, up, "1"), (down, up, NAN)]
    wrong += [(down, up, True), (down.long(), up, scaling), (down, up[:, None], scaling)]
    taller = torch.cat([up, up])
    return [*wrong, (down, taller, scaling), (down.to("meta"), up, scaling), (None, up, scaling)]


def accumulate_into(place: Place) -> Tensor:
    return torch.zeros(place.vocab, place.dim, dtype=place.wide)
