"""What draws the answers of an update: transformers' generate, or vLLM.

A sampler is called with the model (whole, as it is now), the prompts and a seed for each, by all
ranks together; every rank is given all the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch

from em_kernels.lm.ranks import Ranks
from em_kernels.lm.rollout import Rollout, Sampling, sample
from em_kernels.trainer.config import TrainConfig
from em_kernels.trainer.vllm_sampler import EngineError, VllmSampler

Sampler = Callable[[torch.nn.Module, list[list[int]], list[int]], Rollout]


def make_sampler(
    config: TrainConfig, model, tokenizer, longest_prompt: int, ranks: Ranks
) -> Sampler:
    """The sampler that the settings name, for prompts of up to so many tokens.

    Raises:
        ImportError: it is not installed.
    """
    if config.sampler == "vllm":
        return VllmSampler(config, sampling(config), model, tokenizer, longest_prompt, ranks)

    def draw(model, prompts: list[list[int]], seeds: list[int]) -> Rollout:
        options: dict[str, Any] = dict(seeds=seeds, keep_sets=config.keeps_sets)
        settings, batch = sampling(config), config.sample_batch
        return sample(model, tokenizer, prompts, settings, batch, ranks, **options)

    return draw


@contextmanager
def closed_at_the_end(sampler: Sampler) -> Iterator[None]:
    """What the sampler keeps running, if anything, ends with the block, after an error too."""
    failed = True
    try:
        yield
        failed = False
    finally:
        if isinstance(sampler, VllmSampler):
            with suppress(EngineError) if failed else nullcontext():
                sampler.close()


def sampling(config: TrainConfig) -> Sampling:
    return Sampling(
        temperature=config.sampling_temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        max_new_tokens=config.max_new_tokens,
    )
