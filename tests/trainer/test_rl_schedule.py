"""Stages of a run, early stop and the entropy coefficient, from settings and metrics alone."""

import re

import pytest
import torch
from rl_runs import PROBLEMS, rl_settings
from trainer_runs import run, settings

from em_kernels.objectives.aggregation import AGGREGATIONS
from em_kernels.trainer.config import check_resume
from em_kernels.trainer.entropy_update import entropy_minimisation
from em_kernels.trainer.rl_config import OBJECTIVES, RLConfig
from em_kernels.trainer.schedule import (
    DEMONSTRATED,
    WITHOUT_REWARDS,
    Stage,
    current_stage,
    entropy_coef,
    parse_schedule,
    should_stop,
)


def lines_of(*entropies, stage=0, skew=0.0):
    return [{"stage": stage, "mean_entropy": h, "logit_skew": skew} for h in entropies]


def test_a_schedule_is_names_updates_and_rates():
    kinds = [stage.kind for stage in parse_schedule("em:1,opd:1,em+opd:1,em+grpo", 4, OBJECTIVES)]
    assert kinds == ["em", "opd", "em+opd", "rewards"]
    stages = parse_schedule("em:10@2e-4, grpo++:5 ,em+l-grpo@1", 20, OBJECTIVES)
    assert stages == (
        Stage(("em",), 10, 2e-4),
        Stage(("grpo++",), 5, None),
        Stage(("em", "l-grpo"), 5, 1.0),
    )
    assert [stage.policy for stage in stages] == [None, "grpo++", "l-grpo"]
    assert stages[2].name == "em+l-grpo"
    assert parse_schedule("em+grpo++", 3, OBJECTIVES) == (Stage(("em", "grpo++"), 3),)


@pytest.mark.parametrize(
    "text, message",
    [
        ("emm", "objective must be one of .*, got 'emm'"),
        ("grpo,em", "all stages but the last need their updates, got 'grpo'"),
        ("grpo:20,em", r"a stage must have 1 update or more, got 'em' \(0\)"),
        ("grpo:3,em:4", "has 7 updates in all, but `updates` is 20"),
        ("grpo+em", "two objectives at once are em"),
        ("em+em", "two objectives at once are em"),
        ("em:x", "expected NAME"),
    ],
)
def test_bad_schedules_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_schedule(text, 20, OBJECTIVES)


@pytest.mark.parametrize("objective", [n for n in OBJECTIVES if n not in WITHOUT_REWARDS])
def test_one_answer_to_a_problem_is_nothing_to_compare(objective):
    reward = None if objective in ("empo", "l-grpo") else "majority"
    message = f"group_size must be 2 or more with {re.escape(objective)}, got 1.*nothing is learned"
    for stages in ({"objective": objective}, {"schedule": f"em:1,em+{objective}"}):
        with pytest.raises(ValueError, match=message):
            rl_settings(group_size=1, reward=reward, **stages)
        rl_settings(group_size=2, reward=reward, **stages)


@pytest.mark.parametrize("objective", [n for n in WITHOUT_REWARDS if n not in DEMONSTRATED])
def test_entropy_minimisation_and_distillation_compare_nothing(objective):
    assert rl_settings(objective=objective, responses=7).responses == 7
    with pytest.raises(ValueError, match="group_size is for objectives with rewards, got 1 for"):
        rl_settings(objective=objective, group_size=1)
    alone = rl_settings(objective=objective, problems=(), prompts=("1 2",))
    assert alone.prompt_texts == alone.all_texts == ("1 2",)


def test_stages_follow_one_another():
    config = rl_settings(schedule="em:2,grpo", updates=5)
    seen, lines = [], []
    while now := current_stage(config, lines):
        seen.append((now[0], now[1].name))
        lines += lines_of(0.5, stage=now[0])
    assert seen == [(0, "em")] * 2 + [(1, "grpo")] * 3


def test_a_threshold_ends_a_stage_early_after_so_many_updates_in_a_row():
    config = rl_settings(schedule="em:9,grpo", updates=20, stop_entropy=0.1, stop_patience=2)
    assert current_stage(config, lines_of(0.3, 0.05, 0.2, 0.05))[0] == 0
    assert current_stage(config, lines_of(0.3, 0.05, 0.2, 0.05, 0.01))[0] == 1
    lines = lines_of(0.05, 0.05) + lines_of(0.05, stage=1)
    assert current_stage(config, lines)[0] == 1
    assert current_stage(config, lines + lines_of(0.05, stage=1)) is None
    skewed = settings(stop_skew=2.0)
    assert should_stop(skewed, lines_of(0.5, skew=2.1)) and not should_stop(skewed, lines_of(0.5))
    assert not should_stop(settings(), lines_of(0.0, skew=99.0))


def test_entropy_minimisation_stops_early_and_leaves_its_checkpoint(tmp_path):
    config = settings(updates=9, learning_rate=1e-2, loss_temperature=1.0)
    entropies = [line["mean_entropy"] for line in run(config).metrics]
    threshold = sorted(entropies)[4]
    expected = next(i for i, h in enumerate(entropies, start=1) if h < threshold)
    stopping = settings(
        updates=9,
        learning_rate=1e-2,
        loss_temperature=1.0,
        stop_entropy=threshold,
        stop_skew=1e6,
        output=tmp_path / "run",
        save_every=0,
    )
    result = run(stopping)
    assert len(result.metrics) == expected < 9
    assert all("logit_skew" in line for line in result.metrics)
    assert result.checkpoint.name == f"checkpoint-{expected}"
    again = run(stopping, resume=True)
    assert again.metrics == result.metrics


def test_the_coefficient_moves_toward_the_target_and_starts_where_it_is_told():
    line = {"entropy_coef": 0.02, "mean_entropy": 0.3}
    step = dict(step=0.005)
    assert entropy_coef(0.1, [], target=0.5, **step) == 0.1
    assert entropy_coef(0.1, [line], target=None, **step) == 0.1
    assert entropy_coef(0.1, [line], target=0.5, **step) == pytest.approx(0.025)
    assert entropy_coef(0.1, [line], target=0.2, **step) == pytest.approx(0.015)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(responses=12), "responses must be a multiple of group_size=5, got 12"),
        (dict(objective="ppo"), "objective must be one of"),
        (dict(reward="fame"), "reward must be one of"),
        (dict(template="solve"), "template must have {problem}"),
        (dict(problems=()), "problems must be given for 'grpo'"),
        (dict(problems=((" ", "1"),)), "problems must be text that is not empty"),
        (dict(problems=(("\ud835", "1"),)), "problems must be Unicode text, got half of a surrog"),
        (dict(problems=(("1", "\ud835"),)), "answers of problems must be Unicode text, got half"),
        (dict(template="{problem}\ud835"), "template must be Unicode text, got half of a surro"),
        (dict(problems=(("1", None),), reward=None), "need answers for the reward 'verified'"),
        (dict(ratio=2), r"ratio must be in \(0, 1\]"),
        (dict(clip_low=-0.1), "clip_low must be 0 or more"),
        (dict(cov_lower=6), "cov_lower must be below cov_upper"),
        (dict(objective="grpo++", reward="length"), "reward of grpo.. must be 0 or 1"),
        (dict(objective="kl_cov", ref_kl=0.1), "ref_kl must be 0 with kl_cov"),
        (dict(compat="official"), "compat must be left out here"),
        (dict(kl_estimator="k4"), "kl_estimator must be one of"),
        (
            dict(kl_estimator="exact"),
            "kl_estimator is for a penalty that ref_kl weighs, got 'exact'",
        ),
        (dict(objective="opd", problems=()), "problems or prompts must be given for 'opd', got n"),
        (dict(schedule="opd:1,grpo", problems=(), prompts=("1",)), "problems must be given for 'o"),
        (dict(teacher="m"), "teacher is for the objective 'opd', got 'm' for 'grpo': leave it"),
        (dict(objective="opd", opd_kind="k3"), "opd_kind must be one of"),
        (dict(objective="opd", opd_beta=1.5), r"opd_beta must be in \[0, 1\]"),
        (dict(objective="opd", opd_weight="entropy"), "opd_weight must be one of"),
        (dict(reduction="sum"), "reduction must be one of"),
        (dict(gamma=0.0), r"gamma must be in \(0, 1\]"),
        (dict(stop_patience=0), "stop_patience must be 1 or more"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        rl_settings(**changes)


def test_settings_are_the_objectives_own_unless_given():
    config = RLConfig(problems=PROBLEMS)
    assert config.setting("clip_high", "grpo") == 0.2
    assert config.setting("clip_high", "high_entropy") == 0.28
    assert config.setting("ratio", "kl_cov") == 2e-3 and config.setting("ratio", "clip_cov") == 2e-4
    assert config.reward_of("empo") == "empo" and config.reward_of("grpo") == "verified"
    assert [config.setting("reduction", name) for name in ("grpo", "gspo", "em")] == [
        "token_mean",
        "sequence_mean",
        "token_mean",
    ]
    assert [config.setting("normalize_std", name) for name in ("grpo", "dr_grpo")] == [True, False]
    given = RLConfig(problems=PROBLEMS, clip_high=0.0, reward="majority")
    assert given.setting("clip_high", "grpo") == 0.0 and given.reward_of("empo") == "majority"
    assert (config.sampling_temperature, config.loss_temperature, config.top_p) == (1.0, 1.0, 1.0)


def test_entropy_minimisation_takes_every_reduction_of_a_schedule():
    """A sum over each answer was taken for a mean over all tokens."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    rows = {
        "token_mean": [1 / 4, 1 / 4],
        "sequence_mean": [1 / 6, 1 / 2],
        "sequence_mean_token_sum": [1 / 2, 1 / 2],
        "sequence_mean_token_sum_norm": [1 / 24, 1 / 24],
    }
    for reduction in AGGREGATIONS:
        config = rl_settings(objective="em", reduction=reduction)
        weight, _ = entropy_minimisation(config)(None, mask)
        expected = torch.tensor([*rows[reduction], 0])[:, None] * mask
        torch.testing.assert_close(weight, expected)


def test_a_default_that_became_the_objectives_own_is_the_same_run():
    given, own = rl_settings(reduction="token_mean", normalize_std=True), rl_settings()
    assert own.reduction is own.normalize_std is None
    check_resume(given, own)
    check_resume(own, given)
    changed = dict(reduction="sequence_mean", normalize_std=False, clip_high=0.3)
    for name, value in changed.items():
        with pytest.raises(ValueError, match=f"{name} cannot change when a run is resumed"):
            check_resume(own, rl_settings(**{name: value}))


def test_settings_survive_being_written_down():
    config = rl_settings(schedule="em:1,grpo", ref_kl=0.1)
    assert RLConfig.from_dict(config.to_dict()) == config
