"""What an update is made of, whatever its objective: sampling and the optimiser's step."""

from __future__ import annotations

import math

import torch

from em_kernels.lm.rollout import Rollout
from em_kernels.trainer.run import Run


def draw(run: Run, prompts: list[list[int]], update: int) -> Rollout:
    """One answer of the current model to each prompt (token ids), on every rank all of them."""
    with run.weights.sampling() as model:
        rollout = run.sampler(model, prompts, update)
    synchronize(run.model)
    return rollout


def set_learning_rate(run: Run, rate: float) -> None:
    for group in run.optimizer.param_groups:
        group["lr"] = rate


def take_step(run: Run, update: int, loss: float) -> float:
    """Clip and step; returns the norm of the gradient before clipping."""
    parameters = run.optimizer.param_groups[0]["params"]
    grad_norm = run.weights.clip_gradient(parameters, run.config.clip)
    with run.ranks.together():
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"update {update}: the loss is {loss} and its gradient's norm {grad_norm}; "
                "the step was not taken"
            )
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return grad_norm


def synchronize(model) -> None:
    """Let the clock between sampling and loss tell the truth on a GPU."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
