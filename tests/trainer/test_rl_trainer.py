"""RL by name in the trainer: losses and gradients against plain PyTorch, metrics, resuming."""

import json
import math
from dataclasses import replace

import pytest
import torch
from plain_objectives import plain_exact_kl, plain_loss, plain_selection, plain_statistics
from rl_runs import PROBLEMS, interrupted_and_resumed, plain_log_softmax, rl_settings, run_rl
from tiny_qwen2 import WORDS, make_model
from trainer_runs import without_times

from em_kernels import clip_cov_mask, token_covariance
from em_kernels.trainer import policy_update
from em_kernels.trainer.rl_config import OBJECTIVES
from em_kernels.trainer.schedule import WITHOUT_REWARDS

POLICY = [name for name in OBJECTIVES if name not in WITHOUT_REWARDS]
SETTINGS = {
    "grpo": dict(clip_low=0.1, clip_high=0.15, ref_kl=0.2),
    "dr_grpo": {},
    "bnpo": {},
    "cispo": dict(clip_low=0.1, clip_high=0.15),
    "gspo": dict(clip_low=0.03, clip_high=0.05, ref_kl=0.2),
    "gspo_token": dict(clip_low=0.03, clip_high=0.05, reduction="token_mean"),
    "sapo": dict(tau_pos=0.8, tau_neg=1.3),
    "dppo": dict(dppo_low=0.01, dppo_high=0.02, max_ratio=1.1),
    "grpo++": dict(reward="random", entropy_coef=0.3),
    "l-grpo": dict(reward="length", reduction="sequence_mean_token_sum"),
    "clip_cov": dict(ratio=0.1, cov_lower=-9.0, cov_upper=9.0, clip_low=0.1, clip_high=0.1),
    "kl_cov": dict(ratio=0.1, kl_cov_coef=0.7),
    "high_entropy": dict(ratio=0.3, reduction="sequence_mean"),
    "entropy_bonus": dict(entropy_coef=0.5),
    "repo": dict(repo_zeta=0.9, repo_zeta_max=1.0),
    "entropy_advantage": dict(shaping_alpha=0.3, shaping_kappa=3.0),
    "empo": dict(reward="length", empo_low=-1.0),
    "ppl": dict(gamma=0.8, alpha=0.6),
}
SHAPED = {
    "kl_cov, shaped by repo": dict(
        SETTINGS["kl_cov"],
        objective="kl_cov",
        advantage_shaping="repo",
        repo_zeta=-0.6,
        repo_zeta_max=1.0,
    ),
    "high_entropy, shaped by entropy": dict(
        SETTINGS["high_entropy"], objective="high_entropy", advantage_shaping="entropy"
    ),
    "repo, unshaped": dict(objective="repo", advantage_shaping="none"),
}
CLIPPING = {"cispo", "gspo", "gspo_token", "dppo"}
EXACT = {
    **SHAPED,
    "dppo, of all tokens": dict(
        objective="dppo",
        dppo_divergence="topk_kl",
        dppo_k=len(WORDS),
        dppo_low=0.03,
        dppo_high=0.02,
        ref_kl=0.2,
        kl_estimator="exact",
    ),
    "grpo, exact KL": dict(objective="grpo", ref_kl=0.7, kl_estimator="exact"),
    "ppl, labelled by the reference": dict(SETTINGS["ppl"], objective="ppl", ppl_label="reference"),
    "ppl, labelled by the sampler": dict(SETTINGS["ppl"], objective="ppl", ppl_label="sampler"),
    "ppl, labelled by all tokens": dict(
        SETTINGS["ppl"], objective="ppl", ppl_label="topk", ppl_label_k=len(WORDS)
    ),
}


def settings_of(name, **changes):
    own = EXACT.get(name) or dict(SETTINGS[name], objective=name)
    return rl_settings(**{**own, **changes})


class Steps:
    """What every optimiser step saw: weights before it, its tokens and its gradient."""

    def __init__(self, monkeypatch):
        self.weights, self.tokens, self.gradients = [], [], []
        accumulate = policy_update.accumulate_gradients
        inner = policy_update.PolicyUpdate._step

        def step(update, number, index, stage, tokens, *args):
            state = update.run.model.state_dict()
            self.weights.append({name: value.clone() for name, value in state.items()})
            self.tokens.append(tokens)
            return inner(update, number, index, stage, tokens, *args)

        def accumulate_gradients(run, *args):
            sums = accumulate(run, *args)
            parameters = run.model.parameters()
            self.gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
            return sums

        monkeypatch.setattr(policy_update.PolicyUpdate, "_step", step)
        monkeypatch.setattr(policy_update, "accumulate_gradients", accumulate_gradients)


@pytest.mark.parametrize("name", [*POLICY, *EXACT])
def test_loss_and_gradient_are_those_of_full_logits_and_the_papers_formula(name, monkeypatch):
    """In the second epoch, where the policy is no longer the one that sampled."""
    steps = Steps(monkeypatch)
    config = settings_of(name, updates=1, epochs=2, minibatches=1)
    drawn, name = [], config.objective
    if name == "clip_cov":

        def keep(*args, **kwargs):
            drawn.append(clip_cov_mask(*args, **kwargs))
            return drawn[-1]

        monkeypatch.setattr("em_kernels.objectives.clip_cov.clip_cov_mask", keep)
    line = run_rl(config).metrics[0]
    assert line["optimizer_steps"] == len(steps.tokens) == 2
    losses = []
    for weights, tokens, found in zip(steps.weights, steps.tokens, steps.gradients):
        model = make_model()
        model.load_state_dict(weights)
        logprob, entropy = plain_statistics(model, tokens)
        if not losses:  # on-policy to the last bit
            tokens = tokens._replace(old_logprob=logprob.detach())
        inputs = (logprob.detach(), entropy.detach(), tokens)
        selected = drawn.pop(0) if drawn else plain_selection(config, name, *inputs)
        exact = plain_exact_kl(model, tokens, make_model())
        loss = plain_loss(config, name, logprob, entropy, tokens, selected, exact)
        loss.backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert (found - expected).norm() <= 1e-4 * expected.norm()
        losses.append(loss.item())
    assert line["loss"] == pytest.approx(sum(losses) / 2, rel=1e-4, abs=1e-6)
    assert name not in CLIPPING or 0.02 < line["clip_fraction"] < 0.48  # of the second epoch
    old = steps.tokens[1].old_logprob
    assert (logprob.detach() - old).abs().max() > 0.05  # it did move


@pytest.mark.parametrize("label", ["sampler", "reference"])
def test_the_label_is_the_policy_of_this_update_or_of_the_first(label, monkeypatch):
    """In the second epoch of the second update."""
    steps = Steps(monkeypatch)
    changes = dict(ppl_label=label, updates=2, epochs=2, minibatches=1)
    config = settings_of("ppl", **changes, learning_rate=3e-3)
    run_rl(config)
    models = [make_model() for _ in range(4)]
    for model, weights in zip(models, steps.weights, strict=True):
        model.load_state_dict(weights)
    pi, model, tokens = models[2 if label == "sampler" else 0], models[3], steps.tokens[3]
    logprob, entropy = plain_statistics(model, tokens)
    exact = plain_exact_kl(model, tokens, pi)
    plain_loss(config, "ppl", logprob, entropy, tokens, None, exact).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (steps.gradients[3] - expected).norm() <= 1e-4 * expected.norm()


def test_a_stored_label_is_that_of_the_policy_of_this_update(monkeypatch):
    """In the second epoch of the second update: the KL of k tokens, and one for all others."""
    steps, k = Steps(monkeypatch), 4
    changes = dict(ppl_label="topk", ppl_label_k=k, updates=2, epochs=2, minibatches=1)
    config = settings_of("ppl", **changes, learning_rate=3e-3)
    run_rl(config)
    pi, model = make_model(), make_model()
    pi.load_state_dict(steps.weights[2])
    model.load_state_dict(steps.weights[3])
    tokens = steps.tokens[3]
    stored, ids = plain_log_softmax(pi, tokens).detach().topk(k)
    counted = tokens.loss_mask
    assert (tokens.label_logprob - stored)[counted].abs().max() < 1e-4
    assert torch.equal(tokens.label_ids[counted], ids[counted])
    logprob, entropy = plain_statistics(model, tokens)
    own = plain_log_softmax(model, tokens).gather(-1, ids)
    rest, other = (1 - x.exp().sum(-1) for x in (stored, own))
    kl = (stored.exp() * (stored - own)).sum(-1) + rest * (rest / other).log()
    plain_loss(config, "ppl", logprob, entropy, tokens, None, (None, kl)).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (steps.gradients[3] - expected).norm() <= 1e-4 * expected.norm()


def test_the_exact_kl_is_written_down_and_the_penalty_holds_the_policy_near():
    """Where k3 of the sampled tokens is an estimate: they agree on average, and only so."""
    found = {}
    for coef in (1e-9, 30.0):
        for estimator in ("exact", "k3"):
            config = rl_settings(ref_kl=coef, kl_estimator=estimator, updates=4)
            found[coef, estimator] = run_rl(config).metrics[-1]["ref_kl"]
    assert 0 < found[30.0, "exact"] < 0.2 * found[1e-9, "exact"]
    assert found[1e-9, "exact"] == pytest.approx(found[1e-9, "k3"], rel=0.5)
    assert found[1e-9, "exact"] != found[1e-9, "k3"]


def numbers(lines):
    return [
        {name: value for name, value in line.items() if isinstance(value, (int, float))}
        for line in without_times(lines)
    ]


PRESETS = {
    "dr_grpo": dict(normalize_std=False, reduction="sequence_mean_token_sum_norm"),
    "bnpo": dict(reduction="token_mean"),
    "gspo": dict(reduction="sequence_mean"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_settings(name, monkeypatch):
    """To the last bit; Dr. GRPO's advantage is the reward less its mean."""
    steps = Steps(monkeypatch)
    base = "grpo" if name != "gspo" else "gspo"
    for objective, changes in ((name, {}), (base, PRESETS[name])):
        run_rl(rl_settings(objective=objective, updates=1, minibatches=1, **changes))
    assert torch.equal(*steps.gradients)
    tokens = steps.tokens[0]
    lengths = tokens.loss_mask.sum(1)
    means = 1 - lengths / 12 - tokens.advantage.sum(1) / lengths  # of the two groups
    assert (len((1e4 * means).round().unique()) <= 2) == (name == "dr_grpo")


ALIKE = {"bnpo", "cispo", "gspo_token", "sapo", "dppo"}  # per token, as others that are run


@pytest.mark.parametrize("name", [name for name in (*POLICY, *EXACT) if name not in ALIKE])
def test_a_run_does_not_depend_on_the_micro_batches(name):
    """Selection and denominators are those of the whole step, however it is cut."""
    expected = numbers(run_rl(settings_of(name, micro_batch=10)).metrics)
    for size in (1, 4):
        found = numbers(run_rl(settings_of(name, micro_batch=size)).metrics)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-5)


def test_kl_cov_is_inert_while_the_policy_is_the_one_that_sampled():
    """Exactly, although stored log-probabilities are computed in other micro-batches."""
    base = dict(objective="kl_cov", ratio=0.5, updates=1, minibatches=1)
    lines = [run_rl(rl_settings(**base, kl_cov_coef=c)).metrics for c in (0.0, 50.0)]
    assert without_times(lines[0]) == without_times(lines[1])
    assert lines[0][0]["abs_log_ratio"] == 0 and lines[0][0]["selected_fraction"] > 0.4


def test_metrics_are_what_they_say(monkeypatch):
    steps = Steps(monkeypatch)
    config = rl_settings(updates=1, minibatches=1, learning_rate=1e-2)
    line = run_rl(config).metrics[0]
    (tokens,) = steps.tokens
    mask = tokens.loss_mask
    before, after = make_model(), make_model()
    before.load_state_dict(steps.weights[0])
    logprob, entropy = (x.detach() for x in plain_statistics(before, tokens))
    assert line["mean_entropy"] == pytest.approx(entropy[mask].mean().item(), rel=1e-5)
    assert line["response_tokens"] == int(mask.sum())
    cov = token_covariance(logprob, tokens.advantage.double(), mask)[mask].sort().values
    assert line["cov_mean"] == pytest.approx(cov.mean().item(), rel=1e-3)
    assert line["cov_p90"] == pytest.approx(cov[int(0.9 * (len(cov) - 1))].item(), rel=1e-3)
    # A step of size lr along the gradient of A log p in the logits of every token by itself.
    p = plain_log_softmax(before, tokens).detach().exp()
    picked = torch.nn.functional.one_hot(tokens.input_ids.roll(-1, 1), p.shape[-1])
    rate = 1e-4
    moved = p.log() + rate * tokens.advantage[..., None] * (picked - p)
    change = entropy_of(moved.log_softmax(-1))[mask].mean() - entropy_of(p.log())[mask].mean()
    predicted = line["predicted_entropy_change"] / config.learning_rate
    assert change.item() / rate == pytest.approx(predicted, rel=1e-2)
    assert line["reward_mean"] == pytest.approx(1 - line["response_length"] / 12, rel=1e-4)
    assert (line["objective"], line["stage"], line["problems_asked"]) == ("grpo", 0, 2)
    after.load_state_dict(run_rl(config).model.state_dict())
    _, entropy_after = plain_statistics(after, tokens)
    expected = entropy_after[mask].mean() - entropy[mask].mean()
    assert line["entropy_change"] == pytest.approx(expected.item(), rel=1e-3)
    assert "entropy_change" not in run_rl(replace(config, measure_change=False)).metrics[0]


def entropy_of(logp):
    return -(logp.exp() * logp).sum(-1)


def test_reward_rises():
    """Shorter answers are rewarded, and become shorter."""
    config = rl_settings(updates=12, responses=40, group_size=20, learning_rate=2e-3)
    lines = run_rl(config).metrics
    assert lines[-1]["response_length"] < 0.8 * lines[0]["response_length"]


@pytest.mark.parametrize("reward", ["negative_entropy", "self_certainty", "majority", "format"])
def test_every_reward_runs_without_answers(reward):
    problems = tuple((problem, None) for problem, _ in PROBLEMS)
    line = run_rl(rl_settings(updates=1, reward=reward, problems=problems)).metrics[0]
    assert math.isfinite(line["reward_mean"]) and line["accuracy"] is None
    if reward == "negative_entropy":
        assert -3.2 < line["reward_mean"] < 0  # 27 words: log 27 = 3.3


def test_a_mixed_stage_adds_the_weighted_mean_entropy(monkeypatch):
    steps = Steps(monkeypatch)
    base = dict(updates=1, minibatches=1)
    run_rl(rl_settings(**base))
    run_rl(rl_settings(**base, schedule="em+grpo", em_coef=0.3))
    run_rl(rl_settings(**base, objective="entropy_bonus", entropy_coef=-0.3))
    plain, mixed, negative = steps.gradients
    assert torch.equal(mixed, negative) and not torch.allclose(mixed, plain)


def test_pairs_have_an_entropy_bonus_too(monkeypatch):
    """Of the mean over answers of each one's mean entropy, in mixed stages and by itself."""
    steps = Steps(monkeypatch)
    base = dict(updates=1, minibatches=1)
    run_rl(rl_settings(**base, schedule="em+ppl", em_coef=0.3))
    run_rl(rl_settings(**base, objective="ppl", entropy_coef=-0.3))
    mixed, negative = steps.gradients
    assert torch.equal(mixed, negative)
    model, (tokens, _) = make_model(), steps.tokens
    logprob, entropy = plain_statistics(model, tokens)
    loss = plain_loss(rl_settings(objective="ppl"), "ppl", logprob, entropy, tokens, None, None)
    per_answer = (entropy * tokens.loss_mask).sum(1) / tokens.loss_mask.sum(1)
    (loss + 0.3 * per_answer.mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (mixed - expected).norm() <= 1e-4 * expected.norm()


def test_grpo_plus_plus_trains_on_mixed_groups_and_asks_new_problems(monkeypatch):
    steps = Steps(monkeypatch)
    problems = tuple((str(i % 10) + " " + str(i // 10), "1") for i in range(40))
    config = rl_settings(
        objective="grpo++",
        reward="random",
        problems=problems,
        group_size=2,
        minibatches=1,
        updates=1,
        sampling_rounds=4,
    )
    line = run_rl(config).metrics[0]
    (tokens,) = steps.tokens
    assert line["problems_asked"] > 5 and line["answers_used"] == len(tokens.input_ids) <= 10
    assert (tokens.advantage.abs().sum(1) > 0).all()
    assert line["advantage_nonzero"] == 1
    # Nothing to learn from: no step, and the model stays.
    model = make_model()
    hard = tuple((problem, "12345678") for problem, _ in problems)
    still = replace(config, reward="verified", problems=hard)
    line = run_rl(still, model).metrics[0]
    assert (line["optimizer_steps"], line["answers_used"], line["loss"]) == (0, 0, 0.0)
    assert line["problems_asked"] == 20
    for name, value in make_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_empo_leaves_out_prompts_the_model_agrees_on():
    config = rl_settings(objective="empo", reward=None, empo_low=9.0, updates=1)
    assert run_rl(config).metrics[0]["answers_used"] == 0


RESUMED = {
    "target": dict(objective="entropy_bonus", entropy_target=3.2, entropy_step=0.1),
    "repo": dict(objective="repo", repo_zeta=0.01),
    "reference": dict(ref_kl=0.3),
    "exact": dict(ref_kl=0.3, kl_estimator="exact"),
    "sampler": dict(schedule="ppl:3,grpo", ppl_label="sampler"),
    "topk": dict(schedule="ppl:3,grpo", ppl_label="topk", ppl_label_k=4),
    "stages": dict(schedule="em:1,grpo++:2@1e-3,kl_cov", reward="random"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_has_the_numbers_of_an_uninterrupted_one(name, tmp_path):
    config = rl_settings(updates=4, save_every=2, **RESUMED[name])
    whole = run_rl(config)
    if name == "target":
        coefs = [line["entropy_coef"] for line in whole.metrics]
        assert coefs[0] == 0.01 and len(set(coefs)) == 4
    if name == "repo":
        zetas = [line["repo_zeta"] for line in whole.metrics]
        assert zetas[:2] == [0.01, 0.01] and zetas[2] in (0.005, 0.02)
    if name == "stages":
        assert [line["objective"] for line in whole.metrics] == ["em", "grpo++", "grpo++", "kl_cov"]

    resumed = interrupted_and_resumed(config, tmp_path / "run", update=3)
    assert without_times(resumed.metrics) == without_times(whole.metrics)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value)
    saved = [json.loads(s) for s in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert saved == resumed.metrics
