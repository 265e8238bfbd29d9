"""A run under way: what it is made of, how it starts or resumes, how it is saved."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from em_kernels.lm.adapters import (
    adapter_settings,
    base_dtype,
    check_adapted,
    has_adapter,
    is_adapted,
    is_quantised,
    load_weights,
)
from em_kernels.lm.chat import encode_prompt, warn_without_template
from em_kernels.lm.demonstrations import EncodedDemonstrations
from em_kernels.lm.freed_memory import give_back_freed
from em_kernels.lm.heads import Head, ModelError, causal_lm, read_head
from em_kernels.lm.models import (
    SHARDS,
    check_causal,
    enable_gradient_checkpointing,
    load_architecture,
    load_model,
    newest_checkpoint,
    updates_of,
    weights_in_parts,
)
from em_kernels.lm.pieces import decoder_layers, split_mlps
from em_kernels.lm.ranks import Ranks
from em_kernels.lm.rollout import end_tokens, pad_token
from em_kernels.lm.weights import check_not_nan
from em_kernels.trainer import checkpoint as checkpoints
from em_kernels.trainer.adamw import make_adamw
from em_kernels.trainer.config import PURE, TrainConfig, check_resume
from em_kernels.trainer.reached import check_reached
from em_kernels.trainer.run_file import write_run_file
from em_kernels.trainer.same_run import weights_and_prompts
from em_kernels.trainer.samplers import Sampler, make_sampler
from em_kernels.trainer.second_model import SecondModel, check_vocabulary
from em_kernels.trainer.state import (
    check_facts,
    load_optimizer,
    load_weights_from_parts,
    save_parts,
    write_facts,
)
from em_kernels.trainer.strategy import FSDPStrategy, SingleProcessStrategy, make_strategy


@dataclass
class Run:
    """`done` updates of a run, and everything the next one needs."""

    config: TrainConfig
    ranks: Ranks
    model: nn.Module
    strategy: SingleProcessStrategy | FSDPStrategy
    tokenizer: Any
    sampler: Sampler
    prompts: list[list[int]]
    optimizer: torch.optim.Optimizer
    metrics: checkpoints.Metrics
    folder: Path | None
    checkpoint: Path | None
    done: int
    demonstrations: EncodedDemonstrations | None = None

    def beside(self, other: SecondModel) -> SingleProcessStrategy:
        """The other model, ready to read what the one that is trained does; whole on every rank."""
        model = other.model.to(self.model.device)
        return SingleProcessStrategy(model, self.config.loss_temperature, self.config.dtype)

    @property
    def filler(self) -> int:
        return pad_token(self.tokenizer, end_tokens(self.model, self.tokenizer))


def start_run(
    config: TrainConfig,
    model,
    tokenizer,
    resume: bool,
    ranks: Ranks | None = None,
    others: Sequence[SecondModel] = (),
    passed: Sequence[str] = (),
) -> Run:
    """Load the model, or the newest checkpoint of the run, and everything that goes with it.

    `others` are the models that are read beside it, `passed` names what the caller gave as objects.
    """
    ranks = ranks or Ranks()
    folder = Path(config.output) if config.output else None
    given = model is not None
    with ranks.raise_together():
        model, tokenizer, checkpoint = _load_or_resume(
            config, model, tokenizer, folder, resume, ranks
        )
        demonstrations = _encode_demonstrations(config, model, tokenizer, ranks)
        chat = config.chat
        prompts = [encode_prompt(tokenizer, prompt, chat) for prompt in config.prompt_texts]
        longest = max(len(encode_prompt(tokenizer, text, chat)) for text in config.all_texts)
        if ranks.is_first:
            warn_without_template(tokenizer, prompts[0])
        _check_adapter(config, model, saved=folder is not None)
        head = _check_head(config, model, prompts[0], ranks)
        for other in others:
            check_vocabulary(other, head, tokenizer)
        _prepare_to_train(config, model, ranks)
        sampler = make_sampler(config, model, tokenizer, longest, ranks)
    loaded = not (checkpoint and weights_in_parts(checkpoint))
    ranks.check_same(lambda: weights_and_prompts(model, prompts, loaded))
    strategy = make_strategy(model, config.loss_temperature, config.dtype, ranks)
    run = Run(
        config=config,
        ranks=ranks,
        model=model,
        strategy=strategy,
        tokenizer=tokenizer,
        sampler=sampler,
        prompts=prompts,
        optimizer=_optimizer(config, strategy.trained),
        metrics=checkpoints.Metrics(folder if ranks.is_first else None),
        folder=folder,
        checkpoint=checkpoint,
        done=0,
        demonstrations=demonstrations,
    )
    run.optimizer.zero_grad()  # what an interrupted run, or the caller, has left
    _restore(run)
    if folder and run.done <= config.updates:  # else nothing is done, and nothing said otherwise
        _write_settings(run, folder, given, passed)
    return run


def _load_or_resume(
    config: TrainConfig, model, tokenizer, folder: Path | None, resume: bool, ranks: Ranks
) -> tuple[Any, Any, Path | None]:
    """Model and tokenizer, passed or loaded, and the checkpoint to go on from."""
    checkpoint = _checkpoint_to_resume(config, folder) if resume else None
    if folder and not resume:
        checkpoints.check_free(folder)
    given = model is not None
    model, tokenizer = _get_model(config, model, tokenizer, checkpoint, ranks)
    if resume and folder:
        _check_same_kind(folder, model)
    if checkpoint and given:
        _load_into(model, checkpoint, config.trust_remote_code)
    check_not_nan(model)
    return model, tokenizer, checkpoint


def _checkpoint_to_resume(config: TrainConfig, folder: Path | None) -> Path | None:
    """The newest, or None where the run was stopped before its first."""
    if folder is None:
        raise ValueError("output must name the run's folder to resume it, got None")
    check_resume(checkpoints.read_config(folder), config)
    return newest_checkpoint(folder)


def _get_model(
    config: TrainConfig, model, tokenizer, checkpoint: Path | None, ranks: Ranks
) -> tuple:
    """Model and tokenizer, passed or loaded; the weights of a sharded checkpoint come later."""
    if (model is None) != (tokenizer is None):
        raise ValueError("model and tokenizer must be passed together, got only one")
    if model is None:
        name = checkpoint or config.model
        if name is None:
            raise ValueError("model must be given: a folder, a hub name or an object, got None")
        device = "cpu" if ranks.size > 1 else config.device
        if checkpoint and weights_in_parts(checkpoint):
            return load_architecture(
                checkpoint, device, config.weights_dtype, config.trust_remote_code
            )
        dtype = (base_dtype(name) if checkpoint else None) or config.weights_dtype
        return load_model(str(name), device, dtype, config.trust_remote_code)
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "generate"):
        raise ModelError(f"model must be a transformers causal model, got {type(model).__name__}")
    if config.dtype == PURE and causal_lm(model).dtype != torch.bfloat16:
        raise ModelError(
            f"dtype={PURE!r} trains a model whose parameters are bfloat16, got "
            f"{causal_lm(model).dtype}: pass model.to(torch.bfloat16)"
        )
    return model, tokenizer


def _encode_demonstrations(
    config: TrainConfig, model, tokenizer, ranks: Ranks
) -> EncodedDemonstrations | None:
    if not config.demonstrations:
        return None
    limit, chat = config.max_new_tokens, config.chat
    encoded = EncodedDemonstrations(model, tokenizer, config.demonstrations, limit, chat)
    if encoded.cut and ranks.is_first:
        warnings.warn(
            f"{encoded.cut} of {len(encoded)} demonstrations are longer than {encoded.room} tokens "
            "and are cut there, without their end: raise max_new_tokens, up to what the model's "
            "positions leave after the longest prompt",
            stacklevel=4,
        )
    return encoded


def _check_same_kind(folder: Path, model) -> None:
    """A run that trains an adapter goes on with one, checkpoint or not."""
    if checkpoints.trains_adapter(folder) == is_adapted(model):
        return
    if is_adapted(model):
        raise ModelError(
            f"the run in {folder} trains a whole model, got one with an adapter: pass the model "
            "without it, or choose another folder"
        )
    raise ModelError(
        f"the run in {folder} trains an adapter, got a model without one: pass the PEFT model that "
        "it was started with"
    )


def _load_into(model, checkpoint: Path, trust_remote_code: bool) -> None:
    """The weights of a checkpoint into a model that was passed."""
    if has_adapter(checkpoint):
        load_weights(model, checkpoint)
    elif not weights_in_parts(checkpoint):
        saved, _ = load_model(str(checkpoint), "cpu", model.dtype, trust_remote_code)
        causal_lm(model).load_state_dict(saved.state_dict())


def _check_adapter(config: TrainConfig, model, saved: bool) -> None:
    if not is_adapted(model):
        if config.save_merged:
            raise ValueError(
                "save_merged is for a PEFT model, got one without an adapter: its checkpoints are "
                "whole models; leave it out"
            )
        return
    if config.shards_only:
        raise ValueError(
            "shards_only must be False with a PEFT model, got True: its adapter's files are what "
            "its checkpoints are for"
        )
    check_adapted(model, saved=saved, merged=config.save_merged)


def _check_head(config: TrainConfig, model, prompt: list[int], ranks: Ranks) -> Head:
    head = read_head(model)
    config.check_entries(head.weight.shape[0])
    if ranks.is_first:
        check_causal(model, head, prompt)
        if is_adapted(model):
            check_reached(model, head, prompt)
    return head


def _prepare_to_train(config: TrainConfig, model, ranks: Ranks) -> None:
    """What saves memory is put into the model, and what cannot be trained is refused."""
    if config.gradient_checkpointing or config.long:
        enable_gradient_checkpointing(model)
    if config.long:
        _split_mlps(model, ranks)
        give_back_freed()
    _check_trainable(model)
    _check_optimizer(config, ranks)
    check_shardable(model, ranks)


def _check_trainable(model) -> None:
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "model has no parameter to train: all have requires_grad=False (PeftModel's "
            "from_pretrained leaves them so without is_trainable=True)"
        )


def check_shardable(model, ranks: Ranks) -> None:
    """Refuse integers and torchao's tensors, which FSDP2 cannot cut.

    Raises:
        ModelError: there are such, and several ranks.
    """
    if ranks.size > 1 and is_quantised(model):
        raise ModelError(
            "quantised weights cannot be sharded over several ranks: train in one process, or on "
            "weights that are not quantised"
        )


def _check_optimizer(config: TrainConfig, ranks: Ranks) -> None:
    if ranks.size > 1 and config.optimizer_dtype == "8bit":
        raise ValueError(
            "optimizer_dtype='8bit' is for one process: blocks of values with a scale are not cut "
            f"over {ranks.size} ranks; use 'bfloat16'"
        )


def _split_mlps(model, ranks: Ranks) -> None:
    left, layers = split_mlps(model), decoder_layers(model)
    if left and ranks.is_first:
        warnings.warn(
            f"long: {len(left)} of {len(layers)} layers of {type(causal_lm(model)).__name__} have "
            "no MLP that can be computed over pieces of the sequence; theirs is computed in one, "
            "which takes more memory",
            stacklevel=5,
        )


def _optimizer(config: TrainConfig, model) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    moments, seed = config.optimizer_dtype, config.seed
    return make_adamw(parameters, config.learning_rate, config.weight_decay, moments, seed)


def _restore(run: Run) -> None:
    """Put weights, optimiser and metrics where the checkpoint left them."""
    if run.checkpoint:
        trained = run.strategy.trained
        if weights_in_parts(run.checkpoint):
            load_weights_from_parts(run.checkpoint, trained, run.ranks)
        load_optimizer(run.checkpoint, trained, run.optimizer, run.ranks)
        run.done = updates_of(run.checkpoint)
    if run.folder:
        run.metrics.lines = run.ranks.first(lambda: run.metrics.rewind(run.done))
    if run.checkpoint:
        trained, lines = run.strategy.trained, run.metrics.lines
        check_facts(run.checkpoint, trained, run.optimizer, lines, run.ranks)


def _write_settings(run: Run, folder: Path, given: bool, passed: Sequence[str]) -> None:
    """Of the run, and what its folder does not say: the objects that were passed."""
    adapter = adapter_settings(run.model) if is_adapted(run.model) else None
    run.ranks.first(lambda: checkpoints.write_config(folder, run.config, adapter))
    unnamed = [*passed, "adapter"] if given and adapter is not None else passed
    run.ranks.first(lambda: write_run_file(folder, run.config, unnamed, run.ranks.size))


def save_run(run: Run) -> None:
    """Write a checkpoint of where the run is now, in its folder if it has one."""
    if run.folder is None:
        return
    config, parts_only = run.config, run.config.shards_only and run.ranks.size > 1
    keep, done = config.keep_checkpoints, run.done
    with checkpoints.new_checkpoint(run.folder, done, keep, run.ranks) as folder:
        parts = (folder / SHARDS, run.strategy.trained, run.optimizer)
        save_parts(*parts, weights=parts_only, ranks=run.ranks)
        write_facts(*parts, run.metrics.lines, done, run.ranks)

        def publish(model) -> None:
            checkpoints.write_published(model, run.tokenizer, folder, config.save_merged)

        if parts_only:
            run.ranks.first(lambda: publish(run.model.config))
        else:
            with run.strategy.full_model_on_first("cpu") as model:
                run.ranks.first(lambda: publish(model))
    run.checkpoint = run.folder / f"checkpoint-{done}"
