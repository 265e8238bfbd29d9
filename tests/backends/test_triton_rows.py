"""How a row is read: wherever it begins, by one program or by several, to the same bits."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend needs triton")
from triton_rows import (
    DEVICE,
    DTYPES,
    OPTIONS,
    VALID,
    grad,
    make,
    plan_small_steps,
    stats,
    upstream,
)

from em_kernels.backends.interface import ROW_OUTPUTS, RowSpec
from em_kernels.backends.triton import launch
from em_kernels.backends.triton.backend import Triton

backend = Triton()

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def small_plan(monkeypatch):
    monkeypatch.setattr(launch, "plan", plan_small_steps)


def beginning_at(x, by, stride=None):
    """The same rows, the first `by` entries after a multiple of 64 bytes, `stride` apart."""
    outer, inner, vocab = x.shape
    stride = stride or vocab
    storage = torch.full(
        (by + outer * inner * stride + 64,), math.nan, dtype=x.dtype, device=DEVICE
    )
    skip = -storage.data_ptr() % 64 // x.itemsize + by
    view = storage[skip:].as_strided(x.shape, (inner * stride, stride, 1), skip)
    view.copy_(x)
    return view


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("vocab", [1, 3, 9, 33])
def test_short_rows_that_begin_anywhere(dtype, vocab):
    """Rows that end before the first multiple of 16 bytes, and soon after; nothing else is
    written."""
    logits, spec = make(dtype, vocab=max(vocab, 3), valid=vocab)
    spec = spec._replace(target=spec.target.clamp(max=vocab - 1))
    up = upstream(logits)
    want, want_grad = stats(logits, spec), grad(logits, spec, up)
    stride = logits.shape[-1] + 2
    moved = beginning_at(logits, 1, stride=stride)
    assert all(torch.equal(value, want[name]) for name, value in stats(moved, spec).items())
    between = moved.as_strided((4, 2), (stride, 1), moved.storage_offset() + stride - 2)
    between.fill_(7)
    grad(moved, spec, up, out=moved)
    assert torch.equal(moved, want_grad) and between.eq(7).all()


def test_a_narrow_gradient_that_begins_anywhere():
    logits, spec = make(torch.float32)
    up, want = upstream(logits), torch.empty(logits.shape, dtype=torch.bfloat16, device=DEVICE)
    backend.loss(logits.clone(), spec, up, (), want)
    moved = beginning_at(logits, 1, stride=logits.shape[-1] + 1)
    out = moved.view(torch.bfloat16)[..., : logits.shape[-1]]
    backend.loss(moved, spec, up, (), out)
    assert torch.equal(out, want)


def test_masked_rows_that_begin_anywhere_are_zero():
    logits, spec = make(torch.bfloat16)
    mask = torch.tensor([True, False, False, True], device=DEVICE)
    out = beginning_at(torch.full_like(logits, math.nan), 3)
    grad(logits, spec._replace(mask=mask), upstream(logits), out=out)
    assert out.view(4, -1)[~mask].eq(0).all() and out.isfinite().all()


def watch(monkeypatch):
    """The programs and what they share, of every call that follows."""
    made, programs = [], launch._programs
    monkeypatch.setattr(launch, "_programs", lambda *a: made.append(programs(*a)) or made[-1])
    return made


@pytest.mark.parametrize(
    "dtype, options", [(torch.float64, "everything"), (torch.bfloat16, "plain")]
)
def test_few_rows_are_shared_by_programs_to_the_same_bits(monkeypatch, dtype, options):
    logits, spec = make(dtype, **OPTIONS[options])
    logits[0, 1, 5:140] = -math.inf
    mask = torch.tensor([True, True, False, True], device=DEVICE)
    calls = [(spec, ("entropy", "logprob")), (spec._replace(mask=mask), ROW_OUTPUTS)]
    want = [stats(logits, *call) for call in calls]
    made = watch(monkeypatch)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    for call, expected in zip(calls, want, strict=True):
        got = stats(logits, *call)
        assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert [shared.arrived.tolist() for _, shared in made] == [[2, 2, 2, 2], [2, 2, 0, 2]]


def test_rows_are_shared_where_there_are_few_long_ones(monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 2)
    made = watch(monkeypatch)
    for rows, valid in ((3, VALID), (4, VALID), (3, 128)):
        logits, spec = make(rows=rows, valid=valid)
        stats(logits, spec)
    assert [programs for programs, _ in made] == [6, 4, 3]
    assert [shared is None for _, shared in made] == [False, True, True]


@EACH_DTYPE
def test_a_row_of_the_lowest_number(dtype):
    """Lanes that have seen nothing are no entries, though their maximum is as far from it as can
    be."""
    lowest = torch.finfo(dtype).min
    for vocab in (1, 5, 33, 140):
        logits = torch.full((1, 2, vocab), lowest, dtype=dtype, device=DEVICE)
        got = stats(logits, RowSpec(valid_vocab=vocab), ("entropy",))
        want = torch.full_like(got["entropy"], math.log(vocab))
        torch.testing.assert_close(got["entropy"], want)
