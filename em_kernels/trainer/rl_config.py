"""Everything that decides what a run of reinforcement learning does."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

from em_kernels.lm.data import check_unicode, read_jsonl, text_field
from em_kernels.lm.judge.judges import JUDGES
from em_kernels.lm.settings import (
    at_least,
    documented,
    finite,
    fraction,
    not_negative,
    positive,
    redefined,
    setting,
)
from em_kernels.objectives.aggregation import AGGREGATIONS
from em_kernels.objectives.kl import KL_ESTIMATORS
from em_kernels.trainer.config import TrainConfig
from em_kernels.trainer.schedule import Stage, parse_schedule

PPL_LABELS = ("pseudo", "none")
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
OBJECTIVES = ("em", *DEFAULTS)
OWN = "the objective's own"


class Task(NamedTuple):
    """A problem to practise on; `answer` is None where it is not known."""

    problem: str
    answer: str | None


rl_setting = partial(setting, group="reinforcement learning (with --objective or --schedule)")


@documented
@dataclass(frozen=True)
class RLConfig(TrainConfig):
    """Group-relative policy optimisation and its kin, by name.

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
        'a file of lines {"problem": ..., "answer": ...}, or (problem, answer) pairs; the answer '
        "may be missing (None) where the reward does not look at it",
        metavar="FILE",
        shown="none",
    )
    prompts: tuple[str, ...] = redefined(
        TrainConfig, "prompts", (), help="what EM stages sample from", shown="the problems"
    )
    template: str = rl_setting(
        "{problem}", "the user's turn, with {problem} where the problem goes"
    )
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
    kl_estimator: str = rl_setting("k3", "form of that penalty", choices=KL_ESTIMATORS)
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
    ppl_label: str = rl_setting("pseudo", "ppl: label of the segments", choices=PPL_LABELS)
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
        if not self.problems:
            raise ValueError(f"problems must be given for {self.objective!r}, got none")
        check_unicode("template", self.template)
        super().__post_init__()
        if self.responses % self.group_size:
            raise ValueError(
                f"responses must be a multiple of group_size={self.group_size}, "
                f"got {self.responses}"
            )
        for low, high in (("cov_lower", "cov_upper"), ("empo_low", "empo_high")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"{low} must be below {high}, got {getattr(self, low)!r} and "
                    f"{getattr(self, high)!r}"
                )
        if "{problem}" not in self.template:
            raise ValueError(f"template must have {{problem}} in it, got {self.template!r}")
        for stage in self.stages:
            self._check_stage(stage)

    def _settle_problems(self) -> None:
        """A path as text; pairs as `Task`s."""
        if isinstance(self.problems, (str, os.PathLike)):
            object.__setattr__(self, "problems", os.fspath(self.problems))
            return
        tasks = tuple(Task(*pair) for pair in self.problems)
        for task in tasks:
            if not isinstance(task.problem, str) or not task.problem.strip():
                raise ValueError(f"problems must be text that is not empty, got {task.problem!r}")
            if not isinstance(task.answer, (str, type(None))):
                raise TypeError(f"answers of problems must be text, got {task.answer!r}")
            check_unicode("problems", task.problem)
            check_unicode("answers of problems", task.answer or "")
        object.__setattr__(self, "problems", tasks)

    def _check_stage(self, stage: Stage) -> None:
        if stage.policy is None:
            return
        if self.group_size < 2:
            raise ValueError(
                f"group_size must be 2 or more with {stage.policy}, got {self.group_size}: it "
                "compares the answers to one problem, and from a single one nothing is learned; "
                "take 4 to 16, and `responses` a multiple of it"
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
    def prompt_texts(self) -> tuple[str, ...]:
        """What EM stages sample from."""
        return self.prompts or tuple(self.ask(task) for task in self.tasks)

    @property
    def all_texts(self) -> tuple[str, ...]:
        return self.prompts + tuple(self.ask(task) for task in self.tasks)

    def labels(self, index: int, stage: Stage) -> dict:
        return {"stage": index, "objective": stage.name}

    def ask(self, task: Task) -> str:
        """The user's turn."""
        return self.template.replace("{problem}", task.problem)

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """The problems, read from their file, once, if they are in one.

        Raises:
            FileNotFoundError, ValueError: no such file; a broken line; a missing answer.
        """
        tasks = self.problems
        if isinstance(tasks, str):
            tasks = tuple(_read_task(tasks, *line) for line in read_jsonl(tasks))
            if not tasks:
                raise ValueError(f"{self.problems}: no problems in the file")
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


def _read_task(path: str, number: int, line: dict) -> Task:
    answer = text_field(path, number, line, "answer") if "answer" in line else None
    return Task(text_field(path, number, line, "problem", "prompt"), answer)
