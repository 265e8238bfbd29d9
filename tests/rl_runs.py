"""Short RL runs of the tiny model, and what their tests share."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from tiny_qwen2 import make_model, make_tokenizer

from em_kernels.trainer import RLConfig, TrainResult, train
from em_kernels.trainer.schedule import WITHOUT_REWARDS

PROBLEMS = (("1 2", "3"), ("4 5 6", "7"), ("8", "9"))


def rl_settings(**changes) -> RLConfig:
    """A reward that differs between the answers of a random model: their length."""
    base = dict(
        objective="grpo",
        problems=PROBLEMS,
        updates=2,
        responses=10,
        micro_batch=3,
        learning_rate=1e-2,
        max_new_tokens=12,
        device="cpu",
    )
    rewarded = dict(reward="length", group_size=5, judge="exact")
    stages = changes.get("schedule") or changes.get("objective", "grpo")
    if set(re.findall(r"(?:^|[,+])\s*([\w-]*)", stages)) <= {*WITHOUT_REWARDS}:
        rewarded = {}
    return RLConfig(**{**base, **rewarded, **changes})


def run_rl(config: RLConfig, model=None, **kwargs) -> TrainResult:
    return train(config, model or make_model(), make_tokenizer(), progress=False, **kwargs)


def interrupted_and_resumed(config: RLConfig, folder, update: int) -> TrainResult:
    """The run in a folder, ended by Ctrl-C after an update is made, and gone on with."""
    config = replace(config, output=folder)

    def interrupt(line, model):
        if line["update"] == update:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_rl(config, on_step=interrupt)
    return run_rl(config, resume=True)


def plain_log_softmax(model, tokens):
    """(B, T, V) in float64, of the model's own logits."""
    mask = tokens.attention_mask.long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(tokens.input_ids, attention_mask=mask, position_ids=positions).logits
    return logits.double().log_softmax(-1)
