"""Answers from vLLM: an engine in each rank's process, given the weights before each update.

Written for, and tested with, vLLM 0.32 (`make engines`).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module

import torch
import torch.distributed as dist
from torch import Tensor

from em_kernels.lm.adapters import check_same_head, is_adapted, merged_copy
from em_kernels.lm.heads import causal_lm
from em_kernels.lm.optional import require
from em_kernels.lm.random_state import seeded
from em_kernels.lm.ranks import Ranks
from em_kernels.lm.rollout import (
    Drawn,
    Rollout,
    Sampling,
    end_tokens,
    join_answers,
    left_pad,
    pad_token,
    room_for_answers,
)
from em_kernels.lm.text import one_line
from em_kernels.trainer.config import TrainConfig


class EngineError(RuntimeError):
    """The engine that draws the answers could not start, or has failed or ended in mid-update."""


class VllmSampler:
    """A vLLM engine in each rank's process, given the model's weights before each update; those of
    a PEFT model with its adapter merged into a copy.

    An answer is drawn with its seed: not the numbers that transformers would draw, but the same for
    any number of ranks, as far as vLLM's results do not depend on the batch.
    """

    def __init__(
        self,
        config: TrainConfig,
        settings: Sampling,
        model,
        tokenizer,
        longest_prompt: int,
        ranks: Ranks,
    ):
        self.config, self.settings, self.tokenizer, self.ranks = config, settings, tokenizer, ranks
        self.device = (ranks.device or model.device).type
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # read when it is imported
        self.vllm = require("vllm", "vllm", "use sampler='transformers'")
        if is_adapted(model):
            check_same_head(model)
        name = causal_lm(model).name_or_path if is_adapted(model) else config.model
        name = name or config.model or model.name_or_path
        if not name:
            raise ValueError("model must be a folder or a hub name with sampler='vllm', got none")
        room = room_for_answers(model, longest_prompt, config.max_new_tokens)
        self.had_group = _has_group()
        with self._named("starting"), _as_a_rank(), seeded(config.seed):
            self.engine = self.vllm.LLM(
                model=name,
                load_format="dummy",
                dtype=config.compute_dtype,
                max_model_len=longest_prompt + room,
                seed=config.seed,
                trust_remote_code=config.trust_remote_code,
                distributed_executor_backend="external_launcher",
                gpu_memory_utilization=config.vllm_memory,
                logprobs_mode="processed_logprobs",
            )

    def __call__(self, model, prompts: list[list[int]], seeds: list[int]) -> Rollout:
        ends = end_tokens(model, self.tokenizer)
        filler = pad_token(self.tokenizer, ends)
        room = room_for_answers(model, max(map(len, prompts)), self.config.max_new_tokens)
        settings = replace(self.settings, max_new_tokens=room)

        def draw(rows: list[int]) -> list[Drawn]:
            with self._named("being given the weights"):
                self._push_weights(model)
            with self._named("drawing answers"):
                own = [prompts[row] for row in rows]
                return self._generate(own, [seeds[row] for row in rows], settings, ends)

        drawn = self.ranks.share(range(len(prompts)), draw)
        answers, logprob = [one.ids for one in drawn], [one.logprob for one in drawn]
        rollout = join_answers(*left_pad(prompts, filler), answers, ends, filler, logprob)
        return rollout.to(model.device)

    def close(self) -> None:
        """End the engine, and with it its process groups, but for one that was there before."""
        with self._named("ending"), _group_kept() if self.had_group else nullcontext():
            self.engine.llm_engine.engine_core.shutdown()

    def _push_weights(self, model) -> None:
        """By vLLM's own reloading, which repeats what it does to weights once they are loaded:
        some kernels keep them repacked, others in another place or dtype."""
        whole = merged_copy(model) if is_adapted(model) else model
        weights = checkpoint_weights(whole)
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("what it has cached of the last weights could not be dropped")

    def _generate(
        self, prompts: Sequence[list[int]], seeds: list[int], settings: Sampling, ends: list[int]
    ) -> list[Drawn]:
        if not prompts:
            return []
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = partial(
            self.vllm.SamplingParams,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k or -1,
            min_p=settings.min_p,
            repetition_penalty=settings.repetition_penalty,
            max_tokens=settings.max_new_tokens,
            stop_token_ids=ends,
            ignore_eos=True,  # it would add ends of the tokenizer and of the folder's files
            logprobs=0,  # of the drawn token alone
            detokenize=False,
        )
        drawn = [params(seed=seed) for seed in seeds]
        outputs = self.engine.generate(inputs, sampling_params=drawn, use_tqdm=False)
        if len(outputs) != len(prompts):
            raise ValueError(f"it gave {len(outputs)} answers to {len(prompts)} prompts")
        return [_answer(output) for output in outputs]

    @contextmanager
    def _named(self, doing: str) -> Iterator[None]:
        """The engine at work: an error of it is an `EngineError`, autocast is the trainer's own."""
        try:
            with torch.autocast(self.device, enabled=False), _threads_kept():
                yield
        except Exception as error:
            name = f"vLLM {getattr(self.vllm, '__version__', '')}".strip()
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise EngineError(f"{name} failed while {doing}: {reason}") from error


def _answer(output) -> Drawn:
    """Of a request; one that was given up has an answer without tokens, or none."""
    tokens: list[int] = []
    said: list[float] = []
    for answer in output.outputs[:1]:
        tokens = list(answer.token_ids)
        steps = zip(tokens, answer.logprobs or [], strict=True)
        said = [step[token].logprob for token, step in steps]
    return Drawn(torch.tensor([tokens], dtype=torch.long), torch.tensor([said]))


def checkpoint_weights(model) -> list[tuple[str, Tensor]]:
    """The weights as `save_pretrained` writes them: buffers too, tied ones once, under the names of
    files, which are not always those that the model has in memory."""
    state, places = {}, set()
    for name, value in model.state_dict().items():
        place = (value.data_ptr(), value.shape, value.stride())
        if place not in places or not value.numel():
            state[name] = value.detach()
        places.add(place)
    revert = import_module("transformers.core_model_loading").revert_weight_conversion
    return list(revert(model, state).items())


@contextmanager
def _threads_kept() -> Iterator[None]:
    """On the CPU vLLM sets the number of threads of the process, and then a function that sets none
    in the place of torch's."""
    count, function = torch.get_num_threads(), torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = function
        if torch.get_num_threads() != count:
            function(count)


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def _group_kept() -> Iterator[None]:
    """vLLM ends the default process group with its own, whoever has made it."""
    destroy = dist.destroy_process_group

    def destroy_others(group: dist.ProcessGroup | None = None) -> None:
        if group is not None:
            destroy(group)

    dist.destroy_process_group = destroy_others
    try:
        yield
    finally:
        dist.destroy_process_group = destroy


@contextmanager
def _as_a_rank() -> Iterator[None]:
    """vLLM inside a training process reads its place from torchrun's variables, when it starts."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    missing = {**alone, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    missing = {name: value for name, value in missing.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)
