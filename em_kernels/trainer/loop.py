"""The training loop: sample, weigh, step, write down."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from em_kernels.lm.lock import held
from em_kernels.lm.modes import modes_kept
from em_kernels.lm.pieces import whole_again
from em_kernels.lm.progress import Progress
from em_kernels.lm.random_state import seeded
from em_kernels.lm.ranks import Ranks, joined_ranks
from em_kernels.lm.rollout import cut_message, end_tokens
from em_kernels.lm.text import check_folder
from em_kernels.trainer.config import TrainConfig
from em_kernels.trainer.demonstration_update import DemonstrationUpdate
from em_kernels.trainer.distillation import DistillationUpdate
from em_kernels.trainer.entropy_update import EntropyUpdate, Objective, entropy_minimisation
from em_kernels.trainer.loggers import Loggers, check_installed, open_loggers
from em_kernels.trainer.policy_update import PolicyUpdate
from em_kernels.trainer.rl_config import RLConfig
from em_kernels.trainer.run import Run, save_run, start_run
from em_kernels.trainer.same_run import settings_and_data
from em_kernels.trainer.samplers import closed_at_the_end
from em_kernels.trainer.schedule import Stage, current_stage
from em_kernels.trainer.second_model import SecondModel, second_models
from em_kernels.trainer.vllm_sampler import EngineError


@dataclass
class TrainResult:
    """The trained model, its tokenizer, one dict of metrics per update, the last checkpoint."""

    model: nn.Module
    tokenizer: object
    metrics: list[dict]
    checkpoint: Path | None

    def __repr__(self) -> str:
        """Without the model's modules and every update's metrics."""
        last = f", the last of them {self.metrics[-1]}" if self.metrics else ""
        return (
            f"TrainResult({type(self.model).__name__}, {len(self.metrics)} updates{last}, "
            f"checkpoint={str(self.checkpoint) if self.checkpoint else None!r})"
        )


def train(
    config: TrainConfig,
    model=None,
    tokenizer=None,
    *,
    objective: Objective | None = None,
    teacher=None,
    on_step: Callable[[dict, nn.Module], dict | None] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Run `config.updates` updates of entropy minimisation on a causal language model, or, with an
    `RLConfig`, of reinforcement learning, distillation, fine-tuning or a schedule of them.

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
        teacher: of the objective opd, a causal language model of the same vocabulary, or (model,
            tokenizer), which makes sure of that; None loads `config.teacher`. It is only read, and
            not written down: pass it again to resume.
        on_step: called after each update with its metrics and the model in eval mode; entries of
            a dict it returns are added to the metrics. It cannot disturb the run's random state.
            Of several ranks, the first calls it, with the whole model.
        resume: go on from the newest checkpoint in `config.output`, or from the beginning where
            there is none yet, with the numbers an uninterrupted run would have had.
        progress: show a bar on a terminal or in a notebook, else a line an update, on stderr.

    Returns:
        TrainResult(model, tokenizer, metrics, checkpoint). Each update's metrics: update; step (the
        same, but see `compat`); loss; mean_entropy (nats, at loss_temperature, over the positions
        that carry weight); response_length (tokens); response_tokens; truncated (fraction of
        answers without an end); grad_norm (before clipping); tokens_per_second; sample_seconds;
        loss_seconds. Of an RLConfig also those of `PolicyUpdate`, `DistillationUpdate` and
        `DemonstrationUpdate`. All are in docs/trainer.md, with TRL's names for them.

    Raises:
        ValueError, TypeError: a bad setting, prompt or model (`ModelError`); ranks that differ in
            settings, versions, problems or weights; a logger that does not start.
        ImportError: a package is missing, of a logger as well; it says which and what brings it.
        CheckpointError: a checkpoint could not be written or read.
        FileNotFoundError: no folder of a run to resume.
        FloatingPointError: the loss or its gradient is not finite; the step is not taken.
        EngineError: the engine of sampler="vllm" could not start, or failed or ended in the middle
            of an update, of which nothing is kept: its checkpoints and metrics are whole.
        InUseError: another process works in `config.output`.
        RankError: another rank failed; that rank raises one of the above, or has ended
            (`LostRankError`): it was killed, say.
    """
    passed = {"model": model, "teacher": teacher, "objective": objective}
    with joined_ranks(config.device) as ranks:
        ranks.check_same(lambda: settings_and_data(config))
        ranks.first(lambda: check_installed(config.log_to))
        begun = config.output if resume else None
        if begun:
            ranks.first(lambda: check_folder(begun))
        with _folder_held(config.output, ranks):
            with ranks.raise_together():
                others = second_models(config, model, teacher, ranks)
            told = tuple(name for name, value in passed.items() if value is not None)
            beside = tuple(others.values())
            run = start_run(config, model, tokenizer, resume, ranks, beside, passed=told)
            with closed_at_the_end(run.sampler), modes_kept(run.model), whole_again(run.model):
                updates = _updates(run, others, objective)
                with open_loggers(run, resume) as loggers:
                    _run_updates(run, updates, loggers, on_step, progress)
    return TrainResult(run.model, run.tokenizer, run.metrics.lines, run.checkpoint)


@contextmanager
def _folder_held(output: str | None, ranks: Ranks) -> Iterator[None]:
    """The run's folder to these ranks alone, for which the first one stands."""
    with ExitStack() as stack:
        if output is not None:
            ranks.first(lambda: stack.enter_context(held(output, "a training run")))
        yield


Update = Callable[[int, int, Stage], dict]
"""(number, index of its stage, the stage) -> metrics."""


def _updates(
    run: Run, others: dict[str, SecondModel], objective: Objective | None
) -> dict[str, Update]:
    """What makes an update, by the kind of its stage."""
    config, kinds = run.config, {stage.kind for stage in run.config.stages}
    found: dict[str, Update] = {"em": EntropyUpdate(run, objective or entropy_minimisation(config))}
    if "rewards" in kinds:
        found["rewards"] = PolicyUpdate(run, others.get("reference"))
    if isinstance(config, RLConfig) and config.has_opd:
        teacher = run.beside(others["teacher"])
        found["opd"] = DistillationUpdate(run, teacher)
        found["em+opd"] = DistillationUpdate(run, teacher, config.em_coef)
    for stage in config.stages:
        if stage.demonstrated is not None:
            found[stage.kind] = DemonstrationUpdate(run, stage)
    return found


def _run_updates(
    run: Run,
    updates: dict[str, Update],
    loggers: Loggers,
    on_step: Callable | None,
    show: bool,
) -> None:
    """Every update that is still to do, with its checkpoints."""
    config, before = run.config, run.done
    for update, index, stage in _progress(run, show):
        for group in run.optimizer.param_groups:
            group["lr"] = stage.learning_rate or config.learning_rate
        with seeded(config.seed, update), _engine_failures_placed(run, update):
            line = updates[stage.kind](update, index, stage)
        line = _shown(run, {"update": update, **line, **config.labels(index, stage)}, on_step)
        with run.ranks.raise_together():
            run.metrics.add(line)
            loggers.log(run.metrics.lines)
        _warn_if_all_cut(run, line)
        run.done = update
        if _is_due(run):
            save_run(run)
    if run.done == before and run.ranks.is_first:
        warnings.warn(_nothing_done(run), stacklevel=3)
    if not _is_saved(run):
        save_run(run)
    run.strategy.finish()


def _nothing_done(run: Run) -> str:
    """Of a run that was resumed at its end."""
    made, asked = f"the run in {run.folder} has {run.done}", run.config.updates
    if run.done < asked:
        why = "and its entropy or skewness has ended it (stop_entropy, stop_skew)"
        return f"no update was made: {made}, {why}"
    wanted = "all of them" if run.done == asked else f"more than the {asked} asked for"
    return f"no update was made: {made}, {wanted}; to go on give `updates` above {run.done}"


@contextmanager
def _engine_failures_placed(run: Run, update: int) -> Iterator[None]:
    """Where the run stands when the engine fails: before the update, which leaves no trace."""
    try:
        yield
    except EngineError as error:
        if run.folder is None:
            kept = "the run has no folder to go on from"
        elif run.checkpoint is None:
            kept = f"{run.folder} has no checkpoint yet, and resumes from the beginning"
        else:
            kept = f"resume from the last good checkpoint, {run.checkpoint}"
        raise EngineError(f"{error}; update {update} was not made; {kept}") from error


def _shown(run: Run, line: dict, on_step: Callable | None) -> dict:
    """The metrics, with what `on_step` adds to them."""
    run.model.eval()
    if on_step is None:
        return run.ranks.first(lambda: line)
    with run.strategy.full_model_on_first() as model:
        return run.ranks.first(lambda: {**line, **(on_step(dict(line), model) or {})})


def _is_due(run: Run) -> bool:
    every = run.config.save_every
    return every > 0 and run.done % every == 0


def _is_saved(run: Run) -> bool:
    return run.checkpoint is not None and run.checkpoint.name == f"checkpoint-{run.done}"


def _progress(run: Run, show: bool) -> Iterator[tuple[int, int, Stage]]:
    """The updates still to do, with the index and stage of each, told of as they are made."""
    total, show = run.config.updates, show and run.ranks.is_first
    with Progress("train", "update", total, run.done, show=show, every=0) as progress:
        while run.done < total and (now := current_stage(run.config, run.metrics.lines)):
            yield run.done + 1, *now
            line = run.metrics.lines[-1]
            reward = {"reward": f"{line['reward_mean']:.3f}"} if "reward_mean" in line else {}
            said = {
                "loss": f"{line['loss']:.4f}",
                "entropy": f"{line['mean_entropy']:.4f}",
                "length": f"{line['response_length']:.1f}",
            }
            progress.advance(1, **said, **reward)


def _warn_if_all_cut(run: Run, line: dict) -> None:
    """Nothing that was drawn has an end: what was learned is of texts broken off."""
    if line.get("truncated") != 1 or not run.ranks.is_first:
        return
    ends = end_tokens(run.model, run.tokenizer)
    warnings.warn(cut_message(run.config.max_new_tokens, ends, "of an update"), stacklevel=3)
