"""divergence and divergence_loss: every kind on every backend, against textbook float64."""

import math

import pytest
import torch
from divergences import (
    KIND_NAMES,
    KINDS,
    OTHER,
    OWN,
    doubles,
    draw_pair,
    gradients,
    leaves,
    textbook,
    truth,
)
from helpers import DTYPES, FAST_IMPLS, error, random_logits, random_target, same_bits

from em_kernels import divergence, divergence_loss, divergence_stats, softmax_stats

EVERY_IMPL = pytest.mark.parametrize("impl", FAST_IMPLS)
EVERY_KIND = pytest.mark.parametrize(("kind", "beta"), KINDS, ids=KIND_NAMES)
N, V = 4, 203
BOUND = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def check(x, y, impl, kind, beta, bound, **options):
    """Value and both gradients, by both public functions."""
    wide = doubles(x, y)
    expected = truth(*wide, kind, beta, **options)
    weights = torch.linspace(0.5, 2, expected.numel(), device=x.device).view(expected.shape)
    expected_grads = gradients(expected, wide, weights)
    own = leaves(x, y)
    given = dict(kind=kind, beta=beta, impl=impl, **options)
    value = divergence(*own, **given)
    assert value.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    value_bound = 1e-12 if x.dtype == torch.float64 else 1e-5
    assert error(value, expected) < value_bound
    grads = gradients(value, own, weights.to(value))
    for ours, theirs, like in zip(grads, expected_grads, (x, y), strict=True):
        assert ours.dtype == like.dtype and ours.shape == like.shape
        assert error(ours, theirs) < bound
    loss = divergence_loss(*own, token_weight=weights, **given)
    assert error(loss.loss, (expected * weights).sum()) < value_bound
    assert error(loss.divergence, expected) < value_bound
    for ours, theirs in zip(torch.autograd.grad(loss.loss, own), expected_grads, strict=True):
        assert error(ours, theirs) < bound


@EVERY_IMPL
@EVERY_KIND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradients(impl, device, kind, beta, dtype):
    x, y = draw_pair(N, V, dtype=dtype, device=device)
    check(x, y, impl, kind, beta, BOUND[dtype])


@EVERY_IMPL
@EVERY_KIND
def test_each_side_has_options_of_its_own(impl, device, kind, beta):
    x, y = draw_pair(2, 3, V, device=device)
    check(x, y, impl, kind, beta, 1e-5, **OWN, **OTHER)
    check(x, y, impl, kind, beta, 1e-5, temperature=0.5, valid_vocab=V - 7)
    rows = 0.5 + torch.rand(2, 3, device=device)
    check(x, y, impl, kind, beta, 1e-5, temperature=rows, other_temperature=rows.flip(0))


@EVERY_IMPL
@EVERY_KIND
@pytest.mark.parametrize("apart", (1e-3, 1e-4))
def test_digits_of_rows_that_are_nearly_alike(impl, device, kind, beta, apart):
    """At 1e-9 the textbook formula has no digit left in float32; so the gradients."""
    x, y = draw_pair(N, 4999, apart=apart, device=device)
    wide = doubles(x, y)
    expected = truth(*wide, kind, beta)
    assert (expected < 1e-6).all() and (expected > 1e-12).all()
    own = leaves(x, y)
    value = divergence(*own, kind=kind, beta=beta, impl=impl)
    assert ((value - expected).abs() / expected).max() < 1e-4
    for ours, theirs in zip(gradients(value, own), gradients(expected, wide), strict=True):
        assert error(ours, theirs) < 1e-4


@EVERY_IMPL
@EVERY_KIND
def test_equal_rows_have_no_divergence(impl, device, kind, beta):
    x = random_logits(N, V, device=device)
    own = leaves(x, x)
    value = divergence(*own, kind=kind, beta=beta, impl=impl)
    assert (value == 0).all()
    assert all((g.abs() < 1e-7).all() for g in gradients(value, own))


@EVERY_IMPL
def test_beta_0_and_1_are_the_two_kls(impl, device):
    x, y = draw_pair(N, V, device=device)
    for beta, kind in ((0, "forward_kl"), (1.0, "reverse_kl")):
        own, other = leaves(x, y), leaves(x, y)
        value = divergence(*own, kind="js", beta=beta, impl=impl)
        same = divergence(*other, kind=kind, impl=impl)
        assert same_bits(value.detach(), same.detach())
        assert all(map(same_bits, gradients(value, own), gradients(same, other)))


@EVERY_IMPL
@pytest.mark.parametrize("far", (30.0, 120.0))
@EVERY_KIND
def test_rows_that_are_far_apart(impl, device, kind, beta, far):
    x, y = draw_pair(N, V, apart=far, device=device)
    wide, own = doubles(x, y), leaves(x, y)
    expected = truth(*wide, kind, beta)
    value = divergence(*own, kind=kind, beta=beta, impl=impl)
    assert error(value, expected) < 2e-6
    for ours, theirs in zip(gradients(value, own), gradients(expected, wide), strict=True):
        assert (ours - theirs).abs().max() < 1e-6 * far


@pytest.mark.parametrize("offset", (2.0**20, -(2.0**100), 3e38))
@EVERY_IMPL
@EVERY_KIND
def test_an_offset_between_the_rows_is_not_seen(impl, device, kind, beta, offset):
    """Integers beside 2^20; equal logits beside what every other logit is lost in."""
    x = torch.randn(N, V, device=device, generator=torch.Generator(device).manual_seed(0))
    y = torch.randint(-8, 9, (N, V), device=device).float()
    y = y if abs(offset) < 2**24 else torch.zeros_like(y)
    weights, wide = torch.linspace(0.5, 2, N, device=device), doubles(x, y)
    expected = truth(*wide, kind, beta)
    expected_grads = gradients(expected, wide, weights.double())
    own = leaves(x, y + offset)
    value = divergence(*own, kind=kind, beta=beta, impl=impl)
    assert error(value, expected) < 1e-5
    for got, want in zip(gradients(value, own, weights), expected_grads, strict=True):
        assert error(got, want) < 1e-5


INFINITE = {"forward_kl": (True, False), "reverse_kl": (False, True), "js": (False, False)}


def excluding(device):
    """Rows with -inf in: both, the first alone, the other alone, none."""
    x, y = draw_pair(4, V, device=device)
    x[0, ::3] = y[0, ::3] = -math.inf
    x[1, 5], y[2, 7] = -math.inf, -math.inf
    return x, y


@EVERY_IMPL
@EVERY_KIND
def test_excluded_entries(impl, device, kind, beta):
    x, y = excluding(device)
    own = leaves(x, y)
    value = divergence(*own, kind=kind, beta=beta, impl=impl)
    grads = gradients(value, own)
    infinite = torch.tensor([False, *INFINITE[kind], False], device=device)
    assert torch.equal(value.isinf(), infinite) and not value.isnan().any()
    assert all(g.isfinite().all() for g in grads)
    log_p, log_q = (v.double().log_softmax(-1) for v in (x, y))
    # p and q of 0 by numbers so small that they add nothing.
    wide = [v.clamp(min=-1e5).detach().requires_grad_() for v in (log_p, log_q)]
    expected = textbook(*(v.log_softmax(-1) for v in wide), kind, beta)
    expected_grads = gradients(expected, wide)
    for row in range(4):
        if infinite[row]:
            continue
        assert error(value[row], expected[row]) < 1e-5
        for ours, theirs in zip(grads, expected_grads, strict=True):
            assert error(ours[row], theirs[row]) < 1e-5


@EVERY_IMPL
def test_gradients_of_an_infinite_divergence(impl, device):
    """Those that are a difference of probabilities hold, the other side's are 0."""
    x, y = excluding(device)
    p, q = x.double().softmax(-1), y.double().softmax(-1)
    for kind, row, side in (("forward_kl", 1, 0), ("reverse_kl", 2, 1)):
        own = leaves(x, y)
        grads = gradients(divergence(*own, kind=kind, impl=impl), own)
        assert error(grads[side][row], (p - q)[row] * (1 - 2 * side)) < 1e-5
        assert (grads[1 - side][row] == 0).all()


@EVERY_IMPL
@EVERY_KIND
def test_bad_rows_are_nan_and_masked_rows_0(impl, device, kind, beta):
    x, y = draw_pair(6, V, device=device)
    x[0, 3], y[1, 4], x[2, 5], y[3] = math.nan, math.nan, math.inf, -math.inf
    x[5], mask = math.nan, torch.tensor([1, 1, 1, 1, 1, 0], device=device)
    own = leaves(x, y)
    value = divergence(*own, kind=kind, beta=beta, mask=mask, impl=impl)
    bad = torch.tensor([1, 1, 1, 1, 0, 0], device=device) > 0
    assert torch.equal(value.isnan(), bad)
    assert value[5] == 0
    for grad in gradients(value, own):
        assert torch.equal(grad.isnan().all(-1), bad) and torch.equal(grad.isnan().any(-1), bad)
        assert (grad[5] == 0).all()
    alone = divergence(x[4], y[4], kind=kind, beta=beta, impl=impl)
    assert error(value[4], alone) < 1e-6


@EVERY_IMPL
def test_statistics_of_both_sides(impl, device):
    x, y = draw_pair(2, 3, V, device=device)
    target = random_target(2, 3, vocab=V, device=device)
    target[0, 0] = -100
    names = ("entropy", "logprob", "is_top1", "rank", "kept_mass", "is_kept")
    others = ("entropy", "rank")
    options = dict(target=target, outputs=names, other_outputs=others, impl=impl)
    found = divergence_stats(*leaves(x, y), **options)
    loss = divergence_loss(*leaves(x, y), token_weight=torch.ones(2, 3, device=device), **options)
    expected = softmax_stats(x, target, outputs=names)
    other = softmax_stats(y, target, outputs=others)
    for name in names:
        ours = getattr(found.stats, name)
        assert not ours.requires_grad and same_bits(ours, getattr(loss.stats, name))
        assert error(ours.double(), getattr(expected, name).double()) < 1e-6
    assert error(found.other_stats.entropy, other.entropy) < 1e-6
    assert torch.equal(found.other_stats.rank, other.rank)
    assert found.divergence[0, 0] == 0 and found.other_stats.logprob is None
    assert not loss.divergence.requires_grad


@EVERY_IMPL
@EVERY_KIND
def test_gradcheck_of_both_sides(impl, device, kind, beta):
    x, y = draw_pair(2, 7, dtype=torch.float64, device=device)

    def call(x, y):
        return divergence(x, y, kind=kind, beta=beta, impl=impl, **OWN, **OTHER)

    assert torch.autograd.gradcheck(call, leaves(x, y))
    assert torch.autograd.gradgradcheck(call, leaves(x, y))


@pytest.mark.parametrize("impl", ("reference",))
def test_the_gradient_of_a_loss_has_no_derivative(impl, device):
    x, y = leaves(*draw_pair(2, V, device=device))
    loss = divergence_loss(x, y, token_weight=torch.ones(2, device=device), impl=impl).loss
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"take it from \(weight \* divergence"):
        grad.square().sum().backward()


@EVERY_IMPL
def test_a_loss_of_half_precision_in_any_leading_shape(impl, device):
    pair = draw_pair(2, 3, V, dtype=torch.float16, device=device)
    weight = torch.rand(2, 3, device=device)
    shaped, flat = leaves(*pair), leaves(*(x.flatten(0, 1) for x in pair))
    loss = divergence_loss(*shaped, token_weight=weight, mask=weight > 0.2, impl=impl).loss
    weight = weight.flatten()
    same = divergence_loss(*flat, token_weight=weight, mask=weight > 0.2, impl=impl).loss
    assert torch.allclose(loss, same)
    for got, want in zip(gradients(loss, shaped), gradients(same, flat), strict=True):
        assert torch.equal(got.flatten(0, 1), want)


@EVERY_IMPL
def test_a_frozen_side_gets_no_gradient(impl, device):
    x, y = draw_pair(N, V, device=device)
    both = gradients(divergence(*(own := leaves(x, y)), impl=impl), own)
    for side in (0, 1):
        pair = [x.clone(), y.clone()]
        pair[side].requires_grad_()
        (grad,) = gradients(divergence(*pair, impl=impl), [pair[side]])
        assert same_bits(grad, both[side])
    assert not divergence(x, y, impl=impl).requires_grad


@EVERY_IMPL
def test_sides_of_different_dtypes(impl, device):
    x, y = draw_pair(N, V, device=device)
    pair = leaves(x.bfloat16(), y)
    value = divergence(*pair, impl=impl)
    wide = doubles(*pair)
    expected = truth(*wide, "forward_kl", 0.5)
    assert value.dtype == torch.float32 and error(value, expected) < 1e-5
    grads = gradients(value, pair)
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    for ours, theirs, bound in zip(grads, gradients(expected, wide), (1e-2, 1e-5), strict=True):
        assert error(ours, theirs) < bound


@EVERY_IMPL
def test_float16_gradients_of_a_mean_keep_their_digits(impl, device):
    """Of weights so small that the gradient is below what float16 holds, until it is scaled."""
    x, y = draw_pair(N, V, dtype=torch.float16, device=device)
    weight, scale = torch.full((N,), 1e-6, device=device), 2.0**16
    for kind in ("forward_kl", "reverse_kl", "js"):
        own, wide = leaves(x, y), doubles(x, y)
        loss = divergence_loss(*own, kind=kind, token_weight=weight, impl=impl).loss
        expected = truth(*wide, kind, 0.5) * 1e-6 * scale
        for ours, theirs in zip(
            torch.autograd.grad(loss * scale, own), gradients(expected, wide), strict=True
        ):
            assert error(ours, theirs) < 4e-3


BAD = {
    "kind": (dict(kind="kl"), ValueError, "kind must be one of"),
    "beta": (dict(kind="js", beta=1.5), ValueError, r"beta must be in \[0, 1\]"),
    "beta type": (dict(kind="js", beta="0.5"), TypeError, "beta must be a number"),
    "temperature": (dict(temperature=0.0), ValueError, "^temperature must be positive"),
    "other_temperature": (dict(other_temperature=-1.0), ValueError, "^other_temperature must be"),
    "other rows": (
        dict(other_temperature=torch.tensor([1.0, 0.0, 1, 1])),
        ValueError,
        "^other_temperature must be positive and finite, got 0.0 at token 1",
    ),
    "other_softcap": (dict(other_softcap=0.0), ValueError, "^other_softcap must be positive"),
    "other_scale": (dict(other_logit_scale=0.0), ValueError, "^other_logit_scale must be non-zero"),
    "mask": (dict(mask=torch.ones(3)), ValueError, "mask must have the leading shape"),
    "name": (dict(other_temp=1.0), TypeError, "did you mean 'other_temperature'"),
    "other_outputs": (dict(other_outputs=("x",)), ValueError, "^other_outputs must be among"),
    "target": (dict(outputs=("logprob",)), ValueError, "'logprob' needs a target"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_named(name):
    options, kind, message = BAD[name]
    x, y = draw_pair(4, V)
    with pytest.raises(kind, match=message):
        divergence_stats(x, y, **options)


def test_bad_tensors_are_named():
    x, y = draw_pair(4, V)
    with pytest.raises(ValueError, match=r"other_logits must have the shape of logits, \(4, 203\)"):
        divergence(x, y[:, :-1])
    with pytest.raises(TypeError, match="other_logits must be float32"):
        divergence(x, y.long())
    with pytest.raises(TypeError, match="other_logits must be a tensor"):
        divergence(x, None)
    ones = torch.ones(4)
    with pytest.raises(ValueError, match="logits or other_logits must require grad"):
        divergence_loss(x, y, token_weight=ones)
    with pytest.raises(ValueError, match="token_weight must not require grad"):
        divergence_loss(*leaves(x, y), token_weight=ones.requires_grad_())
    with pytest.raises(TypeError, match="token_weight must be real numbers"):
        divergence_loss(*leaves(x, y), token_weight=torch.ones(4, dtype=torch.cfloat))
    with pytest.raises(ValueError, match="token_weight must have the leading shape"):
        divergence_loss(*leaves(x, y), token_weight=torch.ones(3))
    with torch.no_grad():
        assert divergence_loss(x, y, token_weight=torch.ones(4)).loss > 0
