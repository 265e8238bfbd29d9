"""Short training runs of the tiny model, and what their tests share."""

from __future__ import annotations

import torch
from tiny_qwen2 import make_model, make_tokenizer

from em_kernels.objectives.em import token_mean_weights
from em_kernels.trainer import TrainConfig, TrainResult, train

TIMES = ("tokens_per_second", "sample_seconds", "loss_seconds")

torch.set_num_threads(1)


def settings(**changes) -> TrainConfig:
    base = dict(
        prompts=("1 2 a", "3"),
        updates=2,
        responses=10,
        micro_batch=3,
        learning_rate=1e-3,
        sampling_temperature=1.0,
        max_new_tokens=12,
    )
    return TrainConfig(**{**base, **changes})


def plain_entropy(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    logp = (logits.double() / temperature).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def run(config: TrainConfig, model=None, tokenizer=None, **kwargs) -> TrainResult:
    model, tokenizer = model or make_model(), tokenizer or make_tokenizer()
    return train(config, model, tokenizer, progress=False, **kwargs)


def without_times(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


class Spy:
    """An objective that keeps the rollouts it was shown."""

    def __init__(self, weigh=lambda rollout, mask: (token_mean_weights(mask), None)):
        self.weigh, self.rollouts = weigh, []

    def __call__(self, rollout, loss_mask):
        self.rollouts.append(rollout)
        return self.weigh(rollout, loss_mask)
