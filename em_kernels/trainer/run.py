"""A run under way: what it is made of, how it starts or resumes, how it is saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from em_kernels.heads import Head, ModelError, read_head
from em_kernels.trainer import checkpoint as checkpoints
from em_kernels.trainer.config import TrainConfig, check_resume
from em_kernels.trainer.data import encode_prompt
from em_kernels.trainer.models import (
    check_causal,
    enable_gradient_checkpointing,
    load_model,
    newest_checkpoint,
)
from em_kernels.trainer.random_state import RandomState
from em_kernels.trainer.rollout import end_tokens, pad_token


@dataclass
class Run:
    """`done` updates of a run, and everything the next one needs."""

    config: TrainConfig
    model: nn.Module
    tokenizer: object
    head: Head
    prompts: list[list[int]]
    optimizer: torch.optim.Optimizer
    random: RandomState
    metrics: checkpoints.Metrics
    folder: Path | None
    checkpoint: Path | None
    done: int

    @property
    def filler(self) -> int:
        return pad_token(self.tokenizer, end_tokens(self.model, self.tokenizer))


def start_run(config: TrainConfig, model, tokenizer, resume: bool) -> Run:
    """Load the model, or the newest checkpoint of the run, and everything that goes with it."""
    folder = Path(config.output) if config.output else None
    checkpoint = _checkpoint_to_resume(config, folder) if resume else None
    if folder and not resume:
        checkpoints.check_free(folder)
    model, tokenizer = _get_model(config, model, tokenizer, checkpoint)
    head = read_head(model)
    prompts = [encode_prompt(tokenizer, prompt) for prompt in config.prompts]
    check_causal(model, head, prompts[0])
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    run = Run(
        config=config,
        model=model,
        tokenizer=tokenizer,
        head=head,
        prompts=prompts,
        optimizer=_optimizer(config, model),
        random=RandomState(config.seed),
        metrics=checkpoints.Metrics(folder),
        folder=folder,
        checkpoint=checkpoint,
        done=0,
    )
    if folder:
        checkpoints.write_config(folder, config)
    _restore(run)
    return run


def _checkpoint_to_resume(config: TrainConfig, folder: Path | None) -> Path | None:
    """The newest, or None where the run was stopped before its first."""
    if folder is None:
        raise ValueError("output must name the run's folder to resume it, got None")
    check_resume(checkpoints.read_config(folder), config)
    return newest_checkpoint(folder)


def _get_model(config: TrainConfig, model, tokenizer, checkpoint: Path | None) -> tuple:
    if (model is None) != (tokenizer is None):
        raise ValueError("model and tokenizer must be passed together, got only one")
    if model is None:
        name = checkpoint or config.model
        if name is None:
            raise ValueError("model must be given: a folder, a hub name or an object, got None")
        return load_model(str(name), config.device)
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "generate"):
        raise ModelError(f"model must be a transformers causal model, got {type(model).__name__}")
    if checkpoint:
        saved, _ = load_model(str(checkpoint), "cpu", model.dtype)
        model.load_state_dict(saved.state_dict())
    return model, tokenizer


def _optimizer(config: TrainConfig, model) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model has no parameter to train: all have requires_grad=False")
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def _restore(run: Run) -> None:
    """Put optimiser, random state and metrics where the checkpoint left them."""
    if run.checkpoint:
        state = checkpoints.load_state(run.checkpoint, torch.device("cpu"))
        run.optimizer.load_state_dict(state["optimizer"])
        run.random.state = state["random"]
        run.done = state["update"]
    if run.folder:
        run.metrics.rewind(run.done)


def save_run(run: Run) -> None:
    """Write a checkpoint of where the run is now."""
    state = {"optimizer": run.optimizer.state_dict(), "random": run.random.state}
    arguments = (run.folder, run.done, run.model, run.tokenizer, state)
    run.checkpoint = checkpoints.save_checkpoint(*arguments, run.config.keep_checkpoints)
