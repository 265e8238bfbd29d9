"""One update of supervised fine-tuning: demonstrations in turn, weighed, step."""

from __future__ import annotations

from functools import partial
from typing import cast

from torch import Tensor

from em_kernels.lm.demonstrations import EncodedDemonstrations
from em_kernels.lm.rollout import Rollout, aligned_mask
from em_kernels.objectives.aggregation import aggregation_weight
from em_kernels.trainer.batch import MicroBatch, Tokens, demonstration_loss
from em_kernels.trainer.collect import turn
from em_kernels.trainer.entropy_update import EntropyUpdate, totals
from em_kernels.trainer.losses import StepLoss
from em_kernels.trainer.rl_config import RLConfig
from em_kernels.trainer.run import Run
from em_kernels.trainer.schedule import Stage, stage_lines


class DemonstrationUpdate(EntropyUpdate):
    """Cross entropy of `responses` demonstrations (sft), each token weighted by the entropy of the
    likeliest (eaft); nothing is sampled, and prompts do not count.

    All demonstrations take turns, in a new order each time, from the first update of a stage on.
    Metrics are those of entropy minimisation, of the demonstrations in place of answers (truncated:
    cut at `max_new_tokens`), and, as means over their tokens, nll (-log p, nats), token_accuracy
    (the token is the likeliest) and, for eaft, eaft_weight.
    """

    def __init__(self, run: Run, stage: Stage):
        self.run, self.settings = run, cast(RLConfig, run.config)
        self.demonstrations = cast(EncodedDemonstrations, run.demonstrations)
        self.how = self.settings.aggregation(cast(str, stage.demonstrated))
        self.alpha = self.settings.eaft_alpha if stage.demonstrated == "eaft" else None
        self.em_coef = self.settings.em_coef if "em" in stage.objectives else 0.0

    def rollout(self, update: int, index: int) -> Rollout:
        number = self.settings.responses
        first = number * len(stage_lines(self.run.metrics.lines, index))
        size = len(self.demonstrations)
        turns = [turn(self.settings.seed, first + i, size) for i in range(number)]
        return self.demonstrations.rollout(turns)

    def weigh(self, rollout: Rollout) -> Tokens:
        mask = aligned_mask(rollout)
        weight = aggregation_weight(mask, **self.how).float()
        em = self.em_coef * weight if self.em_coef else None
        return Tokens(
            rollout.input_ids,
            rollout.attention_mask,
            mask,
            entropy_weight=em,
            logprob_weight=-weight,
        )

    def loss(self, part: MicroBatch) -> StepLoss:
        names = self.statistics()
        compute = partial(
            demonstration_loss,
            outputs=(*names.values(), "logprob", "is_top1"),
            k=self.settings.eaft_k,
            alpha=self.alpha,
        )
        found, weight = self.run.strategy.compute(part.tokens, compute)
        stats = found.stats
        values: dict[str, Tensor] = {name: getattr(stats, out) for name, out in names.items()}
        values |= {"nll": -stats.logprob, "token_accuracy": stats.is_top1}
        if weight is not None:
            values["eaft_weight"] = weight
        return StepLoss(found.loss, totals(values, part.tokens.loss_mask))
