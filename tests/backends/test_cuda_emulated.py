"""The CUDA kernels themselves, run thread by thread on the CPU, against float64 truth.

The emulator (cuda_emulator) fixes the order in which threads run between two barriers by a seed.
Devices: an H200, a device so small that rows of this size take clusters, and one without clusters.
"""

import pytest
import torch
from contract import Contract, Subject
from contract.subject import DTYPES, EACH_DTYPE, NAN, misaligned, untouched
from cuda_emulator.load import COMPILER, H200, library
from emulated_rows import (
    DEVICES,
    check_gradient,
    check_stats,
    emulated,
    gradient,
    loss,
    make,
)
from helpers import same_bits

from em_kernels.backends.interface import ROW_OUTPUTS, accumulate_dtype

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("nan_filled_memory"),
]

LENGTHS = (1, 7, 8, 33, 1000, 2100, 4097, 8003)
EACH_DEVICE = pytest.mark.parametrize("device", DEVICES)


class TestCuda(Contract):
    IMPLS, LENGTHS, LONG, SAMPLE = tuple(DEVICES), LENGTHS, 3000, 0.25
    PLACES = (0, 1023, 2048, 2999)

    @pytest.fixture
    def subject(self, impl):
        return Subject(emulated(impl))


def cluster_of(device, vocab, dtype):
    cuda = library()
    number = DTYPES.index(dtype)
    sizes = dict(inner=1, outer_stride=vocab, inner_stride=vocab)
    problem = cuda.Problem(dtype=number, logits=0, rows=1, vocab=vocab, valid_vocab=vocab, **sizes)
    out = cuda.Gradient(out=0, outer_stride=vocab, inner_stride=vocab, out_dtype=number)
    limits = cuda.Device(**{**H200, **DEVICES[device]})
    how = cuda.plan(cuda.Operation.loss, problem, cuda.Results([1, 1, 1]), out, limits)
    return how.cluster if how.resident else 0


def test_the_small_device_takes_clusters_of_every_size():
    sizes = {cluster_of("small", vocab, dtype) for vocab in LENGTHS for dtype in DTYPES}
    assert sizes == {0, 1, 2, 4, 8}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_a_row_of_151936_logits_over_a_cluster_of_an_h200(dtype):
    x, spec, upstream = make(1, 151_936, dtype)
    assert cluster_of("h200", 151_936, dtype) == (4 if dtype == torch.bfloat16 else 8)
    rows, out = loss(emulated(), x, spec, upstream)
    check_stats(rows, x, spec, ("logprob", "entropy"))
    check_gradient(out, x, spec, upstream)


# Memory


@EACH_DTYPE
@pytest.mark.parametrize("by", range(8))
@pytest.mark.parametrize("device", ("h200", "no_clusters"))
@pytest.mark.parametrize("short", (1, 8))
def test_bits_of_whole_chunks_do_not_depend_on_alignment(device, dtype, by, short):
    """Two chunks of a block, less a few numbers: the second is whole in some rows only."""
    vocab = 2 * 256 * 4 * (16 // dtype.itemsize) + 16 - short
    x, spec, upstream = make(1, vocab, dtype, valid_vocab=vocab - 2)
    x[..., vocab - 2 :] = NAN
    cuda = emulated(device)
    rows, out = loss(cuda, misaligned(x, 0), spec, upstream, misaligned(x, 0))
    for out_by in (by, (by + 3) % 8):
        shifted = misaligned(torch.full_like(x, NAN), out_by)
        other, _ = loss(cuda, misaligned(x, by), spec, upstream, shifted)
        assert all(same_bits(a, b) for a, b in zip(other, rows, strict=True))
        assert same_bits(shifted.contiguous(), out) and untouched(shifted)
    in_place = misaligned(x, by)
    loss(cuda, in_place, spec, upstream, in_place)
    assert same_bits(in_place.contiguous(), out) and untouched(in_place)


@EACH_DTYPE
@pytest.mark.parametrize("by", (1, 2, 5))
def test_bits_of_the_general_kernels_do_not_depend_on_alignment(dtype, by):
    vocab = 256 * 4 * (16 // dtype.itemsize) + 100
    bias = torch.randn(vocab, dtype=accumulate_dtype(dtype))
    x, spec, upstream = make(1, vocab, dtype, bias=bias, temperature=0.7)
    cuda = emulated()
    rows, out = loss(cuda, misaligned(x, 0), spec, upstream, outputs=ROW_OUTPUTS)
    other_out = misaligned(torch.full_like(x, NAN), (by * 5) % 8)
    other, _ = loss(cuda, misaligned(x, by), spec, upstream, other_out, outputs=ROW_OUTPUTS)
    assert all(same_bits(a, b) for a, b in zip(other, rows, strict=True))
    assert same_bits(other_out.contiguous(), out)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("by", range(4))
@pytest.mark.parametrize("device", ("h200", "no_clusters"))
def test_narrow_gradient_of_rows_that_are_not_aligned(device, dtype, by):
    x, spec, upstream = make(3, 9001)
    cuda = emulated(device)
    wide = loss(cuda, x, spec, upstream)[1].to(dtype)
    beside = misaligned(torch.full_like(wide, NAN), (by * 3) % 8)
    loss(cuda, misaligned(x, by), spec, upstream, beside)
    assert same_bits(beside.contiguous(), wide) and untouched(beside)
    aliased = misaligned(x, by)
    over = aliased.view(dtype)[..., :9001]
    loss(cuda, aliased, spec, upstream, over)
    assert same_bits(over.contiguous(), wide)


@EACH_DEVICE
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("vocab", (1, 33, 1000, 2101, 4096, 9001))
@pytest.mark.parametrize("function", (gradient, loss))
@pytest.mark.parametrize("aliased", (False, True))
@pytest.mark.parametrize("seed", (0, 1))
def test_narrow_gradient_over_the_logits(device, dtype, vocab, function, aliased, seed):
    x, spec, upstream = make(3, vocab, valid_vocab=max(1, vocab - 5))
    spec = spec._replace(mask=torch.tensor([True, False, True]))
    cuda = emulated(device, seed)
    wide = torch.full_like(x, NAN)
    function(cuda, x, spec, upstream, wide)
    storage = x.clone() if aliased else torch.full_like(x, NAN)
    narrow = storage.view(dtype)[..., :vocab]
    function(cuda, storage if aliased else x, spec, upstream, narrow)
    assert same_bits(narrow.contiguous(), wide.to(dtype))


@pytest.mark.parametrize("softcap", (0.0, 5.0))
def test_narrow_gradient_of_the_general_kernels(softcap):
    x, spec, upstream = make(2, 9001, softcap=softcap, bias=torch.randn(9001))
    cuda = emulated(seed=2)
    wide = gradient(cuda, x, spec, upstream)
    check_gradient(wide, x, spec, upstream)
    storage = x.clone()
    narrow = gradient(cuda, storage, spec, upstream, storage.view(torch.bfloat16)[..., :9001])
    assert same_bits(narrow.contiguous(), wide.bfloat16())


# Bits


@EACH_DEVICE
@EACH_DTYPE
def test_bits_do_not_depend_on_the_order_of_threads(device, dtype):
    x, spec, upstream = make(5, 2101, dtype)
    rows, out = loss(emulated(device, 0), x, spec, upstream)
    for seed in (1, 2):
        again, again_out = loss(emulated(device, seed), x, spec, upstream)
        assert all(same_bits(a, b) for a, b in zip(again, rows, strict=True))
        assert same_bits(again_out, out)


# What is refused


def test_an_out_that_does_not_fit_is_refused():
    x, spec, upstream = make(2, 10)
    cuda = emulated()
    for out in (x.double(), x[..., :5], x.transpose(1, 2)):
        with pytest.raises(ValueError, match="out must"):
            gradient(cuda, x, spec, upstream, out)
    with pytest.raises(ValueError, match="out must"):
        gradient(cuda, x.half(), spec, upstream, x.bfloat16())
    with pytest.raises(ValueError, match="target must have 2 entries"):
        cuda.stats(x, spec._replace(target=spec.target[:1]), ())


@EACH_DEVICE
def test_an_upstream_of_logprob_without_a_target_writes_nothing_outside(device):
    """The public functions refuse it; the operators underneath do not."""
    x, spec, upstream = make(3, 33)
    spec = spec._replace(target=None)
    for call in (gradient, loss):
        memory = torch.full((1, 5, 33), 7.0)
        call(emulated(device), x, spec, upstream, memory[:, 1:4])
        assert bool((memory[:, 0] == 7).all()) and bool((memory[:, 4] == 7).all())
        memory = memory[:, 1:4].clone()
        a = -upstream.logprob[:, None] + upstream.lse[:, None]
        p = x[0].double().softmax(-1)
        h = -(p * p.log()).sum(-1, keepdim=True)
        want = p * (a - upstream.entropy[:, None] * (p.log() + h))
        torch.testing.assert_close(memory[0].double(), want, rtol=1e-4, atol=1e-6)
