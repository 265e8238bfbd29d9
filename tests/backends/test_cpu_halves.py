"""16-bit rows on the CPU, summed where they lie: the same maxima and sums as of a float32 copy."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("em_kernels._C")
from backends.test_cpu_kernels import at_level, cpu
from contract.closeness import check_row, true_rows
from helpers import same_bits

from em_kernels.backends.interface import ROW_OUTPUTS, RowSpec

INF, NAN = math.inf, math.nan
BLOCK = cpu.part_entries
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
each_scale = pytest.mark.parametrize("logit_scale", [1.0, -1.0, 0.7, -1.7])


@pytest.fixture(params=cpu.isa_levels())
def isa(request):
    with at_level(request.param) as level:
        yield level


@each_dtype
@each_scale
@pytest.mark.parametrize("vocab", [1, 31, 64, 129, BLOCK, BLOCK + 65])
def test_rows_near_and_far(isa, dtype, logit_scale, vocab):
    """Near the maximum throughout, and with entries beyond where e^d is a number."""
    torch.manual_seed(0)
    x = torch.randn(1, 4, vocab)
    x[0, 1] *= 40
    x[0, 2, ::3] = -INF * logit_scale
    x[0, 2, -1] = x[0, 3, vocab // 2] = 9 * logit_scale
    x = x.to(dtype)
    spec = RowSpec(target=torch.arange(4) % vocab, logit_scale=logit_scale, valid_vocab=vocab)
    names = ("entropy", "logprob", "is_top1", "varentropy", "collision")
    rows = dict(zip(names, cpu.stats(x, spec, names)[3:], strict=True))
    want = true_rows(x, spec, names)
    for name, row in rows.items():
        check_row(row, want[name], 4e-6, 1e-3 if name == "varentropy" else 1e-12, name)
    wide = cpu.stats(x.float(), spec, ("entropy",))
    assert same_bits(cpu.stats(x, spec, ())[0], wide[0])


@each_dtype
@each_scale
def test_zeros_of_both_signs_are_equal(isa, dtype, logit_scale):
    x = torch.full((1, 2, 200), -3.0 * math.copysign(1, logit_scale), dtype=dtype)
    x[0, 0, 70], x[0, 0, 130] = -0.0, 0.0
    x[0, 1, 70], x[0, 1, 130] = 0.0, -0.0
    for target, first in ((70, 1.0), (130, 0.0)):
        spec = RowSpec(target=torch.tensor([target] * 2), logit_scale=logit_scale, valid_vocab=200)
        is_top1, max_prob = cpu.stats(x, spec, ("is_top1", "max_prob"))[3:]
        assert is_top1.tolist() == [first] * 2 and (max_prob < 0.5).all()


@each_dtype
@each_scale
@pytest.mark.parametrize("value", [NAN, -NAN, INF])
@pytest.mark.parametrize("place", [0, BLOCK - 1, BLOCK, BLOCK + 36])
def test_a_nan_or_an_infinity_makes_its_row_nan(isa, dtype, logit_scale, value, place):
    x = torch.randn(1, 3, BLOCK + 37).to(dtype)
    x[0, 1, place] = math.copysign(1, logit_scale) * value
    if math.copysign(1, value) < 0:
        x.view(torch.int16)[0, 1, place] |= -(2**15)
    spec = RowSpec(target=torch.zeros(3, dtype=torch.int64), logit_scale=logit_scale)
    rows = cpu.stats(x, spec._replace(valid_vocab=x.shape[-1]), ROW_OUTPUTS)
    assert all(row[1].isnan() and row[[0, 2]].isfinite().all() for row in rows)


@each_dtype
def test_a_block_without_a_finite_entry_adds_nothing(isa, dtype):
    x = torch.full((1, 2, 3 * BLOCK), -INF, dtype=dtype)
    x[0, 0, BLOCK + 5] = 3.0
    spec = RowSpec(valid_vocab=3 * BLOCK)
    top, log1p_r, _, entropy = cpu.stats(x, spec, ("entropy",))
    assert (top[0], log1p_r[0], entropy[0]) == (3, 0, 0) and entropy[1].isnan()
