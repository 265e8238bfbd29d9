"""Rewards and advantages of sampled answers, by name."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from em_kernels.lm.problems import Problem
from em_kernels.objectives.advantages import group_advantage
from em_kernels.objectives.empo import answer_clusters, empo_reward
from em_kernels.objectives.l_grpo import l_grpo_reward
from em_kernels.objectives.rewards import (
    format_reward,
    length_reward,
    majority_reward,
    negative_entropy_reward,
    random_reward,
    self_certainty_reward,
    verified_reward,
)
from em_kernels.trainer.objective_table import TABLE
from em_kernels.trainer.rl_config import RLConfig


class Answers(NamedTuple):
    """N sampled answers, by rows: number of the group, tokens, right or not, cluster, reward.

    `group` and `length` are (N,) int64; `correct` (N,) float32, None where some problem has no
    known answer; `cluster` (N,) int64, None where nothing asks for it; `reward` (N,) float32, None
    if it is the model's own.
    """

    group: Tensor
    length: Tensor
    correct: Any
    cluster: Any
    reward: Any = None


class Scores(NamedTuple):
    """Of N answers, all (N,): reward, advantage, and whether the answer is trained on."""

    reward: Tensor
    advantage: Tensor
    kept: Tensor


def describe(
    config: RLConfig, objective: str, texts: list[str], tasks: list[Problem], length: Tensor, judge
) -> Answers:
    """What rewards are made of; `config.group_size` answers in a row belong to one problem."""
    group = torch.arange(len(texts)) // config.group_size
    correct = cluster = None
    if all(task.answer is not None for task in tasks):
        correct = verified_reward(texts, [task.answer for task in tasks], judge=judge)
    if TABLE[objective].keeps or config.reward_of(objective) in ("majority", "empo"):
        cluster = answer_clusters(texts, group, judge=judge)
    return Answers(group, length, correct, cluster)


def text_reward(config: RLConfig, name: str, texts: list[str], answers: Answers) -> Tensor:
    """The rewards that need no look at the model: (N,) float32."""
    limit = float(config.max_length or config.max_new_tokens)
    match name:
        case "verified":
            return answers.correct
        case "majority":
            return majority_reward(answers.cluster, answers.group)
        case "empo":
            return empo_reward(answers.cluster, answers.group)
        case "l-grpo":
            inputs = (answers.correct, answers.length, answers.group)
            return l_grpo_reward(*inputs, max_length=limit)
        case "length":
            return length_reward(answers.length, max_length=limit)
        case "random":
            return random_reward(answers.length)
        case "format":
            return format_reward(texts)
        case _:
            raise ValueError(f"reward must be one of the text rewards, got {name!r}")


def model_reward(name: str, values: Tensor, mask: Tensor) -> Tensor:
    """-mean H or the mean self-certainty of each answer, under the policy that sampled it."""
    score = negative_entropy_reward if name == "negative_entropy" else self_certainty_reward
    return score(values, mask)


def score(config: RLConfig, objective: str, answers: Answers, reward: Tensor) -> Scores:
    """Advantages within the groups; `kept` is False where the objective leaves a problem out."""
    normalize = config.setting("normalize_std", objective)
    advantage = group_advantage(reward, answers.group, normalize_std=normalize)
    keeps, every = TABLE[objective].keeps, torch.ones_like(reward, dtype=torch.bool)
    return Scores(reward, advantage, every if keeps is None else keeps(config, answers))


def preference_pairs(reward: Tensor, group: Tensor) -> list[int]:
    """Rows chosen, rejected, chosen, rejected, ...: in each group the best with the worst, the
    second best with the second worst, as long as the rewards differ."""
    rows: list[int] = []
    for number in group.unique().tolist():
        own = (group == number).nonzero()[:, 0]
        order = own[reward[own].argsort(descending=True, stable=True)].tolist()
        for best, worst in zip(order[: len(order) // 2], reversed(order)):
            if reward[best] > reward[worst]:
                rows += [best, worst]
    return rows
