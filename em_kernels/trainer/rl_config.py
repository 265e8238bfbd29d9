"""Everything that decides what a run of reinforcement learning does."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from typing_extensions import Self

from em_kernels.lm.chat import Prompt
from em_kernels.lm.data import PLACE, check_template, fill_template
from em_kernels.lm.demonstrations import (
    SOLUTIONS,
    Demonstration,
    demonstration,
    load_demonstrations,
)
from em_kernels.lm.problems import (
    Problem,
    Source,
    find_source,
    find_template,
    load_problems,
    problem_pairs,
)
from em_kernels.lm.settings import documented
from em_kernels.objectives.rollout_correction import CORRECTIONS
from em_kernels.trainer.config import written
from em_kernels.trainer.entropy_control import check_target
from em_kernels.trainer.objective_entry import OtherPolicy
from em_kernels.trainer.objective_settings import ObjectiveSettings
from em_kernels.trainer.objective_table import BINARY_REWARDS, OBJECTIVES, TABLE
from em_kernels.trainer.schedule import Stage, parse_schedule
from em_kernels.trainer.unused_settings import check_used, unused

NEED_ANSWERS = ("verified", "l-grpo")


@documented
@dataclass(frozen=True)
class RLConfig(ObjectiveSettings):
    """Group-relative policy optimisation and its kin, distillation and fine-tuning, by name.

    An update draws `responses` / `group_size` problems and `group_size` answers to each, gives
    every answer a reward and, within its group, an advantage, and takes `epochs` x `minibatches`
    optimiser steps on the loss of the objective. See `em_kernels.objectives` for formulas and
    sources. The settings of `TrainConfig` keep their meaning; sampling and loss are at temperature
    1 and untruncated by default, so that the policy that samples is the one that is trained.

    A setting that no stage of the run looks at must be left at its default.
    """

    def __post_init__(self):
        self._settle_problems()
        self._check_texts()
        check_template(self.asked_with)
        super().__post_init__()
        if self.repo_zeta_min > self.repo_zeta_max:
            raise ValueError(
                f"repo_zeta_min must be at most repo_zeta_max, got {self.repo_zeta_min!r} and "
                f"{self.repo_zeta_max!r}"
            )
        for low, high in (("cov_lower", "cov_upper"), ("empo_low", "empo_high")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"{low} must be below {high}, got {getattr(self, low)!r} and "
                    f"{getattr(self, high)!r}"
                )
        check_used(self)
        if self.repo_adaptive and abs(self.repo_zeta) > self.repo_zeta_max:
            raise ValueError(
                "repo_zeta must be at most repo_zeta_max in size where it is steered, got "
                f"{self.repo_zeta!r} and {self.repo_zeta_max!r}"
            )
        self._check_rollout()
        for stage in self.stages:
            self._check_stage(stage)

    def _check_texts(self) -> None:
        """Rewards and demonstrations need problems; the others do with prompts."""
        if self.problems:
            return
        name = self.schedule or self.objective
        if any(stage.policy or stage.demonstrated for stage in self.stages):
            raise ValueError(f"problems must be given for {name!r}, got none")
        if not self.prompts:
            raise ValueError(f"problems or prompts must be given for {name!r}, got none")

    def _settle_problems(self) -> None:
        """A path as text; pairs as `Problem`s."""
        if isinstance(self.problems, (str, os.PathLike)):
            object.__setattr__(self, "problems", os.fspath(self.problems))
            return
        object.__setattr__(self, "problems", problem_pairs(self.problems))
        for name in ("problem_field", "answer_field", "solution_field", "split"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} must be None where problems are pairs, got {getattr(self, name)!r}"
                )

    def _check_rollout(self) -> None:
        if self.rollout_correction == "none":
            return
        floor, cap = self.rollout_weights["floor"], self.rollout_weights["cap"]
        if floor >= cap:
            raise ValueError(
                f"rollout_cap must be above rollout_floor, got {cap!r} and {floor!r} with "
                f"rollout_correction={self.rollout_correction!r}"
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
        if TABLE[stage.policy].resamples and reward not in BINARY_REWARDS:
            raise ValueError(
                f"reward of {stage.policy} must be 0 or 1 ({', '.join(BINARY_REWARDS)}), for its "
                f"dynamic sampling, got {reward!r}"
            )

    @classmethod
    def from_written(cls, values: dict) -> Self:
        """Without what was given of settings that the run never looked at."""
        values = written(values)
        draft, defaults = object.__new__(cls), {item.name: item.default for item in fields(cls)}
        draft.__dict__.update(defaults, **values)
        return cls.from_dict({**values, **{name: defaults[name] for name in unused(draft)}})

    @property
    def rollout_weights(self) -> dict[str, Any]:
        """The arguments of `rollout_weight`, of a rollout_correction."""
        mode = self.rollout_correction
        floor, cap = CORRECTIONS[mode].bounds(self.rollout_floor, self.rollout_cap)
        return {"mode": mode, "floor": floor, "cap": cap}

    @property
    def keeps_sets(self) -> bool:
        ratios = any(TABLE[policy].has_ratios for policy in self.policies)
        return self.rollout_support == "sampler" and ratios

    @property
    def stages(self) -> tuple[Stage, ...]:
        setting = "schedule" if self.schedule else "objective"
        return parse_schedule(getattr(self, setting), self.updates, OBJECTIVES, setting)

    @property
    def policies(self) -> list[str]:
        """The objectives of the stages with rewards."""
        return [stage.policy for stage in self.stages if stage.policy]

    @property
    def has_opd(self) -> bool:
        """Whether a stage distils from a teacher."""
        return any("opd" in stage.objectives for stage in self.stages)

    @property
    def reference_setting(self) -> str | None:
        """The setting that a copy of the model is kept for, if there is one."""
        asked = [self.other_policy(policy).setting for policy in self.policies]
        return next((setting for setting in asked if setting is not None), None)

    def other_policy(self, objective: str) -> OtherPolicy:
        """What the loss of an objective has of a policy besides the current one."""
        return TABLE[objective].other(self)

    @property
    def prompt_texts(self) -> tuple[Prompt, ...]:
        """What stages without rewards sample from; where none samples, one that is answered."""
        return self.prompts or self._asked

    @property
    def all_texts(self) -> tuple[Prompt, ...]:
        return self.prompts + self._asked

    @property
    def _asked(self) -> tuple[Prompt, ...]:
        if all(stage.demonstrated for stage in self.stages):
            return (self.demonstrations[0].turns,)
        return tuple(self.ask(task) for task in self.tasks)

    @cached_property
    def demonstrations(self) -> tuple[Demonstration, ...]:
        """The worked solutions, or the answers of pairs, read from where they lie, once.

        Raises:
            FileNotFoundError, ImportError, ValueError: of `load_demonstrations`; a missing answer.
        """
        stage = next((stage for stage in self.stages if stage.demonstrated), None)
        if stage is None:
            return ()
        if isinstance(self.problems, str):
            fields = SOLUTIONS if self.solution_field is None else (self.solution_field,)
            return load_demonstrations(self._source(self.problems), fields)
        missing = next((task.problem for task in self.problems if not task.answer), None)
        if missing is not None:
            raise ValueError(
                f"problems need answers, which are the demonstrations of {stage.demonstrated!r}, "
                f"none for {missing[:60]!r}"
            )
        return tuple(demonstration(self.ask(task), task.answer) for task in self.problems)

    def check_entries(self, entries: int) -> None:
        check_target(self, entries)
        for name in self._counts_of_entries():
            if getattr(self, name) > entries:
                raise ValueError(
                    f"{name} must be at most {entries}, the entries of the model's head, "
                    f"got {getattr(self, name)}"
                )

    def _counts_of_entries(self) -> list[str]:
        """The settings of this run that say how many likeliest tokens are read at a place."""
        acts = {
            "eaft_k": any(stage.demonstrated == "eaft" for stage in self.stages),
            "dppo_k": self.dppo_divergence.startswith("topk"),
            "ppl_label_k": self.ppl_label == "topk",
        }
        return [name for name, does in acts.items() if does]

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
            split=self.split,
            usual_split="train",
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
        needing = [p for p in self.policies if self.reward_of(p) in NEED_ANSWERS]
        missing = next((task.problem for task in tasks if task.answer is None), None)
        if needing and missing is not None:
            where = f" in {self.answer_field!r} (answer_field)" if self.answer_field else ""
            raise ValueError(
                f"problems need answers for the reward {self.reward_of(needing[0])!r}, "
                f"none for {missing[:60]!r}{where}"
            )
        return tasks

    def reward_of(self, objective: str) -> str:
        return self.reward or TABLE[objective].reward

    def setting(self, name: str, objective: str) -> Any:
        """As given, else the objective's own."""
        given = getattr(self, name)
        return TABLE[objective].default(name) if given is None else given

    def in_use(self, name: str) -> Any:
        """In each stage, where an objective has a default of its own."""
        given, objectives = getattr(self, name), [stage.objectives[-1] for stage in self.stages]
        if given is not None and all(TABLE[o].default(name) is None for o in objectives):
            return given
        return tuple(self.setting(name, o) for o in objectives if name in TABLE[o].settings)
