"""The entropy bonus and the controller of its coefficient."""

import math

import pytest
import torch
from objectives_inputs import poison, policy_inputs

from em_kernels import softmax_stats
from em_kernels.objectives import active_entropy_coef, entropy_bonus, next_entropy_coef


def test_by_hand():
    loss, entropy = torch.tensor([1.0, 2.0, math.nan]), torch.tensor([0.5, 3.0, math.nan])
    assert entropy_bonus(loss, entropy, torch.tensor([1, 1, 0]), coef=0.1).tolist() == (
        pytest.approx([0.95, 1.7, 0.0])
    )


def test_gradient_reaches_the_logits():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    loss, mask = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([[1, 1, 0], [1, 0, 1]])

    def bonus(x):
        entropy = softmax_stats(x, outputs=("entropy",), impl="reference").entropy
        return entropy_bonus(loss, entropy, mask, coef=0.3)

    assert torch.autograd.gradcheck(bonus, logits)
    bonus(logits).sum().backward()
    p = logits.detach().softmax(-1)
    entropy = -(p * p.log()).sum(-1, keepdim=True)
    expected = 0.3 * p * (p.log() + entropy) * mask.unsqueeze(-1)
    torch.testing.assert_close(logits.grad, expected)


def test_masked_nan_gets_no_gradient():
    loss, entropy, _, mask = policy_inputs()
    bad = poison(entropy, mask).requires_grad_()
    entropy_bonus(poison(loss, mask), bad, mask, coef=0.1).sum().backward()
    torch.testing.assert_close(bad.grad, -0.1 * mask.double())


def test_coefficient_steps_toward_the_target():
    assert next_entropy_coef(0.01, 0.1, target=0.2) == pytest.approx(0.015)
    assert next_entropy_coef(0.01, 0.3, target=0.2) == pytest.approx(0.005)
    assert next_entropy_coef(0.01, 0.2, target=0.2) == 0.01
    assert next_entropy_coef(0.001, 0.3, target=0.2) == 0.0
    assert next_entropy_coef(0.999, 0.1, target=0.2) == 1.0
    assert next_entropy_coef(0.0, 0.3, target=0.2, minimum=-1.0, step=0.25) == -0.25


def test_coefficient_acts_only_up_to_the_target():
    assert active_entropy_coef(0.01, 0.1, target=0.2) == 0.01
    assert active_entropy_coef(0.01, 0.2, target=0.2) == 0.01
    assert active_entropy_coef(0.01, 0.3, target=0.2) == 0.0


def test_controller_holds_an_entropy_that_follows_the_coefficient():
    coef, history = 0.0, []
    for _ in range(200):
        entropy = 10 * coef
        history.append(entropy)
        coef = next_entropy_coef(coef, entropy, target=0.42)
    assert all(abs(entropy - 0.42) <= 10 * 0.005 for entropy in history[20:])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: entropy_bonus(x, x[:1], x, coef=1.0), ValueError, "entropy must have shape"),
        (lambda x: entropy_bonus(x, x, x, coef=math.nan), ValueError, "coef must be a number"),
        (lambda x: next_entropy_coef(0.1, x, target=1.0), TypeError, "entropy must be a number"),
        (lambda x: next_entropy_coef(0.1, 0.1, target=-1.0), ValueError, "target must be at least"),
        (lambda x: next_entropy_coef(0.1, 0.1, target=1, step=0), ValueError, "step must be"),
        (lambda x: next_entropy_coef(0, 0, target=1, minimum=2), ValueError, "minimum must be"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(2))
