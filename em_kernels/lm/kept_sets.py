"""What a sampler left of the vocabulary at every token: ragged sets of ids, in little memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import Self

_BITS = 32  # of a word


@dataclass(frozen=True)
class KeptSets:
    """A set of token ids at each of (...) places; indexed, padded and joined as a tensor of them.

    The set of a place is the next `length` of `words`, place by place: its ids, or, where they
    would take as many words, one bit for each of the `vocab` ids. So a place takes 4 bytes an id
    and at most V / 8 + 4: 19 KB of V = 152 064, however little was cut off, and 200 bytes with
    top_k = 50. A place without a set, as of a prompt, takes none. Words lie in the host's memory.
    """

    words: Tensor  # (M,) int32
    length: Tensor  # (...) int64
    vocab: int

    @classmethod
    def of(cls, kept: Tensor) -> Self:
        """Of (N, V) bool, on any device."""
        vocab, count = kept.shape[1], kept.sum(1)
        most = -(-vocab // _BITS)
        wide = count >= most
        row, ids = (kept & ~wide[:, None]).nonzero().unbind(1)
        bits = pad(kept[wide], (0, most * _BITS - vocab)).view(-1, most, _BITS)
        packed = (bits * _values(kept.device)).sum(-1).flatten()
        rows = torch.cat([row, wide.nonzero()[:, 0].repeat_interleave(most)])
        words = torch.cat([ids, packed])[rows.argsort(stable=True)]
        return cls(words.to("cpu", torch.int32), count.clamp(max=most).cpu(), vocab)

    @classmethod
    def join(cls, parts: Sequence[KeptSets]) -> Self:
        """One after another along the first dimension."""
        words, lengths = [part.words for part in parts], [part.length for part in parts]
        return cls(torch.cat(words), torch.cat(lengths), parts[0].vocab)

    @property
    def shape(self) -> torch.Size:
        return self.length.shape

    def __getitem__(self, key: Tensor | slice | tuple[Tensor | slice, ...]) -> Self:
        places = torch.arange(self.length.numel()).view(self.shape)
        parts = key if isinstance(key, tuple) else (key,)
        own = tuple(part.cpu() if isinstance(part, Tensor) else part for part in parts)
        return self.take(places[own])

    def take(self, places: Tensor) -> Self:
        """The sets of places that are named by their numbers; -1 is a place without one."""
        flat, length = places.flatten(), self.length.flatten()
        named = flat >= 0
        if not len(length):
            return replace(self, length=torch.zeros_like(places))
        own = torch.where(named, length[flat.clamp(min=0)], 0)
        first = (length.cumsum(0) - length)[flat.clamp(min=0)]
        place = (first - own.cumsum(0) + own).repeat_interleave(own)
        words = self.words[place + torch.arange(len(place))]
        return replace(self, words=words, length=own.view(places.shape))

    def pad(self, before: int, after: int) -> Self:
        """Places without a set at both ends of the last dimension."""
        return replace(self, length=pad(self.length, (before, after)))

    def ids(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """(ids, offsets), as the argument `kept` of the statistics: the place numbered i has
        ids[offsets[i] : offsets[i + 1]]."""
        length, most = self.length.flatten(), -(-self.vocab // _BITS)
        place = torch.arange(len(length)).repeat_interleave(length)
        wide = (length >= most)[place]
        packed = self.words[wide].view(-1, most, 1)
        bits = (packed & _values("cpu").to(torch.int32)).ne(0).view(-1, most * _BITS)
        row, from_bits = bits.nonzero().unbind(1)
        place = torch.cat([place[~wide], place[wide].view(-1, most)[row, 0]])
        found = torch.cat([self.words[~wide].long(), from_bits])[place.argsort(stable=True)]
        offsets = pad(place.bincount(minlength=len(length)).cumsum(0), (1, 0))
        return found.to(device), offsets.to(device)


def _values(device: torch.device | str) -> Tensor:
    """Of the bits of a word in two's complement, int64."""
    values = 2 ** torch.arange(_BITS, dtype=torch.int64, device=device)
    values[-1] = -values[-1]
    return values
