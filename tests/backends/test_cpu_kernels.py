"""The compiled CPU kernels, every instruction set, against `reference` in float64."""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import pytest
import torch

pytest.importorskip("em_kernels._C")

from em_kernels import entropy_loss
from em_kernels.backends import reference
from em_kernels.backends.cpu import Cpu
from em_kernels.backends.interface import OUTPUTS, RowSpec, Saved, Upstream

cpu = Cpu()
LEVELS = cpu.isa_levels()
STATM = Path("/proc/self/statm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Tolerance of per-row results, and of a gradient rounded to the input dtype: ||a - b|| / ||b||.
ROW_TOLERANCE = {torch.float64: 1e-11}
GRAD_TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 1e-3,
}
NAMES = ("max", "log1p_r", "mean_d", *OUTPUTS)


@pytest.fixture(params=LEVELS)
def isa(request):
    before = cpu.get_isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


@pytest.fixture(autouse=True)
def threads():
    """One thread, for speed on these sizes, unless the test asks for others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make_logits(shape, dtype, seed=0, scale=4.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def make_spec(rows, vocab, seed=0, **fields):
    generator = torch.Generator().manual_seed(seed)
    fields.setdefault("valid_vocab", vocab)
    target = torch.randint(0, fields["valid_vocab"], (rows,), generator=generator)
    return RowSpec(target=target, **fields)


def make_upstream(rows, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Upstream(*(torch.randn(rows, generator=generator).to(wide) for _ in range(3)))


def double(values):
    """The same NamedTuple with floating-point tensors in float64."""
    return type(values)(
        *(v.double() if torch.is_tensor(v) and v.is_floating_point() else v for v in values)
    )


def reference_loss(logits, spec, upstream, outputs=OUTPUTS):
    out = torch.empty(logits.shape, dtype=torch.float64)
    rows = reference.loss(logits.double(), double(spec), double(upstream), outputs, out)
    return rows, out


def relative_error(actual, expected, floor=1e-300):
    """||a - b|| / max(||b||, floor) over finite entries; the others must be the same ones."""
    actual, expected = actual.double(), expected.double()
    finite = expected.isfinite()
    assert torch.equal(actual[~finite].nan_to_num(0.5), expected[~finite].nan_to_num(0.5))
    actual, expected = actual[finite], expected[finite]
    return ((actual - expected).norm() / expected.norm().clamp(min=floor)).item()


def same_bits(a, b):
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def check_against_reference(logits, spec):
    dtype = logits.dtype
    upstream = make_upstream(logits.shape[0] * logits.shape[1], dtype)
    expected, expected_grad = reference_loss(logits, spec, upstream)
    rows = cpu.stats(logits, spec, OUTPUTS)
    for name, actual, want in zip(NAMES, rows, expected, strict=True):
        floor = 1.0 if name in ("logit_mean", "logit_skew") else 1e-300  # sums that may cancel
        assert relative_error(actual, want, floor) < ROW_TOLERANCE.get(dtype, 1e-5), name
    out = torch.full_like(logits, math.nan)
    cpu.grad(logits, spec, Saved(*rows[:3]), upstream, out)
    assert relative_error(out, expected_grad) < GRAD_TOLERANCE[dtype]
    fused = torch.full_like(logits, math.nan)
    for a, b in zip(cpu.loss(logits, spec, upstream, OUTPUTS, fused), rows, strict=True):
        assert same_bits(a, b)
    assert same_bits(fused, out)
    in_place = logits.clone()
    cpu.loss(in_place, spec, upstream, OUTPUTS, in_place)
    assert same_bits(in_place, out)


VARIANTS = {
    "plain": {},
    "temperature": dict(temperature=0.7),
    "negative_scale": dict(logit_scale=-1.5),
    "softcap": dict(softcap=5.0),
    "softcap_temperature_scale": dict(softcap=30.0, temperature=2.0, logit_scale=0.5),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 37), (1, 17, 4096), (2, 2, 9001)], ids=str)
def test_matches_reference(isa, dtype, shape, variant):
    spec = make_spec(shape[0] * shape[1], shape[2], **VARIANTS[variant])
    check_against_reference(make_logits(shape, dtype), spec)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_with_bias_row_temperature_mask_padding_and_strides(isa, dtype):
    padded = make_logits((4, 7, 4200), dtype)
    logits = padded[:, :-1, 8:4190]
    rows, vocab = 24, 4182
    generator = torch.Generator().manual_seed(2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    spec = make_spec(
        rows,
        vocab,
        bias=make_logits((vocab,), dtype, seed=3),
        mask=torch.rand(rows, generator=generator) > 0.3,
        temperature_rows=(torch.rand(rows, generator=generator) + 0.5).to(wide),
        softcap=20.0,
        valid_vocab=vocab - 5,
    )
    check_against_reference(logits, spec)
    check_against_reference(logits, spec._replace(bias=None, softcap=0.0))


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 63, 64, 65, 4095, 4097])
def test_every_tail_length(isa, vocab):
    check_against_reference(make_logits((2, 3, vocab), torch.float32), make_spec(6, vocab))
    check_against_reference(make_logits((2, 3, vocab), torch.bfloat16), make_spec(6, vocab))


def test_no_rows(isa):
    logits = torch.empty(1, 0, 50)
    upstream = make_upstream(0, torch.float32)
    assert all(r.shape == (0,) for r in cpu.loss(logits, make_spec(0, 50), upstream, (), logits))


def certain_rows(vocab):
    """Rows whose entropy runs from about 1e-9 to log V: one logit leads the rest by `lead`."""
    lead = torch.linspace(0, 36, 40, dtype=torch.float64)
    logits = make_logits((40, vocab), torch.float64, seed=5, scale=0.5)
    logits[:, vocab // 3] = lead
    return logits.float()[None]


def test_near_certain_rows_keep_relative_accuracy(isa):
    vocab = 20_000
    logits = certain_rows(vocab)
    spec = make_spec(40, vocab)
    upstream = Upstream(entropy=torch.ones(40))
    (*_, entropy), grad = reference_loss(logits, spec, upstream, ("entropy",))
    assert entropy.min() < 1e-9 and entropy.max() > 0.95 * math.log(vocab)
    out = torch.empty_like(logits)
    *_, actual = cpu.loss(logits, spec, upstream, ("entropy",), out)
    assert ((actual.double() - entropy) / entropy).abs().max() < 1e-6
    per_row = (out.double() - grad).norm(dim=-1) / grad.norm(dim=-1)
    assert per_row.max() < 2e-6


def test_gradient_sums_to_zero(isa):
    logits = make_logits((1, 8, 30_000), torch.float32, scale=2.0)
    for field in ("entropy", "logprob"):
        out = torch.empty_like(logits)
        upstream = Upstream(**{field: torch.ones(8)})
        cpu.loss(logits, make_spec(8, 30_000), upstream, (), out)
        assert (out.double().sum(-1).abs() / out.double().abs().sum(-1)).max() < 1e-6


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_shifted_rows_are_exact(isa, shift):
    logits = make_logits((1, 4, 5000), torch.float32).round()
    spec = make_spec(4, 5000)
    shifted = cpu.stats(logits + shift, spec, ("entropy", "logprob"))[3:]
    for a, b in zip(shifted, cpu.stats(logits, spec, ("entropy", "logprob"))[3:]):
        assert same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 10.0])
@pytest.mark.parametrize("vocab", [40, 9000])
def test_excluded_nan_and_infinite_logits(isa, dtype, softcap, vocab):
    logits = make_logits((1, 8, vocab), dtype)
    inf = math.inf
    spec = make_spec(8, vocab, softcap=softcap)
    spec.target[:] = 3
    logits[0, 0, ::2] = -inf  # half of the row excluded, the target (3) not
    logits[0, 1, 3] = -inf  # the target excluded
    logits[0, 2, 5] = math.nan
    logits[0, 3, 5] = inf
    logits[0, 4] = -inf
    logits[0, 5, : vocab // 2] = -inf  # whole blocks excluded
    logits[0, 6] = math.nan
    logits[0, 7, 1:] = -inf  # one token left
    check_against_reference(logits, spec)
    rows = dict(zip(NAMES, cpu.stats(logits, spec, OUTPUTS)))
    assert rows["entropy"].isnan().tolist() == [False, False, True, True, True, False, True, False]
    assert rows["logprob"][1] == -inf
    assert rows["entropy"][7] == 0 and rows["max_prob"][7] == 1
    out = torch.empty_like(logits)
    cpu.loss(logits, spec, make_upstream(8, dtype), (), out)
    assert (out[0, 0, ::2] == 0).all() and (out[0, 5, 4 : vocab // 2] == 0).all()


@pytest.mark.parametrize("position", [0, 4000, 4999])
def test_a_lone_nan_among_excluded_logits_is_seen(isa, position):
    logits = torch.full((1, 1, 5000), -math.inf)
    logits[0, 0, 2500] = 1.0
    logits[0, 0, position] = math.nan
    assert cpu.stats(logits, RowSpec(valid_vocab=5000), ("entropy",))[3].isnan().all()


def test_masked_rows_are_not_read_and_padding_gets_zeros(isa):
    logits = make_logits((1, 3, 100), torch.float32)
    logits[0, 1] = math.nan
    logits[0, :, 90:] = math.nan
    spec = make_spec(3, 100, valid_vocab=90, mask=torch.tensor([True, False, True]))
    spec.target[1] = -100
    out = torch.full_like(logits, math.nan)
    rows = cpu.loss(logits, spec, make_upstream(3, torch.float32), OUTPUTS, out)
    assert all(row[1] == 0 and row.isfinite().all() for row in rows)
    assert (out[0, 1] == 0).all() and (out[0, :, 90:] == 0).all() and out.isfinite().all()


def test_ties_take_the_first_maximum(isa):
    for first, second in ((3, 17), (100, 5000), (4095, 4096)):
        logits = torch.zeros(1, 2, 9000)
        logits[0, :, [first, second]] = 2.0
        spec = RowSpec(target=torch.tensor([first, second]), valid_vocab=9000)
        assert cpu.stats(logits, spec, ("is_top1",))[3].tolist() == [1, 0]
    check_against_reference(torch.zeros(1, 3, 5000), make_spec(3, 5000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads_or_rows(isa, dtype, threads):
    rows, vocab = 20, 13_000
    logits = make_logits((1, rows, vocab), dtype)
    spec, upstream = make_spec(rows, vocab), make_upstream(rows, dtype)

    def run(part):
        out = torch.full_like(logits[:, part], math.nan)
        part_spec = spec._replace(target=spec.target[part])
        part_upstream = Upstream(*(g[part].clone() for g in upstream))
        return [*cpu.loss(logits[:, part], part_spec, part_upstream, OUTPUTS, out), out[0]]

    threads(1)
    whole = run(slice(None))
    for count, part in ((2, slice(None)), (1, slice(3, 4)), (2, slice(3, 4)), (4, slice(2, 9))):
        threads(count)  # 1 and 7 rows on 2 and 4 threads share the vocabulary of a row
        for a, b in zip(run(part), whole, strict=True):
            assert same_bits(a, b[part].contiguous())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_is_rounded_once_to_nearest_even(isa, dtype):
    logits = make_logits((1, 4, 6000), dtype, scale=1.0)
    spec, upstream = make_spec(4, 6000), make_upstream(4, dtype)
    out, wide = torch.empty_like(logits), torch.empty(logits.shape)
    cpu.loss(logits, spec, upstream, (), out)
    cpu.loss(logits.float(), spec, upstream, (), wide)
    assert same_bits(out, wide.to(dtype))


def test_every_16_bit_value_is_read_and_written_exactly(isa):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = bits.view(dtype)
        x = x[x.isfinite()]
        spec = RowSpec(valid_vocab=1)
        got = cpu.stats(x.view(1, -1, 1), spec, ())[0]
        assert torch.equal(got, x.float())
        # One token with p = 1 and lse weight g has gradient g: every value goes through the store.
        out = torch.empty(1, x.numel(), 1, dtype=dtype)
        cpu.loss(torch.zeros_like(out), spec, Upstream(lse=x.float()), (), out)
        assert torch.equal(out.view(-1), x)


def test_levels_agree():
    logits, spec = make_logits((1, 6, 9000), torch.float32), make_spec(6, 9000)
    before = cpu.get_isa()
    results = []
    for level in LEVELS:
        cpu.set_isa(level)
        results.append(cpu.stats(logits, spec, OUTPUTS))
    cpu.set_isa(before)
    for rows in results[1:]:
        assert torch.equal(rows[0], results[0][0])
        for a, b in zip(rows, results[0]):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_levels_are_named_and_checked():
    assert LEVELS[-1] == "portable"
    assert cpu.build_info()["isa"] == cpu.get_isa() and cpu.build_info()["compiler"]
    with pytest.raises(ValueError, match="isa must be one of"):
        cpu.set_isa("mmx")


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("rows, width, vocab", [(1, 5, 9), (7, 130, 200), (64, 128, 64)])
def test_add_product_does_not_round_the_product(rows, width, vocab, add):
    g = make_logits((rows, vocab + 3), torch.bfloat16)[:, :vocab]
    x = make_logits((rows, width), torch.bfloat16, seed=1)
    total = make_logits((vocab, width), torch.float32, seed=2)
    expected = add * total.double() + g.double().T @ x.double()
    if not add:
        total.fill_(math.nan)
    if not cpu.add_product(total, g, x, add):
        pytest.skip("no bfloat16 product into float32 on this processor")
    assert relative_error(total, expected) < 1e-6


def test_bad_arguments_are_refused():
    logits = torch.zeros(1, 2, 10)
    with pytest.raises(ValueError, match="unknown name 'nope'"):
        cpu.stats(logits, RowSpec(valid_vocab=10), ("nope",))
    with pytest.raises(ValueError, match="valid_vocab"):
        cpu.stats(logits, RowSpec(valid_vocab=11), ())
    with pytest.raises(ValueError, match="unit last stride"):
        cpu.stats(logits.transpose(1, 2), RowSpec(valid_vocab=2), ())
    with pytest.raises(TypeError, match="floating point"):
        cpu.stats(logits.int(), RowSpec(valid_vocab=10), ())
    with pytest.raises(ValueError, match="g_logprob needs a target"):
        upstream = Upstream(logprob=torch.ones(2))
        cpu.loss(logits, RowSpec(valid_vocab=10), upstream, (), logits)


def test_memory_of_a_freed_gradient_serves_the_next():
    cpu.release_memory()
    first = cpu.empty((64, 40_000), torch.float32)
    place = first.data_ptr()
    second = cpu.empty((64, 40_000), torch.float32)
    assert second.data_ptr() != place, "a block in use was given out"
    del first
    smaller = cpu.empty((2, 30, 40_000), torch.float32)
    assert smaller.data_ptr() == place and smaller.is_contiguous()
    assert smaller.fill_(1).sum() == smaller.numel()
    del smaller
    tiny = cpu.empty((3, 5), torch.bfloat16)
    assert tiny.shape == (3, 5) and tiny.dtype == torch.bfloat16 and tiny.data_ptr() != place
    cpu.release_memory()


def test_the_memory_of_three_freed_tensors_is_kept():
    """The smallest block that is large enough is given out, the one freed first is given up."""
    cpu.release_memory()
    sizes = (100_000, 200_000, 250_000, 300_000)
    held = [cpu.empty((30, size), torch.float32) for size in sizes]
    places = [x.data_ptr() for x in held]
    while held:
        held.pop(0)
    assert cpu.empty((30, 100_000), torch.float32).data_ptr() == places[1]
    assert cpu.empty((30, 190_000), torch.float32).data_ptr() == places[1]
    again = [cpu.empty((30, size), torch.float32) for size in (300_000, 240_000)]
    assert [x.data_ptr() for x in again] == [places[3], places[2]]
    del again
    cpu.release_memory()


@pytest.mark.skipif(not STATM.exists(), reason="the system does not say what is resident")
def test_memory_that_no_step_wants_is_given_up():
    """A block is kept until sixteen others have been freed after it."""

    def resident():
        return int(STATM.read_text().split()[1]) * mmap.PAGESIZE

    def steps(count):
        for _ in range(count):
            cpu.empty((30, 100_000), torch.float32)  # and frees it

    cpu.release_memory()
    steps(1)
    cpu.empty((30, 900_000), torch.float32).fill_(0)  # 108 MB
    kept = resident()
    steps(16)
    assert kept - resident() < 50e6
    steps(1)
    assert kept - resident() > 80e6
    cpu.release_memory()


def test_gradients_of_two_steps_do_not_share_memory():
    x = torch.randn(64, 40_000, requires_grad=True)
    grads = [torch.autograd.grad(entropy_loss(x * k, impl="cpu"), x)[0] for k in (1.0, 2.0)]
    expected = [
        torch.autograd.grad(entropy_loss(x * k, impl="reference"), x)[0] for k in (1.0, 2.0)
    ]
    for found, want in zip(grads, expected):
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(("rows", "columns"), ((0, 5), (7, 0)))
def test_an_empty_product_is_left_to_torch(rows, columns):
    """A shard without entries, a chunk of which no column is kept."""
    total = torch.ones(columns, 4)
    grad_logits, x = torch.ones(rows, columns).bfloat16(), torch.ones(rows, 4).bfloat16()
    assert not cpu.add_product(total, grad_logits, x, add=True)
    assert (total == 1).all()
