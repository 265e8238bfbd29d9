"""One update of reinforcement learning: sample groups, reward, weigh, step, measure."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels.lm.adapters import is_adapted
from em_kernels.lm.models import load_model
from em_kernels.lm.modes import eval_mode
from em_kernels.lm.ranks import Ranks
from em_kernels.lm.rollout import Rollout, aligned_mask
from em_kernels.ops.covariance import token_covariance
from em_kernels.trainer.distributed import Whole
from em_kernels.trainer.rl_collect import Collected, Practice, collect
from em_kernels.trainer.rl_config import RLConfig
from em_kernels.trainer.rl_loss import (
    SELECTING,
    Tokens,
    select_tokens,
    step_loss,
    step_size,
    token_stats,
)
from em_kernels.trainer.rl_rewards import (
    Scores,
    model_reward,
    preference_pairs,
    score,
)
from em_kernels.trainer.run import Run
from em_kernels.trainer.schedule import Stage, entropy_coef, stage_lines
from em_kernels.trainer.step import draw, take_step

COVARIANCE_QUANTILES = (0.5, 0.9, 0.99, 0.999)
ROUND_OFFSET = 10**9  # more than any number of updates


class Part(NamedTuple):
    """A micro-batch: rows and columns of the tokens of a step."""

    rows: Tensor
    columns: slice
    tokens: Tokens

    def without_weight(self) -> Part:
        return self._replace(tokens=self.tokens.without_weight())


def initial_model(config, model, ranks: Ranks):
    """The reference of a KL penalty, before anything trains the model; None where none is asked.

    It shares the weights that an adapter leaves alone; several ranks take those apart.
    """
    if not isinstance(config, RLConfig) or config.ref_kl == 0:
        return None
    if model is None and config.model is None:
        raise ValueError(
            "model must be given with ref_kl: the model that the run was started with, got None"
        )
    if model is None:
        model, _ = load_model(str(config.model), config.device)
        return model.eval().requires_grad_(False)
    shared = {}
    if is_adapted(model) and ranks.size == 1:
        shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).eval().requires_grad_(False)


class Learner:
    """Updates of a run with the objectives that need rewards."""

    def __init__(self, run: Run, reference=None):
        self.run, self.config = run, run.config
        self.practice = Practice(run.config, run.tokenizer)
        self.reference = None
        if reference is not None:
            reference.to(run.model.device)
            self.reference = Whole(reference, run.config.loss_temperature, run.config.dtype)

    def update(self, update: int, index: int, stage: Stage) -> dict:
        """Sample, then `epochs` x `minibatches` optimiser steps; returns the metrics.

        Besides those of entropy minimisation (response_length is over all answers drawn, loss and
        grad_norm are means over the steps):
            reward_mean; accuracy (None without known answers); advantage_nonzero (share of the
            answers); answers_used (trained on); optimizer_steps; problems_asked (by the run);
            mean_entropy, logit_skew, cov_mean and its quantiles cov_p50 ... cov_p99.9: of the
            answers' tokens under the policy that sampled them;
            clip_fraction, selected_fraction, policy_kl, ref_kl, ...: of the objective, means over
            tokens and steps; entropy_coef: weight of the bonus;
            entropy_change: of the mean entropy of the same tokens by the update;
            predicted_entropy_change: learning rate x mean of A x entropy_slope, what a plain
            gradient step of that size in each token's own logits would change. AdamW and shared
            weights move further: compare signs and courses, not sizes.
        """
        run, config, started = self.run, self.config, time.perf_counter()
        coef = self._entropy_coef(index, stage)
        found = collect(run, self.practice, stage.policy, self._asked(), self._draw(update))
        sampled = time.perf_counter()
        tokens, before = self._read(found, stage.policy)
        scores = self._score(stage.policy, found, before, tokens.loss_mask)
        tokens = tokens._replace(advantage=_per_token(scores.advantage, tokens.loss_mask))
        rows = self._rows(stage.policy, found, scores)
        steps = [
            self._step(update, stage, tokens.at(own), _at(before, own, first), coef)
            for own, first in self._steps(stage.policy, rows)
        ]
        line = _describe(found, scores, tokens, before, config)
        if config.measure_change:
            after = self._statistics(run.weights, tokens, ("entropy",))["entropy"]
            change = _mean(after, tokens.loss_mask) - line["mean_entropy"]
            line["entropy_change"] = change
        ended = time.perf_counter()
        return {
            "update": update,
            "step": update,
            **_over_steps(steps),
            **line,
            "entropy_coef": coef,
            "answers_used": len(rows),
            "optimizer_steps": len(steps),
            "problems_asked": found.asked,
            "tokens_per_second": line["response_tokens"] / (ended - started),
            "sample_seconds": sampled - started,
            "loss_seconds": ended - sampled,
        }

    def _draw(self, update: int) -> Callable[[list[list[int]]], Rollout]:
        """Samples for this update; a second call draws other numbers, whatever the sampler."""
        calls = count(update, ROUND_OFFSET)
        return lambda prompts: draw(self.run, prompts, next(calls))

    def _asked(self) -> int:
        """Problems that the run has used up."""
        return max((line.get("problems_asked", 0) for line in self.run.metrics.lines), default=0)

    def _entropy_coef(self, index: int, stage: Stage) -> float:
        """Of the next update; mixed stages subtract the weight of EM when it is used."""
        return entropy_coef(
            self.config.setting("entropy_coef", stage.policy),
            stage_lines(self.run.metrics.lines, index),
            target=self.config.entropy_target,
            step=self.config.entropy_step,
        )

    def _read(self, found: Collected, objective: str) -> tuple[Tokens, dict[str, Tensor]]:
        """The tokens, with old and reference log-probabilities, and statistics of the policy."""
        rollout = found.rollout
        mask = aligned_mask(rollout)
        blank = torch.zeros(mask.shape, device=mask.device)
        tokens = Tokens(rollout.input_ids, rollout.attention_mask, mask, blank, blank)
        outputs = ["logprob", "entropy", "entropy_slope", "logit_skew"]
        if self.config.reward_of(objective) == "self_certainty":
            outputs.append("self_certainty")
        before = self._statistics(self.run.weights, tokens, tuple(outputs))
        reference = None
        if self.reference is not None:
            reference = self._statistics(self.reference, tokens, ("logprob",))["logprob"]
        return tokens._replace(old_logprob=before["logprob"], ref_logprob=reference), before

    def _statistics(self, weights, tokens: Tokens, outputs: tuple[str, ...]) -> dict[str, Tensor]:
        """(B, T) each, without gradient; 0 where no token counts. Ranks share the work."""
        found = {name: torch.zeros_like(tokens.old_logprob) for name in outputs}
        compute = partial(token_stats, outputs=outputs)
        with torch.no_grad(), eval_mode(weights.trained):
            for part in self.run.ranks.deal(self._parts(tokens, 1)):
                stats = weights.loss(part.tokens, compute)
                for name, values in found.items():
                    values[part.rows, part.columns] = getattr(stats, name).to(values)
        for values in found.values():
            self.run.ranks.sum_tensor(values)
        return found

    def _score(self, objective: str, found: Collected, before: dict, mask: Tensor) -> Scores:
        name, reward = self.config.reward_of(objective), found.answers.reward
        if reward is None:
            values = before["entropy" if name == "negative_entropy" else "self_certainty"]
            reward = model_reward(name, values, mask).cpu()
        return score(self.config, objective, found.answers, reward)

    def _rows(self, objective: str, found: Collected, scores: Scores) -> list[int]:
        """The answers to train on; for ppl in pairs: chosen, rejected, chosen, ..."""
        if not found.mixed:
            return []
        if objective == "ppl":
            return preference_pairs(scores.reward, found.answers.group)
        return scores.kept.nonzero()[:, 0].tolist()

    def _steps(self, objective: str, rows: list[int]) -> Iterator[tuple[Tensor, bool]]:
        """The rows of each optimiser step, and whether it is the first."""
        units = torch.tensor(rows).view(-1, _unit(objective))
        first = True
        for _ in range(self.config.epochs if rows else 0):
            order = units[torch.randperm(len(units))]
            for own in order.tensor_split(min(self.config.minibatches, len(units))):
                yield own.reshape(-1), first
                first = False

    def _step(
        self, update: int, stage: Stage, tokens: Tokens, current: dict | None, coef: float
    ) -> dict[str, float]:
        """One optimiser step: select among all its tokens, then micro-batch by micro-batch.

        `current` are the statistics of the tokens where the policy is still the one that sampled.
        """
        run, config, objective = self.run, self.config, stage.policy
        on_policy = current is not None
        if objective in SELECTING:
            names = ("logprob", "entropy")
            current = current or self._statistics(run.weights, tokens, names)
            chosen = select_tokens(config, objective, tokens, *(current[name] for name in names))
            tokens = tokens._replace(selected=chosen)
        coef -= config.em_coef if "em" in stage.objectives else 0.0
        compute = partial(token_stats, outputs=("logprob", "entropy") if coef else ("logprob",))
        size, sums = step_size(config, objective, tokens), {"loss": 0.0}
        run.weights.train()
        with run.ranks.apart(update):
            for part in run.ranks.deal(self._parts(tokens, _unit(objective))):
                stats = run.weights.loss(part.tokens, compute)
                own = part.tokens.sampled_by(stats) if on_policy else part.tokens
                found = step_loss(config, objective, stats, own, size=size, entropy_coef=coef)
                found.loss.backward()
                for name, value in {"loss": found.loss.item(), **found.sums}.items():
                    sums[name] = sums.get(name, 0.0) + value
        totals = dict(zip(sums, run.ranks.sum(*sums.values())))
        number, loss = max(totals.pop("tokens"), 1), totals.pop("loss")
        means = {name: value / number for name, value in totals.items()}
        return {"loss": loss, "grad_norm": take_step(run, update, loss), **means}

    def _parts(self, tokens: Tokens, unit: int) -> Iterator[Part]:
        """`micro_batch` rows at a time, without columns that are all padding.

        Long answers first, unless rows belong together (`unit` rows in a row).
        """
        order = torch.arange(len(tokens.input_ids), device=tokens.input_ids.device)
        if unit == 1:
            order = tokens.attention_mask.sum(1).argsort(descending=True, stable=True)
        for rows in order.split(max(self.config.micro_batch // unit, 1) * unit):
            used = tokens.attention_mask[rows].any(0).nonzero()[:, 0]
            columns = slice(int(used[0]), int(used[-1]) + 1)
            yield Part(rows, columns, tokens.at(rows, columns))


def _unit(objective: str) -> int:
    """Rows that belong together: one answer, or a pair of them."""
    return 2 if objective == "ppl" else 1


def _per_token(advantage: Tensor, mask: Tensor) -> Tensor:
    return advantage.to(mask.device)[:, None] * mask


def _at(statistics: dict[str, Tensor], rows: Tensor, wanted: bool) -> dict[str, Tensor] | None:
    return {name: values[rows] for name, values in statistics.items()} if wanted else None


def _over_steps(steps: list[dict[str, float]]) -> dict[str, float]:
    """The mean over optimiser steps; without any, a loss of 0."""
    if not steps:
        return {"loss": 0.0, "grad_norm": 0.0}
    return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}


def _mean(values: Tensor, mask: Tensor) -> float:
    return (values * mask).sum(dtype=torch.float64).item() / max(int(mask.sum()), 1)


def _describe(
    found: Collected, scores: Scores, tokens: Tokens, before: dict, config: RLConfig
) -> dict:
    """Metrics of the answers, before any step is taken."""
    mask, advantage = tokens.loss_mask, tokens.advantage
    cov = token_covariance(before["logprob"], advantage, mask)
    ordered = cov[mask].sort().values if mask.any() else cov.new_zeros(1)
    quantiles = {
        f"cov_p{100 * q:g}": ordered[int(q * (len(ordered) - 1))].item()
        for q in COVARIANCE_QUANTILES
    }
    predicted = config.learning_rate * _mean(advantage * before["entropy_slope"], mask)
    return {
        "mean_entropy": _mean(before["entropy"], mask),
        "logit_skew": _mean(before["logit_skew"], mask),
        "reward_mean": scores.reward.mean().item(),
        "accuracy": found.right,
        "response_length": found.length,
        "response_tokens": round(found.length * found.drawn),
        "truncated": 1 - found.rollout.finished.float().mean().item(),
        "advantage_nonzero": (scores.advantage != 0).float().mean().item(),
        "cov_mean": _mean(cov, mask),
        **quantiles,
        "predicted_entropy_change": predicted,
    }
