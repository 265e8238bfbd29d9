"""Kept sets of a sampler: what goes in comes out, in the memory that is promised."""

from __future__ import annotations

import pytest
import torch
from kept_cases import dense

from em_kernels.lm.kept_sets import KeptSets


def some_sets(places: int, vocab: int, seed: int = 0) -> torch.Tensor:
    """(places, vocab) bool: from none to all of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.linspace(0, 1, places)[torch.randperm(places, generator=generator)]
    kept = torch.rand(places, vocab, generator=generator) < share[:, None] ** 3
    kept[0], kept[-1] = True, False
    return kept


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 64, 400])
def test_what_goes_in_comes_out(vocab):
    kept = some_sets(20, vocab)
    sets = KeptSets.of(kept)
    assert torch.equal(dense(sets), kept)
    assert sets.words.dtype == torch.int32
    ids, offsets = sets.ids()
    assert ids.dtype == offsets.dtype == torch.int64
    assert torch.equal(offsets.diff(), kept.sum(1))


def test_memory_is_four_bytes_an_id_and_at_most_a_bit_for_each():
    vocab = 3200
    kept = torch.zeros(3, vocab, dtype=torch.bool)
    kept[0, :7], kept[1, :99], kept[2, 5:] = True, True, True
    sets = KeptSets.of(kept)
    assert sets.length.tolist() == [7, 99, vocab // 32]
    assert sets.words.nbytes == 4 * (7 + 99) + vocab // 8
    assert torch.equal(dense(sets), kept)


def test_sets_are_indexed_padded_and_joined_as_a_tensor():
    kept = some_sets(24, 70).view(4, 6, 70)
    sets = KeptSets.of(kept.view(24, 70)).take(torch.arange(24).view(4, 6))
    rows = torch.tensor([3, 0])
    assert torch.equal(dense(sets[rows]), kept[rows])
    assert torch.equal(dense(sets[rows][:, 2:5]), kept[rows][:, 2:5])
    mask = torch.tensor([True, False, False, True])
    assert torch.equal(dense(sets[mask]), kept[mask])
    padded = torch.nn.functional.pad(kept, (0, 0, 2, 1))
    assert torch.equal(dense(sets.pad(2, 1)), padded)
    joined = KeptSets.join([sets[rows], sets])
    assert torch.equal(dense(joined), torch.cat([kept[rows], kept]))
    order = torch.tensor([[23, -1], [5, 5]])
    expected = kept.view(24, 70)[order.clamp(min=0)] & (order >= 0)[..., None]
    assert torch.equal(dense(sets.take(order)), expected)


def test_no_places():
    nothing = KeptSets.of(torch.zeros(0, 40, dtype=torch.bool))
    assert nothing.ids()[1].tolist() == [0]
    assert not dense(nothing.take(torch.full((2, 3), -1))).any()
