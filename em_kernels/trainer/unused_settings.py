"""Settings that a run does not look at: refused where they are given, forgotten where they were.

A setting is looked at where the entry of a stage's objective names it, or no entry does, and, for
those of `CONDITIONS`, where the other settings let it act.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from em_kernels.trainer.conditions import EVERYWHERE, Condition, idle, on, short
from em_kernels.trainer.entropy_control import shaping_of
from em_kernels.trainer.objective_table import TABLE
from em_kernels.trainer.samplers import sampling
from em_kernels.trainer.schedule import DEMONSTRATED, Stage

if TYPE_CHECKING:
    from em_kernels.trainer.rl_config import RLConfig

THROUGHOUT = ("ref_kl",)
"""What holds the policy in a stage must hold it in all with rewards."""


def _run(config: RLConfig) -> str:
    return f"for {config.schedule or config.objective!r}"


def _shaped(kind: str) -> Condition:
    """Of a stage whose advantages are shaped so."""
    return Condition(
        lambda config: kind in _shapings(config), f"advantage_shaping={kind!r}", _not_shaped
    )


def _not_shaped(config: RLConfig) -> str:
    return f"with advantage_shaping={', '.join(map(repr, _shapings(config)))}"


def _has_bonus(config: RLConfig) -> bool:
    """Whether a target would steer the bonus of some stage."""
    return any(kind != "repo" for kind in _shapings(config))


def _shapings(config: RLConfig) -> list[str]:
    return [shaping_of(config, policy) for policy in config.policies]


_PROBLEMS = on("problems", "problems", lambda value: len(value) > 0)
CONDITIONS = {
    **EVERYWHERE,
    "objective": on("schedule", "runs without a schedule", lambda value: value is None),
    "problems": Condition(
        lambda config: (
            any(stage.policy or stage.demonstrated for stage in config.stages) or not config.prompts
        ),
        "stages with rewards or demonstrations, and others where there are no prompts",
        lambda config: f"with prompts={short(config.prompts)} {_run(config)}",
    ),
    **dict.fromkeys(("template", "problem_field", "split"), _PROBLEMS),
    "answer_field": Condition(
        lambda config: len(config.problems) > 0 and _asks(config),
        "problems that are asked",
        _run,
    ),
    "solution_field": Condition(
        lambda config: any(stage.demonstrated for stage in config.stages),
        "demonstrations (sft, eaft)",
        _run,
    ),
    "em_coef": Condition(
        lambda config: any(len(stage.objectives) > 1 for stage in config.stages),
        "mixed stages (em+NAME)",
        _run,
    ),
    "max_length": Condition(
        lambda config: bool({"length", "l-grpo"} & {*_rewards(config)}),
        "the rewards 'length' and 'l-grpo'",
        lambda config: f"with {', '.join(map(repr, _rewards(config)))}",
    ),
    "kl_estimator": on("ref_kl", "a penalty that ref_kl weighs", lambda value: value > 0),
    "entropy_target": Condition(
        lambda config: config.repo_adaptive or _has_bonus(config),
        "an entropy bonus or a zeta that is steered",
        lambda config: "with repo_adaptive=False",
    ),
    "entropy_step": Condition(
        lambda config: config.entropy_target is not None and _has_bonus(config),
        "an entropy bonus with an entropy_target",
        lambda config: f"with entropy_target={config.entropy_target!r}, {_not_shaped(config)}",
    ),
    **dict.fromkeys(("repo_zeta", "repo_adaptive"), _shaped("repo")),
    **dict.fromkeys(
        ("repo_zeta_min", "repo_zeta_max"),
        Condition(
            lambda config: config.repo_adaptive and "repo" in _shapings(config),
            "a zeta that is steered",
            lambda config: f"with repo_adaptive={config.repo_adaptive}, {_not_shaped(config)}",
        ),
    ),
    **dict.fromkeys(("shaping_alpha", "shaping_kappa"), _shaped("entropy")),
    "ppl_label_k": on("ppl_label", "ppl_label='topk'", lambda value: value == "topk"),
    "dppo_k": on(
        "dppo_divergence", "topk_tv and topk_kl of dppo", lambda value: value.startswith("topk")
    ),
    "rollout_support": Condition(
        lambda config: sampling(config).truncates,
        "answers drawn with top_p, top_k or min_p",
        lambda config: f"with top_p={config.top_p:g}, top_k={config.top_k}, min_p={config.min_p:g}",
    ),
    **dict.fromkeys(
        ("rollout_cap", "rollout_floor"),
        on("rollout_correction", "a rollout_correction", lambda value: value != "none"),
    ),
    "opd_beta": on("opd_kind", "opd_kind='js'", lambda value: value == "js"),
}


def check_used(config: RLConfig) -> None:
    """Refuse a setting that differs from its default where no stage looks at it.

    Raises:
        ValueError: naming the setting, what it is for, and what was received.
    """
    for name in THROUGHOUT:
        _check_throughout(config, name)
    for name, reason in unused(config).items():
        raise ValueError(f"{name} is for {reason}: leave it out")


def unused(config: RLConfig) -> dict[str, str]:
    """Of every such setting, what it is for and what was received."""
    looked_at = {name for stage in config.stages for name in _looked_at(stage)}
    found: dict[str, str] = {}
    for item in fields(config):
        name, value = item.name, getattr(config, item.name)
        if value == item.default:
            continue
        readers, condition = _readers(name), CONDITIONS.get(name)
        if readers and name not in looked_at:
            found[name] = f"{_listed(readers)}, got {short(value)} {_run(config)}"
        elif condition is not None and (told := idle(config, name, item.default, condition)):
            found[name] = told
    return found


def _looked_at(stage: Stage) -> Sequence[str]:
    """Of em and another, em adds its weight alone."""
    return tuple(TABLE[stage.objectives[-1]].settings)


def _readers(name: str) -> list[str]:
    """The objectives that look at a setting; none where every run does."""
    return [objective for objective, entry in TABLE.items() if name in entry.settings]


def _check_throughout(config: RLConfig, name: str) -> None:
    without = [policy for policy in config.policies if name not in TABLE[policy].settings]
    if getattr(config, name) and without:
        raise ValueError(
            f"{name} must be 0 with {without[0]}, got {getattr(config, name)!r}: it is for "
            f"{_listed(_readers(name))}, in all stages with rewards"
        )


def _asks(config: RLConfig) -> bool:
    return any(stage.demonstrated is None for stage in config.stages)


def _rewards(config: RLConfig) -> list[str]:
    return [config.reward_of(policy) for policy in config.policies]


def _listed(objectives: Sequence[str]) -> str:
    if list(objectives) == [name for name, entry in TABLE.items() if entry.loss is not None]:
        return "objectives with rewards"
    if list(objectives) == [name for name in TABLE if name not in DEMONSTRATED]:
        return "objectives that sample"
    *others, last = map(repr, objectives)
    return f"the objectives {', '.join(others)} and {last}" if others else f"the objective {last}"
