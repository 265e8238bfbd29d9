"""The kernels of divergences by themselves, against the definition in float64."""

import math

import pytest
import torch
from divergences import KIND_NAMES, KINDS, draw_pair
from helpers import DTYPES, same_bits

from em_kernels.backends import divergence as definition
from em_kernels.backends.interface import RowSpec
from em_kernels.backends.pair import Divergence, PairOut, PairSaved, PairWeights, Side
from em_kernels.backends.reference import Reference

cpu = pytest.importorskip("em_kernels.backends.cpu")
pytest.importorskip("em_kernels._C")
CPU = cpu.Cpu()
EVERY_KIND = pytest.mark.parametrize(("kind", "beta"), KINDS, ids=KIND_NAMES)
LENGTHS = (1, 2, 15, 17, 63, 64, 65, 1023, 1024, 1025, 4099)
GRADIENT_BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3}


@pytest.fixture(params=CPU.isa_levels())
def isa(request):
    before = CPU.get_isa()
    CPU.set_isa(request.param)
    yield request.param
    CPU.set_isa(before)


def specs(vocab, options):
    own = RowSpec(valid_vocab=vocab)
    if options == "plain":
        return own, own
    bias = torch.linspace(-1, 1, vocab, dtype=torch.float64)
    mask, rows = torch.tensor([1, 1, 0, 1, 1]) > 0, torch.linspace(0.5, 2, 5, dtype=torch.float64)
    if options == "scaled":
        return own._replace(mask=mask, temperature=0.7), own._replace(mask=mask, temperature=0.7)
    capped = own._replace(mask=mask, bias=bias, softcap=3.0, logit_scale=1.5)
    return capped, own._replace(mask=mask, temperature_rows=rows)


def run(backend, x, y, specs, kind, dtype):
    """[saved], [own gradient, other gradient] of a loss."""
    own, other = (Side(v.to(dtype)[None], spec) for v, spec in zip((x, y), specs, strict=True))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.linspace(0.5, 2, len(x), dtype=wide)
    out = PairOut(torch.empty_like(own.logits), torch.empty_like(other.logits))
    given = PairWeights(weights, weights.flip(0))
    rows = definition.loss(backend, own, other, kind, given, out)
    return PairSaved(*rows), (own, other, given, out)


def close(ours, theirs, bound):
    """Relative to the largest, or to probabilities: of fewer entries than ten much cancels."""
    return (ours - theirs).abs().max() < bound * theirs.abs().max().clamp(min=0.5)


@EVERY_KIND
@pytest.mark.parametrize("options", ("plain", "scaled", "capped"))
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float16], ids=str)
def test_every_length_at_every_instruction_set(isa, kind, beta, options, dtype):
    for vocab in LENGTHS:
        x, y = (v.to(dtype).double() for v in draw_pair(5, vocab, apart=4.0))
        if vocab > 64:
            x[0, 60] = y[0, 60] = -math.inf
        given = specs(vocab, options)
        asked = Divergence(kind, beta)
        saved, (own, other, weights, out) = run(CPU, x, y, given, asked, dtype)
        expected, (*_, made) = run(Reference(), x, y, given, asked, torch.float64)
        value, truth = saved.value(asked), expected.value(asked)
        assert close(value, truth, 1e-12 if dtype == torch.float64 else 3e-6)
        assert close(saved.gap, expected.gap, 1e-6)
        for ours, theirs in zip(out, made, strict=True):
            assert close(ours, theirs, GRADIENT_BOUND[dtype])
        again = PairOut(*map(torch.empty_like, out))
        definition.grad(CPU, own, other, saved, asked, weights, again)
        assert all(map(same_bits, again, out))
        sums = CPU.divergence_sums(own, other, saved, asked)
        assert sums.shape == (3, 5) and sums[2].abs().max() < 1e-6


def test_bits_depend_neither_on_threads_nor_on_other_rows(isa):
    x, y = draw_pair(9, 5000)
    asked, given = Divergence("js", 0.3), (RowSpec(valid_vocab=4990),) * 2
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(run(CPU, x, y, given, asked, torch.float32))
    torch.set_num_threads(before)
    (saved, (*_, out)), (again, (*_, repeated)) = results
    assert all(map(same_bits, saved, again)) and all(map(same_bits, out, repeated))
    assert all((g[..., 4990:] == 0).all() for g in out)
    alone, _ = run(CPU, x[4:6], y[4:6], given, asked, torch.float32)
    assert all(same_bits(a, b[4:6]) for a, b in zip(alone, saved, strict=True))


def test_gradients_may_lie_over_the_logits(isa):
    x, y = draw_pair(3, 1500)
    asked, given = Divergence("reverse_kl"), (RowSpec(valid_vocab=1500),) * 2
    saved, (own, other, weights, out) = run(CPU, x, y, given, asked, torch.float32)
    over = PairOut(own.logits, other.logits)
    definition.grad(CPU, own, other, saved, asked, weights, over)
    assert all(map(same_bits, over, out))
