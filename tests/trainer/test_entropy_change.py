"""Predicted change of entropy against the one that a small step makes, whatever the objective."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from rl_runs import rl_settings, run_rl
from trainer_runs import without_times

from em_kernels import softmax_stats
from em_kernels.lm.heads import Head
from em_kernels.lm.ranks import Ranks
from em_kernels.lm.rollout import Rollout
from em_kernels.trainer import batch, strategy
from em_kernels.trainer.entropy_change import PREDICTED
from em_kernels.trainer.entropy_control import control_of
from em_kernels.trainer.entropy_slopes import SHARPER, squared_gradient
from em_kernels.trainer.objective_table import TABLE
from em_kernels.trainer.policy_update import PolicyUpdate
from em_kernels.trainer.sampler_policy import SamplerPolicy

ROWS, COLUMNS, PROMPT = 6, 9, 2
WITH_REWARDS = [name for name, entry in TABLE.items() if entry.loss is not None]
COMMON = dict(reward="random", clip=1e9)
OTHER_LOSSES = {
    "grpo, bonus": dict(entropy_coef=0.3),
    "grpo, maximum of entropy": dict(entropy_coef=-0.3),
    "grpo, k3": dict(ref_kl=0.7),
    "grpo, exact KL": dict(ref_kl=0.7, kl_estimator="exact"),
    "grpo, repo": dict(advantage_shaping="repo"),
    "kl_cov, entropy": dict(advantage_shaping="entropy", ratio=0.1),
    "ppl, no label": dict(ppl_label="none"),
    "ppl, reference": dict(ppl_label="reference"),
    "ppl, sampler": dict(ppl_label="sampler"),
    "ppl, topk": dict(ppl_label="topk", ppl_label_k=3),
}


class Table(torch.nn.Module):
    """Every token has logits of its own, as no id comes twice; in float64."""

    device = torch.device("cpu")

    def __init__(self, seed: int):
        super().__init__()
        count, made = ROWS * COLUMNS, torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(count, count, generator=made, dtype=torch.float64)
        self.logits = torch.nn.Parameter(logits)
        self.head = Head(torch.eye(count, dtype=torch.float64), None, None, 1.0)


class Update(NamedTuple):
    """A `PolicyUpdate` of a table, its tokens, and the statistics `before`."""

    update: PolicyUpdate
    tokens: batch.Tokens
    before: dict

    @property
    def table(self) -> Table:
        return self.update.run.strategy.model

    def step(self, current: dict | None) -> dict:
        config = self.update.config
        control = control_of(config, config.stages[0].policy, ())
        return self.update._step(1, 0, config.stages[0], self.tokens, current, control)

    def entropy(self) -> torch.Tensor:
        """The sum over the tokens that count."""
        ids = self.tokens.input_ids[self.tokens.loss_mask]
        logp = self.table.logits.detach()[ids].log_softmax(-1)
        return -(logp.exp() * logp).sum()


def make_update(config, monkeypatch) -> Update:
    """Up to its first step, through the trainer's own code; the policy moves before that."""
    monkeypatch.setattr(batch, "hidden_states", lambda model, ids, *_: model.logits[ids])
    monkeypatch.setattr(strategy, "read_head", lambda model: model.head)
    table, ranks = Table(0), Ranks()
    own, other = (strategy.SingleProcessStrategy(m, 1.0, "float32") for m in (table, Table(1)))
    optimizer = torch.optim.SGD([table.logits], lr=1e-4)
    update = object.__new__(PolicyUpdate)
    update.config, update.reference = config, other
    update.run = SimpleNamespace(strategy=own, ranks=ranks, config=config, optimizer=optimizer)
    update.sampler = SamplerPolicy(update.run)
    if config.other_policy(config.stages[0].policy).is_sampler:
        update._copy_policy()
    made = torch.Generator().manual_seed(2)
    ids = torch.randperm(ROWS * COLUMNS, generator=made).view(ROWS, COLUMNS)
    length = torch.randint(3, COLUMNS - PROMPT, (ROWS, 1), generator=made)
    column = torch.arange(COLUMNS)
    answer = (column >= PROMPT) & (column < PROMPT + length)
    rollout = Rollout(ids, (column < PROMPT) | answer, answer, torch.ones(ROWS, dtype=torch.bool))
    tokens, before = update._read(SimpleNamespace(rollout=rollout), config.stages[0].policy)
    advantage = torch.randn(ROWS, 1, generator=made) * tokens.loss_mask
    return Update(update, tokens._replace(advantage=advantage), before)


def check_prediction(config, monkeypatch) -> None:
    """After the policy has moved from the one that sampled."""
    found = make_update(config, monkeypatch)
    logits, count = found.table.logits, int(found.tokens.loss_mask.sum())
    made = torch.Generator().manual_seed(3)
    logits.data += 0.4 * torch.randn(logits.shape, generator=made, dtype=torch.float64)
    entropy = found.entropy()
    predicted = found.step(None)[PREDICTED]
    change = (found.entropy() - entropy).item()
    assert abs(change) > 1e-9
    assert predicted == pytest.approx(count * change, rel=1e-3)


@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "em+"])
@pytest.mark.parametrize("name", WITH_REWARDS)
def test_a_step_changes_the_entropy_by_what_is_predicted(name, mixed, monkeypatch):
    """With the logits as the weights, where the policy is no longer the one that sampled."""
    changes = dict(schedule=f"em+{name}", em_coef=0.3) if mixed else dict(objective=name)
    check_prediction(rl_settings(**COMMON, **changes), monkeypatch)


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_penalties_labels_and_a_bonus_are_in_the_prediction(name, monkeypatch):
    config = rl_settings(objective=name.split(",")[0], **COMMON, **OTHER_LOSSES[name])
    check_prediction(config, monkeypatch)


@pytest.mark.parametrize("limits", [dict(top_k=3), dict(top_p=0.5), dict(top_p=0.9)], ids=str)
@pytest.mark.parametrize("name", ["grpo", "cispo", "kl_cov"])
def test_ratios_of_what_was_kept_are_in_the_prediction(name, limits, monkeypatch):
    """Of the entropy over the whole vocabulary, where log-probabilities are of the kept sets."""
    check_prediction(rl_settings(objective=name, **COMMON, **limits), monkeypatch)


@pytest.mark.parametrize("reduction", ["sequence_mean", "sequence_mean_token_sum"])
def test_whatever_the_loss_is_divided_by(reduction, monkeypatch):
    config = rl_settings(**COMMON, reduction=reduction, entropy_coef=0.3)
    check_prediction(config, monkeypatch)


def test_of_plain_grpo_on_policy_it_is_rate_times_mean_of_advantage_times_slope(monkeypatch):
    found = make_update(rl_settings(**COMMON), monkeypatch)
    mask = found.tokens.loss_mask
    slope = found.update._statistics(found.update.run.strategy, found.tokens, ("entropy_slope",))
    expected = 1e-4 * (found.tokens.advantage * slope["entropy_slope"])[mask].mean()
    line = found.step(found.before)
    assert line[PREDICTED] / int(mask.sum()) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_the_squared_gradient_of_the_entropy_from_two_temperatures(scale):
    """From nearly even rows to nearly certain ones."""
    z = scale * torch.randn(50, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logp = z.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1, keepdim=True)
    expected = (logp.exp() * (logp + entropy)).square().sum(-1)
    for dtype, rel in ((torch.float64, 1e-8), (torch.float32, 1e-3)):
        own = softmax_stats(z.to(dtype), outputs=("entropy", "collision"))
        sharper = softmax_stats(z.to(dtype), outputs=SHARPER, temperature=0.5)
        found = squared_gradient(own.entropy, own.collision, sharper)
        assert found.double() == pytest.approx(expected, rel=rel, abs=1e-9)


def test_the_steps_through_the_weights_change_the_entropy_by_what_is_predicted():
    """AdamW and shared weights, over several steps; a hundredth of the change is of second order.
    The prediction does not change the run."""
    common = dict(updates=1, learning_rate=1e-5, entropy_coef=0.3)
    found = {
        kind: run_rl(rl_settings(**common, predict_change=kind)).metrics[0]
        for kind in ("none", "logits", "weights")
    }
    line = found["weights"]
    assert line[f"{PREDICTED}_weights"] == pytest.approx(line["entropy_change"], rel=0.05)
    for kind, without in (("logits", ("_weights",)), ("none", ("_weights", ""))):
        rest = {k: v for k, v in line.items() if k not in {PREDICTED + end for end in without}}
        assert without_times([found[kind]]) == without_times([rest])


def test_steps_add_up_at_the_rate_of_their_stage():
    """Each by its share of the tokens; a rate at which the policy hardly moves."""

    def predicted(**changes):
        common = dict(updates=1, learning_rate=0.1, entropy_coef=0.3)
        return run_rl(rl_settings(**common, **changes)).metrics[0][PREDICTED]

    one = predicted(schedule="grpo@1e-7", minibatches=1)
    assert predicted(schedule="grpo@1e-7", minibatches=2) == pytest.approx(one, rel=1e-2)
    assert predicted(schedule="grpo@1e-7", epochs=2) == pytest.approx(2 * one, rel=1e-2)
    assert predicted(schedule="grpo@2e-7", minibatches=1) == pytest.approx(2 * one, rel=1e-2)
