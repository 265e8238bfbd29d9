"""The compiled CPU kernels with several threads: of their own, and of their callers."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("em_kernels._C")
from contract.closeness import outputs_of
from contract.subject import DTYPES, Subject
from helpers import same_bits

from em_kernels.backends import divergence
from em_kernels.backends.cpu import Cpu
from em_kernels.backends.interface import RowSpec
from em_kernels.backends.pair import Divergence, PairOut, PairWeights, Side

CPU = Cpu()
SUBJECT = Subject(CPU, fused=True, on_gpu=False)
# Rows shared out whole, and cut in blocks: see `run` and `run_blocks` in csrc/cpu/rows.h.
SHAPES = ((33, 1500), (3, 20_000))
# `Kind::Plain`, `Negated` and `General` of csrc/cpu/math.h; 16-bit rows of the first two are read
# where they lie, of the second here farther than e^d reaches.
KINDS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "negated": {"logit_scale": -30.0},
    "softcap": {"softcap": 20.0},
}


@pytest.fixture(params=CPU.isa_levels())
def isa(request):
    before = CPU.get_isa()
    CPU.set_isa(request.param)
    yield request.param
    CPU.set_isa(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def case(rows: int, vocab: int, dtype: torch.dtype, kind: str):
    torch.manual_seed(rows)
    mask = torch.arange(rows) % 5 != 1
    return SUBJECT.make(rows, vocab, dtype, mask=mask, valid_vocab=vocab - 3, **KINDS[kind])


def everything(x, spec, upstream) -> list[torch.Tensor]:
    """What each kernel makes of these rows."""
    levels = torch.linspace(-3, 3, 4).to(upstream.entropy.dtype).repeat(x.shape[1], 1)
    made = [*SUBJECT.run(x, spec, upstream), *CPU.above(x, spec, levels, levels[:, 0], None)]
    parts, rest = CPU.new_parts(x.shape[1]), spec._replace(target=None)
    for first in range(0, x.shape[2], CPU.part_entries):
        piece = x[..., first : first + CPU.part_entries]
        told = rest._replace(valid_vocab=piece.shape[2])
        made += CPU.part_stats(piece, told, outputs_of(rest), parts, first)
    return made + pair(x, spec, upstream) + products(x)


def pair(x, spec, upstream) -> list[torch.Tensor]:
    own, other = Side(x, spec), Side(x.flip(1).contiguous(), spec._replace(temperature=1.3))
    out = PairOut(torch.zeros_like(x), torch.zeros_like(x))
    weights = PairWeights(upstream.entropy, upstream.lse)
    rows = divergence.loss(CPU, own, other, Divergence("js", 0.3), weights, out)
    return [*rows, *out]


def products(x) -> list[torch.Tensor]:
    """Those into float32, of numbers of `x` as hidden states and a weight; none of some dtypes."""
    weight = x.flatten()[:49_000].view(980, 50)
    logits, total = torch.zeros(70, 980), torch.zeros(980, 50)
    CPU.product(logits, weight[:70], weight)
    CPU.add_product(total, weight.view(50, 980), weight[:50], True)
    return [logits, total]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=("rows", "blocks"))
def test_the_bits_of_every_kernel_are_those_of_one_thread(isa, threads, shape, dtype, kind):
    given = case(*shape, dtype, kind)
    threads(1)
    alone = everything(*given)
    threads(4)
    for one, other in zip(alone, everything(*given), strict=True):
        assert same_bits(one, other)


def test_calls_from_several_threads_at_once(threads):
    """Python's lock is released in the kernels: each call has memory of its own."""
    threads(1)
    cases = [case(*shape, *rest) for shape, *rest in itertools.product(SHAPES, DTYPES, KINDS)]
    alone = [everything(*given) for given in cases]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda given: everything(*given), cases * 2))
    for one, other in zip(alone * 2, together, strict=True):
        assert all(same_bits(a, b) for a, b in zip(one, other, strict=True))


def test_spare_blocks_are_given_to_one_thread_each(threads):
    """A tensor that is still in use is never the memory of another."""

    def fill(number: int) -> bool:
        kept = [CPU.empty((3 << 20,), torch.float32).fill_(number + i) for i in range(3)]
        return all(bool((x == number + i).all()) for i, x in enumerate(kept))

    threads(1)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(fill, range(24)))
    CPU.release_memory()


def test_masked_rows_alone(threads):
    """No row counts: threads have nothing to do but to write zeros."""
    threads(4)
    x = torch.full((1, 40, 1500), torch.nan)
    spec = RowSpec(valid_vocab=1500, mask=torch.zeros(40, dtype=torch.bool))
    out = torch.full_like(x, 1.0)
    rows = CPU.stats(x, spec, ("entropy",))
    CPU.loss(x, spec, SUBJECT.make(40, 1500)[2]._replace(logprob=None), (), out)
    assert all(bool((row == 0).all()) for row in (*rows, out))
