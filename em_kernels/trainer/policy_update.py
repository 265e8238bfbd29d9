"""One update by rewards, as papers write it down: sample, reward, advantage, loss, step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from em_kernels.lm.modes import eval_mode
from em_kernels.lm.offload import activations
from em_kernels.lm.random_state import seeded
from em_kernels.lm.rollout import aligned_mask
from em_kernels.trainer.batch import (
    MicroBatch,
    Tokens,
    micro_batches,
    stats_and_others,
    token_labels,
    token_stats,
)
from em_kernels.trainer.collect import Collected, ProblemOrder, collect
from em_kernels.trainer.entropy_change import (
    PREDICTED,
    EntropyGradient,
    watched,
    with_prediction,
)
from em_kernels.trainer.entropy_control import (
    READS,
    Control,
    control_of,
    shaped,
    shaping_of,
    warn_if_stuck,
)
from em_kernels.trainer.losses import StepLoss, select_tokens, step_loss, step_size
from em_kernels.trainer.metrics import Clock, answer_metrics, mean_of, mean_over_steps
from em_kernels.trainer.objective_table import TABLE
from em_kernels.trainer.rewards import Scores, model_reward, preference_pairs, score
from em_kernels.trainer.rl_config import RLConfig
from em_kernels.trainer.run import Run
from em_kernels.trainer.sampler_policy import SamplerPolicy
from em_kernels.trainer.schedule import Stage, stage_lines
from em_kernels.trainer.second_model import SecondModel


class PolicyUpdate:
    """Group-relative policy optimisation and its kin: the objectives that need rewards."""

    def __init__(self, run: Run, reference: SecondModel | None = None):
        self.run, self.config = run, cast(RLConfig, run.config)
        self.order = ProblemOrder(self.config, run.tokenizer)
        self.reference: Any = None if reference is None else run.beside(reference)
        self.sampler = SamplerPolicy(run)

    def __call__(self, update: int, index: int, stage: Stage) -> dict:
        """Sample, reward, step; returns the metrics.

        Besides those of entropy minimisation (response_length is over all answers drawn, loss and
        grad_norm are means over the steps):
            reward_mean; accuracy (None without known answers); advantage_nonzero (share of the
            answers); answers_used (trained on); optimizer_steps; problems_asked (by the run);
            mean_entropy, logit_skew, cov_mean and its quantiles cov_p50 ... cov_p99.9: of the
            answers' tokens under the policy that sampled them;
            clip_fraction, selected_fraction, policy_kl, ref_kl, ...: of the objective, means over
            tokens and steps (ref_kl is the exact KL with kl_estimator="exact"); entropy_coef:
            weight of the bonus; repo_zeta: of REPO, where it shapes the advantages;
            rollout_logprob_diff_mean, rollout_logprob_diff_max, rollout_kl_k1, rollout_kl_k3 (see
            `rollout_difference`) where the sampler says its log-probabilities; rollout_clipped,
            rollout_weight_mean with a rollout_correction; rollout_kept_mass, the mean mass of what
            the sampler kept, where ratios are of that;
            entropy_change: of the mean entropy of the same tokens by the update;
            predicted_entropy_change: what plain gradient steps in each token's own logits would
            change, see `entropy_change`; the rate of a token is the learning rate, whatever the
            number of tokens that its step's loss is a mean of. For plain GRPO on-policy it is
            learning rate x mean of A x entropy_slope. AdamW and shared weights move further:
            compare signs and courses, not sizes;
            predicted_entropy_change_weights: <gradient of that mean entropy in the weights,
            weights after - before>, with predict_change="weights": what the steps taken should
            change, to first order, in the measure of entropy_change.
        """
        run, objective, clock = self.run, cast(str, stage.policy), Clock()
        control = self._control(index, objective)
        # sample group_size answers to each problem
        found = collect(run, self.order, objective, update)
        clock.sampled()
        if self.config.other_policy(objective).is_sampler:
            self._copy_policy()
        # reward them, and compare each with the others of its group
        tokens, before = self._read(found, objective)
        tokens, apart = self.sampler.compare(objective, tokens, found.rollout)
        if tokens.kept is not None:
            apart["rollout_kept_mass"] = mean_of(before["kept_mass"], tokens.loss_mask)
        scores = self._score(objective, found, before, tokens.loss_mask)
        advantage = scores.advantage.to(tokens.loss_mask.device)[:, None] * tokens.loss_mask
        tokens = tokens._replace(advantage=advantage)
        # loss and step, until every answer that counts has had its turns
        rows = self._rows(objective, found, scores)
        steps: list[dict[str, float]] = []
        in_weights = self.config.predict_change == "weights"
        gradient = EntropyGradient(run, tokens) if in_weights else None
        for own in self._steps(objective, rows):
            current = None if steps else {name: values[own] for name, values in before.items()}
            steps.append(self._step(update, len(steps), stage, tokens.at(own), current, control))
        trained = shaped(self.config, objective, tokens, before, control.zeta)
        line = answer_metrics(found, scores, trained, before)
        changes = self._changes(tokens, steps, gradient, line["mean_entropy"])
        return {
            **mean_over_steps(steps),
            **line,
            **changes,
            **apart,
            "step": update,
            **control.metrics(),
            "answers_used": len(rows),
            "optimizer_steps": len(steps),
            "problems_asked": found.asked,
            **clock.metrics(line["response_tokens"]),
        }

    def _control(self, index: int, objective: str) -> Control:
        """Of the next update; mixed stages subtract the weight of EM when it is used."""
        lines = stage_lines(self.run.metrics.lines, index)
        if self.run.ranks.is_first:
            warn_if_stuck(self.config, objective, lines)
        return control_of(self.config, objective, lines)

    def _read(self, found: Collected, objective: str) -> tuple[Tokens, dict[str, Tensor]]:
        """The tokens, with old and reference log-probabilities, and statistics of the policy."""
        rollout = found.rollout
        tokens = Tokens(rollout.input_ids, rollout.attention_mask, aligned_mask(rollout))
        tokens = self.sampler.cut(objective, tokens, rollout)
        outputs = ["logprob", "entropy", "logit_skew", *TABLE[objective].reads]
        if tokens.kept is not None:
            outputs.append("kept_mass")
        if self.config.reward_of(objective) == "self_certainty":
            outputs.append("self_certainty")
        before = self._statistics(self.run.strategy, tokens, tuple(dict.fromkeys(outputs)))
        other, reference = self.config.other_policy(objective), None
        if other.setting is not None and other.divergence is None:
            reference = self._statistics(self.reference, tokens, ("logprob",))["logprob"]
        known = tokens._replace(old_logprob=before["logprob"], ref_logprob=reference)
        if other.stored:
            ids, logprob = read_labels(self.run, tokens, other.stored)
            known = known._replace(label_ids=ids, label_logprob=logprob)
        return known, before

    @torch.no_grad()
    def _copy_policy(self) -> None:
        """The reference becomes the policy as it is now, which has drawn the answers."""
        with self.run.strategy.full_model() as model:
            pairs = zip(self.reference.model.parameters(), model.parameters(), strict=True)
            for old, new in pairs:
                old.copy_(new)

    def _statistics(self, strategy, tokens: Tokens, outputs: tuple[str, ...]) -> dict[str, Tensor]:
        return read_statistics(self.run, strategy, tokens, outputs)

    def _score(self, objective: str, found: Collected, before: dict, mask: Tensor) -> Scores:
        name, reward = self.config.reward_of(objective), found.answers.reward
        if reward is None:
            values = before["entropy" if name == "negative_entropy" else "self_certainty"]
            reward = model_reward(name, values, mask).cpu()
        return score(self.config, objective, found.answers, reward)

    def _rows(self, objective: str, found: Collected, scores: Scores) -> list[int]:
        """The answers to train on; where they go in pairs: chosen, rejected, chosen, ..."""
        if not found.mixed:
            return []
        if TABLE[objective].pairs:
            return preference_pairs(scores.reward, found.answers.group)
        return scores.kept.nonzero()[:, 0].tolist()

    def _steps(self, objective: str, rows: list[int]) -> Iterator[Tensor]:
        """The rows of each optimiser step."""
        units = torch.tensor(rows).view(-1, TABLE[objective].unit)
        for _ in range(self.config.epochs if rows else 0):
            order = units[torch.randperm(len(units))]
            for own in order.tensor_split(min(self.config.minibatches, len(units))):
                yield own.reshape(-1)

    def _changes(
        self, tokens: Tokens, steps: list[dict], gradient: EntropyGradient | None, before: float
    ) -> dict[str, float]:
        """Of the mean entropy `before` by the update: as predicted, taken out of the metrics of the
        steps, and as measured."""
        found: dict[str, float] = {}
        if self.config.predict_change != "none":
            predicted = sum(step.pop(PREDICTED) for step in steps)
            found[PREDICTED] = predicted / max(int(tokens.loss_mask.sum()), 1)
        if gradient is not None:
            found[f"{PREDICTED}_weights"] = gradient.change()
        if self.config.measure_change:
            after = self._statistics(self.run.strategy, tokens, ("entropy",))["entropy"]
            found["entropy_change"] = mean_of(after, tokens.loss_mask) - before
        return found

    def _select(
        self,
        objective: str,
        tokens: Tokens,
        current: dict[str, Tensor] | None,
        control: Control,
    ) -> Tokens:
        """The first phase of a step, of shaped advantages."""
        if current is None:
            names = [*TABLE[objective].reads, *READS[shaping_of(self.config, objective)]]
            current = self._statistics(self.run.strategy, tokens, tuple(dict.fromkeys(names)))
        tokens = shaped(self.config, objective, tokens, current, control.zeta)
        return select_tokens(self.config, objective, tokens, current)

    def _step(
        self,
        update: int,
        step: int,
        stage: Stage,
        tokens: Tokens,
        current: dict[str, Tensor] | None,
        control: Control,
    ) -> dict[str, float]:
        """One optimiser step: select among all its tokens, then micro-batch by micro-batch.

        `current` are the statistics of the tokens where the policy is still the one that sampled.
        On-policy the ratio is 1 and its logarithm 0 exactly: stored log-probabilities would differ
        from it by rounding, and the sign of that is what kl_cov's penalty has its gradient from.
        """
        run, config, on_policy = self.run, self.config, current is not None
        objective = cast(str, stage.policy)
        entry, other = TABLE[objective], config.other_policy(objective)
        reads = READS[shaping_of(config, objective)]
        if entry.select is not None:
            tokens, reads = self._select(objective, tokens, current, control), ()
        coef = control.entropy_coef - (config.em_coef if "em" in stage.objectives else 0.0)
        bonus = ["entropy"] if coef else []
        compute = partial(
            stats_and_others,
            outputs=tuple(dict.fromkeys([*entry.outputs, *reads, *bonus])),
            other=self.reference,
            kind=other.divergence,
            slopes=() if config.predict_change == "none" else (*entry.outputs, *bonus),
        )
        size = step_size(config, objective, tokens)

        def loss(part: MicroBatch) -> StepLoss:
            stats, others, slopes = run.strategy.compute(part.tokens, compute)
            own = part.tokens._replace(**others)
            if on_policy:
                own = own._replace(old_logprob=stats.logprob.detach())
            stats, own = watched(stats, own, slopes)
            if reads:
                now = {name: getattr(stats, name) for name in reads}
                own = shaped(config, objective, own, now, control.zeta)
            found = step_loss(config, objective, stats, own, size=size, entropy_coef=coef)
            return with_prediction(found, stats, own, slopes) if slopes else found

        sums = take_step(run, update, step, self._parts(tokens, entry.unit), loss)
        number, kept = max(sums.pop("tokens"), 1), ("loss", "grad_norm", PREDICTED)
        if PREDICTED in sums:
            rate = run.optimizer.param_groups[0]["lr"]
            sums[PREDICTED] *= rate * int(tokens.loss_mask.sum())
        return {name: value if name in kept else value / number for name, value in sums.items()}

    def _parts(self, tokens: Tokens, unit: int) -> Iterator[MicroBatch]:
        """Micro-batches of whole units: long answers first, unless rows belong together."""
        size = max(self.config.micro_batch // unit, 1) * unit
        return micro_batches(tokens, size, in_order=unit > 1)


def read_statistics(
    run: Run, strategy, tokens: Tokens, outputs: tuple[str, ...]
) -> dict[str, Tensor]:
    """(B, T) each, without gradient; 0 where no token counts. Ranks share the work."""
    shape, device = tokens.input_ids.shape, tokens.input_ids.device
    found = {name: torch.zeros(shape, device=device) for name in outputs}
    _read_into(found, run, strategy, tokens, partial(token_stats, outputs=outputs))
    return found


def read_labels(run: Run, tokens: Tokens, k: int) -> tuple[Tensor, Tensor]:
    """The policy's k likeliest ids and their log-probabilities, (B, T, k); 0 where none counts."""
    found = {
        "ids": tokens.input_ids.new_zeros(*tokens.input_ids.shape, k),
        "logprob": torch.zeros(*tokens.input_ids.shape, k, device=tokens.input_ids.device),
    }
    _read_into(found, run, run.strategy, tokens, partial(token_labels, k=k))
    return found["ids"], found["logprob"]


def _read_into(
    found: dict[str, Tensor], run: Run, strategy, tokens: Tokens, compute: Callable[..., Any]
) -> None:
    parts = micro_batches(tokens, run.config.micro_batch)
    with torch.no_grad(), eval_mode(strategy.trained):
        for part in run.ranks.shard_micro_batches(parts):
            read = strategy.compute(part.tokens, compute)
            for name, values in found.items():
                values[part.rows, part.columns] = getattr(read, name).to(values)
    for values in found.values():
        run.ranks.sum_tensor(values)


def take_step(
    run: Run,
    update: int,
    step: int,
    parts: Iterator[MicroBatch],
    loss_of: Callable[[MicroBatch], StepLoss],
) -> dict[str, float]:
    """One step of the optimiser; returns loss, sums over the tokens, and the gradient's norm."""
    sums = accumulate_gradients(run, update, step, parts, loss_of)
    parameters = run.optimizer.param_groups[0]["params"]
    grad_norm = run.strategy.clip_gradient(parameters, run.config.clip)
    with run.ranks.raise_together():
        if not math.isfinite(sums["loss"]) or not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"update {update}: the loss is {sums['loss']} and its gradient's norm {grad_norm}; "
                "the step was not taken"
            )
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return {**sums, "grad_norm": grad_norm}


def accumulate_gradients(
    run: Run,
    update: int,
    step: int,
    parts: Iterator[MicroBatch],
    loss_of: Callable[[MicroBatch], StepLoss],
) -> dict[str, float]:
    """Backward through a step, a micro-batch at a time: its loss, and sums over its tokens."""
    sums = {"loss": 0.0}
    run.strategy.train()
    with seeded(run.config.seed, update, step, run.ranks.rank):  # dropout, each rank its own
        for part in run.ranks.shard_micro_batches(parts):
            with activations(run.config.long, part.tokens.input_ids):
                loss, more = loss_of(part)
            loss.backward()
            for name, value in {"loss": loss.item(), **more}.items():
                sums[name] = sums.get(name, 0.0) + value
    return dict(zip(sums, run.ranks.sum(*sums.values())))
