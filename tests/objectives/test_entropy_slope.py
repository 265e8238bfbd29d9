"""`entropy_slope` against the change of entropy that a small policy-gradient step really makes.

The policy is a table: state s has logits theta[s], so a gradient step in theta is one in logit
space, and the step is taken through the library's own loss.
"""

import pytest
import torch

from em_kernels import linear_softmax_stats, linear_token_loss, softmax_stats

STATES, VOCAB = 5, 13
LR = 1e-5


def draw_policy(scale=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(STATES, VOCAB, generator=g, dtype=torch.float64) * scale


def entropy_of(theta):
    return softmax_stats(theta, outputs=("entropy",)).entropy


def policy_gradient_step(theta, states, tokens, advantage):
    """theta after a step of SGD on -sum_i A_i log p(token_i | state_i); hidden = one-hot(state)."""
    weight = theta.T.clone().requires_grad_()
    hidden = torch.eye(STATES, dtype=theta.dtype)[states]
    loss = linear_token_loss(hidden, weight, tokens, logprob_weight=-advantage).loss
    loss.backward()
    return (weight.detach() - LR * weight.grad).T


def slope(theta, states, tokens):
    return softmax_stats(theta[states], tokens, outputs=("entropy_slope",)).entropy_slope


@pytest.mark.parametrize("scale", [0.1, 2.0, 8.0], ids=["diffuse", "mixed", "nearly certain"])
def test_one_step_on_one_token(scale):
    theta = draw_policy(scale)
    states = torch.arange(STATES)
    for token in range(VOCAB):
        tokens = torch.full((STATES,), token)
        advantage = torch.linspace(-1, 1, STATES, dtype=torch.float64)
        after = policy_gradient_step(theta, states, tokens, advantage)
        measured = entropy_of(after) - entropy_of(theta)
        predicted = LR * advantage * slope(theta, states, tokens)
        # What is left over is of second order in the step.
        assert (measured - predicted).abs().max() < 20 * LR**2


def test_a_batch_adds_up():
    """Many sampled tokens, several in each state: a state's change is the sum of its tokens'."""
    theta = draw_policy()
    g = torch.Generator().manual_seed(1)
    states = torch.randint(0, STATES, (40,), generator=g)
    tokens = torch.multinomial(theta.softmax(-1)[states], 1, generator=g)[:, 0]
    advantage = torch.randn(40, generator=g, dtype=torch.float64)
    after = policy_gradient_step(theta, states, tokens, advantage)
    change = entropy_of(after) - entropy_of(theta)
    per_token = LR * advantage * slope(theta, states, tokens)
    predicted = torch.zeros(STATES, dtype=torch.float64).index_add(0, states, per_token)
    assert (change - predicted).norm() < 1e-3 * predicted.norm()
    assert (change.sum() - per_token.sum()).abs() < 1e-3 * per_token.abs().sum()


def test_its_mean_over_tokens_is_the_covariance_theorem():
    """E_{y~p}[A_y slope_y] = -Cov_{a~p}(log p, p (A - E A)), what the exact gradient changes."""
    theta = draw_policy()
    p = theta.softmax(-1)
    advantage = torch.randn(theta.shape, generator=torch.Generator().manual_seed(2)).double()
    tokens = torch.arange(VOCAB).expand(STATES, VOCAB)
    rows = theta[:, None].expand(STATES, VOCAB, VOCAB)
    slopes = softmax_stats(rows, tokens, outputs=("entropy_slope",)).entropy_slope
    mean_slope = (p * advantage * slopes).sum(-1)
    step = p * (advantage - (p * advantage).sum(-1, keepdim=True))
    log_p = p.log()
    covariance = (p * log_p * step).sum(-1) - (p * log_p).sum(-1) * (p * step).sum(-1)
    torch.testing.assert_close(mean_slope, -covariance)
    measured = entropy_of(theta + LR * step) - entropy_of(theta)
    assert (measured + LR * covariance).abs().max() < 1e-3 * LR * covariance.abs().max()


def test_temperature_is_that_of_the_policy_that_acts():
    """With p = softmax(z / T) a step on log p moves z by its gradient / T, and z / T by 1 / T^2."""
    theta, temperature, tokens = draw_policy(), 0.7, torch.arange(STATES)
    weight = theta.T.clone().requires_grad_()
    hidden = torch.eye(STATES, dtype=torch.float64)
    stats = linear_softmax_stats(
        hidden, weight, tokens, outputs=("logprob", "entropy_slope"), temperature=temperature
    )
    stats.logprob.sum().backward()
    after = (weight.detach() + LR * weight.grad).T
    measured = entropy_of(after / temperature) - entropy_of(theta / temperature)
    predicted = LR * stats.entropy_slope / temperature**2
    assert (measured - predicted).abs().max() < 1e-3 * predicted.abs().max()
