"""What draws the answers of an update: transformers' generate, or vLLM.

A sampler is called with the model (whole, as it is now), the prompts and a seed for each, by all
ranks together; every rank is given all the answers.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from em_kernels.lm.adapters import check_same_head, is_adapted, merged_copy
from em_kernels.lm.heads import causal_lm
from em_kernels.lm.optional import require
from em_kernels.lm.ranks import Ranks
from em_kernels.lm.rollout import (
    Rollout,
    Sampling,
    end_tokens,
    join_answers,
    left_pad,
    pad_token,
    room_for_answers,
    sample,
)
from em_kernels.trainer.config import TrainConfig

Sampler = Callable[[torch.nn.Module, list[list[int]], list[int]], Rollout]


def make_sampler(
    config: TrainConfig, model, tokenizer, longest_prompt: int, ranks: Ranks
) -> Sampler:
    """The sampler that the settings name, for prompts of up to so many tokens.

    Raises:
        ImportError: it is not installed.
    """
    if config.sampler == "vllm":
        return VllmSampler(config, model, tokenizer, longest_prompt, ranks)

    def draw(model, prompts: list[list[int]], seeds: list[int]) -> Rollout:
        settings, batch = sampling(config), config.sample_batch
        return sample(model, tokenizer, prompts, settings, batch, ranks, seeds=seeds)

    return draw


def sampling(config: TrainConfig) -> Sampling:
    return Sampling(
        temperature=config.sampling_temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        max_new_tokens=config.max_new_tokens,
    )


class VllmSampler:
    """A vLLM engine in each rank's process, given the model's weights before each update; those of
    a PEFT model with its adapter merged into a copy.

    An answer is drawn with its seed: not the numbers that transformers would draw, but the same for
    any number of ranks, as far as vLLM's results do not depend on the batch.
    """

    def __init__(self, config: TrainConfig, model, tokenizer, longest_prompt: int, ranks: Ranks):
        self.config, self.tokenizer, self.ranks = config, tokenizer, ranks
        self.vllm = require("vllm", "vllm", "use sampler='transformers'")
        if is_adapted(model):
            check_same_head(model)
        name = causal_lm(model).name_or_path if is_adapted(model) else config.model
        name = name or config.model or model.name_or_path
        if not name:
            raise ValueError("model must be a folder or a hub name with sampler='vllm', got none")
        room = room_for_answers(model, longest_prompt, config.max_new_tokens)
        _be_a_rank()
        self.engine = self.vllm.LLM(
            model=name,
            load_format="dummy",
            dtype=config.dtype,
            max_model_len=longest_prompt + room,
            seed=config.seed,
            distributed_executor_backend="external_launcher",
            gpu_memory_utilization=config.vllm_memory,
        )

    def __call__(self, model, prompts: list[list[int]], seeds: list[int]) -> Rollout:
        ends = end_tokens(model, self.tokenizer)
        filler = pad_token(self.tokenizer, ends)
        room = room_for_answers(model, max(map(len, prompts)), self.config.max_new_tokens)
        settings = replace(sampling(self.config), max_new_tokens=room)

        def draw(rows: list[int]) -> list[list[int]]:
            self._push_weights(model)
            own = [prompts[row] for row in rows]
            return self._generate(own, [seeds[row] for row in rows], settings, ends)

        drawn = self.ranks.share(range(len(prompts)), draw)
        answers = [torch.tensor([answer], dtype=torch.long) for answer in drawn]
        rollout = join_answers(*left_pad(prompts, filler), answers, ends, filler)
        return rollout.to(model.device)

    def _push_weights(self, model) -> None:
        whole = merged_copy(model) if is_adapted(model) else model
        weights = [(name, value.data) for name, value in whole.named_parameters()]
        self.engine.collective_rpc(_load_weights, args=(weights,))
        self.engine.reset_prefix_cache()

    def _generate(
        self, prompts: Sequence[list[int]], seeds: list[int], settings: Sampling, ends: list[int]
    ) -> list[list[int]]:
        if not prompts:
            return []
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        drawn = [
            self.vllm.SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k or -1,
                min_p=settings.min_p,
                repetition_penalty=settings.repetition_penalty,
                max_tokens=settings.max_new_tokens,
                stop_token_ids=ends,
                seed=seed,
                detokenize=False,
            )
            for seed in seeds
        ]
        outputs = self.engine.generate(inputs, sampling_params=drawn, use_tqdm=False)
        if len(outputs) != len(prompts):
            raise ValueError(f"vLLM gave {len(outputs)} answers to {len(prompts)} prompts")
        # A request that was given up has an answer without tokens, or none.
        return [
            [token for one in output.outputs[:1] for token in one.token_ids] for output in outputs
        ]


def _load_weights(worker, weights: list) -> None:
    """Run by vLLM in its worker: parameters under their names in transformers."""
    worker.model_runner.model.load_weights(weights)


def _be_a_rank() -> None:
    """vLLM inside a training process reads its place from torchrun's variables."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    for name, value in {**alone, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        os.environ.setdefault(name, value)
