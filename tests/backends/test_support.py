"""Borders of kept sets: found by sorting, among the largest, and by counting; and their memory."""

import math

import pytest
import torch
from helpers import random_logits
from linear.test_chunk_memory import Peak

from em_kernels.backends import row_index, support
from em_kernels.backends.border_search import search
from em_kernels.backends.choice import REFERENCE
from em_kernels.backends.interface import RowSpec, Saved, Upstream
from em_kernels.backends.support import Support
from em_kernels.backends.truncation import find_border, find_border_among, is_outside
from em_kernels.backends.units import inverse_temperature

N, V = 48, 97
KINDS = ("normal", "peaked", "ties", "flat", "some -inf", "huge")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_order = pytest.mark.parametrize("min_p_first", (False, True))
each_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)


def rows(kind, dtype, vocab=V):
    z = random_logits(N, vocab, dtype=dtype)
    match kind:
        case "peaked":
            z *= 4
        case "ties":
            z = (2 * z).round() / 2
        case "flat":
            z = torch.zeros_like(z)
        case "some -inf":
            z[:, ::3], z[3], z[4, 5], z[5, 9] = -math.inf, -math.inf, math.nan, math.inf
        case "huge":
            z, z[:, 7] = z * 1e30, -3e38
    return z


def limits(vocab):
    """Of each row others, some of them none."""
    top_k = torch.where(torch.rand(N) < 0.4, math.inf, torch.randint(1, vocab + 9, (N,)).double())
    top_p = torch.where(torch.rand(N) < 0.3, 1.0, torch.rand(N).double().clamp(min=1e-6))
    min_p = torch.where(torch.rand(N) < 0.3, 0.0, torch.rand(N).double() ** 3)
    truncation = torch.stack([top_k, top_p, min_p], -1)
    truncation[0] = torch.tensor([math.nan, 0.5, 0.0])
    return truncation


def same_sets(z, ours, theirs):
    finite = z > -math.inf
    return torch.equal(is_outside(z, ours) & finite, is_outside(z, theirs) & finite)


@each_dtype
@each_kind
@each_order
def test_the_border_found_by_counting_is_that_of_sorting(kind, dtype, min_p_first):
    z, truncation = rows(kind, dtype), limits(V)
    top, spec = z.amax(-1), RowSpec(temperature_rows=0.3 + torch.rand(N).to(dtype), valid_vocab=V)
    c = inverse_temperature(spec, dtype)

    def above(levels, ids):
        largest = torch.where(top.isfinite(), top, 0)
        return REFERENCE.above(z[None], spec, levels, largest, ids)

    found = search(above, top, truncation, min_p_first, V, c)
    assert same_sets(z, found, find_border(z, truncation, min_p_first, c))


@each_dtype
@each_kind
@each_order
@pytest.mark.parametrize("count", (1, 20, V))
def test_the_border_among_the_largest_is_that_of_all_where_it_is_known(
    kind, dtype, min_p_first, count
):
    z, truncation = rows(kind, dtype), limits(V)
    found, known = find_border_among(z, truncation, min_p_first, count)
    want = find_border(z, truncation, min_p_first)
    ours, theirs = (type(want)(*(part[known] for part in border)) for border in (found, want))
    assert same_sets(z[known], ours, theirs)
    if kind == "normal" and count == V:
        assert known.float().mean() > 0.5


@each_kind
def test_rows_are_sorted_where_their_largest_do_not_say(kind, monkeypatch):
    monkeypatch.setattr(support, "LARGEST", 20)
    monkeypatch.setattr(support, "SORTED_ENTRIES", 20)
    z, truncation = rows(kind, torch.float32), limits(V)
    spec = RowSpec(valid_vocab=V, truncation=truncation)
    x = z.clone()
    support.cut(x[None], spec)
    outside = is_outside(z, find_border(z, truncation, False))
    want = z.masked_fill(outside, -math.inf)
    torch.testing.assert_close(x, want, rtol=0, atol=0, equal_nan=True)


def sets():
    kept = torch.rand(N, V) < torch.rand(N, 1)
    kept[:, 3] = True
    ends = kept.sum(-1).cumsum(0)
    starts = torch.nn.functional.pad(ends[:-1], (1, 0))
    return kept, kept.nonzero()[:, 1].contiguous(), torch.stack([starts, ends], -1)


@pytest.mark.parametrize("looking", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("scale", (1.0, -1.0))
def test_a_kept_set_of_some_rows_in_a_slice(looking, dtype, scale, monkeypatch):
    """As in a chunk of rows that a mask left, on a rank with some of the vocabulary."""
    monkeypatch.setattr(row_index, "is_free_to_look", lambda x: looking)
    kept, ids, ends = sets()
    picked = torch.tensor([2, 3, 7, N - 1])
    whole = random_logits(4, V + 5, dtype=dtype)
    x = whole[:, 10:60]  # of a row stride that is not its width
    before = whole.clone()
    spec = RowSpec(kept_ids=ids - 10, kept_rows=ends[picked], valid_vocab=50, logit_scale=scale)
    support.keep_set(x[None], spec)
    want = before[:, 10:60].masked_fill(~kept[picked, 10:60], -math.inf * scale)
    assert torch.equal(x, want)
    assert torch.equal(whole[:, :10], before[:, :10])
    assert torch.equal(whole[:, 60:], before[:, 60:])


@pytest.mark.parametrize("owned", (False, True))
@pytest.mark.parametrize("by_ids", (False, True))
def test_no_memory_of_the_size_of_the_logits(owned, by_ids, monkeypatch):
    count, vocab = 400, 1000
    piece = 4 * 4 * vocab  # of four rows
    monkeypatch.setitem(support.PIECE_BYTES, "cpu", piece)
    x = random_logits(1, count, vocab)
    ids = torch.arange(2 * count) % vocab
    ends = torch.stack([torch.arange(0, 2 * count, 2), torch.arange(2, 2 * count + 1, 2)], -1)
    spec = RowSpec(valid_vocab=vocab)
    if by_ids:
        spec = spec._replace(kept_ids=ids, kept_rows=ends)
    else:
        truncation = torch.tensor([[20.0, 0.9, 0.01]], dtype=torch.float64)
        spec = spec._replace(truncation=truncation.expand(count, 3).contiguous())

    class Counts(type(REFERENCE)):
        """Without the copies that the reference makes."""

        def stats(self, logits, spec, outputs):
            return [logits[0, :, 0] for _ in range(3 + len(outputs))]

        def grad(self, logits, spec, saved, upstream, out):
            pass

    backend, out = Support(Counts(), owned), torch.empty_like(x)
    with Peak() as peak:
        backend.stats(x, spec, ("entropy",))
        one = torch.ones(count)
        border = torch.zeros(count, 3, dtype=torch.float64)
        known = spec if by_ids else spec._replace(border=border)
        backend.grad(x, known, Saved(one, one, one), Upstream(entropy=one), out)
    assert 40 * piece < x.nbytes / 2
    assert peak.bytes < x.nbytes + out.nbytes + 40 * piece
