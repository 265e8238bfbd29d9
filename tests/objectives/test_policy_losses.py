"""CISPO, GSPO and SAPO: their formulas in float64, gradients, masks, and what they refuse."""

import math

import pytest
import torch
from objectives_inputs import poison, policy_inputs

from em_kernels.objectives import (
    aggregate_loss,
    cispo_loss,
    clip_cov_loss,
    dppo_loss,
    grpo_loss,
    gspo_loss,
    gspo_token_loss,
    high_entropy_loss,
    kl_cov_loss,
    kl_estimate,
    kl_penalty,
    sapo_loss,
)

LOSSES = {
    "cispo": (cispo_loss, dict(clip_low=0.3, clip_high=0.2)),
    "gspo": (gspo_loss, dict(clip_low=0.03, clip_high=0.02)),
    "gspo_token": (gspo_token_loss, dict(clip_low=0.03, clip_high=0.02)),
    "sapo": (sapo_loss, dict(tau_pos=0.8, tau_neg=1.3)),
    "dppo": (dppo_loss, dict(delta_low=0.02, delta_high=0.03)),
}


def sg(x):
    return x.detach()


def formula(name, logprob, old, a, mask, **o):
    """As the papers write it; losses outside the mask are 0."""
    rho = (logprob - old).exp()
    if name == "cispo":
        loss = -sg(rho.clamp(1 - o["clip_low"], 1 + o["clip_high"])) * a * logprob
    elif name == "sapo":
        tau = torch.where(a > 0, o["tau_pos"], o["tau_neg"]).double()
        loss = -(4 / tau) / (1 + (-tau * (rho - 1)).exp()) * a
    elif name == "dppo":
        moved = logprob.exp() - old.exp()
        outside = torch.where(a > 0, moved > o["delta_high"], moved < -o["delta_low"])
        loss = -sg(rho) * a * logprob * ~outside
    else:
        s = ((logprob - old) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        s = s.exp().expand_as(rho)
        if name == "gspo_token":
            s = sg(s) * logprob.exp() / sg(logprob.exp())
        loss = -torch.min(s * a, s.clamp(1 - o["clip_low"], 1 + o["clip_high"]) * a)
    return torch.where(mask, loss, 0)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_the_formula(name):
    """Also in float32, to its rounding, and with one advantage an answer."""
    loss, options = LOSSES[name]
    logprob, old, advantage, mask = policy_inputs((5, 8))
    for a in (advantage, advantage[:, 0]):
        wide = a if a.dim() == 2 else a[:, None].expand(5, 8)
        expected = formula(name, logprob, old, wide, mask, **options)
        found = loss(logprob, old, a, mask, **options)
        torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=1e-14)
        weight = torch.rand_like(old)
        theirs, ours = (
            torch.autograd.grad((x * weight).sum(), logprob)[0] for x in (expected, found.loss)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        single = loss(logprob.float(), old.float(), a.float(), mask, **options)
        assert single.loss.dtype == torch.float32
        torch.testing.assert_close(single.loss.double(), expected, rtol=1e-4, atol=1e-5)
        assert not any(value.requires_grad for value in found.metrics.values())


@pytest.mark.parametrize("name", ["gspo", "sapo"])
def test_gradcheck(name):
    """Of those whose value is what their gradient belongs to."""
    loss, options = LOSSES[name]
    logprob, old, advantage, mask = policy_inputs()
    assert torch.autograd.gradcheck(lambda x: loss(x, old, advantage, mask, **options)[0], logprob)


@pytest.mark.parametrize("name", LOSSES)
def test_a_token_that_lost_all_its_probability_has_ratio_zero(name):
    loss, options = LOSSES[name]
    options = {**options, "clip_low": 1.0} if "clip_low" in options else options
    logprob, old, advantage, mask = policy_inputs()
    row, column = mask.nonzero()[0]
    logprob = logprob.detach()
    logprob[row, column] = -math.inf
    logprob.requires_grad_()
    found = loss(logprob, old, advantage, mask, **options).loss
    found.sum().backward()
    assert not found.isnan().any() and not logprob.grad.isnan().any()
    assert logprob.grad[row, column] == 0


@pytest.mark.parametrize("name", LOSSES)
def test_neither_value_nor_gradient_crosses_the_mask(name):
    loss, options = LOSSES[name]
    logprob, old, advantage, mask = policy_inputs()
    expected = loss(logprob, old, advantage, mask, **options)
    bad = poison(logprob, mask)
    found = loss(bad, poison(old, mask, math.inf), poison(advantage, mask), mask, **options)
    torch.testing.assert_close(found, expected)
    found.loss.sum().backward()
    assert (bad.grad[~mask] == 0).all() and bad.grad.isfinite().all()
    nothing = loss(bad, old, advantage, torch.zeros_like(mask), **options)
    assert (nothing.loss == 0).all() and all(value == 0 for value in nothing.metrics.values())


@pytest.mark.parametrize("name", LOSSES)
def test_on_policy_it_is_the_policy_gradient(name):
    """A / n from GSPO's tokens, so that all have one gradient under the mean over answers."""
    loss, options = LOSSES[name]
    logprob, _, advantage, mask = policy_inputs()
    a = advantage[:, :1].expand_as(advantage)
    found, metrics = loss(logprob, logprob.detach(), a, mask, **options)
    aggregate_loss(found, mask, mode="sequence_mean").backward()
    expected = -a * mask / mask.sum(1, keepdim=True) / 4
    torch.testing.assert_close(logprob.grad, expected)
    assert metrics.get("clip_fraction", 0) == 0 == metrics["policy_kl"]
    assert name != "sapo" or metrics["gate"] == 1


def test_a_clipped_weight_leaves_cispo_a_gradient_and_grpo_none():
    logprob, old = torch.tensor([[-1.0, -1.0]], requires_grad=True), torch.tensor([[-3.0, -1.1]])
    one, mask = torch.ones(1), torch.ones(1, 2)
    found = cispo_loss(logprob, old, one, mask)
    assert found.metrics["clip_fraction"] == 0.5  # e^2 = 7.4, above 5
    (grad,) = torch.autograd.grad(found.loss.sum(), logprob)
    torch.testing.assert_close(grad, torch.tensor([[-5.0, -math.exp(0.1)]]))
    (grad,) = torch.autograd.grad(grpo_loss(logprob, old, one, mask).loss.sum(), logprob)
    assert grad[0, 0] == 0


def test_an_answer_is_clipped_as_a_whole():
    """By GSPO: with its clip at the ratio of the answer, not of a token."""
    old = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -2.0, -0.5]], dtype=torch.float64)
    logprob = (old + torch.tensor([[0.3, -0.2, 0.0], [0.3, -0.3, 3e-4]])).requires_grad_()
    found = gspo_loss(logprob, old, torch.ones(2).double(), torch.ones(2, 3))
    assert found.metrics["clip_fraction"] == 0.5
    (grad,) = torch.autograd.grad(found.loss.sum(), logprob)
    assert (grad[0] == 0).all() and (grad[1] == grad[1, 0]).all() and grad[1, 0] < 0


def test_an_advantage_of_a_token_weighs_its_own_gradient():
    """In GSPO-token; in GSPO the gradient of every token is that of the whole answer."""
    logprob, old, advantage, mask = policy_inputs()
    free = dict(clip_low=9.0, clip_high=9.0)
    whole, tokens = (f(logprob, old, advantage, mask, **free) for f in (gspo_loss, gspo_token_loss))
    torch.testing.assert_close(whole.loss, tokens.loss)
    own = torch.autograd.grad(tokens.loss.sum(), logprob)[0]
    torch.testing.assert_close(own, tokens.loss.detach())
    shared = torch.autograd.grad(whole.loss.sum(), logprob)[0]
    mean = whole.loss.detach().sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(shared, mean * mask)


def test_the_gate_of_sapo_closes_faster_for_tokens_to_be_made_less_likely():
    old = torch.full((1, 2), -2.0, dtype=torch.float64)
    logprob = (old + math.log(3)).requires_grad_()
    a = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    found = sapo_loss(logprob, old, a, torch.ones(1, 2))
    (grad,) = torch.autograd.grad(found.loss.sum(), logprob)
    gates = [1 / math.cosh(tau) ** 2 for tau in (1.0, 1.05)]  # 4 s (1 - s) at tau (3 - 1)
    expected = [-3 * gates[0], 3 * gates[1]]
    torch.testing.assert_close(grad, torch.tensor([expected], dtype=torch.float64))
    assert found.metrics["gate"].item() == pytest.approx(sum(gates) / 2)


def test_a_penalty_joins_any_loss():
    """And is the one that `grpo_loss` has of its own."""
    logprob, old, advantage, mask = policy_inputs()
    ref = old - 0.5
    for loss, options in LOSSES.values():
        plain = loss(logprob, old, advantage, mask, **options)
        found = kl_penalty(plain, logprob, mask, kl_coef=0.1, ref_logprob=ref)
        kl = kl_estimate(logprob, ref)
        torch.testing.assert_close(found.loss, plain.loss + 0.1 * kl * mask)
        torch.testing.assert_close(found.metrics, {**plain.metrics, "ref_kl": kl[mask].mean()})
        assert kl_penalty(plain, logprob, mask, kl_coef=0.0) is plain
    options = dict(ref_kl=poison(kl, mask), kl_coef=0.2)
    inside = grpo_loss(logprob, old, advantage, mask, **options)
    outside = kl_penalty(grpo_loss(logprob, old, advantage, mask), logprob, mask, **options)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: cispo_loss(x, x, x, x, clip_low=-1), ValueError, "clip_low must be at least 0"),
        (lambda x: cispo_loss(x, x, x, x, clip_high=math.nan), ValueError, "clip_high must be"),
        (lambda x: gspo_loss(x, x, x, x, clip_high=-1), ValueError, "clip_high must be at least 0"),
        (lambda x: gspo_token_loss(x, x, x, x, clip_low="1"), TypeError, "clip_low must be a num"),
        (lambda x: sapo_loss(x, x, x, x, tau_pos=0), ValueError, "tau_pos must be positive"),
        (lambda x: sapo_loss(x, x, x, x, tau_neg=-1), ValueError, "tau_neg must be positive"),
        (lambda x: cispo_loss(x, x[:1], x, x), ValueError, "old_logprob must have shape"),
        (lambda x: gspo_loss(x, x, x[:1], x), ValueError, "advantage must have shape"),
        (lambda x: sapo_loss(x, x, x, x[0]), ValueError, "mask must have shape"),
        (
            lambda x: kl_penalty(cispo_loss(x, x, x, x), x, x, kl_coef=0.1),
            ValueError,
            "ref_logprob must be given for kl_coef=0.1, or ref_kl, got None for both",
        ),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(2, 3))


@pytest.mark.parametrize("loss", [grpo_loss, *(loss for loss, _ in LOSSES.values())])
def test_missing_old_log_probabilities_are_named(loss):
    x = torch.zeros(2, 3)
    message = r"old_logprob must be given: .* \(on-policy: logprob.detach\(\)\), got None"
    with pytest.raises(ValueError, match=message):
        loss(x, None, x, torch.ones(2, 3))
    for chosen in (clip_cov_loss, kl_cov_loss, high_entropy_loss):
        with pytest.raises(ValueError, match=message):
            chosen(x, None, x, torch.ones(2, 3), torch.ones(2, 3))
