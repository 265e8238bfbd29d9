"""The CPU kernels take the maximum off before they multiply: logits of any size or temperature."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("em_kernels._C")
from backends.test_cpu_kernels import at_level, cpu, make_upstream
from contract.closeness import check_gradient, check_row, true_gradient, true_rows
from helpers import same_bits

from em_kernels.backends.interface import RowSpec, Saved, Upstream
from em_kernels.backends.pair import Divergence, PairOut, PairWeights, Side

VOCAB = 5003  # two blocks, and a rest
MOMENTS = ("logit_mean", "logit_var", "logit_skew", "self_certainty")
SCALES = [(0.5, 1.0), (1.0, 2.0), (0.7, -1.3), (1e-3, 1.0), (1e3, -0.02)]  # T, logit_scale
each_scale = pytest.mark.parametrize("temperature, logit_scale", SCALES)
WIDTH = {"1": {}, "T of rows": {"temperature_rows": torch.tensor([0.5, 0.3, 0.7, 1.0, 2.0])}}


@pytest.fixture(params=cpu.isa_levels())
def isa(request):
    with at_level(request.param) as level:
        yield level


def huge_rows(dtype):
    """Finite, and most of them infinite when they are multiplied; near the maximum, near it."""
    torch.manual_seed(0)
    x = torch.randn(5, VOCAB, dtype=torch.float64)
    x[0] = (x[0] * 1e38).clamp(-3e38, 3e38)
    x[1] = 3e38
    x[1, ::2] = -3e38
    x[2] = x[2] / 8 + 2.5e38
    x[3] = x[3] * 3e30 - 3e38
    x[4, :9] = torch.tensor([-math.inf, 3e38, -3e38, 0.0, 1e-44, -1e-40, 3e38, -math.inf, 1.0])
    return x.to(dtype)[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_scale
def test_finite_logits_have_the_softmax_they_have(isa, dtype, temperature, logit_scale):
    x = huge_rows(dtype)
    spec = RowSpec(
        target=torch.tensor([5, 1, VOCAB - 1, 7, 6]), temperature=temperature,
        logit_scale=logit_scale, valid_vocab=VOCAB,
    )  # fmt: skip
    upstream, out = make_upstream(5, dtype), torch.empty_like(x)
    names = ("entropy", "max_prob", "is_top1", "varentropy", "collision")
    want = true_rows(x, spec, names)
    rows = cpu.loss(x, spec, upstream, names, out)
    for name, row in zip(names, rows[len(Saved._fields) :], strict=True):
        check_row(row, want[name], 1e-5, name=name)
    check_gradient(out, true_gradient(x, spec, upstream))
    parts = cpu.new_parts(5)
    block = cpu.part_entries
    cpu.part_stats(x[..., :block], spec._replace(valid_vocab=block), names, parts, 0)
    rest = spec._replace(valid_vocab=VOCAB - block)
    in_parts = cpu.part_stats(x[..., block:], rest, names, parts, block)
    assert all(map(same_bits, in_parts, rows))


@pytest.mark.parametrize("width", WIDTH)
def test_the_maximum_is_in_units_of_the_logits_and_lse_in_those_of_z(isa, width):
    x = torch.linspace(-3, 7, 5 * 40).view(1, 5, 40)
    spec = RowSpec(temperature=0.7, logit_scale=-2.0, valid_vocab=40, **WIDTH[width])
    top, log1p_r, _, lse = cpu.stats(x, spec, ("lse",))
    assert torch.equal(top, -x[0].amin(-1))
    c = 2 / spec.temperature_rows if width != "1" else 2 / 0.7
    torch.testing.assert_close(lse, c * top + log1p_r)
    capped = spec._replace(softcap=5.0)
    want = 5 * torch.tanh(x[0].amin(-1) * -2 / 5)
    torch.testing.assert_close(cpu.stats(x, capped, ())[0], want)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan, 1e-39, 1e39])
def test_a_row_whose_factor_is_no_normal_number_is_nan(isa, temperature):
    x, rows = torch.randn(1, 2, 40), torch.tensor([1.0, temperature])
    spec = RowSpec(temperature_rows=rows, valid_vocab=40)
    out = torch.empty_like(x)
    results = cpu.loss(x, spec, Upstream(entropy=torch.ones(2)), ("entropy", "logit_var"), out)
    for row in (*results, out[0]):
        assert row[1].isnan().all() and row[0].isfinite().all()


def spread_rows():
    torch.manual_seed(0)
    n = torch.randn(9, VOCAB, dtype=torch.float64)
    n[0] *= 1e20
    n[1] *= 1e-42
    n[2] = n[2].sign() * 3e38
    n[3, 5] = -1e20
    n[4, 6] = 3e38
    n[5] += 1e6
    n[6] = 1e30 + n[6] * 3e23
    n[7] = n[7].exp() * 1e13
    n[8], n[8, 0] = 0, 1e-45
    n[3, ::7] = -math.inf
    return n.float()[None]


@each_scale
def test_moments_of_logits_of_any_size(isa, temperature, logit_scale):
    x = spread_rows() * math.copysign(1, logit_scale)
    spec = RowSpec(temperature=temperature, logit_scale=logit_scale, valid_vocab=VOCAB)
    rows = dict(zip(MOMENTS, cpu.stats(x, spec, MOMENTS)[3:], strict=True))
    u = x[0].double()
    count = u.isfinite().sum(-1).double()
    mean = u.masked_fill(u.isinf(), 0).sum(-1) / count
    away = (u - mean[:, None]).masked_fill(u.isinf(), 0)
    deviation = (away**2).sum(-1).div(count).sqrt()
    skew = ((away / deviation[:, None]) ** 3).sum(-1) / count * math.copysign(1, logit_scale)
    c = logit_scale / temperature
    check_row(rows["logit_var"], (c * deviation).square().float(), 1e-3, 1e-38, "logit_var")
    check_row(rows["logit_skew"], skew, 1e-3, 1e-2, "logit_skew")
    check_row(rows["logit_mean"], (c * mean).float(), 1e-5, 0, "logit_mean")
    z = c * u
    certainty = z.logsumexp(-1) - c * mean - count.log()
    check_row(rows["self_certainty"], certainty.float(), 1e-4, 1e-2, "self_certainty")


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js"])
@pytest.mark.parametrize("shift", [0.0, 2.0**127])
def test_a_pair_of_huge_rows_that_are_alike(isa, kind, shift):
    """The rows differ in a few steps of a float near 1e38, and by a shift that no float holds."""
    torch.manual_seed(0)
    x = (torch.randn(1, 4, VOCAB) * 8).round() * 2.0**106
    other = x + shift
    other[..., :9] += 2.0**106
    x = x - shift
    spec = RowSpec(temperature=2.0**105, logit_scale=0.5, valid_vocab=VOCAB)
    own, theirs = Side(x, spec), Side(other, spec)
    weights, out = PairWeights(torch.ones(4), torch.ones(4)), [torch.empty_like(x) for _ in "pq"]
    divergence = Divergence(kind, 0.3)
    rows = cpu.divergence_loss(own, theirs, divergence, weights, PairOut(*out), (), ())
    z, w = (side[0].double() / 2.0**106 for side in (x, other))
    p, q = (torch.log_softmax(v, -1) for v in (z, w))
    mixed = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(kind, 0.3)
    m = torch.logaddexp(p + math.log1p(-mixed), q + math.log(mixed)) if 0 < mixed < 1 else None
    m = m if m is not None else (q if mixed else p)
    check_row(rows[5], (p.exp() * (p - m)).sum(-1), 1e-4, 1e-9, "own_kl")
    check_row(rows[6], (q.exp() * (q - m)).sum(-1), 1e-4, 1e-9, "other_kl")
    assert all(g.isfinite().all() for g in out)


def test_levels_above_which_are_counted_are_in_units_of_the_logits(isa):
    x = huge_rows(torch.float32)[:, :3]
    spec = RowSpec(temperature=0.5, logit_scale=-1.0, valid_vocab=VOCAB)
    levels = -x[0, :, 7:9].contiguous()
    top = -x[0].amin(-1)
    counts, sums = cpu.above(x, spec, levels, top)
    over = -x[0, :, None, :] > levels[:, :, None]
    assert torch.equal(counts, over.sum(-1))
    e = ((-x[0].double() - top.double()[:, None]) * 2).exp()
    check_row(sums, torch.where(over, e[:, None, :], 0).sum(-1), 1e-5, name="sums")
