"""`--sampler vllm` with vLLM itself, on the CPU: `make engines ENGINE=vllm`."""

from __future__ import annotations

import copy
import json
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy
import pytest
import torch
import torch.distributed as dist
from helpers import error
from trainer_runs import without_times

from em_kernels import softmax_stats
from em_kernels.lm.chat import encode_prompt
from em_kernels.lm.rollout import Rollout, aligned_mask
from em_kernels.tiny_math import PROMPT, make_problems, model_path
from em_kernels.trainer import Sampling, TrainConfig, load_model, samplers, train

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: make engines ENGINE=vllm")

CLOSE = 2e-4  # of a log-probability: float32 in another order
GIVEN = (
    *("model", "updates", "responses", "micro_batch", "learning_rate", "loss_temperature"),
    *("sampling_temperature", "top_p", "repetition_penalty", "max_new_tokens", "sampler"),
    *("vllm_memory", "device"),
)
PROMPTS = [PROMPT, *(problem.text for problem in make_problems("dev", 3, seed=0))]


def settings(**changes) -> TrainConfig:
    base = dict(
        model=str(model_path()),
        prompts=tuple(PROMPTS),
        updates=3,
        responses=8,
        micro_batch=4,
        learning_rate=1e-3,
        loss_temperature=1.0,
        sampling_temperature=0.7,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=24,
        sampler="vllm",
        vllm_memory=0.08,
        device="cpu",
    )
    return TrainConfig(**{**base, **changes})


@dataclass
class Handed:
    """The model whose weights the engine was given, and what it then answered."""

    model: torch.nn.Module
    rollout: Rollout
    greedy: list[tuple[list[int], list[float]]]


class Watched(samplers.VllmSampler):
    """Keeps itself, and asks for greedy answers after each of its own."""

    made: ClassVar[list[Watched]] = []

    def __init__(self, *args):
        super().__init__(*args)
        self.handed: list[Handed] = []
        self.made.append(self)

    def close(self) -> None:
        """Not yet."""

    def __call__(self, model, prompts, seeds) -> Rollout:
        rollout = super().__call__(model, prompts, seeds)
        asked = [encode_prompt(self.tokenizer, prompt) for prompt in PROMPTS]
        params = vllm.SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, logprobs=0)
        found = self.engine.generate(
            [{"prompt_token_ids": ids} for ids in asked], params, use_tqdm=False
        )
        greedy = []
        for one in found:
            tokens = list(one.outputs[0].token_ids)
            steps = zip(tokens, one.outputs[0].logprobs)
            greedy.append((tokens, [step[token].logprob for token, step in steps]))
        self.handed.append(Handed(copy.deepcopy(model), rollout, greedy))
        return rollout


def state_of_the_process() -> list:
    return [
        random.getstate(),
        numpy.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        torch.get_num_threads(),
        torch.set_num_threads,
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three updates of EM, everything handed over kept; the engine stays for other tests."""
    random.seed(5)
    numpy.random.seed(5)
    torch.manual_seed(5)
    before = state_of_the_process()
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "VllmSampler", Watched)
        result = train(settings(output=str(folder), save_every=1), progress=False)
    yield SimpleNamespace(
        result=result,
        folder=folder,
        states=(before, state_of_the_process()),
        sampler=Watched.made[0],
        handed=Watched.made[0].handed,
    )
    samplers.VllmSampler.close(Watched.made[0])
    assert not dist.is_initialized()


def test_the_process_group_of_the_caller_stays():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        train(settings(updates=1, responses=2), progress=False)
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total == 1
    finally:
        dist.destroy_process_group()


def log_probabilities(model, ids: list[int], start: int) -> torch.Tensor:
    """(T, V) of the tokens from `start` on, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    return logits[start - 1 : -1].double().log_softmax(-1)


def greedy_of_transformers(model, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_answers_are_those_of_the_weights_of_each_update(trained):
    """Not of the first ones, nor of the dummies that the engine started with."""
    first, _ = load_model(str(model_path()), "cpu")
    tokenizer = trained.sampler.tokenizer
    asked = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    assert len(trained.handed) == 3
    for number, handed in enumerate(trained.handed):
        for prompt, (tokens, said) in zip(asked, handed.greedy):
            assert tokens == greedy_of_transformers(handed.model, prompt, len(tokens))
            row = torch.arange(len(tokens)), torch.tensor(tokens)
            whole = [*prompt, *tokens]
            own = log_probabilities(handed.model, whole, len(prompt))[row]
            assert error(torch.tensor(said), own) < CLOSE
            initial = log_probabilities(first, whole, len(prompt))[row]
            assert (error(own, initial) > 10 * CLOSE) == (number > 0)


def kept_logprob(model, rollout: Rollout, sampling: Sampling) -> torch.Tensor:
    """(B, T) by this library's operators: of the distribution that is left of the model's."""
    with torch.no_grad():
        positions = (rollout.attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = model(
            input_ids=rollout.input_ids,
            attention_mask=rollout.attention_mask.long(),
            position_ids=positions,
        ).logits
    logits = penalised(logits, rollout, sampling.repetition_penalty)
    target = rollout.input_ids.roll(-1, 1)
    limits = dict(top_p=sampling.top_p, top_k=sampling.top_k or None, min_p=sampling.min_p)
    found = softmax_stats(
        logits.flatten(0, 1),
        target.flatten(),
        temperature=sampling.temperature,
        outputs=("logprob",),
        sampler="vllm",
        **limits,
    ).logprob.view(target.shape)
    return found.where(aligned_mask(rollout), 0).roll(1, 1)


def penalised(logits: torch.Tensor, rollout: Rollout, penalty: float) -> torch.Tensor:
    """CTRL's repetition penalty, of everything up to each position."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, (ids, mask) in enumerate(zip(rollout.input_ids, rollout.attention_mask)):
        for column in mask.nonzero()[:, 0].tolist():
            seen[row, column:, ids[column]] = True
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def test_drawn_tokens_have_the_log_probability_that_they_were_drawn_with(trained):
    for handed in trained.handed:
        rollout = handed.rollout
        expected = kept_logprob(handed.model, rollout, Sampling(temperature=0.7))
        assert rollout.logprob.dtype == torch.float32
        assert rollout.logprob.shape == rollout.input_ids.shape
        assert (rollout.logprob[rollout.response_mask] < -0.01).any()
        assert not rollout.logprob[~rollout.response_mask].any()
        assert error(rollout.logprob, expected) < CLOSE


@pytest.mark.parametrize(
    "limits",
    [
        dict(top_p=0.8),
        dict(top_k=3),
        dict(min_p=0.1),
        dict(repetition_penalty=1.3),
        dict(top_p=0.9, top_k=10, min_p=0.02, repetition_penalty=1.15, temperature=1.3),
    ],
    ids=lambda limits: "+".join(limits),
)
def test_truncated_tokens_too(trained, limits):
    sampler, model = trained.sampler, trained.handed[0].model
    sampling = Sampling(**{"temperature": 1.0, "max_new_tokens": 24, **limits})
    prompts = [encode_prompt(sampler.tokenizer, prompt) for prompt in PROMPTS] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "settings", sampling)
        rollout = samplers.VllmSampler.__call__(sampler, model, prompts, list(range(len(prompts))))
    expected = kept_logprob(model, rollout, sampling)
    assert error(rollout.logprob, expected) < CLOSE
    whole = kept_logprob(model, rollout, Sampling(temperature=sampling.temperature))
    assert error(rollout.logprob, whole) > 10 * CLOSE


def test_answers_end_where_the_model_says(trained):
    for handed in trained.handed:
        rollout, end = handed.rollout, handed.model.generation_config.eos_token_id
        for answer, finished in zip(rollout.answers(), rollout.finished):
            assert (answer[-1] == end) == finished
            assert not (answer[:-1] == end).any()
            assert finished or len(answer) == 24
        assert rollout.finished.any()


def test_answers_depend_on_their_seeds_alone(trained):
    sampler, model = trained.sampler, trained.handed[0].model
    prompts = [encode_prompt(sampler.tokenizer, PROMPT)] * 4

    def drawn(seeds: list[int]) -> list[list[int]]:
        rollout = samplers.VllmSampler.__call__(sampler, model, prompts, seeds)
        return [answer.tolist() for answer in rollout.answers()]

    first, again = drawn([11, 12, 13, 14]), drawn([14, 13, 12, 11])
    assert first == again[::-1]
    assert len({tuple(answer) for answer in first}) > 1


def test_the_process_is_left_as_it_was(trained):
    """Its generators of random numbers, its threads and the function that sets their number."""
    before, after = trained.states
    assert before == after


FAILING = """
import os, signal, sys
from em_kernels.trainer import samplers

class Dies(samplers.VllmSampler):
    drawn = 0

    def _generate(self, *args):
        self.drawn += 1
        worker = self.engine.llm_engine.model_executor.driver_worker.worker
        own, steps = worker.execute_model, []

        def execute(*args, **kwargs):
            steps.append(None)
            if self.drawn == 3 and len(steps) == 5:
                if sys.argv[1] == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("the device is gone")
            return own(*args, **kwargs)

        worker.execute_model = execute
        try:
            return super()._generate(*args)
        finally:
            worker.execute_model = own

samplers.VllmSampler = Dies
from em_kernels.cli import main
sys.exit(main(sys.argv[2:]))
"""


def command(folder: Path, **changes) -> list[str]:
    """Of `em-kernels`, for a run with the settings above."""
    flags = {name: value for name, value in settings(**changes).to_dict().items() if name in GIVEN}
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    given = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    return ["train", "--output", str(folder), "--save-every", "1", "--quiet", *prompts, *given]


def call(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def metrics_of(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return without_times([json.loads(line) for line in lines])


@pytest.mark.parametrize("how", ["raises", "killed"])
def test_an_engine_that_dies_in_mid_update(trained, tmp_path, how):
    """In the fifth step of the third update's answers; the run then goes on from its second."""
    folder, expected = tmp_path / "run", without_times(trained.result.metrics)
    ended = call("-c", FAILING, how, *command(folder))
    if how == "killed":
        assert ended.returncode == -signal.SIGKILL
    else:
        assert ended.returncode == 2, ended.stderr
        last = ended.stderr.splitlines()[-1]
        reason = "failed while drawing answers: RuntimeError: the device is gone; update 3 was not"
        assert last.startswith(f"em-kernels: error: vLLM {vllm.__version__} {reason}")
        assert last.endswith(f"last good checkpoint, {folder / 'checkpoint-2'}")
    names = {path.name for path in folder.iterdir() if "checkpoint" in path.name}
    assert names == {"checkpoint-1", "checkpoint-2"}
    assert metrics_of(folder) == expected[:2]
    resumed = call("-m", "em_kernels", "train", "--quiet", "--resume", str(folder))
    assert resumed.returncode == 0, resumed.stderr
    assert metrics_of(folder) == expected


def test_two_ranks_draw_what_one_does(trained, tmp_path):
    folder = tmp_path / "run"
    ranks = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "em_kernels")
    ended = call(*ranks, *command(folder, updates=2))
    assert ended.returncode == 0, ended.stderr
    for line, expected in zip(metrics_of(folder), without_times(trained.result.metrics)):
        assert line == pytest.approx(expected, rel=1e-4)
