"""The clipped loss by hand on both sides of both bounds, its gradient, and the KL penalty."""

import math

import pytest
import torch
from objectives_inputs import poison, policy_inputs

from em_kernels.objectives import (
    aggregate_loss,
    clip_cov_loss,
    clipped_surrogate,
    grpo_loss,
    kl_cov_loss,
    kl_estimate,
)

RATIO = torch.tensor([[1.0, 1.5, 1.5, 0.5, 0.5, 1.25]])
ADVANTAGE = torch.tensor([[2.0, 2.0, -2.0, 2.0, -2.0, 2.0]])


def loss_of(ratio=RATIO, advantage=ADVANTAGE, **options):
    old = torch.full(ratio.shape, -1.0)
    logprob = (old + ratio.log()).requires_grad_()
    return logprob, grpo_loss(logprob, old, advantage, torch.ones(ratio.shape), **options)


def test_by_hand():
    _, (loss, metrics) = loss_of()
    # Clipped: 1.5 and 1.25 with A > 0 at 1.2; 0.5 with A < 0 at 0.8.
    torch.testing.assert_close(loss, torch.tensor([[-2.0, -2.4, 3.0, -1.0, 1.6, -2.4]]))
    assert metrics["clip_fraction"] == 0.5
    kl = (0.5 - math.log(1.5)) * 2 + (math.log(2) - 0.5) * 2 + 0.25 - math.log(1.25)
    torch.testing.assert_close(metrics["policy_kl"].item(), kl / 6, rtol=1e-5, atol=0)


def test_clip_higher_moves_the_upper_bound_alone():
    _, (loss, metrics) = loss_of(clip_high=0.28)
    torch.testing.assert_close(loss, torch.tensor([[-2.0, -2.56, 3.0, -1.0, 1.6, -2.5]]))
    torch.testing.assert_close(metrics["clip_fraction"].item(), 2 / 6, rtol=1e-6, atol=0)


def test_gradient_is_minus_ratio_times_advantage_where_not_clipped():
    logprob, (loss, _) = loss_of()
    loss.sum().backward()
    torch.testing.assert_close(logprob.grad, torch.tensor([[-2.0, 0.0, 3.0, -1.0, 0.0, 0.0]]))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradcheck(estimator):
    logprob, old, advantage, mask = policy_inputs()
    ref = old + 0.1
    options = dict(ref_logprob=ref, kl_coef=0.3, kl_estimator=estimator)
    assert torch.autograd.gradcheck(
        lambda x: grpo_loss(x, old, advantage, mask, **options).loss, logprob
    )


def test_on_policy_it_is_the_policy_gradient():
    logprob, _, advantage, mask = policy_inputs()
    loss, metrics = grpo_loss(logprob, logprob.detach(), advantage, mask)
    loss.sum().backward()
    torch.testing.assert_close(logprob.grad, -advantage * mask)
    assert metrics["clip_fraction"] == metrics["policy_kl"] == 0


def test_kl_penalty():
    logprob, old, advantage, mask = policy_inputs()
    ref = old - 0.5
    plain = grpo_loss(logprob, old, advantage, mask).loss
    loss, metrics = grpo_loss(logprob, old, advantage, mask, ref_logprob=ref, kl_coef=0.1)
    kl = kl_estimate(logprob, ref)
    torch.testing.assert_close(loss, plain + 0.1 * kl * mask)
    torch.testing.assert_close(metrics["ref_kl"], kl[mask].mean())
    assert not metrics["ref_kl"].requires_grad


def test_an_exact_kl_takes_the_place_of_the_estimate():
    logprob, old, advantage, mask = policy_inputs()
    kl = poison(torch.rand_like(old).requires_grad_(), mask)
    plain = grpo_loss(logprob, old, advantage, mask).loss
    loss, metrics = grpo_loss(logprob, old, advantage, mask, ref_kl=kl, kl_coef=0.1)
    clean = torch.where(mask, kl.detach(), 0)
    torch.testing.assert_close(loss, plain + 0.1 * clean)
    torch.testing.assert_close(metrics["ref_kl"], clean[mask].mean())
    loss.sum().backward()
    torch.testing.assert_close(kl.grad, 0.1 * mask.to(kl))


def test_advantage_per_answer_and_loss_independent_of_micro_batches():
    logprob, old, advantage, mask = policy_inputs()
    per_answer = advantage[:, 0]
    whole = grpo_loss(logprob, old, per_answer, mask).loss
    spread = per_answer.unsqueeze(-1).expand(mask.shape)
    assert torch.equal(whole, grpo_loss(logprob, old, spread, mask).loss)
    total = aggregate_loss(whole, mask)
    parts = [
        aggregate_loss(
            grpo_loss(logprob[i], old[i], per_answer[i], mask[i]).loss,
            mask[i],
            denominator=mask.sum(),
        )
        for i in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), total)


def test_masked_nan_and_huge_ratios_do_no_harm():
    inputs = policy_inputs()
    mask = inputs[3]
    bad = [poison(x, mask) for x in inputs[:3]]
    ref = poison(inputs[1], mask)
    clean = grpo_loss(*inputs, ref_logprob=inputs[1], kl_coef=0.1)
    loss, metrics = grpo_loss(*bad, mask, ref_logprob=ref, kl_coef=0.1)
    assert torch.equal(loss, clean.loss) and metrics == clean.metrics
    loss.sum().backward()
    assert bad[0].grad.isfinite().all() and (bad[0].grad[~mask] == 0).all()

    logprob = torch.tensor([-1.0, -1.0, -500.0], requires_grad=True)
    far = torch.tensor([-500.0, -500.0, -1.0])
    loss, metrics = grpo_loss(logprob, far, torch.tensor([0.0, -1.0, 1.0]), torch.ones(3))
    loss.sum().backward()
    assert loss.isfinite().all() and logprob.grad.isfinite().all() and loss[0] == 0
    assert all(value.isfinite() for value in metrics.values())


def test_where_log_ratios_are_held():
    """GRPO's at 20, where verl holds them, Clip-Cov's and KL-Cov's at 80; from below none."""
    change = torch.tensor([-40.0, -25.0, 15.0, 30.0, 50.0, 100.0])
    logprob, old = (change - 200).requires_grad_(), torch.full((6,), -200.0)
    tokens = (logprob, old, torch.full((6,), -1.0), torch.ones(6))
    nothing = torch.zeros(6, dtype=torch.bool)
    wide = dict(clip_low=1.0, clip_high=1.0)
    for result, limit in (
        (grpo_loss(*tokens, **wide), 20.0),
        (clip_cov_loss(*tokens, nothing, **wide), 80.0),
        (kl_cov_loss(*tokens, nothing), 80.0),
    ):
        torch.testing.assert_close(result.loss, change.clamp(max=limit).exp())
        (grad,) = torch.autograd.grad(result.loss.sum(), logprob)
        torch.testing.assert_close(grad, change.clamp(max=limit).exp() * (change < limit))
    far = [x[:2] for x in tokens]
    torch.testing.assert_close(grpo_loss(*far).metrics["policy_kl"], torch.tensor(63.0 / 2))


def test_no_token_at_all():
    logprob, old, advantage, mask = policy_inputs()
    loss, metrics = grpo_loss(logprob, old, advantage, torch.zeros_like(mask))
    assert (loss == 0).all() and all(value == 0 for value in metrics.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_inputs_are_computed_in_float32(dtype):
    inputs = [x.detach().to(dtype) for x in policy_inputs()[:3]]
    mask = policy_inputs()[3]
    loss = grpo_loss(*inputs, mask).loss
    assert loss.dtype == torch.float32
    assert torch.equal(loss, grpo_loss(*(x.float() for x in inputs), mask).loss)


def test_surrogate_at_advantage_zero_is_not_clipped():
    loss, clipped = clipped_surrogate(torch.tensor([3.0]), torch.tensor([0.0]), 0.2, 0.2)
    assert loss == 0 and not clipped


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(kl_coef=0.1), ValueError, "ref_logprob must be given for kl_coef=0.1"),
        (dict(kl_coef=-1.0), ValueError, "kl_coef must be at least 0"),
        (dict(clip_low=-0.1), ValueError, "clip_low must be at least 0"),
        (dict(clip_high="1"), TypeError, "clip_high must be a number, got str"),
        (dict(advantage=torch.ones(2)), ValueError, r"advantage must have shape \(4, 6\)"),
        (dict(old_logprob=torch.ones(4)), ValueError, "old_logprob must have shape"),
        (dict(mask=[1]), TypeError, "mask must be a tensor, got list"),
        (dict(ref_logprob=torch.ones(4)), ValueError, "ref_logprob must have shape"),
        (dict(ref_kl=torch.ones(4)), ValueError, "ref_kl must have shape"),
        (dict(ref_kl=torch.ones(4, 6).long()), TypeError, "ref_kl must be floating point"),
        (dict(ref_kl=torch.ones(1), ref_logprob=torch.ones(1)), ValueError, "ref_kl must be given"),
    ],
)
def test_bad_input_names_the_argument(options, error, message):
    names = ("logprob", "old_logprob", "advantage", "mask")
    with pytest.raises(error, match=message):
        grpo_loss(**{**dict(zip(names, policy_inputs())), **options})
