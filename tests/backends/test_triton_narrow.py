"""Gradients narrower than their logits, beside them or over them: `narrows` of the backend."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend needs triton")
from triton_rows import (
    DEVICE,
    NAMES,
    OPTIONS,
    VALID,
    VOCAB,
    make,
    plan_small_steps,
    stats,
    upstream,
)

from em_kernels.backends.interface import ROW_OUTPUTS, Saved
from em_kernels.backends.triton import kernels, launch
from em_kernels.backends.triton.backend import Triton

backend = Triton()

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
EACH_NARROW = pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True)
def small_plan(monkeypatch):
    monkeypatch.setattr(launch, "plan", plan_small_steps)


def over(logits, dtype):
    """The 16-bit view whose rows begin where those of the float32 logits do."""
    return logits.view(dtype)[..., : logits.shape[-1]]


def gradients(logits, spec, narrow):
    """{(function, place): gradient}: as wide as the logits, and narrow beside and over them."""
    up = upstream(logits)
    saved = Saved(*backend.stats(logits, spec, ())[:3])
    found = {}
    for place in ("wide", "beside", "over"):
        for name in ("grad", "loss"):
            x = logits.clone()
            out = torch.full_like(x, math.nan, dtype=None if place == "wide" else narrow)
            out = over(x, narrow) if place == "over" else out
            if name == "grad":
                backend.grad(x, spec, saved, up, out)
            else:
                backend.loss(x, spec, up, (), out)
            found[name, place] = out
    return found


def check_rounded(found, narrow):
    """Narrow gradients are the wide ones but for rounding, the same bits beside and over the
    logits. (Triton's interpreter rounds to bfloat16 towards zero.)"""
    for name in ("grad", "loss"):
        beside, wide = found[name, "beside"], found[name, "wide"]
        assert torch.equal(beside, found[name, "over"]), name
        rounding = torch.finfo(narrow).eps * wide.abs() + torch.finfo(narrow).smallest_normal / 512
        assert ((beside.float() - wide).abs() <= rounding).all(), name


@EACH_NARROW
@pytest.mark.parametrize("options", OPTIONS)
def test_a_narrow_gradient_is_the_wide_one_rounded(narrow, options):
    logits, spec = make(torch.float32, **OPTIONS[options])
    found = gradients(logits, spec, narrow)
    assert found["grad", "wide"][..., :VALID].ne(0).any()
    check_rounded(found, narrow)


@pytest.mark.parametrize("valid", [1, 31, 32, 33, 64, 128, 177, 178])
def test_every_end_of_the_valid_vocabulary(valid):
    logits, spec = make(torch.float32, valid=valid)
    found = gradients(logits, spec, torch.bfloat16)
    check_rounded(found, torch.bfloat16)
    assert all(value[..., valid:].eq(0).all() for value in found.values())


@EACH_NARROW
def test_statistics_of_a_loss_over_its_logits(narrow):
    logits, spec = make(torch.float32, softcap=15.0)
    want = stats(logits, spec)
    rows = backend.loss(logits, spec, upstream(logits), ROW_OUTPUTS, over(logits, narrow))
    for name, row in zip(NAMES, rows, strict=True):
        assert torch.equal(row, want[name]), name


def test_strided_rows_keep_what_is_between_them():
    whole = torch.randn(2, 3, VOCAB + 6, device=DEVICE)
    view, before = whole[:, :-1, :VOCAB], whole.clone()
    _, spec = make(valid=VOCAB)
    want = torch.empty(view.shape, dtype=torch.bfloat16, device=DEVICE)
    backend.loss(view, spec, upstream(view), (), want)
    out = whole.view(torch.bfloat16)[:, :-1, :VOCAB]
    backend.loss(view, spec, upstream(view), (), out)
    assert torch.equal(out, want)
    assert torch.equal(whole[:, -1], before[:, -1])
    assert torch.equal(whole[..., VOCAB // 2 :], before[..., VOCAB // 2 :])


def test_masked_rows_over_their_logits_are_zero():
    logits, spec = make(torch.float32)
    mask = torch.tensor([True, False, True, False], device=DEVICE)
    found = gradients(logits, spec._replace(mask=mask), torch.bfloat16)
    for name, value in found.items():
        assert value.view(4, -1)[~mask].eq(0).all(), name
        assert value.view(4, -1)[mask][:, :VALID].ne(0).any(), name


def test_barriers_keep_a_fast_warp_from_overtaking_a_slow_one():
    """A warp may store as soon as the others have passed the last barrier, and no sooner: what the
    stores of step k overwrite, steps up to k // 2, must have been read before that barrier."""
    step, last = 4096, None
    for k in range(300):
        if kernels.outruns_reads.fn(k * step, step):
            last = k
        assert last is not None and last >= k // 2
    barriers = sum(bool(kernels.outruns_reads.fn(k * step, step)) for k in range(300))
    assert barriers == 9
