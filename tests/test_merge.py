"""Statistics of whole rows from those of their shards, in one process."""

import itertools
import math

import pytest
import torch
from helpers import OUTPUTS, error, rows_of_entropy, truth
from hypothesis import given
from hypothesis import strategies as st

from em_kernels import reference
from em_kernels._merge import merge, parts_of
from em_kernels._spec import RowSpec

INF = math.inf


def parts_of_shards(logits, target, sizes, outputs=OUTPUTS):
    """({name: (K, N)}, the shard that has the target), as `VocabParallel` makes them."""
    names, shards, begin = parts_of(outputs), [], 0
    for size in sizes:
        x = logits[:, begin : begin + size]
        local = target - begin
        spec = RowSpec(
            target=torch.where((local >= 0) & (local < size), local, 0), valid_vocab=size
        )
        rows = dict(
            zip(names, reference.stats(x, spec, names[3 : len(names) - ("count" in names)]))
        )
        count = (x != -INF).sum(-1)
        if "count" in names:
            rows["count"] = count
        rows = [
            row.double().masked_fill(count == 0, -INF if name == "max" else 0)
            for name, row in rows.items()
        ]
        shards.append(torch.stack(rows))
        begin += size
    ends = torch.tensor(sizes).cumsum(0)
    owner = torch.searchsorted(ends, target, right=True)
    return dict(zip(names, torch.stack(shards).unbind(1))), owner


def merged(logits, target, sizes, outputs=OUTPUTS):
    rows = merge(*parts_of_shards(logits, target, sizes, outputs), outputs)
    return dict(zip(outputs, rows[3:]))


@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    excluded=st.sampled_from((0.0, 0.3)),
    scale=st.sampled_from((0.3, 3.0, 40.0)),
)
def test_any_cut_gives_the_whole(seed, sizes, excluded, scale):
    g = torch.Generator().manual_seed(seed)
    vocab = sum(sizes)
    logits = (scale * torch.randn(6, vocab, generator=g, dtype=torch.float64)).round(decimals=0)
    gone = torch.rand(6, vocab, generator=g) < excluded
    logits = logits.masked_fill(gone, -INF)  # rounded, so that maxima tie across shards
    target = torch.randint(0, vocab, (6,), generator=g)
    whole = reference.stats(logits, RowSpec(target=target, valid_vocab=vocab), OUTPUTS)
    got = merged(logits, target, sizes)
    for name, expected in zip(OUTPUTS, whole[3:]):
        assert torch.equal(got[name].isnan(), expected.isnan()), name
        assert torch.equal(got[name].isinf(), expected.isinf()), name
        finite = expected.isfinite()
        torch.testing.assert_close(got[name][finite], expected[finite], rtol=1e-9, atol=1e-12)


def test_the_first_of_equal_maxima_is_the_top():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0]])
    for target, sizes in itertools.product(range(5), ((2, 3), (1, 1, 3), (1, 2, 2), (3, 2))):
        top = merged(logits, torch.tensor([target]), sizes, ("is_top1",))["is_top1"]
        assert top == (target == 1), (target, sizes)


@pytest.mark.parametrize("sizes", ((2000, 1000), (1, 2999), (999, 2, 1999)))
def test_sure_rows_keep_their_relative_accuracy(sizes):
    """float32 shards: an entropy of 1e-9 to 1e-5, a slope to 1e-3, wherever the maximum lies."""
    logits = rows_of_entropy(torch.tensor([1e-9, 1e-8, 1e-6, 1e-3]).double().repeat(8), 3000)
    target = logits.argmax(-1)
    expected, got = truth(logits.double(), target), merged(logits, target, sizes)
    for name in ("entropy", "logprob", "varentropy", "collision", "self_certainty", "lse"):
        assert (got[name] / expected[name] - 1).abs().max() < 1e-5, name
    exact = merged(logits.double(), target, sizes)
    assert (exact["entropy_slope"] / expected["entropy_slope"] - 1).abs().max() < 1e-3


def test_equal_logits_have_no_variance_in_pieces_either():
    got = merged(torch.full((1, 10), 0.5), torch.tensor([3]), (4, 1, 5))
    assert got["logit_var"] == got["logit_skew"] == got["varentropy"] == 0
    assert got["logit_mean"] == 0.5 and abs(got["self_certainty"]) < 1e-12


def test_only_what_is_needed_is_asked_of_a_shard():
    saved = ("max", "log1p_r", "mean_d")
    assert parts_of(("entropy", "lse", "max_prob")) == saved
    assert parts_of(("logprob", "entropy")) == (*saved, "logprob")
    assert parts_of(("logit_var",)) == (*saved, "logit_mean", "logit_var", "count")


def test_order_decides_no_digit_of_a_row_that_is_far_from_certain():
    """Shards in another order are another row with the same statistics."""
    logits = torch.randn(4, 12, dtype=torch.float64)
    target = torch.tensor([0, 5, 9, 11])
    swapped = torch.cat([logits[:, 7:], logits[:, :7]], 1)
    a = merged(logits, target, (7, 5))
    b = merged(swapped, (target + 5) % 12, (5, 7))
    for name in OUTPUTS:
        assert error(a[name], b[name]) < 1e-14, name
