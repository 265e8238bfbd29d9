"""The answers of an update: which problems are asked, and which groups are drawn again."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from em_kernels.lm.chat import encode_prompt
from em_kernels.lm.judge.judges import make_judge
from em_kernels.lm.kept_sets import KeptSets
from em_kernels.lm.random_state import seed_of
from em_kernels.lm.rollout import Rollout
from em_kernels.objectives.grpo_plus_plus import dynamic_sampling_mask
from em_kernels.trainer.objective_table import TABLE
from em_kernels.trainer.rewards import Answers, describe, text_reward
from em_kernels.trainer.rl_config import RLConfig
from em_kernels.trainer.run import Run
from em_kernels.trainer.shared_settings import TEXT_REWARDS

R = TypeVar("R")


def turn(seed: int, number: int, size: int) -> int:
    """Which of `size` takes the `number`-th turn, from 0: all of them, in a new order each time."""
    lap, place = divmod(number, size)
    order = list(range(size))
    random.Random(f"{seed}-{lap}").shuffle(order)
    return order[place]


class ProblemOrder:
    """The problems of a run and how they take turns: all of them, in a new order each time."""

    def __init__(self, config: RLConfig, tokenizer):
        self.config, self.tasks = config, config.tasks
        asked = map(config.ask, self.tasks)
        self.prompts = [encode_prompt(tokenizer, prompt, config.chat) for prompt in asked]
        self.judge = make_judge(config.judge)

    def turn(self, number: int) -> int:
        """The index of the problem that is asked as the `number`-th of the run, from 0."""
        return turn(self.config.seed, number, len(self.tasks))


class Collected(NamedTuple):
    """Answers of whole groups, of one update.

    `asked` counts the problems of the run so far; `drawn` the answers of this update, `right` the
    share of right ones among them (None if not known) and `length` their mean tokens, those that
    were then left out included. `mixed` tells whether there is anything to train on.
    """

    rollout: Rollout
    answers: Answers
    asked: int
    drawn: int
    right: float | None
    length: float
    mixed: bool


def draw(run: Run, prompts: list[list[int]], update: int, first: int = 0) -> Rollout:
    """One answer of the current model to each prompt (token ids), on every rank all of them.

    `first` is the number of the first one among the answers of the update.
    """
    rows = range(first, first + len(prompts))
    seeds = [seed_of(run.config.seed, update, row) for row in rows]
    with run.strategy.full_model() as model:
        rollout = run.sampler(model, prompts, seeds)
    if rollout.input_ids.is_cuda:
        torch.cuda.synchronize(rollout.input_ids.device)  # the clock between sampling and loss
    return rollout


def collect(run: Run, order: ProblemOrder, objective: str, update: int) -> Collected:
    """Sample `config.responses` answers.

    Where the objective resamples (grpo++), groups that are all right or all wrong make room for
    new problems, for `sampling_rounds` rounds; there may then be fewer answers.
    """
    config, lines = order.config, run.metrics.lines
    dynamic = TABLE[objective].resamples
    asked = max((line.get("problems_asked", 0) for line in lines), default=0)
    missing, drawn = config.responses // config.group_size, 0
    seen: list[tuple[Rollout, Answers]] = []
    kept: list[tuple[Rollout, Answers]] = []
    for _ in range(config.sampling_rounds if dynamic else 1):
        seen.append(_ask(run, order, objective, update, asked, missing, drawn))
        rollout, answers = seen[-1]
        asked, drawn = asked + missing, drawn + len(answers.group)
        used = torch.ones_like(answers.group, dtype=torch.bool)
        if dynamic:
            used = dynamic_sampling_mask(answers.reward, answers.group)
        if used.any():
            kept.append((_rows(rollout, used), _rows(answers, used)))
        missing -= int(used.sum()) // config.group_size
        if not missing:
            break
    rollouts, parts = zip(*(kept or seen[-1:]))
    every = join_answers([answers for _, answers in seen])
    return Collected(
        join_rollouts(rollouts, run.filler),
        join_answers(parts),
        asked,
        drawn,
        right=None if every.correct is None else every.correct.mean().item(),
        length=every.length.float().mean().item(),
        mixed=bool(kept),
    )


def _ask(
    run: Run,
    order: ProblemOrder,
    objective: str,
    update: int,
    asked: int,
    groups: int,
    first: int,
) -> tuple[Rollout, Answers]:
    """`groups` new problems, answered `group_size` times each."""
    config = order.config
    numbers = [order.turn(asked + i) for i in range(groups) for _ in range(config.group_size)]
    rollout = draw(run, [order.prompts[number] for number in numbers], update, first)
    tasks = [order.tasks[number] for number in numbers]
    tokens = [ids.tolist() for ids in rollout.answers()]
    texts = run.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    length = torch.tensor([len(ids) for ids in tokens])

    def look() -> Answers:
        return describe(config, objective, texts, tasks, length, order.judge)

    answers, name = run.ranks.first(look), config.reward_of(objective)
    if name in TEXT_REWARDS:
        answers = answers._replace(reward=text_reward(config, name, texts, answers))
    return rollout, answers


def _rows(batch, mask: Tensor):
    """The rows of a Rollout or of Answers where the mask is True."""
    return type(batch)(*(None if x is None else x[mask] for x in batch))


def join_rollouts(rollouts, filler: int) -> Rollout:
    """The rows of several, padded so that all answers start in the same column."""
    prompt = max(rollout.prompt_width for rollout in rollouts)
    answer = max(r.input_ids.shape[1] - r.prompt_width for r in rollouts)
    parts: list[Rollout] = []
    for rollout in rollouts:
        width = rollout.prompt_width
        sides = (prompt - width, answer - (rollout.input_ids.shape[1] - width))
        padded = {
            name: pad(value, sides, value=filler if name == "input_ids" else 0)
            for name, value in rollout._asdict().items()
            if isinstance(value, Tensor) and name != "finished"
        }
        kept = None if rollout.kept is None else rollout.kept.pad(*sides)
        parts.append(rollout._replace(**padded, kept=kept))
    return _together(Rollout, parts)


def join_answers(parts: Sequence[Answers]) -> Answers:
    """The rows of several; groups of different parts stay apart."""
    offset, groups = 0, []
    for part in parts:
        groups.append(part.group + offset)
        offset = int(groups[-1].max()) + 1
    return _together(Answers, [p._replace(group=group) for p, group in zip(parts, groups)])


def _together(kind: Callable[..., R], parts: Sequence[tuple]) -> R:
    """The rows of several records; None where one of them has None."""
    return kind(*(_joined(column) for column in zip(*parts)))


def _joined(column: tuple) -> Tensor | KeptSets | None:
    if any(x is None for x in column):
        return None
    return KeptSets.join(column) if isinstance(column[0], KeptSets) else torch.cat(column)
