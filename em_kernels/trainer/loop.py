"""The training loop: sample, weigh, step, write down."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from em_kernels.lm.modes import modes_kept
from em_kernels.lm.ranks import joined_ranks
from em_kernels.lm.rollout import Rollout, aligned_mask, official_masks
from em_kernels.objectives.em import (
    micro_batch_mean_weights,
    sequence_mean_weights,
    token_mean_weights,
)
from em_kernels.trainer.config import TrainConfig
from em_kernels.trainer.loss import Batch, micro_batch_loss
from em_kernels.trainer.rl import Learner, initial_model
from em_kernels.trainer.run import Run, save_run, start_run
from em_kernels.trainer.schedule import Stage, current_stage
from em_kernels.trainer.step import draw, set_learning_rate, take_step

Objective = Callable[[Rollout, Tensor], tuple[Tensor | None, Tensor | None]]
"""(rollout, loss mask) -> (entropy_weight, logprob_weight), over the whole update at once."""


@dataclass
class TrainResult:
    """The trained model, its tokenizer, one dict of metrics per update, the last checkpoint."""

    model: nn.Module
    tokenizer: object
    metrics: list[dict]
    checkpoint: Path | None


def train(
    config: TrainConfig,
    model=None,
    tokenizer=None,
    *,
    objective: Objective | None = None,
    on_step: Callable[[dict, nn.Module], dict | None] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Run `config.updates` updates of entropy minimisation on a causal language model, or, with an
    `RLConfig`, of reinforcement learning or a schedule of both.

    Under torchrun, or in a process group of several ranks, every rank calls it with the same
    arguments and the model is sharded over them (FSDP2). The numbers are those of one process up
    to rounding, dropout aside, however many ranks there are: they share the answers it would draw,
    and the micro-batches it would make. While answers are drawn, each rank holds the whole model.

    Args:
        config: a TrainConfig or an RLConfig; `config.output=None` writes nothing.
        model, tokenizer: both, or neither to load `config.model`. The model is trained in place,
            in the dtype and on the device that it has. A `peft.PeftModel` trains what of it
            requires grad: its active adapter; checkpoints are that adapter (see
            `TrainConfig.save_merged`), and to resume it is passed again, or loaded on the model
            that its adapter_config.json names. Modules that are in eval mode below a model in
            train mode stay so; a model in eval mode, as from_pretrained gives it, is trained with
            all its modules in train mode. Afterwards, after an error too, every module is in the
            mode that it was in.
        objective: replaces entropy minimisation by other weights that are known before the
            forward pass, e.g. logprob_weight = -A / n for a policy gradient of advantages A. It
            is not written down: pass it again to resume. Not used by stages with rewards. Every
            rank calls it on all the answers.
        on_step: called after each update with its metrics and the model in eval mode; entries of
            a dict it returns are added to the metrics. It cannot disturb the run's random state.
            Of several ranks, the first calls it, with the whole model.
        resume: go on from the newest checkpoint in `config.output`, or from the beginning where
            there is none yet, with the numbers an uninterrupted run would have had.
        progress: show a progress bar.

    Returns:
        TrainResult(model, tokenizer, metrics, checkpoint). Each update's metrics: update; step (the
        same, but see `compat`); loss; mean_entropy (nats, at loss_temperature, over the positions
        that carry weight); response_length (tokens); response_tokens; truncated (fraction of
        answers without an end); grad_norm (before clipping); tokens_per_second; sample_seconds;
        loss_seconds. Of an RLConfig also those of `Learner.update`.

    Raises:
        ValueError, TypeError: a bad setting, prompt or model (`ModelError`).
        CheckpointError: a checkpoint could not be written or read.
        FloatingPointError: the loss or its gradient is not finite; the step is not taken.
        RankError: another rank failed; that rank raises one of the above.
    """
    with joined_ranks(config.device) as ranks:
        reference = initial_model(config, model, ranks)
        run = start_run(config, model, tokenizer, resume, ranks)
        learner = Learner(run, reference) if any(s.policy for s in config.stages) else None
        with modes_kept(run.model):
            _run_updates(
                run, learner, objective or _entropy_minimisation(config), on_step, progress
            )
    return TrainResult(run.model, run.tokenizer, run.metrics.lines, run.checkpoint)


def _run_updates(
    run: Run, learner: Learner | None, objective: Objective, on_step: Callable | None, show: bool
) -> None:
    """Every update that is still to do, with its checkpoints."""
    config = run.config
    for update, index, stage in _progress(run, show):
        set_learning_rate(run, stage.learning_rate or config.learning_rate)
        with run.random:
            if stage.policy:
                line = learner.update(update, index, stage)
            else:
                line = _update(run, update, objective)
        line = _shown(run, {**line, **config.labels(index, stage)}, on_step)
        with run.ranks.together():
            run.metrics.add(line)
        run.done = update
        if _is_due(run):
            save_run(run)
    if not _is_saved(run):
        save_run(run)
    run.weights.finish()


def _update(run: Run, update: int, objective: Objective) -> dict:
    """Sample, then one optimiser step; returns the metrics."""
    config, started = run.config, time.perf_counter()
    rollout = draw(run, _prompts_of(run, update), update)
    sampled = time.perf_counter()
    with run.ranks.together():
        batch = _batch(run, rollout, objective)
    with run.ranks.apart(update):
        loss, means = _accumulate_gradients(run, batch)
    grad_norm = take_step(run, update, loss)
    ended = time.perf_counter()
    tokens = int(rollout.response_mask.sum())
    return {
        "update": update,
        "step": update * config.steps_per_update,
        "loss": loss,
        **means,
        "response_length": tokens / config.responses,
        "response_tokens": tokens,
        "truncated": 1 - rollout.finished.float().mean().item(),
        "grad_norm": grad_norm,
        "tokens_per_second": tokens / (ended - started),
        "sample_seconds": sampled - started,
        "loss_seconds": ended - sampled,
    }


def _batch(run: Run, rollout: Rollout, objective: Objective) -> Batch:
    """The masks and weights of the whole update, before it is cut."""
    ids, attention_mask, positions = rollout.input_ids, rollout.attention_mask, None
    loss_mask = aligned_mask(rollout)
    if run.config.compat == "official":
        attention_mask, loss_mask = official_masks(rollout, run.filler)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    weights = objective(rollout, loss_mask)
    weighted = torch.stack([w != 0 for w in weights if w is not None]).any(0)
    return Batch(ids, attention_mask, positions, loss_mask & weighted, *weights)


def _accumulate_gradients(run: Run, batch: Batch) -> tuple[float, dict[str, float]]:
    """Backward through the update, a micro-batch at a time: (loss, mean statistics)."""
    names = {"mean_entropy": "entropy"}
    if run.config.stop_skew is not None:
        names["logit_skew"] = "logit_skew"
    sums = [0.0] * (1 + len(names))
    compute = partial(micro_batch_loss, outputs=tuple(names.values()))
    run.weights.train()
    for part in run.ranks.deal(_micro_batches(run.config, batch)):
        result = run.weights.loss(part, compute)
        result.loss.backward()
        values = [result.loss, *(_total(result.stats, name, part) for name in names.values())]
        sums = [total + value.item() for total, value in zip(sums, values)]
    loss, *sums = run.ranks.sum(*sums)
    count = max(int(batch.loss_mask.sum()), 1)
    return loss, {name: total / count for name, total in zip(names, sums)}


def _total(stats, name: str, part: Batch) -> Tensor:
    return (getattr(stats, name) * part.loss_mask).sum()


def _shown(run: Run, line: dict, on_step: Callable | None) -> dict:
    """The metrics, with what `on_step` adds to them."""
    run.model.eval()
    if on_step is None:
        return run.ranks.first(lambda: line)
    with run.weights.on_first() as model:
        return run.ranks.first(lambda: {**line, **(on_step(dict(line), model) or {})})


def _micro_batches(config: TrainConfig, batch: Batch) -> Iterator[Batch]:
    """`micro_batch` rows at a time, long answers first, without columns that are all padding."""
    order = torch.arange(batch.input_ids.shape[0], device=batch.input_ids.device)
    if config.compat != "official":
        order = batch.attention_mask.sum(1).argsort(descending=True, stable=True)
    for rows in order.split(config.micro_batch):
        used = batch.attention_mask[rows].any(0).nonzero()[:, 0]
        columns = slice(int(used[0]), int(used[-1]) + 1)
        yield Batch(*(None if x is None else x[rows, columns] for x in batch))


def _entropy_minimisation(config: TrainConfig) -> Objective:
    def weigh(rollout: Rollout, loss_mask: Tensor) -> tuple[Tensor, None]:
        if config.compat == "official":
            return micro_batch_mean_weights(loss_mask, config.micro_batch), None
        if config.reduction == "sequence_mean":
            return sequence_mean_weights(loss_mask), None
        return token_mean_weights(loss_mask), None

    return weigh


def _prompts_of(run: Run, update: int) -> list[list[int]]:
    """Prompts take turns, over the whole run."""
    first = (update - 1) * run.config.responses
    return [run.prompts[(first + i) % len(run.prompts)] for i in range(run.config.responses)]


def _is_due(run: Run) -> bool:
    every = run.config.save_every
    return run.folder is not None and every > 0 and run.done % every == 0


def _is_saved(run: Run) -> bool:
    return run.folder is None or (
        run.checkpoint is not None and run.checkpoint.name == f"checkpoint-{run.done}"
    )


def _progress(run: Run, show: bool) -> Iterator[tuple[int, int, Stage]]:
    """The updates still to do, with the index and stage of each, under a progress bar."""
    from tqdm import tqdm

    total, hide = run.config.updates, not (show and run.ranks.is_first)
    with tqdm(total=total, initial=run.done, desc="train", unit="update", disable=hide) as bar:
        while run.done < total and (now := current_stage(run.config, run.metrics.lines)):
            yield run.done + 1, *now
            line = run.metrics.lines[-1]
            bar.set_postfix(loss=f"{line['loss']:.4f}", length=f"{line['response_length']:.0f}")
            bar.update()
