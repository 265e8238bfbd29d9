"""Clip-Cov and KL-Cov by hand, their gradients, and selection over the whole update."""

import pytest
import torch
from objectives_inputs import poison, policy_inputs

from em_kernels.objectives import (
    aggregate_loss,
    clip_cov_loss,
    clip_cov_selection,
    grpo_loss,
    kl_cov_loss,
    kl_cov_selection,
)

# Means over the four tokens: logprob -2, A 0. Covariances: 2, 1, 2, 1.
LOGPROB = torch.tensor([[-1.0, -1.0, -3.0, -3.0]])
ADVANTAGE = torch.tensor([[2.0, 1.0, -2.0, -1.0]])
ONES = torch.ones(1, 4)


def test_clip_cov_selects_by_hand():
    # The lower bound is exclusive: the first and the third are eligible.
    options = dict(lower=1.0, upper=5.0)
    selected = clip_cov_selection(LOGPROB, LOGPROB, ADVANTAGE, ONES, ratio=1.0, **options)
    assert selected.tolist() == [[True, False, True, False]]
    one = clip_cov_selection(LOGPROB, LOGPROB, ADVANTAGE, ONES, ratio=2e-4, **options)
    assert one.sum() == 1 and (one & selected).sum() == 1


def test_clip_cov_leaves_what_ppo_clips():
    old = LOGPROB.clone()
    old[0, 0] -= 1.0  # its ratio e is above 1 + 0.5 with A > 0
    options = dict(ratio=1.0, clip_low=0.5, clip_high=0.5)
    selected = clip_cov_selection(LOGPROB, old, ADVANTAGE, ONES, **options)
    assert selected.tolist() == [[False, False, True, False]]


def test_clip_cov_draw_is_seeded():
    inputs = policy_inputs((20, 50))
    options = dict(lower=-1.0, ratio=0.05)
    draws = [
        clip_cov_selection(*inputs, generator=torch.Generator().manual_seed(s), **options)
        for s in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].sum() == int(0.05 * int(inputs[3].sum()))


def test_clip_cov_loss_by_hand():
    old = LOGPROB - torch.tensor([[1.5, 3.0, 1.5, 1.0]]).log()
    selected = torch.tensor([[True, False, False, False]])
    loss, metrics = clip_cov_loss(LOGPROB, old, ADVANTAGE, ONES, selected)
    # The second is clipped at 2; the first is dropped.
    torch.testing.assert_close(loss, torch.tensor([[0.0, -2.0, 3.0, 1.0]]))
    assert metrics["clip_fraction"] == metrics["selected_fraction"] == 0.25
    torch.testing.assert_close(aggregate_loss(loss, ONES).item(), 0.5)  # over 4 tokens, not 3


def test_clip_cov_gradient_is_grpos_but_for_the_selected():
    logprob, old, advantage, mask = policy_inputs()
    selected = clip_cov_selection(logprob, old, advantage, mask, ratio=0.3, lower=-1.0)
    assert selected.any()

    def call(x):
        return clip_cov_loss(x, old, advantage, mask, selected).loss

    assert torch.autograd.gradcheck(call, logprob)
    (found,) = torch.autograd.grad(call(logprob).sum(), logprob)
    grpo = grpo_loss(logprob, old, advantage, mask, clip_low=1.0, clip_high=1.0).loss
    (expected,) = torch.autograd.grad(grpo.sum(), logprob)
    assert torch.equal(found, torch.where(selected, 0, expected))
    assert (expected[selected] != 0).all()


def test_kl_cov_by_hand():
    selected = kl_cov_selection(LOGPROB, ADVANTAGE, ONES, ratio=0.25)
    assert selected.tolist() == [[True, False, False, False]]
    old = LOGPROB - torch.tensor([[1.5, 3.0, 0.5, 1.0]]).log()
    loss, metrics = kl_cov_loss(LOGPROB, old, ADVANTAGE, ONES, selected, kl_coef=2.0)
    penalty = 2 * torch.tensor(1.5).log().item()
    torch.testing.assert_close(loss, torch.tensor([[-3.0 + penalty, -3.0, 1.0, 1.0]]))
    distance = torch.tensor([1.5, 3.0, 2.0, 1.0]).log().mean()
    torch.testing.assert_close(metrics["abs_log_ratio"], distance)


def test_kl_cov_gradient():
    logprob, old, advantage, mask = policy_inputs()
    selected = kl_cov_selection(logprob, advantage, mask, ratio=0.2)

    def call(x):
        return kl_cov_loss(x, old, advantage, mask, selected, kl_coef=0.7).loss

    assert torch.autograd.gradcheck(call, logprob)
    (found,) = torch.autograd.grad(call(logprob).sum(), logprob)
    change = (logprob - old).detach()
    expected = -advantage * change.exp() * mask + 0.7 * change.sign() * selected
    torch.testing.assert_close(found, expected)


def test_kl_cov_is_inert_on_policy():
    logprob, _, advantage, mask = policy_inputs()
    old = logprob.detach()
    grads = []
    for kl_coef in (0.0, 100.0):
        loss = kl_cov_loss(logprob, old, advantage, mask, mask, kl_coef=kl_coef).loss
        grads.append(torch.autograd.grad(loss.sum(), logprob)[0])
    assert torch.equal(*grads)


def test_one_selection_serves_micro_batches():
    logprob, old, advantage, mask = policy_inputs((8, 16))
    selected = kl_cov_selection(logprob, advantage, mask, ratio=0.02)
    assert selected.sum() == 1
    each = [kl_cov_selection(*x, ratio=0.02) for x in zip(logprob, advantage, mask)]
    assert sum(int(part.sum()) for part in each) == 8
    whole = aggregate_loss(kl_cov_loss(logprob, old, advantage, mask, selected).loss, mask)
    parts = [
        aggregate_loss(kl_cov_loss(*part).loss, part[3], denominator=mask.sum())
        for part in zip(*(x.split(3) for x in (logprob, old, advantage, mask, selected)))
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("method", ["clip_cov", "kl_cov"])
def test_edge_cases_are_free_of_nan(method):
    def run(logprob, old, advantage, mask):
        if method == "clip_cov":
            selected = clip_cov_selection(logprob, old, advantage, mask, lower=-9.0)
            return selected, clip_cov_loss(logprob, old, advantage, mask, selected)
        selected = kl_cov_selection(logprob, advantage, mask)
        return selected, kl_cov_loss(logprob, old, advantage, mask, selected)

    logprob, old, advantage, mask = policy_inputs()
    torch.manual_seed(0)
    _, clean = run(logprob, old, advantage, mask)
    bad = [poison(x, mask) for x in (logprob, old, advantage)]
    torch.manual_seed(0)
    _, found = run(*bad, mask)
    assert torch.equal(found.loss, clean.loss) and found.metrics == clean.metrics
    found.loss.sum().backward()
    assert bad[0].grad.isfinite().all()

    none, one = torch.zeros_like(mask), torch.zeros_like(mask)
    one[0, 0] = True
    equal = torch.ones_like(advantage)
    for a, m, count in ((advantage, none, 0), (advantage, one, 1), (equal, mask, 1)):
        selected, (loss, metrics) = run(logprob, old, a, m)
        assert selected.sum() == count and loss.isfinite().all()
        assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: kl_cov_loss(x, x, x, x, x, kl_coef=-1.0), ValueError, "kl_coef must be"),
        (lambda x: kl_cov_loss(x, x, x, x, x[:1]), ValueError, "selected must have shape"),
        (lambda x: kl_cov_selection(x, x, x, ratio=20), ValueError, r"ratio must be in \(0, 1\]"),
        (lambda x: clip_cov_loss(x, x, x, x, None), TypeError, "selected must be a tensor"),
        (lambda x: clip_cov_selection(x, x, x, x, lower=6.0), ValueError, "lower must be below"),
        (lambda x: clip_cov_selection(x, x.long(), x, x), TypeError, "old_logprob must be float"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(2, 3))
