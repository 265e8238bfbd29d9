"""The 80/20 loss: the clipped loss of the selected tokens over all tokens."""

import pytest
import torch
from objectives_inputs import poison, policy_inputs

from em_kernels import high_entropy_mask
from em_kernels.objectives import aggregate_loss, grpo_loss, high_entropy_loss


def test_by_hand():
    entropy = torch.tensor([[0.1, 0.2, 0.3, 0.4, 2.0]])
    ones, logprob = torch.ones(1, 5), torch.full((1, 5), -1.0)
    # The 0.8 quantile lies at position 3.2: 0.4 + 0.2 x 1.6 = 0.72.
    selected = high_entropy_mask(entropy, ones, ratio=0.2)
    loss, metrics = high_entropy_loss(logprob, logprob, 3 * ones, ones, selected)
    assert loss.tolist() == [[0.0, 0.0, 0.0, 0.0, -3.0]]
    torch.testing.assert_close(aggregate_loss(loss, ones).item(), -3 / 5)  # over all 5
    torch.testing.assert_close(metrics["selected_fraction"].item(), 0.2)


def test_gradient_is_grpos_on_the_selected_and_zero_elsewhere():
    logprob, old, advantage, mask = policy_inputs()
    entropy = torch.rand(mask.shape, dtype=torch.float64)
    selected = high_entropy_mask(entropy, mask, ratio=0.3)

    def call(x):
        return high_entropy_loss(x, old, advantage, mask, selected).loss

    assert torch.autograd.gradcheck(call, logprob)
    (found,) = torch.autograd.grad(call(logprob).sum(), logprob)
    grpo = grpo_loss(logprob, old, advantage, mask, clip_high=0.28).loss
    (expected,) = torch.autograd.grad(grpo.sum(), logprob)
    assert torch.equal(found, torch.where(selected, expected, 0)) and found.any()


def test_all_selected_is_grpo():
    inputs = policy_inputs()
    found = high_entropy_loss(*inputs, inputs[3], clip_high=0.2).loss
    assert torch.equal(found, grpo_loss(*inputs).loss)


def test_masked_nan_and_no_token():
    logprob, old, advantage, mask = policy_inputs()
    bad = [poison(x, mask) for x in (logprob, old, advantage)]
    loss, metrics = high_entropy_loss(*bad, mask, mask)
    loss.sum().backward()
    assert loss.isfinite().all() and bad[0].grad.isfinite().all()
    none = torch.zeros_like(mask)
    loss, metrics = high_entropy_loss(logprob, old, advantage, none, none)
    assert (loss == 0).all() and all(value == 0 for value in metrics.values())


def test_bad_input_names_the_argument():
    logprob, old, advantage, mask = policy_inputs()
    with pytest.raises(ValueError, match=r"selected must have shape \(4, 6\)"):
        high_entropy_loss(logprob, old, advantage, mask, mask[:1])
    with pytest.raises(TypeError, match="selected must be a tensor, got float"):
        high_entropy_loss(logprob, old, advantage, mask, 0.2)
