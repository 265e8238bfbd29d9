"""Settings of reinforcement learning and distillation that most objectives have.

Those of one objective or a few are in `objective_settings`; which objective looks at which is in
`objective_table`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from em_kernels.lm.chat import Prompt
from em_kernels.lm.demonstrations import SOLUTIONS
from em_kernels.lm.judge.judges import JUDGES
from em_kernels.lm.problems import (
    ANSWER_FIELD,
    FIELD_SHOWN,
    FILES,
    PROBLEM_FIELD,
    SPLIT,
    TEMPLATE,
    TEMPLATE_SHOWN,
)
from em_kernels.lm.settings import (
    at_least,
    finite,
    fraction,
    not_negative,
    number,
    positive,
    redefined,
    setting,
)
from em_kernels.objectives.aggregation import AGGREGATIONS
from em_kernels.objectives.kl import KL_ESTIMATORS
from em_kernels.objectives.repo import ZETA, ZETA_MAX, ZETA_MIN
from em_kernels.objectives.rollout_correction import CORRECTIONS
from em_kernels.trainer.config import TrainConfig
from em_kernels.trainer.objective_table import EXACT, OBJECTIVES

TEXT_REWARDS = ("verified", "majority", "empo", "l-grpo", "length", "random", "format")
MODEL_REWARDS = ("negative_entropy", "self_certainty")
REWARDS = TEXT_REWARDS + MODEL_REWARDS
OWN = "the objective's own"
SHAPINGS = ("none", "repo", "entropy")
PREDICTIONS = ("none", "logits", "weights")
ROLLOUT_SUPPORTS = ("sampler", "full")

rl_setting = partial(setting, group="reinforcement learning (with --objective or --schedule)")
entropy_setting = partial(setting, group="entropy control")
rollout_setting = partial(setting, group="sampler and trainer")


@dataclass(frozen=True)
class SharedSettings(TrainConfig):
    """The part of `RLConfig` that is no one objective's."""

    objective: str = rl_setting(
        "grpo", "what to train for", choices=OBJECTIVES, shown="grpo; em on the command line"
    )
    schedule: str | None = rl_setting(
        None,
        "stages instead of one objective, NAME[:UPDATES][@RATE],...: em:10,grpo or em+kl_cov",
    )
    problems: str | tuple = rl_setting(
        (),
        f"{FILES}; in Python also (problem, answer) pairs; the answer may be missing where the "
        "reward does not look at it; em and opd do with `prompts` alone; sft and eaft train on a "
        "row's worked solution, or on its chat messages, and of pairs on the answer",
        metavar="FILE|PRESET",
        shown="none",
    )
    prompts: tuple[Prompt, ...] = redefined(
        TrainConfig,
        "prompts",
        (),
        help="what stages of em and opd sample from",
        shown="the problems",
    )
    template: str | None = rl_setting(None, TEMPLATE, shown=TEMPLATE_SHOWN)
    problem_field: str | None = rl_setting(None, PROBLEM_FIELD, shown=FIELD_SHOWN)
    answer_field: str | None = rl_setting(None, ANSWER_FIELD, shown=FIELD_SHOWN)
    solution_field: str | None = rl_setting(
        None,
        "the field of a row that holds the worked solution of sft and eaft",
        shown=f"the first of {', '.join(SOLUTIONS)} that it has",
    )
    split: str | None = rl_setting(None, SPLIT, shown="train")
    group_size: int = rl_setting(
        8,
        "answers to each problem of an update, 2 or more, which the advantage (for ppl: the "
        "preference) compares; `responses` is a multiple of it",
        check=at_least(1),
    )
    reward: str | None = rl_setting(
        None, "what an answer is worth", choices=(None, *REWARDS), shown=OWN
    )
    judge: str = rl_setting("auto", "what decides whether an answer is right", choices=JUDGES)
    epochs: int = rl_setting(1, "passes over the answers of an update", check=at_least(1))
    minibatches: int = rl_setting(2, "optimiser steps each pass", check=at_least(1))
    normalize_std: bool | None = rl_setting(
        None, "divide advantages by the standard deviation of the group", shown=OWN
    )
    reduction: str | None = redefined(  # type: ignore[assignment]
        TrainConfig,
        "reduction",
        None,
        help="of the loss: mean over all tokens; over each answer and then over answers; or sum "
        "over each answer and then mean over answers; or that over max_new_tokens besides",
        choices=(None, *AGGREGATIONS),
        shown=OWN,
    )
    clip_low: float | None = rl_setting(
        None,
        "clip bound below 1 of the ratio to the policy that sampled",
        check=not_negative,
        shown=OWN,
    )
    clip_high: float | None = rl_setting(None, "and above 1", check=not_negative, shown=OWN)
    ratio: float | None = rl_setting(
        None,
        "fraction of the tokens that clip_cov, kl_cov and high_entropy select (published: 2e-4, "
        "2e-3, 0.2; the first two for batches of a million tokens: with fewer, raise them)",
        check=fraction,
        shown=OWN,
    )
    ref_kl: float = rl_setting(
        0.0,
        "weight of a KL penalty to the initial model; above 0 a copy of that model is kept",
        check=not_negative,
    )
    kl_estimator: str = rl_setting(
        "k3",
        "form of that penalty: an estimate from the sampled tokens, or the exact KL over the whole "
        "vocabulary",
        choices=(*KL_ESTIMATORS, EXACT),
    )
    entropy_coef: float | None = entropy_setting(
        None, "weight of the entropy bonus, loss units per nat", check=finite, shown=OWN
    )
    entropy_target: float | None = entropy_setting(
        None,
        "hold this mean entropy (nats), whatever the objective: steers repo_zeta where that shapes "
        "the advantage (by default to the entropy of the stage's first update), else the weight "
        "of the entropy bonus",
        check=not_negative,
    )
    entropy_step: float = entropy_setting(
        0.005, "how far the weight of the bonus moves in an update, with a target", check=positive
    )
    advantage_shaping: str | None = entropy_setting(
        None,
        "what is made of each token's advantage: repo rescales it by the token's log-probability, "
        "entropy adds to it where the policy is unsure",
        choices=(None, *SHAPINGS),
        shown=OWN,
    )
    repo_zeta: float = entropy_setting(
        ZETA, "repo: by how much, per nat; below 0 it lowers the entropy", check=finite
    )
    repo_zeta_min: float = entropy_setting(
        ZETA_MIN, "repo: least size of zeta, where it changes its sign", check=positive
    )
    repo_zeta_max: float = entropy_setting(ZETA_MAX, "repo: largest size of zeta", check=positive)
    repo_adaptive: bool = entropy_setting(
        True, "repo: double and halve zeta to hold the entropy; else it stays as it is"
    )
    shaping_alpha: float = entropy_setting(
        0.4, "entropy in the advantage: weight of a nat", check=not_negative
    )
    shaping_kappa: float = entropy_setting(
        2.0,
        "entropy in the advantage: at most a share of 1 / kappa of the advantage is added",
        check=number(lambda v: v > 1, "above 1"),
    )
    em_coef: float = rl_setting(
        0.1, "weight of the mean entropy in mixed stages (em+NAME)", check=not_negative
    )
    max_length: int | None = rl_setting(
        None,
        "L_max of the length rewards, tokens",
        check=at_least(1),
        shown="max_new_tokens",
    )
    rollout_support: str = rollout_setting(
        "sampler",
        "what log-probabilities in ratios are of where answers are drawn with top_p, top_k or "
        "min_p: sampler, what was kept then, held fixed; full, the whole vocabulary",
        choices=ROLLOUT_SUPPORTS,
    )
    rollout_correction: str = rollout_setting(
        "none",
        "importance weight between sampler and trainer that the loss of a token is multiplied by, "
        "see `rollout_weight`",
        choices=("none", *CORRECTIONS),
    )
    rollout_cap: float | None = rollout_setting(
        None, "upper bound of that weight", check=positive, shown="the correction's own"
    )
    rollout_floor: float | None = rollout_setting(
        None, "lower bound of that weight", check=not_negative, shown="the correction's own"
    )
    measure_change: bool = entropy_setting(
        True, "read the entropy again after each update: one more forward pass"
    )
    predict_change: str = entropy_setting(
        "logits",
        "the change of entropy to first order, written beside the measured one: of plain steps in "
        "the logits of every token by itself, or of the steps taken through the weights too, for "
        "one more backward pass and two copies of the weights",
        choices=PREDICTIONS,
    )
    updates: int = redefined(TrainConfig, "updates", 100)
    learning_rate: float = redefined(TrainConfig, "learning_rate", 1e-6)
    loss_temperature: float = redefined(TrainConfig, "loss_temperature", 1.0)
    sampling_temperature: float = redefined(TrainConfig, "sampling_temperature", 1.0)
    top_p: float = redefined(TrainConfig, "top_p", 1.0)
    repetition_penalty: float = redefined(TrainConfig, "repetition_penalty", 1.0)
    compat: str | None = redefined(TrainConfig, "compat", help="of em alone", choices=(None,))
