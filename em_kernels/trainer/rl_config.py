"""Everything that decides what a run of reinforcement learning does."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

from em_kernels.backends.pair import KINDS
from em_kernels.lm.data import PLACE, check_template, fill_template
from em_kernels.lm.judge.judges import JUDGES
from em_kernels.lm.problems import (
    ANSWER_FIELD,
    FIELD_SHOWN,
    FILES,
    PROBLEM_FIELD,
    SPLIT,
    TEMPLATE,
    TEMPLATE_SHOWN,
    Problem,
    Source,
    find_source,
    find_template,
    load_problems,
    problem_pairs,
)
from em_kernels.lm.settings import (
    at_least,
    documented,
    finite,
    fraction,
    not_negative,
    path_text,
    positive,
    redefined,
    setting,
    share,
)
from em_kernels.objectives.aggregation import AGGREGATIONS
from em_kernels.objectives.kl import KL_ESTIMATORS
from em_kernels.trainer.config import TrainConfig
from em_kernels.trainer.schedule import WITHOUT_REWARDS, Stage, parse_schedule

WHOLE_LABELS = ("sampler", "reference")  # policies that are there, with all their probabilities
PPL_LABELS = ("pseudo", "none", "topk", *WHOLE_LABELS)
EXACT = "exact"  # the KL itself in place of an estimate of it
OPD_WEIGHTS = ("none", "teacher_entropy")
TEXT_REWARDS = ("verified", "majority", "empo", "l-grpo", "length", "random", "format")
MODEL_REWARDS = ("negative_entropy", "self_certainty")
REWARDS = TEXT_REWARDS + MODEL_REWARDS
NEED_ANSWERS = ("verified", "l-grpo")


class Defaults(NamedTuple):
    """What an objective is published with; None where it has no such setting."""

    reward: str = "verified"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    ratio: float | None = None
    entropy_coef: float = 0.0


DEFAULTS = {
    "grpo": Defaults(),
    "grpo++": Defaults(clip_high=0.28, entropy_coef=1e-3),
    "l-grpo": Defaults(reward="l-grpo", clip_high=0.28),
    "clip_cov": Defaults(clip_low=1.0, clip_high=1.0, ratio=2e-4),
    "kl_cov": Defaults(clip_low=None, clip_high=None, ratio=2e-3),
    "high_entropy": Defaults(clip_high=0.28, ratio=0.2),
    "entropy_bonus": Defaults(entropy_coef=1e-2),
    "empo": Defaults(reward="empo"),
    "ppl": Defaults(clip_low=None, clip_high=None),
}
OBJECTIVES = (*WITHOUT_REWARDS, *DEFAULTS)
OWN = "the objective's own"


rl_setting = partial(setting, group="reinforcement learning (with --objective or --schedule)")


@documented
@dataclass(frozen=True)
class RLConfig(TrainConfig):
    """Group-relative policy optimisation and its kin, and distillation, by name.

    An update draws `responses` / `group_size` problems and `group_size` answers to each, gives
    every answer a reward and, within its group, an advantage, and takes `epochs` x `minibatches`
    optimiser steps on the loss of the objective. See `em_kernels.objectives` for formulas and
    sources. The settings of `TrainConfig` keep their meaning; sampling and loss are at temperature
    1 and untruncated by default, so that the policy that samples is the one that is trained.
    """

    objective: str = rl_setting(
        "grpo", "what to train for", choices=OBJECTIVES, shown="grpo; em on the command line"
    )
    schedule: str | None = rl_setting(
        None,
        "stages instead of one objective, NAME[:UPDATES][@RATE],...: em:10,grpo or em+kl_cov",
    )
    problems: str | tuple = rl_setting(
        (),
        f"{FILES}, or (problem, answer) pairs; the answer may be missing (None) where the reward "
        "does not look at it; em and opd do with `prompts` alone",
        metavar="FILE|PRESET",
        shown="none",
    )
    prompts: tuple[str, ...] = redefined(
        TrainConfig,
        "prompts",
        (),
        help="what stages of em and opd sample from",
        shown="the problems",
    )
    template: str | None = rl_setting(None, TEMPLATE, shown=TEMPLATE_SHOWN)
    problem_field: str | None = rl_setting(None, PROBLEM_FIELD, shown=FIELD_SHOWN)
    answer_field: str | None = rl_setting(None, ANSWER_FIELD, shown=FIELD_SHOWN)
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
    normalize_std: bool = rl_setting(
        True, "divide advantages by the standard deviation of the group"
    )
    reduction: str = redefined(
        TrainConfig,
        "reduction",
        help="of the loss: mean over all tokens; over each answer and then over answers; or sum "
        "over each answer and then mean over answers",
        choices=AGGREGATIONS,
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
    cov_lower: float = rl_setting(1.0, "clip_cov: least covariance", check=finite)
    cov_upper: float = rl_setting(5.0, "clip_cov: largest covariance", check=finite)
    kl_cov_coef: float = rl_setting(1.0, "kl_cov: weight of the penalty", check=not_negative)
    ref_kl: float = rl_setting(
        0.0,
        "weight of a KL penalty to the initial model, for objectives built on `grpo_loss`; above 0 "
        "a copy of that model is kept",
        check=not_negative,
    )
    kl_estimator: str = rl_setting(
        "k3",
        "form of that penalty: an estimate from the sampled tokens, or the exact KL over the whole "
        "vocabulary",
        choices=(*KL_ESTIMATORS, EXACT),
    )
    entropy_coef: float | None = rl_setting(
        None, "weight of the entropy bonus, loss units per nat", check=finite, shown=OWN
    )
    entropy_target: float | None = rl_setting(
        None,
        "steer the entropy bonus toward this mean entropy (nats), whatever the objective",
        check=not_negative,
    )
    entropy_step: float = rl_setting(
        0.005, "how far the weight of the bonus moves in an update, with a target", check=positive
    )
    em_coef: float = rl_setting(
        0.1, "weight of the mean entropy in mixed stages (em+NAME)", check=not_negative
    )
    empo_low: float = rl_setting(
        0.0, "empo: least semantic entropy of a problem that is kept, nats", check=finite
    )
    empo_high: float = rl_setting(10.0, "empo: largest, nats", check=finite)
    max_length: int | None = rl_setting(
        None,
        "L_max of the length rewards, tokens",
        check=at_least(1),
        shown="max_new_tokens",
    )
    sampling_rounds: int = rl_setting(
        3,
        "how often grpo++ draws new problems in the place of those whose answers are all right or "
        "all wrong, the first draw included",
        check=at_least(1),
    )
    gamma: float = rl_setting(0.9, "ppl: discount", check=fraction)
    alpha: float = rl_setting(1.0, "ppl: scale of the regret", check=positive)
    ppl_label: str = rl_setting(
        "pseudo",
        "ppl: label of the segments; with the exact KL at every token: sampler, the policy that "
        "drew them, of which a copy is made in every update, or reference, the initial model; "
        "topk, what is stored of the sampler: its `ppl_label_k` likeliest tokens, others as one",
        choices=PPL_LABELS,
    )
    ppl_label_k: int = rl_setting(
        20, "ppl: how many tokens at every place are stored as label topk", check=at_least(1)
    )
    teacher: str | None = rl_setting(
        None,
        "opd: the model to learn from, a folder or a hub name, of the same vocabulary; every rank "
        "holds it whole, in `dtype`",
        check=path_text,
        metavar="MODEL",
    )
    opd_kind: str = rl_setting(
        "reverse_kl",
        "opd: the divergence between the student p and the teacher q: forward_kl is KL(q || p), "
        "reverse_kl KL(p || q), js Jensen-Shannon",
        choices=KINDS,
    )
    opd_beta: float = rl_setting(
        0.5, "opd: weight of the teacher in the mixture of js, in [0, 1]", check=share
    )
    opd_weight: str = rl_setting(
        "none",
        "opd: weight of every token; teacher_entropy: the entropy of the teacher there over its "
        "mean over the tokens of the update",
        choices=OPD_WEIGHTS,
    )
    measure_change: bool = rl_setting(
        True, "read the entropy again after each update: one more forward pass"
    )
    updates: int = redefined(TrainConfig, "updates", 100)
    learning_rate: float = redefined(TrainConfig, "learning_rate", 1e-6)
    loss_temperature: float = redefined(TrainConfig, "loss_temperature", 1.0)
    sampling_temperature: float = redefined(TrainConfig, "sampling_temperature", 1.0)
    top_p: float = redefined(TrainConfig, "top_p", 1.0)
    repetition_penalty: float = redefined(TrainConfig, "repetition_penalty", 1.0)
    compat: str | None = redefined(TrainConfig, "compat", help="of em alone", choices=(None,))

    def __post_init__(self):
        self._settle_problems()
        self._check_texts()
        check_template(self.asked_with)
        super().__post_init__()
        for low, high in (("cov_lower", "cov_upper"), ("empo_low", "empo_high")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"{low} must be below {high}, got {getattr(self, low)!r} and "
                    f"{getattr(self, high)!r}"
                )
        if self.teacher is not None and not self.has_opd:
            raise ValueError(
                f"teacher is for the objective 'opd', got {self.teacher!r} for "
                f"{self.schedule or self.objective!r}: leave it out"
            )
        if self.kl_estimator == EXACT and self.ref_kl == 0:
            raise ValueError(
                f"kl_estimator {EXACT!r} is the form of a penalty that ref_kl weighs, got ref_kl=0:"
                " give it a weight, or leave kl_estimator out"
            )
        for stage in self.stages:
            self._check_stage(stage)

    def _check_texts(self) -> None:
        """Rewards need problems; the others do with prompts."""
        if self.problems:
            return
        name = self.schedule or self.objective
        if any(stage.policy for stage in self.stages):
            raise ValueError(f"problems must be given for {name!r}, got none")
        if not self.prompts:
            raise ValueError(f"problems or prompts must be given for {name!r}, got none")

    def _settle_problems(self) -> None:
        """A path as text; pairs as `Problem`s."""
        if isinstance(self.problems, (str, os.PathLike)):
            object.__setattr__(self, "problems", os.fspath(self.problems))
            return
        object.__setattr__(self, "problems", problem_pairs(self.problems))
        for name in ("problem_field", "answer_field", "split"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} must be None where problems are pairs, got {getattr(self, name)!r}"
                )

    def _check_stage(self, stage: Stage) -> None:
        if stage.policy is None:
            return
        if self.group_size < 2:
            raise ValueError(
                f"group_size must be 2 or more with {stage.policy}, got {self.group_size}: it "
                "compares the answers to one problem, and from a single one nothing is learned; "
                "take 4 to 16, and `responses` a multiple of it"
            )
        if self.responses % self.group_size:
            raise ValueError(
                f"responses must be a multiple of group_size={self.group_size}, "
                f"got {self.responses}"
            )
        reward = self.reward_of(stage.policy)
        if stage.policy == "grpo++" and reward not in ("verified", "majority", "format", "random"):
            raise ValueError(
                "reward of grpo++ must be 0 or 1 (verified, majority, format, random), for its "
                f"dynamic sampling, got {reward!r}"
            )
        if self.ref_kl > 0 and stage.policy in ("clip_cov", "kl_cov", "high_entropy", "ppl"):
            raise ValueError(f"ref_kl must be 0 with {stage.policy}, got {self.ref_kl!r}")

    @property
    def stages(self) -> tuple[Stage, ...]:
        return parse_schedule(self.schedule or self.objective, self.updates, OBJECTIVES)

    @property
    def has_opd(self) -> bool:
        """Whether a stage distils from a teacher."""
        return any("opd" in stage.objectives for stage in self.stages)

    @property
    def reference_setting(self) -> str | None:
        """The setting that a copy of the model is kept for, if there is one."""
        if self.ref_kl > 0:
            return "ref_kl"
        labelled = any(self.exact_kl(stage.policy) for stage in self.stages if stage.policy)
        return "ppl_label" if labelled else None

    def exact_kl(self, objective: str) -> str | None:
        """The divergence from a second model that the loss of an objective has exactly, if any."""
        if objective == "ppl":
            return "forward_kl" if self.ppl_label in WHOLE_LABELS else None
        return "reverse_kl" if self.ref_kl > 0 and self.kl_estimator == EXACT else None

    @property
    def prompt_texts(self) -> tuple[str, ...]:
        """What stages without rewards sample from."""
        return self.prompts or tuple(self.ask(task) for task in self.tasks)

    @property
    def all_texts(self) -> tuple[str, ...]:
        return self.prompts + tuple(self.ask(task) for task in self.tasks)

    def labels(self, index: int, stage: Stage) -> dict:
        return {"stage": index, "objective": stage.name}

    def ask(self, task: Problem) -> str:
        """The user's turn."""
        return fill_template(self.asked_with, task.problem)

    @cached_property
    def asked_with(self) -> str:
        """The template."""
        if isinstance(self.problems, str):
            return self._source(self.problems).template
        return PLACE if self.template is None else find_template(self.template)

    def _source(self, name: str) -> Source:
        return find_source(
            name,
            template=self.template,
            problem_field=self.problem_field,
            answer_field=self.answer_field,
            split=self.split or "train",
        )

    @cached_property
    def tasks(self) -> tuple[Problem, ...]:
        """The problems, read from where they lie, once.

        Raises:
            FileNotFoundError, ImportError, ValueError: of `load_problems`; a row that is no
                problem; a missing answer.
        """
        tasks = self.problems
        if isinstance(tasks, str):
            found = load_problems(self._source(tasks), strict=True, answers_needed=False)
            tasks = tuple(found.problems)
        policies = [stage.policy for stage in self.stages if stage.policy]
        needing = [p for p in policies if self.reward_of(p) in NEED_ANSWERS]
        missing = next((task.problem for task in tasks if task.answer is None), None)
        if needing and missing is not None:
            raise ValueError(
                f"problems need answers for the reward {self.reward_of(needing[0])!r}, "
                f"none for {missing[:60]!r}"
            )
        return tasks

    def reward_of(self, objective: str) -> str:
        return self.reward or DEFAULTS[objective].reward

    def setting(self, name: str, objective: str):
        """clip_low, clip_high, ratio or entropy_coef: as given, else the objective's own."""
        given = getattr(self, name)
        return getattr(DEFAULTS[objective], name) if given is None else given
