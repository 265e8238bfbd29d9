"""The answers of an update: which problems are asked, and which groups are drawn again."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from em_kernels.evaluator.judge import make_judge
from em_kernels.objectives.grpo_plus_plus import dynamic_sampling_mask
from em_kernels.trainer.data import encode_prompt
from em_kernels.trainer.rl_config import RLConfig, Task
from em_kernels.trainer.rl_rewards import Answers, right_answers, text_reward
from em_kernels.trainer.rollout import Rollout


class Practice:
    """The problems of a run and how they take turns: all of them, in a new order each time."""

    def __init__(self, config: RLConfig, tokenizer):
        self.seed, self.group_size = config.seed, config.group_size
        self.tasks = config.tasks()
        self.prompts = [encode_prompt(tokenizer, config.ask(task)) for task in self.tasks]
        self.judge = make_judge(config.judge)

    def turn(self, number: int) -> int:
        """The index of the problem that is asked as the `number`-th of the run, from 0."""
        lap, place = divmod(number, len(self.tasks))
        order = list(range(len(self.tasks)))
        random.Random(f"{self.seed}-{lap}").shuffle(order)
        return order[place]


class Collected(NamedTuple):
    """The answers of an update in whole groups; `asked` problems were used up for them."""

    rollout: Rollout
    answers: Answers
    asked: int
    drawn: int
    right: float | None
    rewarded: float | None


def collect(run, practice: Practice, objective: str, asked: int, draw) -> Collected:
    """Sample `config.responses` answers; `draw(prompts) -> Rollout` samples one to each prompt.

    With grpo++, groups that are all right or all wrong make room for new problems, for
    `sampling_rounds` rounds; there may then be fewer answers, or none.
    """
    config, wanted = run.config, run.config.responses // run.config.group_size
    rounds = config.sampling_rounds if objective == "grpo++" else 1
    rollouts, answers, rights = [], [], []
    for _ in range(rounds):
        missing = wanted - sum(len(a.texts) for a in answers) // config.group_size
        numbers = [practice.turn(asked + i) for i in range(missing)]
        rollout, found = _ask(run, practice, numbers, asked, draw)
        asked += missing
        rights.append(found)
        if objective == "grpo++":
            rollout, found = _mixed_groups(config, objective, rollout, found)
        rollouts.append(rollout)
        answers.append(found)
        if sum(len(a.texts) for a in answers) == wanted * config.group_size:
            break
    return Collected(
        join_rollouts(rollouts, run.filler),
        _join_answers(answers),
        asked,
        sum(len(found.texts) for found in rights),
        _mean([found.correct for found in rights]),
        None,
    )
