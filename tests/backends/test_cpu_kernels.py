"""The compiled CPU kernels: the contract at every instruction set, and what is theirs alone."""

from __future__ import annotations

import math
import mmap
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytest.importorskip("em_kernels._C")
from contract import Contract, Subject
from contract.closeness import true_gradient, true_rows
from helpers import error, same_bits

from em_kernels import entropy_loss, linear_entropy_loss
from em_kernels.backends.cpu import Cpu
from em_kernels.backends.interface import ROW_OUTPUTS, RowSpec, Upstream

cpu = Cpu()
LEVELS = cpu.isa_levels()
STATM = Path("/proc/self/statm")


@contextmanager
def at_level(level):
    before = cpu.get_isa()
    cpu.set_isa(level)
    yield level
    cpu.set_isa(before)


@pytest.fixture(params=LEVELS)
def isa(request):
    with at_level(request.param) as level:
        yield level


@pytest.fixture(autouse=True)
def threads():
    """One thread, for speed on these sizes, unless the test asks for others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


class TestCpu(Contract):
    IMPLS, LONG = tuple(LEVELS), 9001
    LENGTHS = (1, 2, 15, 16, 17, 37, 63, 64, 65, 4095, 4096, 4097)
    PLACES = (0, 17, 4095, 4096, 9000)

    @pytest.fixture
    def subject(self, impl):
        with at_level(impl):
            yield Subject(cpu, fused=True, on_gpu=False)


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
    entropy = true_rows(logits, spec, ("entropy",))["entropy"]
    grad = true_gradient(logits, spec, upstream)
    assert entropy.min() < 1e-9 and entropy.max() > 0.95 * math.log(vocab)
    out = torch.empty_like(logits)
    *_, actual = cpu.loss(logits, spec, upstream, ("entropy",), out)
    assert ((actual.double() - entropy) / entropy).abs().max() < 1e-6
    per_row = (out.double() - grad).norm(dim=-1) / grad.norm(dim=-1)
    assert per_row.max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads_or_rows(isa, dtype, threads):
    rows, vocab = 20, 13_000
    logits = make_logits((1, rows, vocab), dtype)
    spec, upstream = make_spec(rows, vocab), make_upstream(rows, dtype)

    def run(part):
        out = torch.full_like(logits[:, part], math.nan)
        part_spec = spec._replace(target=spec.target[part])
        part_upstream = Upstream(*(g[part].clone() for g in upstream))
        return [*cpu.loss(logits[:, part], part_spec, part_upstream, ROW_OUTPUTS, out), out[0]]

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
        results.append(cpu.stats(logits, spec, ROW_OUTPUTS))
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
    assert error(total, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows, width, vocab", [(1, 2, 9), (70, 130, 300), (64, 128, 128)])
def test_product_does_not_round_the_logits(rows, width, vocab, dtype):
    x = make_logits((rows, width + 2), dtype)[:, :width]
    weight = make_logits((vocab, width), dtype, seed=1)
    out = torch.full((rows, vocab + 3), math.nan)
    if not cpu.product(out[:, :vocab], x, weight):
        pytest.skip(f"no {dtype} product into float32 on this processor")
    assert error(out[:, :vocab], x.double() @ weight.double().T) < 1e-6
    assert out[:, vocab:].isnan().all()


def test_a_product_that_is_not_at_hand_is_left_to_the_caller():
    x, weight = torch.ones(2, 4), torch.ones(3, 4)
    assert not cpu.product(torch.empty(2, 3), x, weight)
    odd = x.bfloat16()[:, :3], weight.bfloat16()[:, :3]
    assert not cpu.product(torch.empty(2, 3), *odd)
    assert not cpu.product(torch.empty(2, 0), x.bfloat16(), weight.bfloat16()[:0])
    with pytest.raises(ValueError, match="do not fit"):
        cpu.product(torch.empty(2, 2), x.bfloat16(), weight.bfloat16())


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


@pytest.mark.parametrize(
    "options", ({"chunk_tokens": 7}, {"logits_dtype": torch.float32}), ids=("dW", "logits")
)
def test_onednn_may_be_switched_off_and_on_between_calls(options):
    """Its block product, in the sum of dW over chunks and of float32 logits, refuses then."""
    given = [make_logits((n, 16), torch.bfloat16, seed=n).requires_grad_() for n in (20, 64)]
    found = []
    for enabled in (True, False, True, False):
        with torch.backends.mkldnn.flags(enabled=enabled, allow_tf32=None):
            loss = linear_entropy_loss(*given, impl="cpu", **options)
            found.append(torch.autograd.grad(loss, given))
    for first, second in (found[::2], found[1::2]):
        assert all(map(same_bits, first, second))
    for on, off in zip(*found[:2], strict=True):
        assert error(off, on) < 2e-2
