"""Running arms: one training, measured on the way, by seed; what is done is not done again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.rl_study import arms as rl_study
from benchmarks.science.arms import ARMS, HABITS, SWEEP, Arm
from benchmarks.science.choices import Choices
from benchmarks.science.store import Store
from em_kernels import tiny_math
from em_kernels.analysis.shift import pooled_moments
from em_kernels.evaluator import evaluate
from em_kernels.evaluator.records import Answer
from em_kernels.lm.chat import encode_prompt
from em_kernels.lm.heads import read_head
from em_kernels.lm.models import hidden_states
from em_kernels.lm.rollout import Rollout, Sampling, aligned_mask, sample
from em_kernels.ops.linear_softmax_stats import linear_softmax_stats
from em_kernels.tiny_math.pretrain import HABITS as HABITS_OF_WRITING
from em_kernels.tiny_math.pretrain import habit_of
from em_kernels.trainer import TrainConfig, load_model, train

FULL = (1.0, 0.5, 0.0)
"""Temperatures of a full measurement; 0 is greedy."""
MOMENT_TEXTS = 128
MOMENTS = ("logit_mean", "logit_var", "logit_skew")
KEPT = ("mean_entropy", "logit_skew")


class Size(NamedTuple):
    """How much is run; None leaves what the arm says."""

    problems: int = 256
    seeds: int | None = None
    updates: int | None = None

    def updates_of(self, arm: Arm) -> int:
        return arm.updates if self.updates is None else min(arm.updates, self.updates)

    def seeds_of(self, arm: Arm) -> range:
        number = arm.seeds if self.seeds is None else self.seeds
        return range(arm.first_seed, arm.first_seed + number)


def random_reward(seed: int):
    """Weights of a policy gradient whose rewards are fair coin tosses, normalised in the group."""
    generator = torch.Generator().manual_seed(seed)

    def weigh(rollout: Rollout, loss_mask: Tensor) -> tuple[None, Tensor]:
        reward = torch.randint(0, 2, (loss_mask.shape[0],), generator=generator).float()
        advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
        mask = loss_mask.float()
        return None, -advantage[:, None] * mask / mask.sum().clamp(min=1)

    return weigh


def problems_of(split: str, count: int) -> list[tuple[str, str]]:
    return [(p.text, str(p.answer)) for p in tiny_math.make_problems(split, count)]


@torch.no_grad()
def skewness(model, rollout: Rollout) -> dict[str, float]:
    """Skewness of the logits over the vocabulary at the generated tokens, by both definitions.

    "skew": of each token, and then the mean over tokens; "pooled": of all logits of all tokens at
    once. See `em_kernels.analysis.shift`.
    """
    ids, head = rollout.input_ids, read_head(model)
    hidden, targets = hidden_states(model, ids, rollout.attention_mask), ids.roll(-1, 1)
    mask = aligned_mask(rollout)
    rows = hidden[mask], head.weight, targets[mask]
    stats = linear_softmax_stats(*rows, outputs=MOMENTS, **head.arguments)
    moments = [getattr(stats, name).double().numpy() for name in MOMENTS]
    return {"skew": float(moments[2].mean()), "pooled": pooled_moments(*moments)[2]}


class Meter:
    """Measures a model as its arm says; the texts for the moments are the untrained model's."""

    def __init__(self, arm: Arm, model, tokenizer, seed: int, count: int, last: int):
        self.arm, self.tokenizer, self.seed, self.last = arm, tokenizer, seed, last
        self.problems = problems_of(arm.split, count)
        shown = [encode_prompt(tokenizer, p) for p, _ in self.problems[:MOMENT_TEXTS]]
        sampling = Sampling(max_new_tokens=tiny_math.MAX_NEW_TOKENS)
        seeds = range(len(shown))
        self.texts = sample(model, tokenizer, shown, sampling, len(shown), seeds=seeds)

    def __call__(self, update: int, model) -> dict | None:
        """Accuracies by temperature, and the skewness; None where nothing is asked for."""
        arm = self.arm
        asked: list[float] = [1.0] * (update in arm.curve or update == self.last)
        asked += FULL * (update in arm.full) + SWEEP * (update in arm.sweep)
        if not asked:
            return None
        point: dict = {"update": update, "accuracy": {}, **skewness(model, self.texts)}
        for temperature in sorted(set(asked), reverse=True):
            found = self._answers(model, temperature)
            right = [answer.correct for _, answer in found]
            point["accuracy"][f"{temperature:g}"] = sum(right) / len(right)
            if temperature == 0 and arm.base == HABITS:
                point["greedy_by_habit"] = by_habit(found)
        return point

    def _answers(self, model, temperature: float) -> list[tuple[str, Answer]]:
        """(problem, answer) of every problem; temperature 0 is greedy."""
        greedy = temperature == 0
        result = evaluate(
            model,
            self.tokenizer,
            self.problems,
            samples=0 if greedy else 1,
            temperature=temperature or 1.0,
            greedy=greedy,
            max_new_tokens=tiny_math.MAX_NEW_TOKENS,
            judge="exact",
            seed=self.seed,
            progress=False,
        )
        return [(r.problem, r.greedy or r.samples[0]) for r in result.records]


def by_habit(found: list[tuple[str, Answer]]) -> dict[str, float]:
    """The share of right answers to the problems of each habit."""
    right: dict[str, list[bool]] = {habit: [] for habit in HABITS_OF_WRITING}
    for problem, answer in found:
        right[habit_of(problem)].append(answer.correct)
    return {habit: sum(own) / len(own) for habit, own in right.items() if own}


def config_of(arm: Arm, seed: int, size: Size, chosen: Choices) -> TrainConfig:
    updates = size.updates_of(arm)
    if arm.stages is None:
        return arm.em(seed, updates, chosen)
    steps = updates if size.updates is not None else rl_study.UPDATES
    return rl_study.settings(arm.stages, seed, rl_study.Size(steps, 64, size.problems, 1))


def settings_of(arm: Arm, seed: int, chosen: Choices) -> dict:
    """What is the arm's own in a run, as a data file has it."""
    own = {"stages": arm.stages} if arm.stages else arm.settings(seed, chosen)
    return json.loads(json.dumps(own))


def run(arm: Arm, seed: int, size: Size, chosen: Choices) -> dict:
    """One training: "settings" beside the usual ones; "points", what was measured; "lines", metrics
    by update; "cpu_seconds"."""
    began = time.process_time()
    model, tokenizer = load_model(str(tiny_math.model_path(arm.base)), "cpu")
    config = config_of(arm, seed, size, chosen) if arm.updates else None
    last = config.updates if config else 0
    meter = Meter(arm, model, tokenizer, seed, size.problems, last)
    points, lines = [meter(0, model)], []

    def watch(line: dict, model) -> None:
        lines.append(line)
        points.append(meter(line["update"], model))

    if config:
        objective = random_reward(seed) if arm.random_reward else None
        train(config, model, tokenizer, objective=objective, on_step=watch, progress=False)
    return {
        "settings": settings_of(arm, seed, chosen),
        "points": [point for point in points if point],
        "lines": {name: [line.get(name) for line in lines] for name in KEPT},
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def measured(
    store: Store, arms: Iterable[str], size: Size, say: Callable[[str], object] = print
) -> None:
    """Run what the data files do not have yet, or have with other settings, seed by seed.

    Raises:
        ValueError: a file has runs of another size.
    """
    chosen = Choices(store)
    for name in arms:
        arm = ARMS[name]
        sizes = {"problems": size.problems, "updates": size.updates_of(arm)}
        found = store.read(name) or {"arm": name, "size": sizes, "runs": {}}
        if found["size"] != sizes:
            raise ValueError(
                f"{store.path(name)} has runs of {found['size']}, got {sizes}: give another folder"
            )
        for seed in size.seeds_of(arm):
            kept = found["runs"].get(str(seed))
            if kept and kept["settings"] == settings_of(arm, seed, chosen):
                continue
            found["runs"][str(seed)] = run(arm, seed, size, chosen)
            store.write(name, found)
            say(f"{name}, seed {seed}: {found['runs'][str(seed)]['cpu_seconds']:.0f} s of CPU time")
