"""The CUDA kernels themselves, run thread by thread on the CPU, against float64 truth.

The emulator (cuda_emulator) fixes the order in which threads run between two barriers by a seed.
Devices: an H200, a device so small that rows of this size take clusters, and one without clusters.
"""

import math

import pytest
import torch
from cuda_emulator.load import COMPILER, H200, backend, library
from helpers import error, random_logits, random_target, rows_of_entropy, same_bits

from em_kernels.backends import reference
from em_kernels.backends.interface import OUTPUTS, RowSpec, Saved, Upstream, accumulate_dtype

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("nan_filled_memory"),
]

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICES = {
    "h200": {},
    "small": {"shared_per_block": 2704, "shared_per_multiprocessor": 100_000},
    "no_clusters": {"compute_capability": 80},
}
FIRST_ORDER = ("logprob", "entropy", "lse", "max_prob")
VOCABS = (1, 2, 3, 7, 8, 31, 33, 1000, 4097)
# What the outputs need beyond 2e-6: differences of sums.
ILL_CONDITIONED = {"logit_mean": 10, "logit_skew": 30, "entropy_slope": 30, "logit_var": 5}
# What the rounding of a result that may be 0 is measured by.
ROUNDING_SCALE = {"logit_skew": 1, "logit_mean": 1, "lse": 1, "max": 1, "entropy_slope": 1e-3}
GRADIENT_TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
EACH_DEVICE = pytest.mark.parametrize("device", DEVICES)


def emulated(device="h200", seed=0):
    return backend(seed, **DEVICES[device])


def make(rows, vocab, dtype=torch.float32, **spec):
    x = random_logits(1, rows, vocab, dtype=dtype)
    valid = spec.get("valid_vocab", vocab)
    target = random_target(rows, vocab=valid)
    wide = accumulate_dtype(dtype)
    upstream = Upstream(*(torch.randn(rows, dtype=wide) for _ in range(3)))
    return x, RowSpec(**{"target": target, "valid_vocab": vocab} | spec), upstream


def wide_spec(spec):
    return spec._replace(
        bias=None if spec.bias is None else spec.bias.double(),
        temperature_rows=None if spec.temperature_rows is None else spec.temperature_rows.double(),
    )


def true_stats(x, spec, outputs):
    return reference.stats(x.double(), wide_spec(spec), outputs)


def true_gradient(x, spec, upstream):
    exact, spec = x.double(), wide_spec(spec)
    out = torch.empty_like(exact)
    saved = Saved(*reference.stats(exact, spec, ()))
    wide = Upstream(*(None if g is None else g.double() for g in upstream))
    reference.grad(exact, spec, saved, wide, out)
    return out


def check_stats(got, x, spec, outputs):
    want = true_stats(x, spec, outputs)
    limit = 1e-13 if x.dtype == torch.float64 else 2e-6
    for name, a, b in zip((*Saved._fields, *outputs), got, want, strict=True):
        scale = ROUNDING_SCALE.get(name, 0) * torch.ones_like(b)
        assert error(a, b, scale) <= limit * ILL_CONDITIONED.get(name, 1), name


def check_gradient(out, x, spec, upstream, dtype=None):
    want = true_gradient(x, spec, upstream)
    assert error(out, want) <= GRADIENT_TOLERANCE[dtype or x.dtype]


def gradient(cuda, x, spec, upstream, out=None):
    saved = Saved(*cuda.stats(x, spec, ()))
    out = torch.full_like(x, NAN) if out is None else out
    cuda.grad(x, spec, saved, upstream, out)
    return out


def loss(cuda, x, spec, upstream, out=None, outputs=("logprob", "entropy")):
    out = torch.full_like(x, NAN) if out is None else out
    return cuda.loss(x, spec, upstream, outputs, out), out


def cluster_of(device, vocab, dtype):
    cuda = library()
    number = DTYPES.index(dtype)
    sizes = dict(inner=1, outer_stride=vocab, inner_stride=vocab)
    problem = cuda.Problem(dtype=number, logits=0, rows=1, vocab=vocab, valid_vocab=vocab, **sizes)
    out = cuda.Gradient(out=0, outer_stride=vocab, inner_stride=vocab, out_dtype=number)
    limits = cuda.Device(**{**H200, **DEVICES[device]})
    how = cuda.plan(cuda.Operation.loss, problem, cuda.Results([1, 1, 1]), out, limits)
    return how.cluster if how.resident else 0


# Values


@EACH_DTYPE
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("outputs", (FIRST_ORDER, OUTPUTS), ids=("first_order", "all"))
def test_statistics(dtype, vocab, outputs):
    x, spec, _ = make(3, vocab, dtype)
    check_stats(emulated().stats(x, spec, outputs), x, spec, outputs)


@EACH_DTYPE
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("which", ((0,), (1,), (2,), (0, 1, 2)), ids=str)
def test_gradient(dtype, vocab, which):
    x, spec, upstream = make(2, vocab, dtype)
    upstream = Upstream(*(g if i in which else None for i, g in enumerate(upstream)))
    check_gradient(gradient(emulated(), x, spec, upstream), x, spec, upstream)


@EACH_DEVICE
@EACH_DTYPE
@pytest.mark.parametrize("vocab", (1, 8, 33, 1000, 2100, 4097, 8003))
def test_loss(device, dtype, vocab):
    x, spec, upstream = make(2, vocab, dtype)
    rows, out = loss(emulated(device), x, spec, upstream)
    check_stats(rows, x, spec, ("logprob", "entropy"))
    check_gradient(out, x, spec, upstream)


def test_the_small_device_takes_clusters_of_every_size():
    sizes = {
        cluster_of("small", vocab, dtype)
        for vocab in (1, 8, 33, 1000, 2100, 4097, 8003)
        for dtype in DTYPES
    }
    assert sizes == {0, 1, 2, 4, 8}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_a_row_of_151936_logits_over_a_cluster_of_an_h200(dtype):
    x, spec, upstream = make(1, 151_936, dtype)
    assert cluster_of("h200", 151_936, dtype) == (4 if dtype == torch.bfloat16 else 8)
    rows, out = loss(emulated(), x, spec, upstream)
    check_stats(rows, x, spec, ("logprob", "entropy"))
    check_gradient(out, x, spec, upstream)


@EACH_DTYPE
@pytest.mark.parametrize(
    "transform",
    (
        {"temperature": 0.7},
        {"temperature": 2.5, "logit_scale": 0.4},
        {"logit_scale": -1.3},
        {"logit_scale": 0.0},
        {"softcap": 4.0},
        {"softcap": 7.0, "temperature": 1.9, "logit_scale": 0.6, "valid_vocab": 901},
    ),
    ids=str,
)
@pytest.mark.parametrize("biased", (False, True))
def test_transforms(dtype, transform, biased):
    wide = accumulate_dtype(dtype)
    bias = torch.randn(1003, dtype=wide) if biased else None
    x, spec, upstream = make(2, 1003, dtype, bias=bias, **transform)
    cuda = emulated()
    check_stats(cuda.stats(x, spec, OUTPUTS), x, spec, OUTPUTS)
    check_gradient(gradient(cuda, x, spec, upstream), x, spec, upstream)
    check_gradient(loss(cuda, x, spec, upstream)[1], x, spec, upstream)


@EACH_DEVICE
def test_temperature_per_row(device):
    temperature = torch.tensor([0.3, 1.0, 4.0])
    x, spec, upstream = make(3, 1003, temperature_rows=temperature)
    rows, out = loss(emulated(device), x, spec, upstream)
    check_stats(rows, x, spec, ("logprob", "entropy"))
    check_gradient(out, x, spec, upstream)


@pytest.mark.parametrize("vocab", (64, 4099))
def test_entropy_and_its_gradient_down_to_1e_9(vocab):
    entropies = torch.logspace(-9, 0, 10)
    x = rows_of_entropy(entropies, vocab)[None]
    spec, upstream = RowSpec(valid_vocab=vocab), Upstream(entropy=torch.ones(10))
    want, want_gradient = true_stats(x, spec, ("entropy",))[3], true_gradient(x, spec, upstream)
    for device in DEVICES:
        rows, out = loss(emulated(device), x, spec, upstream, outputs=("entropy",))
        assert ((rows[3] - want) / want).abs().max() < 1e-4
        rowwise = (out - want_gradient).norm(dim=-1) / want_gradient.norm(dim=-1)
        assert rowwise.max() < 1e-4


@pytest.mark.parametrize("temperature", (0.3, 0.7, 1.9))
def test_the_gradient_of_a_certain_row_at_a_temperature(temperature):
    """z - max is exactly 0 at the maximum, though z and max are rounded."""
    x = rows_of_entropy(torch.full((8,), 1e-8), 300)[None] * temperature + 20
    spec = RowSpec(valid_vocab=300, temperature=temperature)
    upstream = Upstream(entropy=torch.ones(8))
    want = true_gradient(x, spec, upstream)
    top = x.argmax(-1, keepdim=True)
    for device in DEVICES:
        out = loss(emulated(device), x, spec, upstream, outputs=())[1]
        ratio = out.gather(-1, top) / want.gather(-1, top)
        assert (ratio - 1).abs().max() < 1e-3


@pytest.mark.parametrize("entropy", (1e-9, 1e-4))
def test_second_order_outputs_of_a_certain_row(entropy):
    x = rows_of_entropy(torch.tensor([entropy]), 300)[None]
    spec = RowSpec(target=x[0].argmax(-1), valid_vocab=300)
    names = ("varentropy", "entropy_slope")
    got, want = (f(x, spec, names)[3:] for f in (emulated().stats, true_stats))
    for name, a, b in zip(names, got, want):
        assert error(a, b) < 1e-4, name


# Edge rules


@EACH_DEVICE
@pytest.mark.parametrize("poison", ("nan", "+inf", "two", "all -inf", "target", "temperature"))
@pytest.mark.parametrize("place", (0, 1023, 2999))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_bad_row_is_nan_and_touches_no_other_row(device, poison, place, dtype):
    x, spec, upstream = make(3, 3000, dtype, temperature_rows=torch.ones(3))
    cuda = emulated(device)
    rows, out = loss(cuda, x, spec, upstream, outputs=FIRST_ORDER)
    extra = cuda.stats(x, spec, OUTPUTS)
    match poison:
        case "nan":
            x[0, 1, place] = NAN
        case "+inf":
            x[0, 1, place] = INF
        case "two":
            x[0, 1, place], x[0, 1, place - 1] = NAN, INF
        case "all -inf":
            x[0, 1] = -INF
        case "target":
            spec.target[1] = 3000 if place else -1
        case _:
            spec.temperature_rows[1] = 0.0 if place else -1.0
    bad_rows, bad_out = loss(cuda, x, spec, upstream, outputs=FIRST_ORDER)
    good = torch.tensor([0, 2])
    for a, b in zip((*bad_rows, *cuda.stats(x, spec, OUTPUTS)), (*rows, *extra), strict=True):
        assert a[1].isnan() and same_bits(a[good], b[good])
    assert bad_out[0, 1].isnan().all() and same_bits(bad_out[0, good], out[0, good])


@EACH_DEVICE
@EACH_DTYPE
def test_minus_inf_logits_are_as_if_they_were_not_there(device, dtype):
    x, spec, upstream = make(2, 2100, dtype)
    x[..., torch.rand(2100) < 0.5] = -INF
    x[..., :40], x[..., -40:] = -INF, -INF
    spec = spec._replace(target=x[0].argmax(-1))
    cuda = emulated(device)
    check_stats(cuda.stats(x, spec, OUTPUTS), x, spec, OUTPUTS)
    rows, out = loss(cuda, x, spec, upstream)
    check_stats(rows, x, spec, ("logprob", "entropy"))
    check_gradient(out, x, spec, upstream)
    assert (out[x == -INF] == 0).all()


@EACH_DEVICE
def test_a_target_on_a_minus_inf_logit(device):
    x, spec, upstream = make(2, 1000)
    x[0, torch.arange(2), spec.target] = -INF
    rows, out = loss(emulated(device), x, spec, upstream)
    assert (rows[3] == -INF).all() and rows[4].isfinite().all()
    assert torch.equal(out[0, torch.arange(2), spec.target], upstream.logprob)


@EACH_DEVICE
def test_one_finite_logit_is_certainty(device):
    x = torch.full((1, 3, 2100), -INF)
    target = torch.tensor([0, 1030, 2099])
    x[0, torch.arange(3), target] = torch.tensor([-7.0, 0.0, 1e4])
    spec = RowSpec(target=target, valid_vocab=2100)
    cuda = emulated(device)
    stats = dict(zip(OUTPUTS, cuda.stats(x, spec, OUTPUTS)[3:], strict=True))
    for name in ("entropy", "logprob", "varentropy", "logit_var", "logit_skew", "entropy_slope"):
        assert (stats[name] == 0).all(), name
    for name in ("max_prob", "collision", "is_top1"):
        assert (stats[name] == 1).all(), name
    _, out = loss(cuda, x, spec, Upstream(*(torch.ones(3) for _ in range(2))))
    assert (out == 0).all()


@EACH_DEVICE
@EACH_DTYPE
def test_left_out_rows_are_exact_zeros(device, dtype):
    mask = torch.tensor([True, False, True, False])
    x, spec, upstream = make(4, 1000, dtype, valid_vocab=901)
    cuda = emulated(device)
    rows, out = loss(cuda, x, spec, upstream)
    x[0, 1], spec.target[3], upstream.entropy[1] = NAN, 10**9, NAN
    spec = spec._replace(mask=mask)
    some, some_out = loss(cuda, x, spec, upstream)
    for a, b in zip(some, rows, strict=True):
        assert (a[~mask] == 0).all() and same_bits(a[mask], b[mask])
    assert (some_out[0, ~mask] == 0).all() and same_bits(some_out[0, mask], out[0, mask])
    assert all((a[~mask] == 0).all() for a in cuda.stats(x, spec, OUTPUTS))
    assert (gradient(cuda, x, spec, upstream)[0, ~mask] == 0).all()


@EACH_DEVICE
@pytest.mark.parametrize("valid", (1, 100, 901, 999))
def test_padded_vocabulary_is_not_read_and_gets_no_gradient(device, valid):
    x, spec, upstream = make(2, 1000, valid_vocab=valid)
    cuda = emulated(device)
    tight = spec._replace(valid_vocab=valid)
    rows, out = loss(cuda, x[..., :valid], tight, upstream)
    x[..., valid:] = NAN
    padded_rows, padded_out = loss(cuda, x, spec, upstream)
    assert all(same_bits(a, b) for a, b in zip(padded_rows, rows, strict=True))
    assert same_bits(padded_out[..., :valid], out) and (padded_out[..., valid:] == 0).all()


@EACH_DEVICE
def test_logits_of_extreme_size(device):
    x = torch.tensor([[[3e38, -3e38, 0.0], [-3e38, -3e38, -3e38], [1e30, 1e30, -1e30]]])
    spec = RowSpec(target=torch.zeros(3, dtype=torch.int64), valid_vocab=3)
    rows, out = loss(emulated(device), x, spec, Upstream(entropy=torch.ones(3)))
    want = torch.tensor([0.0, math.log(3), math.log(2)])
    assert error(rows[4], want) < 1e-6 and error(rows[3], -want) < 1e-6
    assert out.isfinite().all()


def test_shift_by_1e4_is_exact():
    x, spec, upstream = make(2, 1003)
    x = (x * 64).round() / 64
    cuda = emulated()
    for shift in (-1e4, 1e4):
        rows, out = loss(cuda, x, spec, upstream)
        shifted, shifted_out = loss(cuda, x + shift, spec, upstream)
        assert all(same_bits(a, b) for a, b in zip(shifted[1:], rows[1:], strict=True))
        assert same_bits(shifted_out, out)


def test_first_of_equal_maxima_is_the_top_token():
    x = torch.zeros(1, 4, 4500)
    x[0, :2, 4100], x[0, :2, 4400] = 5.0, 5.0
    spec = RowSpec(target=torch.tensor([4100, 4400, 0, 1]), valid_vocab=4500)
    assert emulated().stats(x, spec, ("is_top1",))[3].tolist() == [1, 0, 1, 0]


@EACH_DTYPE
@pytest.mark.parametrize("vocab", (1000, 5000))
def test_ties_of_the_maximum_count(dtype, vocab):
    x = torch.zeros(1, 1, vocab, dtype=dtype)
    spec = RowSpec(valid_vocab=vocab)
    for device in DEVICES:
        cuda = emulated(device)
        rows, out = loss(cuda, x, spec, Upstream(entropy=torch.ones(1)), outputs=("entropy",))
        assert error(rows[3], torch.tensor([math.log(vocab)])) < 1e-6
        assert out.abs().max() < 1e-6


@EACH_DEVICE
@EACH_DTYPE
def test_the_maximum_is_left_out_wherever_it_lies(device, dtype):
    """What is left is its own size, 2e-9, not the rounding of 1 + 2e-9; a second maximum counts."""
    places = (0, 1, 7, 8, 31, 255, 256, 1023, 1024, 2047, 2048, 2991, 2992, 2998, 2999)
    x = torch.full((1, 2 * len(places), 3000), -28.0, dtype=dtype)
    for i, place in enumerate(places):
        x[0, 2 * i : 2 * i + 2, place] = 0.0
        x[0, 2 * i + 1, places[(i * 7 + 3) % len(places)]] = 0.0
    spec, upstream = RowSpec(valid_vocab=3000), Upstream(entropy=torch.ones(x.shape[1]))
    (top, rest, mean), out = loss(emulated(device), x, spec, upstream, outputs=())
    want = true_stats(x, spec, ())
    assert (top == 0).all()
    assert (rest / want[1] - 1).abs().max() < 2e-6 and (mean / want[2] - 1).abs().max() < 2e-6
    if dtype != torch.float16:  # where that of a certain row underflows
        check_gradient(out, x, spec, upstream)


# Memory


def misaligned(x, by):
    """A copy of `x` whose rows begin `by` elements past a multiple of 16 bytes."""
    outer, inner, vocab = x.shape
    pitch = (vocab + by + 15) // 8 * 8
    storage = torch.full((outer * inner * pitch + by,), NAN, dtype=x.dtype)
    view = storage.as_strided(x.shape, (inner * pitch, pitch, 1), by)
    view.copy_(x)
    return view


def untouched(view, by):
    """Whether what lies between the rows of a `misaligned` tensor is still NaN."""
    pitch, vocab = view.stride(1), view.shape[2]
    between = view.as_strided((*view.shape[:2], pitch - vocab), view.stride(), by + vocab)
    return bool(between.isnan().all())


@EACH_DEVICE
@EACH_DTYPE
@pytest.mark.parametrize("by", (0, 1, 3, 7))
@pytest.mark.parametrize("vocab", (5, 1000, 2101))
def test_bits_do_not_depend_on_alignment(device, dtype, by, vocab):
    x, spec, upstream = make(2, vocab, dtype)
    cuda = emulated(device)
    rows, out = loss(cuda, misaligned(x, 0), spec, upstream)
    other_out = misaligned(torch.full_like(x, NAN), (by * 5) % 8)
    other, _ = loss(cuda, misaligned(x, by), spec, upstream, other_out)
    assert all(same_bits(a, b) for a, b in zip(other, rows, strict=True))
    assert same_bits(other_out.contiguous(), out)


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
        assert same_bits(shifted.contiguous(), out) and untouched(shifted, out_by)
    in_place = misaligned(x, by)
    loss(cuda, in_place, spec, upstream, in_place)
    assert same_bits(in_place.contiguous(), out) and untouched(in_place, by)


@EACH_DTYPE
@pytest.mark.parametrize("by", (1, 2, 5))
def test_bits_of_the_general_kernels_do_not_depend_on_alignment(dtype, by):
    vocab = 256 * 4 * (16 // dtype.itemsize) + 100
    bias = torch.randn(vocab, dtype=accumulate_dtype(dtype))
    x, spec, upstream = make(1, vocab, dtype, bias=bias, temperature=0.7)
    cuda = emulated()
    rows, out = loss(cuda, misaligned(x, 0), spec, upstream, outputs=OUTPUTS)
    other_out = misaligned(torch.full_like(x, NAN), (by * 5) % 8)
    other, _ = loss(cuda, misaligned(x, by), spec, upstream, other_out, outputs=OUTPUTS)
    assert all(same_bits(a, b) for a, b in zip(other, rows, strict=True))
    assert same_bits(other_out.contiguous(), out)


@EACH_DEVICE
@EACH_DTYPE
@pytest.mark.parametrize("vocab", (33, 1000, 2101))
@pytest.mark.parametrize("function", (gradient, loss))
def test_out_may_be_the_logits(device, dtype, vocab, function):
    x, spec, upstream = make(3, vocab, dtype)
    cuda = emulated(device)
    out = torch.full_like(x, NAN)
    function(cuda, x, spec, upstream, out)
    inplace = misaligned(x, 3)
    function(cuda, inplace, spec, upstream, inplace)
    assert same_bits(inplace.contiguous(), out)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("by", range(4))
@pytest.mark.parametrize("device", ("h200", "no_clusters"))
def test_narrow_gradient_of_rows_that_are_not_aligned(device, dtype, by):
    x, spec, upstream = make(3, 9001)
    cuda = emulated(device)
    wide = loss(cuda, x, spec, upstream)[1].to(dtype)
    beside = misaligned(torch.full_like(wide, NAN), (by * 3) % 8)
    loss(cuda, misaligned(x, by), spec, upstream, beside)
    assert same_bits(beside.contiguous(), wide) and untouched(beside, (by * 3) % 8)
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


@EACH_DTYPE
@pytest.mark.parametrize("cut", ("tail", "head", "every_other_token", "vocab_slice"))
def test_strided_views(dtype, cut):
    full = random_logits(3, 5, 401, dtype=dtype)
    view = {
        "tail": full[:, :-1],
        "head": full[:, 1:],
        "every_other_token": full[:, ::2],
        "vocab_slice": full[..., 7:390],
    }[cut]
    count, vocab = view.shape[0] * view.shape[1], view.shape[2]
    spec = RowSpec(target=random_target(count, vocab=vocab), valid_vocab=vocab)
    upstream = Upstream(*(torch.randn(count, dtype=accumulate_dtype(dtype)) for _ in range(3)))
    before = full.clone()
    out = torch.full(full.shape, NAN, dtype=dtype)[: view.shape[0], : view.shape[1], :vocab]
    rows, _ = loss(emulated(), view, spec, upstream, out)
    check_stats(rows, view, spec, ("logprob", "entropy"))
    check_gradient(out, view, spec, upstream)
    assert same_bits(full, before)


def test_no_rows():
    x = torch.empty(0, 3, 50)
    cuda, spec = emulated(), RowSpec(valid_vocab=50)
    assert [row.shape for row in cuda.stats(x, spec, ("entropy",))] == [(0,)] * 4
    assert loss(cuda, x, spec, Upstream())[1].shape == (0, 3, 50)


# Bits


@EACH_DEVICE
@EACH_DTYPE
def test_bits_depend_neither_on_the_order_of_threads_nor_on_other_rows(device, dtype):
    x, spec, upstream = make(5, 2101, dtype)
    rows, out = loss(emulated(device, 0), x, spec, upstream)
    for seed in (1, 2):
        again, again_out = loss(emulated(device, seed), x, spec, upstream)
        assert all(same_bits(a, b) for a, b in zip(again, rows, strict=True))
        assert same_bits(again_out, out)
    one = spec._replace(target=spec.target[3:4])
    alone, alone_out = loss(emulated(device), x[:, 3:4], one, Upstream(*(g[3:4] for g in upstream)))
    assert all(same_bits(a, b[3:4]) for a, b in zip(alone, rows, strict=True))
    assert same_bits(alone_out, out[:, 3:4])


@EACH_DTYPE
@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_bits_of_an_output_do_not_depend_on_what_else_is_asked_for(dtype, temperature):
    x, spec, _ = make(2, 4500, dtype, temperature=temperature)
    cuda = emulated()
    together = dict(zip(OUTPUTS, cuda.stats(x, spec, OUTPUTS)[3:], strict=True))
    for name in ("logprob", "entropy", "lse", "max_prob", "collision", "is_top1", "logit_var"):
        assert same_bits(cuda.stats(x, spec, (name,))[3], together[name]), name


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
