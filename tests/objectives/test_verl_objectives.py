"""Clip-Cov, KL-Cov, GRPO advantages and aggregation against verl's functions on shared inputs.

Runs where verl is installed; what verl 0.9.1 gave for these inputs is written down for where it
is not. Clip-Cov is compared with every eligible token taken, so that no draw enters.
"""

from types import SimpleNamespace

import pytest
import torch
import verl_source

from em_kernels.objectives import (
    aggregate_loss,
    clip_cov_loss,
    clip_cov_selection,
    group_advantage,
    kl_cov_loss,
    kl_cov_selection,
)

MODES = {
    "token_mean": "token-mean",
    "sequence_mean": "seq-mean-token-mean",
    "sequence_mean_token_sum": "seq-mean-token-sum",
}
RECORDED = {
    "clip_cov": {
        "token_mean": -0.0889195853,
        "sequence_mean": -0.1143196956,
        "sequence_mean_token_sum": -0.4594178574,
    },
    "kl_cov": {
        "token_mean": -0.0291461810,
        "sequence_mean": 0.0752308110,
        "sequence_mean_token_sum": -0.1505886016,
    },
}


def shared_inputs():
    """(logprob, old_logprob, advantage, mask) in float64, from a formula, not a generator."""
    i = torch.arange(48, dtype=torch.float64).view(6, 8)
    logprob = -1.5 + 1.4 * torch.sin(1.7 * i)
    old = logprob + 0.4 * torch.cos(2.3 * i)
    advantage = (1.3 * torch.sin(0.9 + torch.arange(6, dtype=torch.float64))).view(6, 1)
    mask = torch.arange(8) < torch.tensor([8, 3, 5, 8, 1, 6]).view(6, 1)
    return logprob, old, advantage.expand(6, 8), mask


def ours(method, mode):
    logprob, old, advantage, mask = shared_inputs()
    if method == "clip_cov":
        clip = dict(clip_low=0.2, clip_high=0.28)
        selected = clip_cov_selection(
            logprob, old, advantage, mask, ratio=1.0, lower=0.5, upper=2.0, **clip
        )
        loss = clip_cov_loss(logprob, old, advantage, mask, selected, **clip).loss
    else:
        selected = kl_cov_selection(logprob, advantage, mask, ratio=0.2)
        loss = kl_cov_loss(logprob, old, advantage, mask, selected, kl_coef=0.7).loss
    assert 3 <= selected.sum() <= 12
    return aggregate_loss(loss, mask, mode=mode).item()


def theirs(core_algos, method, mode):
    logprob, old, advantage, mask = shared_inputs()
    config = SimpleNamespace(
        clip_ratio=0.2,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        global_batch_info={},
        policy_loss=SimpleNamespace(
            clip_cov_ratio=1.0,
            clip_cov_lb=0.5,
            clip_cov_ub=2.0,
            kl_cov_ratio=0.2,
            ppo_kl_coef=0.7,
        ),
    )
    compute = getattr(core_algos, f"compute_policy_loss_{method}")
    loss, _ = compute(old, logprob, advantage, mask.double(), MODES[mode], config)
    return loss.item()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", RECORDED)
def test_loss_is_the_one_recorded_from_verl(method, mode):
    assert ours(method, mode) == pytest.approx(RECORDED[method][mode], rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", RECORDED)
def test_loss_is_that_of_verl(method, mode, monkeypatch):
    core_algos = verl_source.load(monkeypatch)["verl.trainer.ppo.core_algos"]
    assert ours(method, mode) == pytest.approx(theirs(core_algos, method, mode), rel=1e-6)


def test_advantage_is_that_of_verl(monkeypatch):
    core_algos = verl_source.load(monkeypatch)["verl.trainer.ppo.core_algos"]
    reward = torch.tensor([1.0, 0.0, 0.0, 0.5, 0.5, 0.5, 1.0, 0.0])
    prompt = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    expected, _ = core_algos.compute_grpo_outcome_advantage(
        reward[:, None].clone(), torch.ones(8, 1), prompt.numpy()
    )
    torch.testing.assert_close(group_advantage(reward, prompt), expected[:, 0])
