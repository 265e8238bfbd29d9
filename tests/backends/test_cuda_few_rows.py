"""Several blocks of the CUDA kernels share a row where rows are few: bit for bit what one does."""

import pytest
import torch
from contract.subject import DTYPES, EACH_DTYPE, FIRST_ORDER, INF, NAN, misaligned, untouched
from cuda_emulator.load import COMPILER, H200, backend, library
from emulated_rows import check_gradient, check_stats, gradient, loss, make
from helpers import random_target, same_bits

from em_kernels.backends.interface import ROW_OUTPUTS, RowSpec, Saved, Upstream, accumulate_dtype

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("nan_filled_memory"),
]
ALONE = {"multiprocessors": 0}  # every row is one block's
OLD = {"compute_capability": 80}
FLOAT = pytest.mark.parametrize("dtype", DTYPES[:2], ids=("float32", "bfloat16"))
EACH_OUTPUTS = pytest.mark.parametrize("outputs", (FIRST_ORDER, ROW_OUTPUTS), ids=("first", "all"))


def plan(operation, vocab, dtype, rows=1, columns=(1, 1, 1), **limits):
    cuda, number = library(), DTYPES.index(dtype)
    sizes = dict(inner=1, outer_stride=vocab, inner_stride=vocab, vocab=vocab, valid_vocab=vocab)
    problem = cuda.Problem(dtype=number, logits=0, rows=rows, **sizes)
    out = cuda.Gradient(out=0, outer_stride=vocab, inner_stride=vocab, out_dtype=number)
    device = cuda.Device(**{**H200, **limits})
    return cuda.plan(
        getattr(cuda.Operation, operation), problem, cuda.Results(columns), out, device
    )


def stats(x, spec, outputs, seed=0, **limits):
    return backend(seed, **limits).stats(x, spec, outputs)


def check_same(got, want):
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


def edge(parts, dtype, off):
    """A vocabulary of so many parts, `off` numbers less or more."""
    vocab = 42_000 * parts
    for _ in range(3):  # the slice depends on the vocabulary
        vocab = plan("statistics", vocab, dtype).slice * parts
    return vocab + off


# Statistics


@EACH_DTYPE
@EACH_OUTPUTS
@pytest.mark.parametrize("off", (-1, 0, 1))
def test_statistics_by_a_cluster_have_the_bits_of_one_block(dtype, outputs, off):
    vocab = edge(2, dtype, off)
    assert plan("statistics", vocab, dtype).cluster > 1
    x, spec, _ = make(1, vocab, dtype)
    shared = stats(x, spec, outputs)
    check_same(stats(x, spec, outputs, **ALONE), shared)
    check_stats(shared, x, spec, outputs)


@pytest.mark.parametrize(("vocab", "blocks", "parts"), ((151_936, 4, 3), (262_144, 8, 6)))
@EACH_OUTPUTS
def test_blocks_without_a_part(vocab, blocks, parts, outputs):
    how = plan("statistics", vocab, torch.bfloat16)
    assert how.cluster == how.row_blocks == blocks and -(-vocab // how.slice) == parts
    x, spec, _ = make(1, vocab, torch.bfloat16)
    shared = stats(x, spec, outputs, seed=1)
    check_same(stats(x, spec, outputs, **ALONE), shared)
    check_stats(shared, x, spec, outputs)


@FLOAT
def test_a_row_has_its_bits_among_any_number_of_rows_and_on_any_device(dtype):
    x, spec, _ = make(4, 84_003, dtype, temperature_rows=torch.tensor([0.7, 1.0, 2.5, 0.1]))
    every = stats(x, spec, FIRST_ORDER)
    for limits in (ALONE, OLD, {"multiprocessors": 1}, {"largest_cluster": 1}):
        check_same(stats(x, spec, FIRST_ORDER, seed=3, **limits), every)
    for row in range(4):
        one = spec._replace(
            target=spec.target[row : row + 1], temperature_rows=spec.temperature_rows[row : row + 1]
        )
        alone = stats(x[:, row : row + 1], one, FIRST_ORDER)
        check_same(alone, [each[row : row + 1] for each in every])


@FLOAT
@EACH_OUTPUTS
@pytest.mark.parametrize("by", (1, 3, 6))
def test_rows_that_are_not_aligned_and_padding(dtype, outputs, by):
    vocab = edge(2, dtype, 5)
    x, spec, _ = make(2, vocab, dtype, valid_vocab=vocab - 3)
    x[..., vocab - 3 :] = NAN
    assert plan("statistics", vocab - 3, dtype).cluster > 1
    shared = stats(misaligned(x, by), spec, outputs)
    check_same(stats(misaligned(x, by), spec, outputs, **ALONE), shared)
    check_same(stats(misaligned(x, 0), spec, outputs), shared)
    view = misaligned(x, 0)[..., by : by + 84_000]  # a shard of the vocabulary, in place
    spec = RowSpec(target=random_target(2, vocab=84_000), valid_vocab=84_000)
    check_same(stats(view, spec, outputs), stats(view.clone(), spec, outputs, **ALONE))
    check_stats(stats(view, spec, outputs), view, spec, outputs)


def rows_with_edges(dtype, vocab, slice_):
    """-inf in the first part, in the last, in all but one number, everywhere; the maximum twice,
    once a part; NaN and +inf in either part; a row that is left out."""
    x, spec, _ = make(10, vocab, dtype)
    x[0, 0, :slice_] = -INF
    x[0, 1, slice_:] = -INF
    x[0, 2] = -INF
    x[0, 2, slice_ + 1] = 3.0
    x[0, 3] = -INF
    x[0, 4, slice_ - 1], x[0, 4, slice_] = 40.0, 40.0
    x[0, 5, 0], x[0, 6, vocab - 1], x[0, 7, 1], x[0, 8, slice_] = NAN, NAN, INF, INF
    target = spec.target.clone()
    target[:5] = torch.tensor([slice_, 0, slice_ + 1, 0, slice_ - 1])
    mask = torch.ones(10, dtype=torch.bool)
    mask[9] = False
    return x, spec._replace(target=target, mask=mask)


@FLOAT
@EACH_OUTPUTS
def test_edge_rows_of_a_cluster(dtype, outputs):
    vocab = edge(2, dtype, -100)
    x, spec = rows_with_edges(dtype, vocab, plan("statistics", vocab, dtype).slice)
    shared = stats(x, spec, outputs, seed=2)
    check_same(stats(x, spec, outputs, **ALONE), shared)
    assert all(each[[3, 5, 6, 7, 8]].isnan().all() and each[9] == 0 for each in shared)
    good = torch.tensor([0, 1, 2, 4])
    spec = spec._replace(target=spec.target[good], mask=None)
    check_stats([each[good] for each in shared], x[:, good], spec, outputs)
    if outputs is ROW_OUTPUTS:
        assert shared[3 + ROW_OUTPUTS.index("is_top1")][[2, 4]].tolist() == [1, 1]


@FLOAT
def test_transforms_of_a_shared_row(dtype):
    bias = torch.randn(90_001)
    for transform in ({"bias": bias}, {"softcap": 5.0, "logit_scale": -0.5, "temperature": 0.7}):
        x, spec, _ = make(1, 90_001, dtype, **transform)
        shared = stats(x, spec, ROW_OUTPUTS)
        check_same(stats(x, spec, ROW_OUTPUTS, **ALONE), shared)
        check_stats(shared, x, spec, ROW_OUTPUTS)


# The gradient


@EACH_DTYPE
@pytest.mark.parametrize("by", (0, 1, 3))
@pytest.mark.parametrize("in_place", (False, True))
def test_a_gradient_by_many_blocks_has_the_bits_of_one(dtype, by, in_place):
    vocab = 40_011
    assert plan("gradient", vocab, dtype).row_blocks > 1
    x, spec, upstream = make(3, vocab, dtype, valid_vocab=vocab - 7)
    x[..., vocab - 7 :] = NAN
    spec = spec._replace(mask=torch.tensor([True, False, True]))
    saved = Saved(*stats(x, spec, ()))
    want = torch.full_like(x, NAN)
    backend(**ALONE).grad(x, spec, saved, upstream, want)
    check_gradient(want[:, ::2], x[:, ::2], spec_of(spec, [0, 2]), pick(upstream, [0, 2]))
    given = misaligned(x, by)
    out = given if in_place else misaligned(torch.full_like(x, NAN), (3 * by) % 8)
    for seed in (0, 1):
        given.copy_(x)
        backend(seed).grad(given, spec, saved, upstream, out)
        assert same_bits(out.contiguous(), want)
        assert untouched(out)


def spec_of(spec, rows):
    return spec._replace(target=spec.target[rows], mask=None)


def pick(upstream, rows):
    return Upstream(*(g[rows] for g in upstream))


@FLOAT
def test_the_target_may_be_in_any_block(dtype):
    how = plan("gradient", 40_000, dtype)
    places = [n * how.slice + off for n in range(how.row_blocks) for off in (0, how.slice - 1)]
    places = torch.tensor([min(place, 39_999) for place in places] + [40_000, -1])
    x, _, _ = make(1, 40_000, dtype)
    x = x.expand(1, len(places), -1).contiguous()
    spec = RowSpec(target=places, valid_vocab=40_000)
    upstream = Upstream(*(torch.ones(len(places)) for _ in range(3)))
    out, alone = (gradient(backend(**limits), x, spec, upstream) for limits in ({}, ALONE))
    assert same_bits(out, alone) and out[0, -2:].isnan().all()
    check_gradient(out[:, :-2], x[:, :-2], spec_of(spec, slice(-2)), pick(upstream, slice(-2)))


@FLOAT
def test_transforms_of_a_shared_gradient(dtype):
    bias = torch.randn(40_001)
    for transform in ({"bias": bias}, {"bias": bias, "softcap": 5.0, "temperature": 0.7}):
        x, spec, upstream = make(1, 40_001, dtype, **transform)
        out, alone = (
            gradient(backend(**limits), x, spec, upstream, x.clone()) for limits in ({}, ALONE)
        )
        assert same_bits(out, alone)
        check_gradient(out, x, spec, upstream)


@pytest.mark.parametrize("narrow", (torch.bfloat16, torch.float16), ids=str)
def test_a_narrow_gradient_over_the_logits_of_few_rows(narrow):
    """What is written lies on what other chunks of the row have not read: it stays one block's."""
    x, spec, upstream = make(2, 40_001)
    want = gradient(backend(), x, spec, upstream).to(narrow)
    for seed in (0, 1):
        storage = x.clone()
        over = storage.view(narrow)[..., :40_001]
        assert same_bits(gradient(backend(seed), storage, spec, upstream, over).contiguous(), want)


@EACH_DTYPE
@EACH_OUTPUTS
def test_a_loss_that_is_not_resident_is_its_two_halves(dtype, outputs):
    """Whatever is asked for besides, the gradient has the same bits."""
    x, spec, upstream = make(2, 90_001, dtype, temperature=0.7)
    rows, out = loss(backend(**OLD), x, spec, upstream, outputs=outputs)
    check_same(rows, stats(x, spec, outputs, **ALONE))
    assert same_bits(out, loss(backend(**OLD, **ALONE), x, spec, upstream, outputs=())[1])
    assert rows[0].dtype == accumulate_dtype(dtype)
    check_gradient(out, x, spec, upstream)
