"""That every rank was started on the same run: what they would otherwise mix without a word."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version

from torch import nn

from em_kernels.lm.fingerprint import digest
from em_kernels.lm.text import text_digest
from em_kernels.trainer.config import TrainConfig
from em_kernels.trainer.rl_config import RLConfig

PACKAGES = ("em-kernels", "torch", "transformers")
OF_A_RANK = frozenset({"model", "teacher", "problems", "device"})
"""Settings that may differ: where it lies on this machine. What lies there must not."""


def settings_and_data(config: TrainConfig) -> dict[str, object]:
    """What ranks compare before anything is loaded, by the name that an error gives it."""
    return {
        **{f"the version of {name}": version(name) for name in PACKAGES},
        "the version of Python": platform.python_version(),
        **{f.name: getattr(config, f.name) for f in fields(config) if f.name not in OF_A_RANK},
        "what lies in problems": _data(config),
    }


def weights_and_prompts(
    model: nn.Module, prompts: Sequence[Sequence[int]], loaded: bool
) -> dict[str, object]:
    """What they compare then; `loaded` where every rank has the weights already."""
    weights = digest(model.named_parameters()) if loaded else None
    return {
        "the weights of model": weights,
        "the tokens of the prompts": text_digest(repr(prompts)),
    }


def _data(config: TrainConfig) -> str:
    found: list[object] = []
    if isinstance(config, RLConfig):
        found = [*config.demonstrations] or [*config.tasks]
    return f"{len(found)} rows ({text_digest(repr(found))})"
