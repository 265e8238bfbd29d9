"""The Triton kernels of divergences, against the definition."""

import math

import pytest
import torch
from divergences import draw_pair
from helpers import ON_CPU, SLOW_INTERPRETER

from em_kernels.backends import divergence as definition
from em_kernels.backends.interface import RowSpec
from em_kernels.backends.pair import Divergence, PairOut, PairSaved, PairWeights, Side
from em_kernels.backends.reference import Reference

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif("triton" not in ON_CPU and SLOW_INTERPRETER, reason="no Triton")
ASKED = (Divergence("forward_kl"), Divergence("reverse_kl"), Divergence("js", 0.3))
VOCAB = 70


def draw(dtype, device, *, odd=False):
    """Two sides of four rows: plain, excluded entries, masked, a NaN."""
    x, y = draw_pair(4, VOCAB + 3, apart=4.0, device=device)
    x[1, ::3] = y[1, ::3] = -math.inf
    x[3, 5], x[2] = math.nan, math.nan
    mask = torch.tensor([1, 1, 0, 1], device=device) > 0
    bias = torch.linspace(-1, 1, VOCAB + 3, device=device)
    rows = torch.linspace(0.5, 2, 4, device=device)
    own = RowSpec(valid_vocab=VOCAB, mask=mask, temperature_rows=rows)
    other = own._replace(temperature_rows=None, softcap=5.0, bias=bias, logit_scale=1.5)
    wide = torch.empty(2, 4, VOCAB + 4, dtype=dtype, device=device)
    sides = wide[..., odd : odd + VOCAB + 3].copy_(torch.stack([x, y]))
    return Side(sides[0][None], own), Side(sides[1][None], other)


def run(backend, sides, asked, weights, narrow=False):
    out = PairOut(*(torch.empty_like(side.logits) for side in sides))
    if narrow:
        out = PairOut(*(side.logits.view(torch.bfloat16)[..., : VOCAB + 3] for side in sides))
    rows = definition.loss(backend, *sides, asked, weights, out)
    return PairSaved(*rows), out


@pytest.fixture
def triton():
    from em_kernels.backends.triton.backend import Triton

    return Triton()


@pytest.fixture
def device():
    return "cpu" if SLOW_INTERPRETER else "cuda"


def agree(found, expected, bound):
    assert torch.equal(found.isnan(), expected.isnan())
    difference = (found.float() - expected.float()).nan_to_num().abs().max()
    assert difference <= bound * expected.float().nan_to_num().abs().max().clamp(min=0.5)


@pytest.mark.parametrize("asked", ASKED, ids=str)
@pytest.mark.parametrize("odd", (False, True))
def test_sums_and_gradients(triton, device, asked, odd):
    sides = draw(torch.float32, device, odd=odd)
    weights = PairWeights(torch.rand(4, device=device), torch.rand(4, device=device))
    saved, out = run(triton, sides, asked, weights)
    expected, made = run(Reference(), sides, asked, weights)
    for ours, theirs in zip((*saved, *out), (*expected, *made), strict=True):
        agree(ours, theirs, 3e-6)


@pytest.mark.parametrize("asked", ASKED[1:], ids=str)
def test_narrow_gradients_lie_over_the_logits(triton, device, asked):
    weights = PairWeights(torch.rand(4, device=device), torch.rand(4, device=device))
    sides = draw(torch.float32, device)
    _, made = run(Reference(), sides, asked, weights)
    _, out = run(triton, sides, asked, weights, narrow=True)
    for ours, theirs in zip(out, made, strict=True):
        agree(ours, theirs.bfloat16(), 1e-2)


def test_one_side_and_infinite_divergences(triton, device):
    own, other = draw(torch.bfloat16, device)
    own.logits[0, 0, 3], weights = -math.inf, torch.ones(4, device=device)
    for asked in ASKED:
        for given in (PairWeights(weights, None), PairWeights(None, weights)):
            saved, out = run(triton, (own, other), asked, given)
            expected, made = run(Reference(), (own, other), asked, given)
            assert torch.equal(saved.other_kl.isinf(), expected.other_kl.isinf())
            place = 0 if given.other is None else 1
            agree(out[place], made[place], 1e-2)
