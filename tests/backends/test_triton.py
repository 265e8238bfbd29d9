"""The Triton kernels against the definition in float64: interpreted here, on a GPU where one is."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend needs triton")
import triton
import triton.language as tl
from triton_rows import (
    DEVICE,
    DTYPES,
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

from em_kernels.backends.interface import OUTPUTS, RowSpec, Saved, Upstream, accumulate_dtype
from em_kernels.backends.triton import elementary, kernels, launch, moments
from em_kernels.backends.triton.backend import Triton

backend = Triton()

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture
def small_plan(monkeypatch):
    monkeypatch.setattr(launch, "plan", plan_small_steps)


WIDE = [(dtype, name) for dtype in (torch.float32, torch.float64) for name in OPTIONS]
NARROW = [
    (dtype, name) for dtype in (torch.bfloat16, torch.float16) for name in ("plain", "everything")
]


@pytest.mark.parametrize("dtype, options", [*WIDE, *NARROW])
def test_every_output(small_plan, dtype, options):
    logits, spec = make(dtype, **OPTIONS[options])
    want, got = true_stats(logits, spec), stats(logits, spec)
    for name in NAMES:
        assert got[name].dtype == accumulate_dtype(dtype) and got[name].shape == (4,)
        assert_close(got[name], want[name], ROUNDINGS * rounding(got[name].dtype), name)


@pytest.mark.parametrize("dtype, options", [*WIDE, *NARROW])
def test_gradient(small_plan, dtype, options):
    logits, spec = make(dtype, **OPTIONS[options])
    up = upstream(logits)
    want, got = true_grad(logits, spec, up), grad(logits, spec, up)
    wide = accumulate_dtype(dtype)
    assert got.dtype == dtype and got[..., VALID:].eq(0).all()
    assert_close(got, want, 0.5 * rounding(dtype) + ROUNDINGS * rounding(wide))


@pytest.mark.parametrize("given", ["logprob", "entropy", "lse", ""])
def test_gradient_of_one_output(small_plan, given):
    logits, spec = make(softcap=20.0)
    up = upstream(logits, **{name: name == given for name in Upstream._fields})
    if given != "logprob":
        spec = spec._replace(target=None)
    assert_close(
        grad(logits, spec, up), true_grad(logits, spec, up), ROUNDINGS * rounding(logits.dtype)
    )


def test_logit_gradients_sum_to_zero(small_plan):
    logits, spec = make(valid=VOCAB)
    for name in ("logprob", "entropy"):
        up = upstream(logits, **{other: other == name for other in Upstream._fields})
        assert grad(logits, spec, up).double().sum(-1).abs().max() < 5e-6


@pytest.mark.parametrize("name", OUTPUTS)
def test_one_output_is_the_same_alone(small_plan, name):
    logits, spec = make(rows=2)
    if name not in ("logprob", "is_top1", "entropy_slope"):
        spec = spec._replace(target=None)
    alone, all_of_them = stats(logits, spec, (name,)), stats(logits, make(rows=2)[1])
    assert tuple(alone) == (*Saved._fields, name)
    for key, value in alone.items():
        assert torch.equal(value, all_of_them[key]), key


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_is_stats_then_gradient(small_plan, dtype):
    logits, spec = make(dtype, softcap=15.0)
    up = upstream(logits, lse=False)
    want_rows, want = stats(logits, spec), grad(logits, spec, up)
    out = torch.full_like(logits, math.nan)
    rows = dict(zip(NAMES, backend.loss(logits, spec, up, OUTPUTS, out)))
    tolerance = 4 * rounding(accumulate_dtype(dtype))
    for name in NAMES:
        assert_close(rows[name], want_rows[name].double(), tolerance, name)
    assert_close(out, want.double(), rounding(dtype))
    backend.loss(logits, spec, up, (), logits)
    assert torch.equal(logits, out)


def test_gradient_in_place(small_plan):
    logits, spec = make(torch.bfloat16)
    up = upstream(logits)
    want = grad(logits, spec, up)
    assert torch.equal(grad(logits, spec, up, out=logits), want)


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


def test_relative_accuracy_when_nearly_certain(small_plan):
    check_relative(*certain_rows(GAPS), tolerance=1e-5)


def test_entropy_slope_of_the_likeliest_token(small_plan):
    """From -0.3 to -6e-16, down to where the definition in float64 has digits left."""
    logits, spec = certain_rows(GAPS[:-1])
    want, got = (f(logits, spec)["entropy_slope"] for f in (true_stats, stats))
    assert (got / want - 1).abs().max() < 1e-5


def test_uniform_row_has_entropy_log_v(small_plan):
    logits = torch.full((1, 2, VOCAB), -7.25, device=DEVICE)
    got = stats(logits, RowSpec(valid_vocab=VOCAB), ("entropy", "collision", "logit_var"))
    assert_close(got["entropy"], torch.full((2,), math.log(VOCAB)).double(), 1e-7)
    assert_close(got["collision"], torch.full((2,), 1 / VOCAB).double(), 1e-9)
    assert got["logit_var"].eq(0).all()


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
    if which == "tanh" and dtype == torch.float64:
        error = (out.cpu() - want).abs()  # no series: absolute accuracy is what a logit needs
    assert error.max() <= 16 * rounding(dtype)


def test_ties_count_and_the_first_is_the_argmax(small_plan):
    logits = torch.full((1, 4, VOCAB), -20.0, device=DEVICE)
    logits[0, :, [66, 67, 130, 177]] = 5.0
    target = torch.tensor([66, 67, 130, 177], device=DEVICE)
    spec = RowSpec(target=target, valid_vocab=VOCAB)
    want, got = true_stats(logits, spec), stats(logits, spec)
    assert got["is_top1"].tolist() == [1, 0, 0, 0]
    for name in NAMES:
        assert_close(got[name], want[name], 1e-6, name)


@pytest.mark.parametrize("softcap", [0.0, 10.0])
def test_minus_infinity_has_probability_zero(small_plan, softcap):
    logits, spec = make(softcap=softcap)
    logits[0, :, 5:140] = -math.inf
    logits[1, :, :168] = -math.inf
    spec = spec._replace(target=torch.tensor([0, 6, 168, 3], device=DEVICE))
    want, got = true_stats(logits, spec), stats(logits, spec)
    for name in NAMES:
        assert_close(got[name], want[name], 1e-5, name)
    assert got["logprob"][1] == -math.inf and got["entropy"][2] == 0
    up = upstream(logits)
    got = grad(logits, spec, up)
    assert_close(got, true_grad(logits, spec, up), 1e-5)
    assert got[0, 0, 5:140].eq(0).all()


@pytest.mark.parametrize(
    "bad, softcap",
    [("nan", 0.0), ("nan", 10.0), ("inf", 10.0), ("all -inf", 10.0), ("nan after inf", 0.0)],
)
def test_a_bad_row_is_nan_and_alone(small_plan, bad, softcap):
    logits, spec = make(softcap=softcap)
    clean = stats(logits, spec)
    row = logits[0, 1]
    if bad == "all -inf":
        row.fill_(-math.inf)
    else:
        row[100] = math.inf if "inf" in bad else math.nan
        row[101] = math.nan if bad == "nan after inf" else 0.0
    got, up = stats(logits, spec), upstream(logits)
    for name in NAMES:
        assert got[name][1].isnan(), name
        assert torch.equal(got[name][[0, 2, 3]], clean[name][[0, 2, 3]]), name
    for g in (up, Upstream(lse=up.lse)):
        got = grad(logits, spec, g).view(4, -1)
        assert got[1, :VALID].isnan().all() and got[1, VALID:].eq(0).all()
        assert got[[0, 2, 3]].isfinite().all()


def test_lowest_finite_logits_are_not_minus_infinity(small_plan):
    logits = torch.full((1, 2, VOCAB), torch.finfo(torch.float32).min, device=DEVICE)
    logits[0, 1, 77] = 3.0
    got = stats(logits, RowSpec(valid_vocab=VOCAB), ("entropy",))
    assert_close(got["entropy"], torch.tensor([math.log(VOCAB), 0.0]).double(), 1e-7)


def test_masked_rows_are_zero_and_not_read(small_plan):
    logits, spec = make(temperature_rows=torch.tensor([1.0, -1.0, 0.0, 1.0]))
    clean = stats(logits, spec)
    mask = torch.tensor([True, False, False, True], device=DEVICE)
    logits.view(4, -1)[~mask] = math.nan
    target = torch.where(mask, spec.target, -100)
    spec = spec._replace(mask=mask, target=target)
    up = Upstream(*(torch.where(mask, g, math.nan) for g in upstream(logits)))
    got = stats(logits, spec)
    for name in NAMES:
        assert got[name][~mask].eq(0).all(), name
        assert torch.equal(got[name][mask], clean[name][mask]), name
    out = torch.full_like(logits, math.nan)
    rows = backend.loss(logits, spec, up, (), out)
    assert all(row[~mask].eq(0).all() for row in rows)
    for g in (out, grad(logits, spec, up)):
        assert g.view(4, -1)[~mask].eq(0).all() and g.isfinite().all()


@pytest.mark.parametrize("bad", [-100, -1, VALID, VOCAB, 2**40])
def test_target_out_of_range_is_nan_in_its_row(small_plan, bad):
    logits, spec = make()
    spec.target[2] = bad
    got = stats(logits, spec)
    for name in NAMES:
        assert got[name].isnan().tolist() == [False, False, True, False], name
    out = torch.empty_like(logits)
    backend.loss(logits, spec, upstream(logits), (), out)
    for g in (out, grad(logits, spec, upstream(logits))):
        assert g.view(4, -1)[2, :VALID].isnan().all()
        assert g.view(4, -1)[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_bad_temperature_is_nan_in_its_row(small_plan, bad):
    logits, spec = make(temperature_rows=torch.ones(4))
    spec.temperature_rows[2] = bad
    got = stats(logits, spec)
    for name in NAMES:
        assert got[name].isnan().tolist() == [False, False, True, False], name
    assert grad(logits, spec, upstream(logits)).view(4, -1)[2, :VALID].isnan().all()


def test_padded_vocabulary_is_not_read(small_plan):
    logits, spec = make()
    clean, up = stats(logits, spec), upstream(logits)
    clean_grad = grad(logits, spec, up)
    logits[..., VALID:] = math.nan
    assert all(torch.equal(v, clean[name]) for name, v in stats(logits, spec).items())
    assert torch.equal(grad(logits, spec, up), clean_grad)


def test_strided_rows_are_read_and_written_in_place(small_plan):
    whole = torch.randn(2, 3, VOCAB + 5, device=DEVICE)
    view = whole[:, :-1, :VOCAB]
    spec = RowSpec(target=torch.arange(4, device=DEVICE), valid_vocab=VOCAB)
    dense = view.contiguous()
    want, got = stats(dense, spec), stats(view, spec)
    assert all(torch.equal(got[name], want[name]) for name in NAMES)
    up, before = upstream(view), whole.clone()
    want = grad(dense, spec, up)
    grad(view, spec, up, out=view)
    assert torch.equal(view, want)
    assert torch.equal(whole[:, -1], before[:, -1])
    assert torch.equal(whole[..., VOCAB:], before[..., VOCAB:])


def test_a_row_does_not_depend_on_the_others(small_plan):
    logits, spec = make()
    together = stats(logits, spec)
    row = logits[1:, 1:2]
    alone = stats(row, spec._replace(target=spec.target[3:4]))
    assert all(torch.equal(alone[name], together[name][3:4]) for name in NAMES)


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_exact_under_a_shift(small_plan, shift):
    logits, spec = make()
    logits = (logits * 256).round() / 256
    want, got = stats(logits, spec), stats(logits + shift, spec)
    for name in ("entropy", "logprob", "varentropy", "collision", "max_prob", "entropy_slope"):
        assert torch.equal(got[name], want[name]), name
    for name in ("logit_var", "logit_skew", "self_certainty"):
        assert_close(got[name], want[name].double(), 1e-5, name)
    up = upstream(logits)
    assert torch.equal(grad(logits + shift, spec, up), grad(logits, spec, up))


def test_logit_moments_of_blocks_at_different_levels(small_plan):
    """Where a shift taken from the first entries is a poor one."""
    logits = torch.randn(1, 1, VOCAB, device=DEVICE)
    logits[..., :32] += 50
    logits[..., 100:] -= 1000
    spec = RowSpec(valid_vocab=VOCAB)
    outputs = ("logit_mean", "logit_var", "logit_skew", "self_certainty")
    want, got = true_stats(logits, spec, outputs), stats(logits, spec, outputs)
    for name in outputs:
        assert_close(got[name], want[name], 2e-6, name)
