"""Ratios of what the answers were drawn from: kept sets, importance weights, what is told."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from kept_cases import dense
from rl_runs import rl_settings, run_rl
from tiny_qwen2 import make_model, make_tokenizer
from trainer_runs import without_times

from em_kernels.lm.heads import read_head
from em_kernels.lm.ranks import Ranks
from em_kernels.lm.rollout import aligned_mask
from em_kernels.trainer import train
from em_kernels.trainer.batch import Tokens, token_stats
from em_kernels.trainer.collect import draw
from em_kernels.trainer.run import Run, start_run
from em_kernels.trainer.sampler_policy import SamplerPolicy, read_kept_sets
from em_kernels.trainer.samplers import sampling

torch.set_num_threads(1)

CUT = dict(top_p=0.7, top_k=40, min_p=0.02)
ONE = dict(updates=1, minibatches=1, measure_change=False)


def first(**changes) -> dict:
    """The metrics of one update."""
    return run_rl(rl_settings(**{**ONE, **changes})).metrics[0]


def started(**changes) -> Run:
    return start_run(rl_settings(**changes), make_model(), make_tokenizer(), False)


def drawn(run: Run):
    """(rollout, its tokens)."""
    rollout = draw(run, [[5, 6, 7], [8]] * 3, 1)
    return rollout, Tokens(rollout.input_ids, rollout.attention_mask, aligned_mask(rollout))


def without(monkeypatch, *fields: str, less: float = 0.0) -> None:
    """Answers come without these fields of theirs, and with log-probabilities that are less."""
    import em_kernels.trainer.samplers as samplers

    whole = samplers.sample

    def some(*args, **kwargs):
        found = whole(*args, **kwargs)
        said = torch.where(found.response_mask, found.logprob - less, 0)
        return found._replace(logprob=said)._replace(**dict.fromkeys(fields))

    monkeypatch.setattr(samplers, "sample", some)


def test_sampler_and_trainer_agree_in_float32():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        line = first()
    assert 0 <= line["rollout_logprob_diff_mean"] <= line["rollout_logprob_diff_max"] < 2e-5
    assert abs(line["rollout_kl_k1"]) < 1e-5 and 0 <= line["rollout_kl_k3"] < 1e-9
    assert not {"rollout_kept_mass", "rollout_clipped"} & line.keys()


def test_what_is_cut_off_is_cut_off_from_ratios_too():
    line = first(**CUT)
    assert line["rollout_logprob_diff_max"] < 2e-5
    assert 0 < line["rollout_kept_mass"] < 0.9


def test_the_whole_vocabulary_in_ratios_differs_by_what_was_cut_off_and_that_is_told():
    with pytest.warns(
        UserWarning, match="nats on average, at most .*rollout_support='full'"
    ) as told:
        result = run_rl(rl_settings(**{**ONE, **CUT}, rollout_support="full"))
    assert len([w for w in told if "ratios" in str(w.message)]) == 1
    line = result.metrics[0]
    assert line["rollout_kl_k1"] == pytest.approx(line["rollout_logprob_diff_mean"], rel=1e-4)
    assert 0.1 < line["rollout_logprob_diff_mean"] < line["rollout_logprob_diff_max"]
    assert "rollout_kept_mass" not in line


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(sampling_temperature=0.7), "loss_temperature=1, the sampling at 0.7"),
        (dict(repetition_penalty=1.3), "repetition_penalty=1.3"),
    ],
)
def test_what_ratios_cannot_have_is_told_once_and_how_much(changes, reason):
    with pytest.warns(UserWarning, match="ratios are made of differ") as told:
        result = run_rl(rl_settings(**{**ONE, **changes, "updates": 2}))
    (warning,) = (str(w.message) for w in told if "ratios" in str(w.message))
    assert reason in warning
    mean, most = (result.metrics[0][f"rollout_logprob_diff_{of}"] for of in ("mean", "max"))
    assert f"{mean:.3g} nats on average, at most {most:.3g}" in warning
    assert mean > 1e-3


def test_bfloat16_differs_by_rounding():
    line = first(dtype="bfloat16")
    assert 1e-5 < line["rollout_logprob_diff_mean"] < 0.1


def test_log_probabilities_are_those_of_the_kept_set_under_any_policy():
    """In float64 by hand, of another model than the one that sampled, with a gradient."""
    run = started(**CUT)
    rollout, tokens = drawn(run)
    cut = SamplerPolicy(run).cut("grpo", tokens, rollout)
    other, mask = make_model(seed=5), tokens.loss_mask
    names = ("logprob", "entropy", "kept_mass", "logit_skew")
    stats = token_stats(other, read_head(other), cut, 1.0, names)
    hidden = other.model(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask.long(),
        position_ids=(tokens.attention_mask.long().cumsum(1) - 1).clamp(min=0),
    ).last_hidden_state
    logits = other.lm_head(hidden).double()
    kept = dense(rollout.kept)[:, 1:]
    inside = logits[:, :-1].masked_fill(~kept, -torch.inf)
    logprob = inside.log_softmax(-1).gather(-1, tokens.input_ids[:, 1:, None])[..., 0]
    counted = mask[:, :-1]
    assert logprob[counted].isfinite().all()
    torch.testing.assert_close(
        stats.logprob[:, :-1][counted].double(), logprob[counted], rtol=1e-4, atol=1e-5
    )
    mass = logits.softmax(-1)[:, :-1].mul(kept).sum(-1)
    torch.testing.assert_close(stats.kept_mass[:, :-1][counted].double(), mass[counted])
    whole = token_stats(other, read_head(other), tokens, 1.0, names)
    assert stats.entropy.equal(whole.entropy) and stats.logit_skew.equal(whole.logit_skew)
    (gradient,) = torch.autograd.grad(stats.logprob.sum(), other.lm_head.weight)
    assert gradient.isfinite().all() and gradient.any()


def test_beside_stored_ids_ratios_are_of_the_whole_vocabulary_and_that_is_told():
    with pytest.warns(UserWarning, match="with ids stored of the sampler they are of tokens that"):
        line = first(**CUT, objective="dppo", dppo_divergence="topk_tv", dppo_k=4)
    assert line["rollout_logprob_diff_mean"] > 0.1 and "rollout_kept_mass" not in line


def test_sets_that_the_sampler_does_not_tell_are_made_by_its_limits(monkeypatch):
    run = started(**CUT, sampling_temperature=1.2, loss_temperature=0.9)
    rollout, tokens = drawn(run)
    made = read_kept_sets(run, tokens, sampling(run.config))
    told = rollout.kept[:, 1:].pad(0, 1)
    assert made.shape == tokens.loss_mask.shape
    assert (dense(made) == dense(told)).float().mean() > 0.999  # but for ties of rounding
    limits = replace(sampling(run.config), top_k=1)
    sets = dense(read_kept_sets(run, tokens, limits))
    token = tokens.input_ids.roll(-1, 1)[..., None]
    assert sets.gather(-1, token)[tokens.loss_mask].all()
    assert set(sets[tokens.loss_mask].sum(-1).tolist()) == {1, 2}
    assert not sets[~tokens.loss_mask].any()
    without(monkeypatch, "kept")
    assert first(**CUT)["rollout_logprob_diff_max"] < 2e-5


def test_ranks_share_the_making_of_sets():
    run = started(**CUT)
    _, tokens = drawn(run)
    whole = read_kept_sets(run, tokens, sampling(run.config))
    pieces: list = []

    class One(Ranks):
        def gather(self, make) -> list:
            pieces.append(make())
            return pieces

    for rank in range(3):
        run.ranks = One(rank, 3, torch.device("cpu"))
        joined = read_kept_sets(run, tokens, sampling(run.config))
    assert len(pieces) == 3
    assert torch.equal(dense(joined), dense(whole))


def test_several_steps_on_truncated_answers_stay_finite():
    options = dict(**CUT, reward="random", epochs=3, learning_rate=0.05)
    line = first(**options, objective="clip_cov", ratio=0.1)
    assert 1e-3 < line["policy_kl"] < 10
    ref = first(**options, ref_kl=0.1)
    assert 0 < ref["ref_kl"] < 10 and ref["rollout_logprob_diff_max"] < 2e-5


def test_the_weight_multiplies_the_loss(monkeypatch):
    plain = first(epochs=1)
    without(monkeypatch, less=1.0)  # a ratio of e everywhere
    capped = first(rollout_correction="token_tis")
    assert capped["rollout_clipped"] == 1 and capped["rollout_weight_mean"] == 2
    assert capped["rollout_logprob_diff_mean"] == pytest.approx(1, abs=1e-4)
    assert abs(plain["loss"]) > 1e-4
    assert capped["loss"] == pytest.approx(2 * plain["loss"], rel=1e-4)
    own = first(rollout_correction="icepop", objective="kl_cov", ratio=0.1)
    assert own["rollout_clipped"] == 0
    assert own["rollout_weight_mean"] == pytest.approx(2.71828, rel=1e-4)
    low = first(rollout_correction="token_mask", rollout_cap=2.5)
    assert low["rollout_clipped"] == 1 and low["loss"] == 0 and low["grad_norm"] == 0


def test_a_sampler_that_says_nothing(monkeypatch):
    plain = run_rl(rl_settings(**ONE)).metrics
    without(monkeypatch, "logprob", "kept")
    quiet = run_rl(rl_settings(**ONE)).metrics
    left = [{k: v for k, v in line.items() if not k.startswith("rollout")} for line in plain]
    assert without_times(quiet) == without_times(left)
    with pytest.raises(ValueError, match="rollout_correction must be 'none' with a sampler that"):
        first(rollout_correction="token_tis")
    with pytest.warns(UserWarning, match="by how much the sampler does not say"):
        first(repetition_penalty=1.3)


def test_stages_without_ratios_are_told_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "all answers of an update were cut")
        result = run_rl(rl_settings(**{**ONE, **CUT}, objective="ppl", repetition_penalty=1.2))
        assert "rollout_kept_mass" not in result.metrics[0]
        assert result.metrics[0]["rollout_logprob_diff_mean"] > 1e-3
        config = rl_settings(objective="em", problems=(), prompts=("1 2",), updates=1, top_p=0.9)
        train(config, make_model(), make_tokenizer(), progress=False)
        assert not config.keeps_sets


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rollout_support="all", top_p=0.9), "rollout_support must be one of"),
        (dict(rollout_support="full"), "rollout_support is for answers drawn with top_p"),
        (dict(rollout_correction="tis"), "rollout_correction must be one of"),
        (dict(rollout_cap=2.0), "rollout_cap is for a rollout_correction"),
        (dict(rollout_floor=0.5), "rollout_floor is for a rollout_correction"),
        (dict(rollout_cap=0.0, rollout_correction="icepop"), "rollout_cap must be positive"),
        (dict(rollout_floor=-1.0, rollout_correction="icepop"), "rollout_floor must be 0 or more"),
        (dict(rollout_cap=0.5, rollout_correction="icepop"), "rollout_cap must be above"),
        (dict(objective="ppl", rollout_correction="icepop"), "rollout_correction is for"),
        (dict(min_p=1.5), r"min_p must be in \[0, 1\]"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        rl_settings(**changes)
