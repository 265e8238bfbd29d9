"""16-bit gradients of float32 logits on the CPU, beside or over them: the wide ones rounded."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("em_kernels._C")
from backends.test_cpu_kernels import at_level, cpu
from helpers import same_bits

from em_kernels.backends.interface import RowSpec, Saved, Upstream
from em_kernels.backends.pair import Divergence, PairOut, PairSaved, PairWeights, Side

INF = math.inf
BLOCK = cpu.part_entries
PLACES = ("beside", "over")
each_narrow = pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
each_kind = pytest.mark.parametrize(
    "options", [{}, {"logit_scale": -0.7}, {"softcap": 9.0, "bias": True}], ids=str
)


@pytest.fixture(params=cpu.isa_levels())
def isa(request):
    with at_level(request.param) as level:
        yield level


@pytest.fixture(params=[1, 8])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def rows_of(vocab, options):
    """Five rows, one masked and one with a NaN, of which the last two columns are padding."""
    torch.manual_seed(0)
    x = 3 * torch.randn(1, 5, vocab)
    x[0, 1, vocab // 3] = math.nan
    bias = torch.randn(vocab) if options.get("bias") else None
    spec = RowSpec(
        bias,
        torch.arange(5) * (vocab - 3) // 4,
        torch.tensor([True, True, False, True, True]),
        valid_vocab=vocab - 2,
        softcap=options.get("softcap", 0.0),
        logit_scale=options.get("logit_scale", 1.0),
    )
    return x, spec


def place(x, narrow, where):
    """(logits, where their gradient goes)."""
    x = x.clone()
    if where == "over":
        return x, x.view(narrow)[..., : x.shape[-1]]
    return x, torch.full_like(x, math.nan, dtype=narrow)


@each_narrow
@each_kind
@pytest.mark.parametrize("vocab", [6, 70, 1030, 3 * BLOCK + 77])
def test_a_narrow_gradient_is_the_wide_one_rounded(isa, threads, narrow, options, vocab):
    logits, spec = rows_of(vocab, options)
    upstream = Upstream(*torch.rand(3, 5))
    wide = torch.full_like(logits, math.nan)
    rows = cpu.loss(logits, spec, upstream, ("entropy",), wide)
    assert wide[0, 0].ne(0).any()
    for where in PLACES:
        x, out = place(logits, narrow, where)
        found = cpu.loss(x, spec, upstream, ("entropy",), out)
        assert same_bits(out, wide.to(narrow)), where
        for own, want in zip(found, rows, strict=True):
            assert same_bits(own, want)
        x, out = place(logits, narrow, where)
        cpu.grad(x, spec, Saved(*rows[:3]), upstream, out)
        assert same_bits(out, wide.to(narrow)), where


@each_narrow
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js"])
def test_so_are_those_of_a_divergence(isa, narrow, kind):
    torch.manual_seed(1)
    own = 3 * torch.randn(1, 4, BLOCK + 33)
    other = own + torch.randn(own.shape)
    own[0, 0, 7] = other[0, 1, -9] = -INF
    own[0, 2, 0] = math.nan
    spec, weights = RowSpec(valid_vocab=own.shape[-1] - 2), PairWeights(*torch.rand(2, 4))
    wide = PairOut(torch.empty_like(own), torch.empty_like(own))
    sides, divergence = (Side(own, spec), Side(other, spec)), Divergence(kind)
    rows = cpu.divergence_loss(*sides, divergence, weights, wide, (), ())
    for dtype in (torch.float32, narrow):
        for where in PLACES:
            (x, out), (y, other_out) = (place(logits, dtype, where) for logits in (own, other))
            places = Side(x, spec), Side(y, spec)
            cpu.divergence_grad(
                *places, PairSaved(*rows), divergence, weights, PairOut(out, other_out)
            )
            assert same_bits(out, wide.own.to(dtype)), where
            assert same_bits(other_out, wide.other.to(dtype)), where


def test_other_dtypes_are_refused():
    logits, spec = rows_of(64, {})
    saved = Saved(*cpu.stats(logits, spec, ()))
    for x, dtype in ((logits, torch.float64), (logits.bfloat16(), torch.float16)):
        with pytest.raises(ValueError, match=r"or 16 bits for float32 ones, got .* (Double|Half)"):
            cpu.grad(x, spec, saved, Upstream(None, torch.rand(5), None), x.to(dtype))
