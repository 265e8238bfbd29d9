"""The Triton kernels against the definition in float64: interpreted here, on a GPU where one is."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend needs triton")
import triton
import triton.language as tl
from contract import Contract, Subject
from triton_rows import (
    DEVICE,
    NAMES,
    OPTIONS,
    ROUNDINGS,
    VALID,
    VOCAB,
    assert_close,
    grad,
    make,
    plan_small_steps,
    rounding,
    stats,
    true_grad,
    true_stats,
    upstream,
)

from em_kernels.backends.interface import RowSpec, Upstream
from em_kernels.backends.triton import elementary, kernels, launch, moments
from em_kernels.backends.triton.backend import Triton

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


class TestTriton(Contract):
    IMPLS, LONG, PLACES = ("triton",), VOCAB, (0, 67, 177)
    LENGTHS = (1, 2, 7, 31, 32, 33, 64, 128, VALID)
    SAMPLE = 0.15 if DEVICE == "cpu" else 1.0

    @pytest.fixture
    def subject(self, impl, small_plan):
        # Its interpreter rounds to bfloat16 towards zero, and reads denormal numbers of it as 0.
        interpreted = DEVICE == "cpu"
        closeness = 2.0**-7 if interpreted else 4e-3
        return Subject(Triton(), DEVICE, bfloat16=closeness, denormal16=not interpreted)


@pytest.fixture
def small_plan(monkeypatch):
    monkeypatch.setattr(launch, "plan", plan_small_steps)


WIDE = [(dtype, name) for dtype in (torch.float32, torch.float64) for name in OPTIONS]


@pytest.mark.parametrize("vocab", [1, 2, 7, 256, 4099, 50257, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_of_a_call(vocab, dtype):
    logits, spec = make(dtype, rows=1, vocab=max(vocab, 3), valid=vocab)
    spec = spec._replace(target=spec.target.clamp(max=vocab - 1))
    up = upstream(logits)
    want, got = true_stats(logits, spec), stats(logits, spec)
    for name in NAMES:
        assert_close(got[name], want[name], ROUNDINGS * rounding(torch.float32), name)
    tolerance = 0.5 * rounding(dtype) + ROUNDINGS * rounding(torch.float32)
    assert_close(grad(logits, spec, up), true_grad(logits, spec, up), tolerance)


def certain_rows(gaps, vocab=VOCAB, spread=1.0):
    """Rows whose best logit leads the others by `gaps` nats, give or take `spread`."""
    generator = torch.Generator().manual_seed(3)
    logits = spread * torch.randn(1, len(gaps), vocab, generator=generator)
    top = torch.randint(vocab, (len(gaps),), generator=generator)
    leaders = logits[0].amax(-1) + torch.tensor(gaps)
    logits[0, torch.arange(len(gaps)), top] = leaders
    return logits.to(DEVICE), RowSpec(target=top.to(DEVICE), valid_vocab=vocab)


GAPS = [0.0, 4.0, 10.0, 16.0, 22.0, 30.0]


def check_relative(logits, spec, tolerance):
    """Entropy, logprob and both gradients to a relative error, at near-certain rows too."""
    want, got = true_stats(logits, spec), stats(logits, spec)
    assert want["entropy"].min() < 1e-9 and want["entropy"].max() > 1
    for name in ("entropy", "logprob", "log1p_r", "mean_d", "varentropy"):
        error = (got[name].double() / want[name] - 1).abs().max().item()
        assert error <= tolerance, f"{name}: {error:.3g}"
    ones = torch.ones_like(got["max"])
    for up in (Upstream(entropy=ones), Upstream(logprob=ones)):
        want, got_grad = true_grad(logits, spec, up), grad(logits, spec, up).double()
        error = (got_grad - want).norm(dim=-1) / want.norm(dim=-1)
        assert error.max() <= tolerance, f"{up}: {error}"


@triton.jit
def rough_exp(x):
    """exp as an NVIDIA GPU computes it, its errors at their bounds: ex2.approx(x log2 e)."""
    if x.dtype == tl.float64:
        value = tl.exp(x)
    else:
        t = x * 1.4426950408889634
        sign = tl.where((t * 1024).to(tl.int32) % 2 == 0, 1.0, -1.0)
        value = tl.exp2(t) * (1 + sign * 2.0**-22)
        value = tl.where(t == 0, 1, tl.where(t < -126, 0, value))
    return value


@triton.jit
def rough_reciprocal(w):
    """1 / w as an NVIDIA GPU computes it, its error at its bound: rcp.approx.ftz."""
    y = 1 / w
    if w.dtype != tl.float64:
        sign = tl.where((w * 1048576).to(tl.int32) % 2 == 0, 1.0, -1.0)
        y = y * (1 + sign * 2.0**-23)
    return y


@pytest.mark.skipif(DEVICE != "cpu", reason="it replaces the interpreter's exact exp")
@pytest.mark.parametrize("which", ["tanh", "slope"])
def test_tanh_with_the_instructions_of_a_gpu(monkeypatch, which):
    """At most 2^-21.4 from the truth, as the docstring derives; the slope in relative terms."""
    monkeypatch.setattr(elementary, "exp", rough_exp)
    monkeypatch.setattr(elementary, "reciprocal", rough_reciprocal)
    x = torch.linspace(-12, 12, 4096)
    out = torch.empty_like(x)
    evaluate[(1,)](x, out, len(x), WHICH=which, BLOCK=4096)
    want = torch.tanh(x.double() / 2) if which == "tanh" else torch.cosh(x.double() / 2) ** -2
    scale = 1 if which == "tanh" else want
    assert ((out - want) / scale).abs().max() <= (2**-21.4 if which == "tanh" else 2e-6)


@pytest.mark.skipif(DEVICE != "cpu", reason="it replaces the interpreter's exact exp")
def test_error_budget_with_the_exp_of_a_gpu(small_plan, monkeypatch):
    """Rows with H from 1e-9 to log V keep 1e-4."""
    for module in (elementary, moments, kernels):
        monkeypatch.setattr(module, "exp", rough_exp)
    monkeypatch.setattr(elementary, "reciprocal", rough_reciprocal)
    logits, spec = certain_rows(GAPS)
    check_relative(logits, spec, tolerance=2e-5)
    logits, spec = certain_rows(GAPS[-3:], spread=5.0)
    spec = spec._replace(temperature=0.5, softcap=80.0)
    got, want = stats(logits, spec)["entropy"], true_stats(logits, spec)["entropy"]
    assert want.min() < 1e-9 and (got / want - 1).abs().max() < 1e-4


@triton.jit
def evaluate(x, out, n, WHICH: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    v = tl.load(x + lanes, mask=lanes < n, other=0.0)
    if WHICH == "log1p":
        v = elementary.log1p(v)
    elif WHICH == "expm1":
        v = elementary.expm1(v)
    elif WHICH == "reciprocal":
        v = elementary.reciprocal(v + 1)
    elif WHICH == "tanh":
        v, _ = elementary.tanh_half(v)
    else:
        _, v = elementary.tanh_half(v)
    tl.store(out + lanes, v, mask=lanes < n)


ELEMENTARY = {
    "log1p": (np.logspace(-30, 6, 400), np.log1p),
    "expm1": (-np.logspace(-30, 2, 400), np.expm1),
    "reciprocal": (np.linspace(0, 1, 400), lambda x: 1 / (1 + x)),
    "tanh": (np.concatenate([np.logspace(-9, 2, 200), -np.logspace(-9, 2, 200)]), None),
    "slope": (np.linspace(-20, 20, 401), lambda x: 1 / np.cosh(x / 2) ** 2),
}


@pytest.mark.parametrize("which", ELEMENTARY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elementary_functions(which, dtype):
    points, function = ELEMENTARY[which]
    function = function or (lambda x: np.tanh(x / 2))
    x = torch.tensor(points, dtype=dtype, device=DEVICE)
    out = torch.empty_like(x)
    evaluate[(1,)](x, out, len(points), WHICH=which, BLOCK=512)
    want = torch.tensor(function(x.double().cpu().numpy()))
    error = ((out.cpu().double() - want) / want).abs()
    assert error.max() <= 16 * rounding(dtype)
