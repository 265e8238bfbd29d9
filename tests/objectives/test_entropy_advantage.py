"""Entropy in the advantage."""

import math

import pytest
import torch
from helpers import error
from objectives_inputs import poison, policy_inputs

from em_kernels.objectives import entropy_advantage


@pytest.mark.parametrize(("alpha", "kappa"), ((0.4, 2.0), (0.1, 2.0), (5.0, 1.01), (0.0, 2.0)))
def test_formula(alpha, kappa):
    _, _, advantage, mask = policy_inputs()
    entropy = torch.rand(4, 6, dtype=torch.float64, requires_grad=True)
    found = entropy_advantage(entropy, advantage, mask, alpha=alpha, kappa=kappa)
    expected = advantage + torch.minimum(alpha * entropy, advantage.abs() / kappa)
    assert error(found, expected * mask) < 1e-14
    assert not found.requires_grad
    assert torch.equal(found.sign(), (advantage * mask).sign())


def test_by_hand():
    """What is published: A += min(0.4 H, |A| / 2)."""
    entropy = torch.tensor([0.5, 3.0, 0.5, 3.0, 3.0])
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0])
    found = entropy_advantage(entropy, advantage, torch.ones(5))
    assert found.tolist() == pytest.approx([1.2, 1.5, -0.8, -0.5, 0.0])


def test_one_advantage_an_answer_and_nan_outside_the_mask():
    entropy, _, advantage, mask = policy_inputs()
    entropy, whole = -entropy, advantage[:, :1].expand(4, 6)
    expected = entropy_advantage(entropy, whole, mask)
    assert torch.equal(entropy_advantage(entropy, advantage[:, 0], mask), expected)
    bad = entropy_advantage(poison(entropy, mask), poison(whole, mask), mask)
    assert torch.equal(bad, expected)


def test_an_entropy_below_zero_by_rounding_does_not_turn_an_advantage_of_zero():
    found = entropy_advantage(torch.tensor([-1e-9]), torch.zeros(1), torch.ones(1))
    assert found.item() == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kappa=1.0), "kappa must be above 1"),
        (dict(alpha=-0.1), "alpha must be at least 0"),
        (dict(alpha=math.inf), "alpha must be at least 0 and finite"),
    ],
)
def test_bad_input_names_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        entropy_advantage(torch.ones(2), torch.ones(2), torch.ones(2), **options)
