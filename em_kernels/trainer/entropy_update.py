"""One update on a loss whose weights are known before the forward pass: entropy minimisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from em_kernels.lm.rollout import Rollout, aligned_mask, official_masks
from em_kernels.objectives.aggregation import aggregation_weight
from em_kernels.objectives.em import (
    micro_batch_mean_weights,
    sequence_mean_weights,
    token_mean_weights,
)
from em_kernels.trainer.batch import MicroBatch, Tokens, micro_batches, token_loss
from em_kernels.trainer.collect import draw
from em_kernels.trainer.config import TrainConfig
from em_kernels.trainer.losses import StepLoss
from em_kernels.trainer.metrics import Clock
from em_kernels.trainer.policy_update import take_step
from em_kernels.trainer.run import Run
from em_kernels.trainer.schedule import Stage

Objective = Callable[[Rollout, Tensor], tuple[Tensor | None, Tensor | None]]
"""(rollout, loss mask) -> (entropy_weight, logprob_weight), over the whole update at once."""


class EntropyUpdate:
    """Sample, weigh, step; `objective` gives the weights of every token."""

    def __init__(self, run: Run, objective: Objective):
        self.run, self.objective = run, objective

    def __call__(self, update: int, index: int, stage: Stage) -> dict:
        """Sample, weigh, step; returns the metrics, see `train`."""
        run, clock = self.run, Clock()
        rollout = self.rollout(update, index)
        clock.sampled()
        tokens = self.weighed(rollout)
        found = take_step(run, update, 0, self.parts(tokens), self.loss)
        count, whole = max(int(tokens.loss_mask.sum()), 1), ("loss", "grad_norm")
        drawn = int(rollout.response_mask.sum())
        return {
            **{name: value if name in whole else value / count for name, value in found.items()},
            "step": update * run.config.steps_per_update,
            "response_length": drawn / run.config.responses,
            "response_tokens": drawn,
            "truncated": 1 - rollout.finished.float().mean().item(),
            **clock.metrics(drawn),
        }

    def rollout(self, update: int, index: int) -> Rollout:
        """The answers of an update, in the stage of that index."""
        return draw(self.run, self._prompts(update), update)

    def _prompts(self, update: int) -> list[list[int]]:
        """Prompts take turns, over the whole run."""
        prompts, number = self.run.prompts, self.run.config.responses
        return [prompts[((update - 1) * number + i) % len(prompts)] for i in range(number)]

    def weighed(self, rollout: Rollout) -> Tokens:
        """`weigh`; an error in the objective on one rank ends all."""
        with self.run.ranks.raise_together():
            return self.weigh(rollout)

    def weigh(self, rollout: Rollout) -> Tokens:
        """The masks and weights of the whole update, before it is cut."""
        ids, attention_mask, positions = rollout.input_ids, rollout.attention_mask, None
        loss_mask = aligned_mask(rollout)
        if self.run.config.compat == "official":
            attention_mask, loss_mask = official_masks(rollout, self.run.filler)
            positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        weights = self.objective(rollout, loss_mask)
        weighted = torch.stack([w != 0 for w in weights if w is not None]).any(0)
        return Tokens(ids, attention_mask, loss_mask & weighted, positions, *weights)

    def parts(self, tokens: Tokens) -> Iterator[MicroBatch]:
        config = self.run.config
        size = config.micro_batch
        return micro_batches(tokens, size, in_order=config.compat == "official")

    def loss(self, part: MicroBatch) -> StepLoss:
        names = self.statistics()
        compute = partial(token_loss, outputs=tuple(names.values()))
        found = self.run.strategy.compute(part.tokens, compute)
        values = {name: getattr(found.stats, output) for name, output in names.items()}
        return StepLoss(found.loss, totals(values, part.tokens.loss_mask))

    def statistics(self) -> dict[str, str]:
        """Metric -> output of the operators."""
        skew = {} if self.run.config.stop_skew is None else {"logit_skew": "logit_skew"}
        return {"mean_entropy": "entropy", **skew}


def totals(values: dict[str, Tensor], mask: Tensor) -> dict[str, float]:
    """Each summed over the tokens that count."""
    return {name: (value * mask).sum().item() for name, value in values.items()}


def entropy_minimisation(config: TrainConfig) -> Objective:
    how = config.aggregation("em")

    def weigh(rollout: Rollout, loss_mask: Tensor) -> tuple[Tensor, None]:
        if config.compat == "official":
            return micro_batch_mean_weights(loss_mask, config.micro_batch), None
        if how["mode"] == "sequence_mean":
            return sequence_mean_weights(loss_mask), None
        if how["mode"] == "token_mean":
            return token_mean_weights(loss_mask), None
        return aggregation_weight(loss_mask, **how).float(), None

    return weigh
