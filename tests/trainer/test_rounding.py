"""Numbers in few bits: neighbours only, right on average, the same for the same seed."""

from __future__ import annotations

import pytest
import torch

from em_kernels.trainer.rounding import BLOCK, dynamic_map, read_codes, round_to, write_codes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_number_becomes_one_of_its_two_neighbours_and_is_right_on_average():
    x = torch.randn(50, generator=generator(1)) * 10.0 ** torch.arange(-25, 25)
    many = x.repeat(4000, 1)
    found = round_to(many, torch.bfloat16, generator())
    assert found.dtype == torch.bfloat16
    toward_zero = (x.view(torch.int32) & -65536).view(torch.float32)
    away = (toward_zero.view(torch.int32) + 65536).view(torch.float32)
    assert ((found == toward_zero) | (found == away)).all()
    gap = (away - toward_zero).abs().double()
    error = (found.double().mean(0) - x.double()).abs() / gap
    assert error.max() < 5 * 0.5 / 4000**0.5


def test_what_bfloat16_has_is_kept_and_other_dtypes_get_the_nearest():
    x = torch.randn(1000, generator=generator()).bfloat16()
    assert torch.equal(round_to(x.float(), torch.bfloat16, generator()), x)
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    same = round_to(odd, torch.bfloat16, generator())
    assert torch.equal(same[:4].view(torch.int16), odd[:4].bfloat16().view(torch.int16))
    assert same[4].isnan()
    assert torch.equal(round_to(x.float() / 3, torch.float16, generator()), (x.float() / 3).half())


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_that_of_the_libraries(signed):
    """Its outer values and its counts a decade, from bitsandbytes' definition."""
    table = dynamic_map(signed)
    assert len(table) == 256 and torch.equal(table, table.sort().values)
    assert table[-1] == 1 and (table == 0).sum() == 1
    for i in range(7):
        low, high = 10.0 ** (i - 7), 10.0 ** (i - 6)
        inside = (table > low) & (table < high)
        assert inside.sum() == 2 ** (i if signed else i + 1)
        assert ((table > -high) & (table < -low)).sum() == (inside.sum() if signed else 0)
    quant = pytest.importorskip("torchao.optim.quant_utils")
    theirs = torch.tensor(quant.create_dynamic_map(signed=signed))
    torch.testing.assert_close(table, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_neighbours_and_right_on_average(signed):
    x = torch.randn(BLOCK + 37, generator=generator(2))
    x = x if signed else x.abs()
    x[5] = 0
    codes, scales = torch.empty(len(x), dtype=torch.uint8), torch.empty(2)
    drawn = generator()
    found = []
    for _ in range(400):
        write_codes(x, codes, scales, signed, drawn)
        found.append(read_codes(codes, scales, signed))
    values, table = torch.stack(found), dynamic_map(signed)
    top = x[:BLOCK].abs().argmax()
    gap = (table.diff().max() * scales).repeat_interleave(BLOCK)[: len(x)]
    assert ((values - x).abs() <= gap).all()
    assert ((values.mean(0) - x).abs() <= 5 * 0.5 * gap / 20 + 1e-6).all()
    assert (values[:, 5] == 0).all()
    torch.testing.assert_close(values[:, top], x[top].expand(400))


def test_a_block_of_zeros_stays_so():
    codes, scales = torch.zeros(10, dtype=torch.uint8), torch.ones(1)
    for signed in (True, False):
        write_codes(torch.zeros(10), codes, scales, signed, generator())
        assert not read_codes(codes, scales, signed).any()
