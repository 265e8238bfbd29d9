"""Statistics of whole rows from those of their shards, in one process."""

import itertools
import math

import pytest
import torch
from contract.closeness import true_rows
from contract.sizes import check, rows_of_any_size, sizes_of
from helpers import IMPLS, error, rows_of_entropy, truth
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from em_kernels.backends import reference, vocab_parallel
from em_kernels.backends.choice import backend
from em_kernels.backends.interface import ROW_OUTPUTS, RowSpec
from em_kernels.backends.merge import SPREAD, merge, parts_of
from em_kernels.backends.reference import Reference

INF = math.inf


def parts_of_shards(logits, target, sizes, outputs=ROW_OUTPUTS, temperature=1.0):
    """({name: (K, N)}, the shard that has the target), as `VocabParallel` makes them."""
    names, shards, begin = parts_of(outputs), [], 0
    for size in sizes:
        x = logits[:, begin : begin + size]
        local = target - begin
        spec = RowSpec(
            target=torch.where((local >= 0) & (local < size), local, 0),
            valid_vocab=size,
            temperature=temperature,
        )
        asked = [vocab_parallel._ASKED.get(name, name) for name in names[3:] if name != "count"]
        found, count = reference.stats(x, spec, tuple(asked)), (x != -INF).sum(-1)
        if spread := sum(name in names for name in SPREAD):
            found[-spread:] = vocab_parallel.spreads(x[None], spec, found[0], found[-spread:])
        rows = dict(zip(names, (*found, count)))
        rows = [
            row.double().masked_fill(count == 0, -INF if name == "max" else 0)
            for name, row in rows.items()
        ]
        shards.append(torch.stack(rows))
        begin += size
    ends = torch.tensor(sizes).cumsum(0)
    owner = torch.searchsorted(ends, target, right=True)
    return dict(zip(names, torch.stack(shards).unbind(1))), owner


def merged(logits, target, sizes, outputs=ROW_OUTPUTS, temperature=1.0):
    parts, owner = parts_of_shards(logits, target, sizes, outputs, temperature)
    rows = merge(parts, owner, outputs, 1 / temperature)
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
    whole = reference.stats(logits, RowSpec(target=target, valid_vocab=vocab), ROW_OUTPUTS)
    got = merged(logits, target, sizes)
    for name, expected in zip(ROW_OUTPUTS, whole[3:]):
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


@pytest.mark.parametrize("cut", ((40,), (20, 20), (39, 1), (1, 1, 38), (7, 14, 14, 5)))
@pytest.mark.parametrize("temperature", (0.7, 3e-5))
def test_logits_of_any_size(cut, temperature):
    """Of float32 shards; what is beyond float32 is infinite once it is rounded."""
    x = rows_of_any_size(40, torch.float32, {})[0]
    x[5] = x[5].roll(1)  # the first entry of a shard that has only one is there
    target = torch.arange(len(x)) + 20
    spec = RowSpec(target=target, valid_vocab=40, temperature=temperature)
    want = true_rows(x[None], spec)
    sizes = sizes_of(want)
    for name, row in merged(x, target, cut, temperature=temperature).items():
        check(row.float(), want[name], name, sizes)


def test_only_what_is_needed_is_asked_of_a_shard():
    saved = ("max", "log1p_r", "mean_d")
    assert parts_of(("entropy", "lse", "max_prob")) == saved
    assert parts_of(("logprob", "entropy")) == (*saved, "logprob")
    assert parts_of(("logit_var",)) == (*saved, "logit_away", "logit_std", "count")


def test_order_decides_no_digit_of_a_row_that_is_far_from_certain():
    """Shards in another order are another row with the same statistics."""
    logits = torch.randn(4, 12, dtype=torch.float64)
    target = torch.tensor([0, 5, 9, 11])
    swapped = torch.cat([logits[:, 7:], logits[:, :7]], 1)
    a = merged(logits, target, (7, 5))
    b = merged(swapped, (target + 5) % 12, (5, 7))
    for name in ROW_OUTPUTS:
        assert error(a[name], b[name]) < 1e-14, name


class Operations(TorchDispatchMode):
    """The names of the operations, in turn."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_operations_of_a_merge():
    """Each is a launch on a GPU; one more shard is one more addition to each of the sums."""
    logits, target = torch.randn(4, 40), torch.arange(4)
    counts = []
    for sizes in ((20, 20), (10, 10, 10, 10)):
        given = parts_of_shards(logits, target, sizes, ("logprob", "entropy"))
        with Operations() as operations:
            merge(*given, ("logprob", "entropy"), 1.0)
        counts.append(len(operations.names))
    assert counts[0] <= 35 and counts[1] - counts[0] <= 2 * 2


@pytest.fixture
def two_shards(monkeypatch):
    """`VocabParallel` as on the first of two ranks, the other of which has the same logits."""
    monkeypatch.setattr(vocab_parallel, "gather", lambda own, group: torch.stack([own, own]))

    def make(backend, vocab):
        shards = vocab_parallel.Shards(None, 0, [vocab, 2 * vocab], vocab, True)
        return vocab_parallel.VocabParallel(backend, shards)

    return make


class OnAGpu(Reference):
    """What a backend does in kernels of its own is left out."""

    rows = torch.rand(4)

    def stats(self, logits, spec, outputs):
        return [self.rows] * (3 + len(outputs))

    def count_present(self, logits, spec, top):
        return torch.full((4,), -1)


def test_operations_of_a_chunk_on_a_gpu(two_shards):
    """None waits for the device, and but for the first chunk none copies to it."""
    module, logits = two_shards(OnAGpu(), 40), torch.randn(1, 4, 40)
    spec = RowSpec(target=torch.arange(4), mask=torch.ones(4).bool(), valid_vocab=40)
    module.stats(logits, spec, ("logprob", "entropy"))
    with Operations() as operations:
        module.stats(logits, spec, ("logprob", "entropy"))
    assert len(operations.names) <= 68
    waits = {"nonzero", "_local_scalar_dense", "is_nonzero", "item", "lift_fresh", "index_put_"}
    assert not waits.intersection(operations.names)


def test_results_of_shards_are_in_memory_of_their_own(two_shards):
    for dtype in (torch.float32, torch.float64):
        logits, spec = torch.randn(1, 4, 40, dtype=dtype), RowSpec(valid_vocab=40)
        rows = two_shards(Reference(), 40).stats(logits, spec, ("entropy", "lse"))
        assert len({row.untyped_storage().data_ptr() for row in rows}) == 5


PRESENCE = {
    "plain": {},
    "everything": dict(bias=True, softcap=5.0, logit_scale=-0.5, temperature=0.7),
    "rows": dict(temperature_rows=torch.tensor([0.5, 1.0, 2.0, 0.9, 1.1, 1.2])),
}


@pytest.mark.parametrize("impl", [name for name in IMPLS if name != "cuda"])
@pytest.mark.parametrize("options", PRESENCE.values(), ids=PRESENCE)
def test_how_many_logits_of_a_row_are_present(impl, device, options):
    """In every row, or in those of which the maximum is NaN."""
    logits = torch.randn(2, 3, 330)[..., :300]
    logits[0, 0] = -INF
    logits[0, 1, 1:] = -INF
    logits[0, 2, 3], logits[0, 2, 4:] = math.nan, -INF
    logits[1, 0, :7] = INF if options.get("logit_scale", 1) < 0 else -INF
    logits[1, 1, :290] = -INF  # what is left lies outside the vocabulary
    spec = RowSpec(valid_vocab=290, **options)
    if "bias" in options:
        spec = spec._replace(bias=torch.zeros(300).index_fill_(0, torch.arange(5), -INF).to(device))
        logits[0, 0] = INF
        logits[0, 1, 1:] = INF
    if "temperature_rows" in options:
        spec = spec._replace(temperature_rows=options["temperature_rows"].to(device))
    logits = logits.to(device)
    z = reference.transform(logits, spec)
    want, module = (z != -INF).sum(-1), backend(impl, torch.device(device))
    assert {0, 290 - 5 * ("bias" in options)} <= set(want.tolist())
    assert torch.equal(vocab_parallel.count_present(module, logits, spec, None), want)
    top = reference.stats(logits, spec, ())[0]
    some = torch.where(top.isnan(), want, -1)
    assert torch.equal(vocab_parallel.count_present(module, logits, spec, top), some)
    assert (some >= 0).any() and (some < 0).any()
