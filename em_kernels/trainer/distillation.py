"""One update of on-policy distillation: sample, let the teacher read, step."""

from __future__ import annotations

from functools import partial
from typing import cast

from torch import Tensor

from em_kernels.lm.rollout import Rollout, aligned_mask
from em_kernels.objectives.aggregation import aggregation_weight
from em_kernels.objectives.opd import opd_weight
from em_kernels.trainer.batch import MicroBatch, Tokens, distillation_loss
from em_kernels.trainer.entropy_update import EntropyUpdate, totals
from em_kernels.trainer.losses import StepLoss
from em_kernels.trainer.policy_update import read_statistics
from em_kernels.trainer.rl_config import RLConfig
from em_kernels.trainer.run import Run
from em_kernels.trainer.strategy import SingleProcessStrategy


class DistillationUpdate(EntropyUpdate):
    """The answers of the student, and at every token its divergence from the teacher, both at
    `loss_temperature`.

    Metrics besides those of entropy minimisation: divergence and teacher_entropy, means over the
    tokens that carry weight, whichever (nats). `loss` is the weighted mean of the divergence, and
    with `em_coef` that times the mean entropy on top.
    """

    def __init__(self, run: Run, teacher: SingleProcessStrategy, em_coef: float = 0.0):
        self.run, self.teacher, self.em_coef = run, teacher, em_coef
        self.settings = cast(RLConfig, run.config)

    def weighed(self, rollout: Rollout) -> Tokens:
        with self.run.ranks.raise_together():
            self._check_read(rollout)
        return self.weigh(rollout)

    def weigh(self, rollout: Rollout) -> Tokens:
        """Of the whole update: the teacher's mean entropy is one over all its tokens."""
        mask, how = aligned_mask(rollout), self.settings.aggregation("opd")
        tokens = Tokens(rollout.input_ids, rollout.attention_mask, mask)
        entropy = None
        if self.settings.opd_weight == "teacher_entropy":
            entropy = read_statistics(self.run, self.teacher, tokens, ("entropy",))["entropy"]
        weight, em = opd_weight(mask, entropy, **how), None
        if self.em_coef:
            em = self.em_coef * aggregation_weight(mask, **how).float()
        else:
            mask = mask & (weight != 0)
        return tokens._replace(loss_mask=mask, divergence_weight=weight, entropy_weight=em)

    def _check_read(self, rollout: Rollout) -> None:
        """A student with more rows than its tokenizer uses may draw one that the teacher lacks."""
        known = self.teacher.model.get_input_embeddings().weight.shape[0]
        largest = int(rollout.input_ids.max())
        if largest >= known:
            raise ValueError(
                f"teacher: the student drew the token {largest}, which is none of the "
                f"tokenizer's, and of which the teacher, with {known} tokens, knows nothing; cut "
                "the student's embeddings (resize_token_embeddings)"
            )

    def loss(self, part: MicroBatch) -> StepLoss:
        names, config = self.statistics(), self.settings
        compute = partial(
            distillation_loss,
            outputs=tuple(names.values()),
            teacher=self.teacher,
            kind=config.opd_kind,
            beta=config.opd_beta,
        )
        found = self.run.strategy.compute(part.tokens, compute)
        values: dict[str, Tensor] = {name: getattr(found.stats, out) for name, out in names.items()}
        values |= {"divergence": found.divergence, "teacher_entropy": found.other_stats.entropy}
        return StepLoss(found.loss, totals(values, part.tokens.loss_mask))
