"""Everything that decides what a run of reinforcement learning does."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from em_kernels.lm.data import check_unicode, read_jsonl, text_field
from em_kernels.objectives.aggregation import AGGREGATIONS
from em_kernels.objectives.kl import KL_ESTIMATORS
from em_kernels.trainer.config import TrainConfig, check_choice, check_float, check_int
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


class Task(NamedTuple):
    """A problem to practise on; `answer` is None where it is not known."""

    problem: str
    answer: str | None


@dataclass(frozen=True)
class RLConfig(TrainConfig):
    """Group-relative policy optimisation and its kin, by name.

    An update draws `responses` / `group_size` problems and `group_size` answers to each, gives
    every answer a reward and, within its group, an advantage, and takes `epochs` x `minibatches`
    optimiser steps on the loss of the objective. See `em_kernels.objectives` for formulas and
    sources. The settings of `TrainConfig` keep their meaning; sampling and loss are at temperature
    1 and untruncated by default, so that the policy that samples is the one that is trained.

    Args:
        objective: one of `OBJECTIVES`.
        schedule: stages instead of one objective, e.g. "em:10,grpo" (see `parse_schedule`).
        problems: a file of lines {"problem": ..., "answer": ...}, or (problem, answer) pairs. The
            answer may be missing (None) where the reward does not look at it.
        prompts: what EM stages sample from; none takes the problems.
        template: the user's turn, with {problem} where the problem goes.
        group_size: G >= 2, answers to each problem of an update, which the advantage (for ppl: the
            preference) compares; `responses` is a multiple of it.
        reward: one of `REWARDS`; None is the objective's own (verified, or empo, or l-grpo).
        judge: what decides an answer: "auto", "math-verify" or "exact".
        epochs, minibatches: passes over the answers of an update; optimiser steps each pass.
        normalize_std: divide the advantage by the standard deviation of the group.
        reduction: "token_mean", "sequence_mean" or "sequence_mean_token_sum".
        clip_low, clip_high: of the ratio to the policy that sampled; None is the objective's own.
        ratio: fraction of the tokens that clip_cov, kl_cov and high_entropy select; None is the
            published one (2e-4, 2e-3, 0.2). The first two are tuned to batches of a million tokens:
            with fewer tokens, raise them.
        cov_lower, cov_upper: of clip_cov.
        kl_cov_coef: beta of kl_cov.
        ref_kl, kl_estimator: weight and form of a KL penalty to the initial model, for objectives
            built on `grpo_loss`; > 0 keeps a copy of that model.
        entropy_coef: weight of the entropy bonus, loss units per nat; None is the objective's own.
        entropy_target, entropy_step: nats; with a target the coefficient moves by a step an update
            toward it, whatever the objective.
        em_coef: weight of the mean entropy in mixed stages (em+NAME).
        empo_low, empo_high: bounds of the semantic entropy of the problems that empo keeps, nats.
        max_length: L_max of the length rewards, tokens; None is max_new_tokens.
        sampling_rounds: how often grpo++ draws new problems in the place of those whose answers
            are all right or all wrong, the first draw included.
        gamma, alpha, ppl_label: of `ppl_loss` (normalised by length); "pseudo" or "none".
        measure_change: read the entropy again after the update: one more forward pass.

    Raises:
        TypeError, ValueError: naming the argument and what was received.
    """

    objective: str = "grpo"
    schedule: str | None = None
    problems: str | tuple = ()
    prompts: tuple[str, ...] = ()
    template: str = "{problem}"
    group_size: int = 8
    reward: str | None = None
    judge: str = "auto"
    epochs: int = 1
    minibatches: int = 2
    normalize_std: bool = True
    clip_low: float | None = None
    clip_high: float | None = None
    ratio: float | None = None
    cov_lower: float = 1.0
    cov_upper: float = 5.0
    kl_cov_coef: float = 1.0
    ref_kl: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float | None = None
    entropy_target: float | None = None
    entropy_step: float = 0.005
    em_coef: float = 0.1
    empo_low: float = 0.0
    empo_high: float = 10.0
    max_length: int | None = None
    sampling_rounds: int = 3
    gamma: float = 0.9
    alpha: float = 1.0
    ppl_label: str = "pseudo"
    measure_change: bool = True
    updates: int = 100
    learning_rate: float = 1e-6
    loss_temperature: float = 1.0
    sampling_temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    REDUCTIONS = AGGREGATIONS

    def __post_init__(self):
        self._settle_problems()
        if not self.problems:
            raise ValueError(f"problems must be given for {self.objective!r}, got none")
        check_unicode("template", self.template)
        super().__post_init__()
        for name in ("group_size", "epochs", "minibatches", "sampling_rounds"):
            check_int(name, getattr(self, name), 1)
        if self.max_length is not None:
            check_int("max_length", self.max_length, 1)
        if self.responses % self.group_size:
            raise ValueError(
                f"responses must be a multiple of group_size={self.group_size}, "
                f"got {self.responses}"
            )
        self._check_numbers()
        check_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        check_choice("ppl_label", self.ppl_label, PPL_LABELS)
        check_choice("reward", self.reward, (None, *REWARDS))
        check_choice("compat", self.compat, (None,))
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

    def _check_numbers(self) -> None:
        for name in ("clip_low", "clip_high", "entropy_target", "ref_kl", "kl_cov_coef", "em_coef"):
            if getattr(self, name) is not None:
                check_float(name, getattr(self, name), lambda v: v >= 0, "0 or more")
        for name in ("cov_lower", "cov_upper", "empo_low", "empo_high", "entropy_coef"):
            if getattr(self, name) is not None:
                check_float(name, getattr(self, name), math.isfinite, "a number")
        for name in ("entropy_step", "alpha"):
            check_float(name, getattr(self, name), lambda v: v > 0, "positive")
        check_float("gamma", self.gamma, lambda v: 0 < v <= 1, "in (0, 1]")
        if self.ratio is not None:
            check_float("ratio", self.ratio, lambda v: 0 < v <= 1, "in (0, 1]")
        for low, high in (("cov_lower", "cov_upper"), ("empo_low", "empo_high")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"{low} must be below {high}, got {getattr(self, low)!r} and "
                    f"{getattr(self, high)!r}"
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
