"""REPO-R: the advantage it makes, and the controller that steers zeta to an entropy."""

import math

import pytest
import torch
from helpers import error
from objectives_inputs import poison, policy_inputs

from em_kernels.objectives import next_zeta, repo_advantage


def textbook(logprob, advantage, zeta, entropy=0.0):
    """A - beta L with beta = zeta |A|, set to 0 where that has the other sign."""
    shaped = advantage - zeta * advantage.abs() * (logprob + entropy)
    return torch.where(shaped.sign() == advantage.sign(), shaped, 0)


def skyrl(advantages, log_probs, zeta):
    """The same as SkyRL writes it, by the sign of A."""
    logp = log_probs.clamp(min=-20.0)
    pos = (advantages * (1.0 - zeta * logp)).clamp_min(0.0)
    neg = (advantages * (1.0 + zeta * logp)).clamp_max(0.0)
    return torch.where(advantages > 0, pos, torch.where(advantages < 0, neg, advantages))


@pytest.mark.parametrize("zeta", (0.0, 0.05, -0.05, 0.6, -0.6))
def test_formula(zeta):
    logprob, _, advantage, mask = policy_inputs()
    entropy = torch.rand(4, 6, dtype=torch.float64) * 2
    found = repo_advantage(logprob, advantage, mask, zeta=zeta)
    assert not found.requires_grad and found.dtype == torch.float64
    assert error(found, textbook(logprob, advantage, zeta) * mask) < 1e-14
    assert error(found, skyrl(advantage, logprob, zeta) * mask) < 1e-14
    centred = repo_advantage(logprob, advantage, mask, zeta=zeta, entropy=entropy)
    assert error(centred, textbook(logprob, advantage, zeta, entropy) * mask) < 1e-14


def test_the_sign_stays_and_rare_tokens_gain():
    logprob = torch.tensor([[-0.1, -3.0, -0.1, -3.0]])
    advantage = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    common, rare, common_bad, rare_bad = repo_advantage(
        logprob, advantage, torch.ones(1, 4), zeta=0.5
    )[0].tolist()
    assert rare > common > 0 and common_bad < rare_bad <= 0
    assert repo_advantage(logprob, advantage, torch.ones(1, 4), zeta=9.0)[0, 3] == 0


def test_a_token_of_no_probability_is_finite():
    found = repo_advantage(torch.tensor([-math.inf]), torch.ones(1), torch.ones(1), zeta=0.05)
    assert found.tolist() == pytest.approx([2.0])


def test_one_advantage_an_answer_and_nan_outside_the_mask():
    logprob, _, advantage, mask = policy_inputs()
    whole = advantage[:, :1].expand(4, 6)
    expected = repo_advantage(logprob, whole, mask, zeta=0.05)
    assert torch.equal(repo_advantage(logprob, advantage[:, 0], mask, zeta=0.05), expected)
    bad = repo_advantage(
        poison(logprob, mask),
        poison(whole, mask),
        mask,
        zeta=0.05,
        entropy=poison(torch.zeros_like(logprob), mask),
    )
    assert torch.equal(bad, expected)


def test_controller_doubles_halves_and_turns():
    low, high = dict(entropy=0.1, target=0.2), dict(entropy=0.3, target=0.2)
    assert next_zeta(1e-3, **low) == 2e-3
    assert next_zeta(0.04, **low) == 0.05
    assert next_zeta(1e-3, **high) == 5e-4
    assert next_zeta(1.5e-4, **high) == -1e-4
    assert next_zeta(-1e-4, **high) == -2e-4
    assert next_zeta(-0.04, **high) == -0.05
    assert next_zeta(-1e-3, **low) == -5e-4
    assert next_zeta(-1.5e-4, **low) == 1e-4
    assert next_zeta(0.0, **low) == 1e-4 and next_zeta(0.0, **high) == -1e-4
    assert next_zeta(0.01, 0.2, target=0.2) == 0.01


def test_controller_holds_an_entropy_that_drifts_down():
    """An entropy that falls by itself, and that zeta raises."""
    zeta, entropy, history = 1e-3, 0.5, []
    for _ in range(300):
        entropy = max(entropy - 0.002 + 0.2 * zeta, 0.0)
        history.append(entropy)
        zeta = next_zeta(zeta, entropy, target=0.5)
    assert all(0.4 < entropy < 0.6 for entropy in history)


@pytest.mark.parametrize(
    ("call", "raised", "message"),
    [
        (lambda x: repo_advantage(x, x, x, zeta=math.nan), ValueError, "zeta must be a number"),
        (lambda x: repo_advantage(x, x[:1], x, zeta=0.1), ValueError, "advantage must have shape"),
        (lambda x: repo_advantage(x.int(), x, x, zeta=0.1), TypeError, "logprob must be floating"),
        (lambda x: repo_advantage(x, x, x, zeta=1, entropy=x[:1]), ValueError, "entropy must have"),
        (lambda x: next_zeta(0.1, 0.1, target=-0.1), ValueError, "target must be at least 0"),
        (
            lambda x: next_zeta(0.1, 0.1, target=1, minimum=0),
            ValueError,
            "minimum must be positive",
        ),
        (lambda x: next_zeta(0.1, 0.1, target=1, minimum=1), ValueError, "minimum must be at most"),
        (lambda x: next_zeta(0.1, -0.1, target=1), ValueError, "entropy must be at least 0"),
    ],
)
def test_bad_input_names_the_argument(call, raised, message):
    with pytest.raises(raised, match=message):
        call(torch.ones(2))
