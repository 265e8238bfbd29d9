"""A setting that no stage of a run looks at is refused, and forgotten where an old run has it."""

import json
import re
from dataclasses import fields, replace
from types import NoneType
from typing import get_args, get_type_hints

import pytest
from rl_runs import PROBLEMS, rl_settings, run_rl
from trainer_runs import without_times

from em_kernels import cli
from em_kernels.lm.settings import settings_of
from em_kernels.trainer import RLConfig, TrainConfig, read_config
from em_kernels.trainer.conditions import EVERYWHERE
from em_kernels.trainer.objective_table import OBJECTIVES, TABLE
from em_kernels.trainer.schedule import WITHOUT_REWARDS
from em_kernels.trainer.unused_settings import CONDITIONS

NAMES = sorted({name for entry in TABLE.values() for name in entry.settings})
NEEDED = {  # to make a setting act that only does with another one
    "vllm_memory": dict(sampler="vllm"),
    "kl_estimator": dict(ref_kl=0.1),
    "entropy_step": dict(entropy_target=0.3, advantage_shaping="none"),
    "repo_zeta": dict(advantage_shaping="repo"),
    "repo_zeta_min": dict(advantage_shaping="repo"),
    "repo_zeta_max": dict(advantage_shaping="repo"),
    "repo_adaptive": dict(advantage_shaping="repo"),
    "shaping_alpha": dict(advantage_shaping="entropy"),
    "shaping_kappa": dict(advantage_shaping="entropy"),
    "ppl_label_k": dict(ppl_label="topk"),
    "opd_beta": dict(opd_kind="js"),
    "dppo_k": dict(dppo_divergence="topk_tv"),
    "max_length": dict(reward="length"),
    "rollout_support": dict(top_p=0.9),
    "rollout_cap": dict(rollout_correction="token_tis"),
    "rollout_floor": dict(rollout_correction="token_tis"),
}


def another(name: str):
    """A value that the setting may have and by default has not."""
    given = {"prompts": ("1 2",), "teacher": "m", "reward": "random"}
    given |= {"cov_upper": 9.0, "repo_zeta_min": 1e-3, "repo_zeta": 0.02, "shaping_kappa": 3.0}
    if name in given:
        return given[name]
    item = next(item for item in fields(RLConfig) if item.name == name)
    told, kind = settings_of(RLConfig)[name], get_type_hints(RLConfig)[name]
    if told.choices:
        return next(choice for choice in reversed(told.choices) if choice != item.default)
    kind = next((part for part in get_args(kind) if part is not NoneType), kind)
    if kind is bool:
        return not item.default
    if kind is int:
        return 4 if name == "group_size" else (item.default or 2) + 1
    return 0.25 if item.default == 0.5 else 0.5


def run_of(objective: str, **changes) -> RLConfig:
    prompted = "prompts" in changes and "prompts" in TABLE[objective].settings
    texts = {} if prompted else {"problems": PROBLEMS}
    return RLConfig(objective=objective, responses=8, **{**texts, **changes})


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_is_looked_at_or_refused(name):
    for objective, entry in TABLE.items():
        change = {name: another(name)}
        if name == "max_length" and entry.resamples:
            continue  # its rewards are 0 or 1, never lengths
        if name in entry.settings:
            needed = {n: v for n, v in NEEDED.get(name, {}).items() if n in entry.settings}
            config = run_of(objective, **{**needed, **change})
            assert getattr(config, name) == change[name]
            continue
        message = f"{name} is for .*, got .* for {re.escape(repr(objective))}: leave it out"
        if name in EVERYWHERE:
            message = f"{name} is for .*, got .*: leave it out"
        if name == "ref_kl" and entry.loss is not None:
            message = f"ref_kl must be 0 with {re.escape(objective)}, got 0.5: it is for the obj"
        with pytest.raises(ValueError, match=message):
            run_of(objective, **change)


@pytest.mark.parametrize("name", [name for name in NEEDED if name != "max_length"])
def test_a_setting_that_waits_for_another_is_refused_without_it(name):
    objective = next(n for n in OBJECTIVES if name in TABLE[n].settings)
    with pytest.raises(ValueError, match=f"{name} is for .*, got .* with .*: leave it out"):
        run_of(objective, **{name: another(name)})


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(objective="kl_cov", schedule="em:1,grpo"),
            "objective is for runs without a schedule, got 'kl_cov' with schedule='em:1,grpo'",
        ),
        (dict(em_coef=0.3), r"em_coef is for mixed stages \(em.NAME\), got 0.3 for 'grpo': leave"),
        (dict(schedule="em:1,grpo", em_coef=0.3), "em_coef is for mixed stages"),
        (dict(prompts=("1",)), r"prompts is for the objectives 'em' and 'opd', got \('1',\) for"),
        (dict(schedule="em+grpo", prompts=("1",)), "prompts is for the objectives 'em' and 'opd'"),
        (
            dict(objective="opd", prompts=("1",)),
            "problems is for stages with rewards or demonstrations, and",
        ),
        (dict(reward="random", max_length=3), "max_length is for the rewards .*, got 3 with 'ran"),
        (dict(schedule="grpo:1,clip_cov", ref_kl=0.1), "ref_kl must be 0 with clip_cov, got 0.1"),
        (dict(schedule="em:1,grpo", gamma=0.5), "gamma is for the objective 'ppl', got 0.5 for"),
        (
            dict(repo_zeta=0.1),
            "repo_zeta is for advantage_shaping='repo', got 0.1 with advantage_shaping='none'",
        ),
        (
            dict(objective="gspo", advantage_shaping="repo"),
            "advantage_shaping is for the obj.*, got",
        ),
        (dict(objective="repo", shaping_alpha=0.1), "shaping_alpha is for advantage_shaping='entr"),
        (
            dict(objective="repo", entropy_target=0.5, entropy_step=0.1),
            "entropy_step is for an entropy bonus with an entropy_target, got 0.1 with entropy_tar",
        ),
        (
            dict(objective="repo", repo_adaptive=False, entropy_target=0.5),
            "entropy_target is for an entropy bonus or a zeta that is steered, got 0.5 with repo_a",
        ),
        (
            dict(objective="repo", repo_adaptive=False, repo_zeta_max=0.1),
            "repo_zeta_max is for a zeta that is steered, got 0.1 with repo_adaptive=False",
        ),
        (dict(group_size=2, objective="em"), "group_size is for objectives with rewards, got 2"),
        (
            dict(prompts=("1",)),
            "prompts is for the objectives 'em' and 'opd', got .*'grpo': leave it out",
        ),
        (dict(stop_patience=3), "stop_patience is for a threshold, .*, got 3 without one: leave"),
        (dict(vllm_memory=0.5), "vllm_memory is for sampler='vllm', got 0.5 with sampler='tran"),
        (
            dict(objective="repo", repo_zeta=-0.1),
            "repo_zeta must be at most repo_zeta_max in size .* got -0.1 and 0.05",
        ),
    ],
)
def test_what_a_run_does_not_look_at_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        rl_settings(**changes)
    assert set(CONDITIONS) <= {item.name for item in fields(RLConfig)}


def test_entropy_minimisation_refuses_what_does_not_act_and_reads_older_runs_without_it():
    for change in (dict(stop_patience=3), dict(vllm_memory=0.5)):
        with pytest.raises(ValueError, match="leave it out"):
            TrainConfig(**change)
        assert TrainConfig.from_written({**change, "updates": 3}) == TrainConfig(updates=3)
    assert TrainConfig(stop_patience=3, stop_skew=1.0).stop_patience == 3


def test_one_stage_that_looks_is_enough():
    stages = "opd:1,em+clip_cov:1,ppl"
    config = rl_settings(
        schedule=stages, updates=3, gamma=0.5, cov_lower=0.0, em_coef=0.3, teacher="m", ratio=0.1
    )
    assert (config.gamma, config.cov_lower) == (0.5, 0.0)
    assert rl_settings(schedule="em:1,grpo", prompts=("1",)).prompt_texts == ("1",)
    alone = rl_settings(objective="opd", problems=(), prompts=("1",), reduction="sequence_mean")
    assert alone.all_texts == ("1",)


def test_a_template_needs_problems():
    with pytest.raises(ValueError, match=r"template is for problems, got '.*' with problems=\(\)"):
        rl_settings(objective="opd", problems=(), prompts=("1",), template="{problem}!")


def test_the_table_knows_which_objectives_do_without_rewards():
    assert tuple(name for name, entry in TABLE.items() if entry.loss is None) == WITHOUT_REWARDS


def test_an_old_run_with_such_settings_goes_on(tmp_path):
    """As it was: they did nothing."""
    config = rl_settings(output=str(tmp_path), updates=1)
    run_rl(config)
    path = tmp_path / "train_config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "gamma": 0.5, "prompts": ["1"], "ppl_label_k": 3}))
    assert read_config(tmp_path) == config
    with pytest.raises(ValueError, match="gamma is for the objective 'ppl'"):
        RLConfig.from_dict({**written, "gamma": 0.5})
    lines = run_rl(replace(config, updates=2), resume=True).metrics
    whole = run_rl(replace(config, output=None, updates=2)).metrics
    assert without_times(lines) == without_times(whole)


def test_flags_are_refused_by_name(tmp_path, capsys):
    problems = tmp_path / "p.jsonl"
    problems.write_text('{"problem": "1 + 1", "answer": 2}\n')
    words = ["train", "--model", "m", "--output", str(tmp_path / "run"), "--objective", "grpo"]
    for option in ("--prompt", "--opd-weight"):
        value = "teacher_entropy" if option == "--opd-weight" else "x"
        assert cli.main([*words, "--problems", str(problems), option, value]) == 2
        assert f"error: {option} is for" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        dict(objective="dppo", dppo_divergence="topk_tv", dppo_k=27),
        dict(objective="ppl", ppl_label="topk", ppl_label_k=27),
    ],
    ids=lambda changes: changes["objective"],
)
def test_more_tokens_than_the_head_has_are_refused_before_anything_is_written(changes, tmp_path):
    *_, name = changes
    with pytest.raises(ValueError, match=f"{name} must be at most 26, the entries of the model's"):
        run_rl(rl_settings(**changes, output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
