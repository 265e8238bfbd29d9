"""The policy that drew the answers beside the one that is trained, as ratios need it.

Three policies stand behind a ratio: mu, the distribution that a token was drawn from, after
penalty, temperature and truncation; old, the trainer's weights at that time, at `loss_temperature`;
and the current one. Where answers are drawn truncated, old and current are those of what was kept
then, the same set for both: every ratio is of two distributions over the same tokens, and finite.
That is "Keep Sampling Mask" of DeepSeek-AI, "DeepSeek-V3.2" (2025), arXiv:2512.02556. Sets that the
sampler does not tell are made of the old policy by the sampler's limits, with the token that was
drawn (this library's choice).
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from em_kernels.lm.kept_sets import KeptSets
from em_kernels.lm.modes import eval_mode
from em_kernels.lm.rollout import Rollout, Sampling
from em_kernels.objectives.rollout_correction import rollout_difference, rollout_weight
from em_kernels.trainer.batch import Tokens, kept_by_limits, micro_batches
from em_kernels.trainer.objective_table import TABLE
from em_kernels.trainer.rl_config import RLConfig
from em_kernels.trainer.run import Run
from em_kernels.trainer.samplers import sampling


class SamplerPolicy:
    """What the sampler's distribution has to do with the objective of an update."""

    def __init__(self, run: Run):
        self.run, self.config = run, cast(RLConfig, run.config)
        self.sampling = sampling(run.config)
        self._has_told = False

    def cut(self, objective: str, tokens: Tokens, rollout: Rollout) -> Tokens:
        """The tokens with the sets that their log-probabilities are of, if they are of any."""
        if not (TABLE[objective].has_ratios and self.sampling.truncates and self._keeps(objective)):
            return tokens
        if rollout.kept is not None:
            return tokens._replace(kept=rollout.kept[:, 1:].pad(0, 1))
        return tokens._replace(kept=read_kept_sets(self.run, tokens, self.sampling))

    def _keeps(self, objective: str) -> bool:
        """Log-probabilities that are compared with stored ones of K ids stay those of all ids."""
        return self.config.keeps_sets and not self.config.other_policy(objective).stored

    def compare(
        self, objective: str, tokens: Tokens, rollout: Rollout
    ) -> tuple[Tokens, dict[str, float]]:
        """The tokens with their importance weights, if there are any, and what to log.

        Raises:
            ValueError: weights are asked for, and the sampler gives no log-probabilities.
        """
        mask, said = tokens.loss_mask, rollout.logprob
        corrects = TABLE[objective].has_ratios and self.config.rollout_correction != "none"
        if said is None:
            if corrects:
                raise ValueError(
                    f"rollout_correction must be 'none' with a sampler that gives no "
                    f"log-probabilities ({self.config.sampler}), got "
                    f"{self.config.rollout_correction!r}: leave it out, or take another sampler"
                )
            self._tell(objective, {}, mask)
            return tokens, {}
        policies = tokens.old_logprob, pad(said[:, 1:], (0, 1)).to(tokens.old_logprob)
        found = rollout_difference(*policies, mask)
        if corrects:
            weight, metrics = rollout_weight(*policies, mask, **self.config.rollout_weights)
            tokens, found = tokens._replace(rollout_weight=weight), {**found, **metrics}
        values = {name: value.item() for name, value in found.items()}
        self._tell(objective, values, mask)
        return tokens, values

    def _tell(self, objective: str, found: dict[str, float], mask: Tensor) -> None:
        """Once, what keeps the two apart besides rounding, and by how much."""
        reasons = self._reasons(objective) if TABLE[objective].has_ratios else []
        if self._has_told or not reasons or not mask.any():
            return
        self._has_told = True
        size = "by how much the sampler does not say"
        if found:
            mean, most = (found[f"rollout_logprob_diff_{name}"] for name in ("mean", "max"))
            size = (
                f"over the {int(mask.sum())} tokens of this update by {mean:.3g} nats on average, "
                f"at most {most:.3g}"
            )
        if self.run.ranks.is_first:
            warnings.warn(
                "the log-probabilities that ratios are made of differ from those that the answers "
                f"were drawn with, {size}: {'; '.join(reasons)}",
                stacklevel=2,
            )

    def _reasons(self, objective: str) -> list[str]:
        config, reasons = self.config, []
        if config.loss_temperature != config.sampling_temperature:
            reasons.append(
                f"they are at loss_temperature={config.loss_temperature:g}, the sampling at "
                f"{config.sampling_temperature:g}"
            )
        if config.repetition_penalty != 1:
            reasons.append(
                f"they are without the repetition_penalty={config.repetition_penalty:g} of the "
                "sampling"
            )
        if self.sampling.truncates and not self._keeps(objective):
            why = "rollout_support='full'" if not config.keeps_sets else "ids stored of the sampler"
            reasons.append(f"with {why} they are of tokens that were cut off too")
        return reasons


def read_kept_sets(run: Run, tokens: Tokens, limits: Sampling) -> KeptSets:
    """What the limits leave of the policy's distribution at every token, (B, T); in the order of
    the run's sampler. Ranks share the work."""
    shape, strategy = tokens.loss_mask.shape, run.strategy
    numbers = torch.arange(tokens.loss_mask.numel()).view(shape)
    compute = partial(kept_by_limits, limits=limits, min_p_first=run.config.sampler == "vllm")
    own: list[tuple[Tensor, KeptSets]] = []
    with torch.no_grad(), eval_mode(strategy.trained):
        parts = micro_batches(tokens, run.config.micro_batch)
        for part in run.ranks.shard_micro_batches(parts):
            places = numbers[part.rows.cpu()][:, part.columns][part.tokens.loss_mask.cpu()]
            own.append((places, strategy.compute(part.tokens, compute)))
    found = [piece for pieces in run.ranks.gather(lambda: own) for piece in pieces]
    order = torch.cat([places for places, _ in found])
    where = torch.full((numbers.numel(),), -1)
    where[order] = torch.arange(len(order))
    return KeptSets.join([sets for _, sets in found]).take(where.view(shape))
