"""Sampling with vLLM, against a stand-in with the part of vLLM's interface that is used."""

from __future__ import annotations

import copy
import itertools
import math
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from rl_runs import rl_settings
from tiny_qwen2 import make_model, make_tokenizer, save
from trainer_runs import Spy, run, settings, without_times
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from em_kernels.cli import main
from em_kernels.lm.ranks import Ranks
from em_kernels.lm.rollout import Drawn
from em_kernels.trainer import EngineError, ModelError, Sampling, load_model, sample, train
from em_kernels.trainer.samplers import make_sampler
from em_kernels.trainer.vllm_sampler import checkpoint_weights


@dataclass
class SamplingParams:
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    max_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool
    logprobs: int
    seed: int
    detokenize: bool


GIVEN = {
    *("model", "output", "updates", "responses", "micro_batch", "learning_rate", "sampler"),
    *("sampling_temperature", "max_new_tokens", "save_every"),
}
OPTIONS = {
    *("model", "load_format", "dtype", "max_model_len", "seed", "distributed_executor_backend"),
    *("gpu_memory_utilization", "logprobs_mode", "trust_remote_code"),
}


class LLM:
    """Draws with transformers, from the weights that were pushed last."""

    def __init__(self, **options):
        assert options.keys() == OPTIONS
        assert options["logprobs_mode"] == "processed_logprobs"
        assert options["trust_remote_code"] is False
        self.options, self.calls, self.seen, self.stale = options, [], [], True
        self.model = make_model(seed=9)
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self._shut_down))
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        torch.manual_seed(options["seed"])
        torch.set_num_threads = lambda count: None  # as on the CPU

    def _shut_down(self) -> None:
        self.calls.append("shutdown")
        dist.destroy_process_group()

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None) -> list:
        assert (method, args) == ("reload_weights", ())
        return [self._reload(**kwargs)]

    def _reload(self, weights_iterator) -> None:
        self.calls.append("reload_weights")
        missing = self.model.load_state_dict(dict(weights_iterator), strict=False).missing_keys
        assert missing == ["lm_head.weight"]
        self.stale = True

    def reset_prefix_cache(self) -> bool:
        self.stale = False
        return True

    def generate(self, prompts, sampling_params, *, use_tqdm) -> list:
        assert not self.stale and len(prompts) == len(sampling_params)
        self.calls.append("generate")
        self.seen += sampling_params
        return [self._draw(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params)]

    def _draw(self, prompt: list[int], params: SamplingParams):
        assert params.stop_token_ids == [1] and params.ignore_eos and params.logprobs == 0
        names = ("temperature", "top_p", "min_p", "repetition_penalty")
        values = {name: getattr(params, name) for name in names}
        values["top_k"] = 0 if params.top_k == -1 else params.top_k
        torch.manual_seed(params.seed)
        sampling = Sampling(**values, max_new_tokens=params.max_tokens)
        drawn = sample(self.model, make_tokenizer(), [prompt], sampling, 1)
        tokens = drawn.answers()[0].tolist()
        said = drawn.logprob[drawn.response_mask].tolist()
        steps = [{t: SimpleNamespace(logprob=value)} for t, value in zip(tokens, said)]
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, logprobs=steps)])


@pytest.fixture
def vllm(monkeypatch):
    """The engines that were made."""
    module = ModuleType("vllm")
    module.engines = []

    def make(**options) -> LLM:
        assert [os.environ[name] for name in ("RANK", "WORLD_SIZE")] == ["0", "1"]
        module.engines.append(LLM(**options))
        return module.engines[-1]

    module.LLM, module.SamplingParams = make, SamplingParams
    module.__version__ = "0.0"
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(torch, "set_num_threads", torch.set_num_threads)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    yield module
    if dist.is_initialized():  # of an engine that no run has closed
        dist.destroy_process_group()


def test_the_engine_is_given_the_weights_before_every_update(vllm, tmp_path):
    config = settings(model=save(tmp_path / "model"), sampler="vllm", updates=3, seed=2)
    spy = Spy()
    result = train(config, objective=spy, progress=False)
    (engine,) = vllm.engines
    assert engine.calls == [*["reload_weights", "generate"] * 3, "shutdown"]
    assert engine.options["model"] == config.model
    assert engine.options["load_format"] == "dummy"
    assert engine.options["dtype"] == "float32"
    assert engine.options["max_model_len"] == 7 + 12  # <user> 1 _ 2 _ a <assistant>
    assert len({params.seed for params in engine.seen}) == 3 * config.responses
    assert {(p.temperature, p.top_p, p.top_k, p.max_tokens) for p in engine.seen} == {
        (1.0, 0.95, -1, 12)
    }
    weights = dict(engine.model.named_parameters())
    trained = dict(result.model.named_parameters())
    moved = [not torch.equal(weights[name], value) for name, value in trained.items()]
    assert all(moved)  # what was pushed last is from before the last update
    assert [line["response_tokens"] for line in result.metrics] == [
        int(rollout.response_mask.sum()) for rollout in spy.rollouts
    ]


def test_what_is_trained_on_is_what_the_current_model_drew(vllm, tmp_path):
    """Redrawn by hand for the second update, from the weights after the first."""
    config = settings(model=save(tmp_path / "model"), sampler="vllm", updates=2)
    spy, models = Spy(), []

    def keep(line, model):
        models.append({name: value.clone() for name, value in model.state_dict().items()})

    train(config, objective=spy, on_step=keep, progress=False)
    engine = LLM(**vllm.engines[0].options)
    engine.model.load_state_dict(models[0])
    rollout = spy.rollouts[1]
    second = vllm.engines[0].seen[config.responses :]
    for row, params in enumerate(second):
        prompt = rollout.attention_mask[row] & ~rollout.response_mask[row]
        drawn = engine._draw(rollout.input_ids[row][prompt].tolist(), params)
        assert rollout.answers()[row].tolist() == [int(t) for t in drawn.outputs[0].token_ids]
        ended = rollout.answers()[row][-1].item() == 1
        assert rollout.finished[row].item() == ended


def test_a_run_is_repeated_by_its_seed_and_resumes(vllm, tmp_path):
    config = dict(model=save(tmp_path / "model"), sampler="vllm", save_every=1)
    whole = train(settings(**config, updates=3), progress=False)
    parts = dict(**config, output=tmp_path / "parts")
    train(settings(**parts, updates=1), progress=False)
    resumed = train(settings(**parts, updates=3), resume=True, progress=False)
    assert without_times(resumed.metrics) == without_times(whole.metrics)
    other = train(settings(**config, updates=3, seed=1), progress=False)
    assert without_times(other.metrics) != without_times(whole.metrics)


def test_answers_come_with_what_they_were_drawn_with(vllm, tmp_path):
    """At each token the log-probability that the engine said, and 0 elsewhere."""
    config = settings(model=save(tmp_path / "model"), sampler="vllm", top_k=3, updates=1)
    spy = Spy()
    train(config, objective=spy, progress=False)
    (rollout,), (engine,) = spy.rollouts, vllm.engines
    for row, params in enumerate(engine.seen):
        prompt = rollout.attention_mask[row] & ~rollout.response_mask[row]
        (answer,) = engine._draw(rollout.input_ids[row][prompt].tolist(), params).outputs
        said = [step[token].logprob for token, step in zip(answer.token_ids, answer.logprobs)]
        assert rollout.logprob[row][rollout.response_mask[row]].tolist() == pytest.approx(said)
    assert not rollout.logprob[~rollout.response_mask].any()


@pytest.mark.parametrize("fails", ["collective_rpc", "reset_prefix_cache", "generate"])
def test_an_engine_that_fails_in_mid_update(vllm, tmp_path, monkeypatch, capsys, fails):
    """One line says so; what the run has written is whole, and it goes on from there."""
    config = dict(model=save(tmp_path / "model"), sampler="vllm", save_every=1, updates=3)
    whole = train(settings(**config), progress=False)
    folder, own, count = tmp_path / "run", getattr(LLM, fails), itertools.count(1)

    def fail(self, *args, **kwargs):
        if next(count) == 3:
            raise RuntimeError("EngineCore encountered\nan issue")
        return own(self, *args, **kwargs)

    monkeypatch.setattr(LLM, fails, fail)
    values = asdict(settings(**config, output=str(folder))).items()
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values if name in GIVEN]
    capsys.readouterr()
    assert main(["train", "--quiet", "--prompt", "1 2 a", "--prompt", "3", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("em-kernels: error: vLLM 0.0 failed while ")
    assert "RuntimeError: EngineCore encountered an issue; update 3 was not made" in line
    assert line.endswith(f"resume from the last good checkpoint, {folder / 'checkpoint-2'}")
    names = {path.name for path in folder.iterdir()}
    assert {name for name in names if "checkpoint" in name} == {"checkpoint-1", "checkpoint-2"}
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    monkeypatch.setattr(LLM, fails, own)
    resumed = train(settings(**config, output=str(folder)), resume=True, progress=False)
    assert without_times(resumed.metrics) == without_times(whole.metrics)


def test_an_engine_that_cannot_start_says_why(vllm, tmp_path, monkeypatch):
    def refuse(**options):
        raise RuntimeError("no room for its cache")

    monkeypatch.setattr(vllm, "LLM", refuse)
    with pytest.raises(EngineError, match=r"vLLM 0\.0 failed while starting: .*no room for its"):
        run(settings(model=save(tmp_path / "model"), sampler="vllm"))


def test_a_cache_that_cannot_be_dropped_is_an_error(vllm, tmp_path, monkeypatch):
    monkeypatch.setattr(LLM, "reset_prefix_cache", lambda self: False)
    with pytest.raises(EngineError, match=r"cached of the last weights.*; update 1 was not made"):
        run(settings(model=save(tmp_path / "model"), sampler="vllm"))


def test_the_process_is_left_as_it_was(vllm, tmp_path):
    config = settings(model=save(tmp_path / "model"), sampler="vllm", updates=1, seed=4)
    torch.manual_seed(3)
    state, function, variables = torch.get_rng_state(), torch.set_num_threads, dict(os.environ)
    train(config, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.set_num_threads is function
    assert dict(os.environ) == variables
    assert not dist.is_initialized()


@pytest.mark.parametrize("fails", [False, True])
def test_the_process_group_of_the_caller_stays(vllm, tmp_path, monkeypatch, fails):
    config = settings(model=save(tmp_path / "model"), sampler="vllm", updates=1)
    if fails:
        monkeypatch.setattr(LLM, "reset_prefix_cache", lambda self: False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(EngineError) if fails else nullcontext():
            train(config, progress=False)
        assert dist.is_initialized() and vllm.engines[0].calls[-1] == "shutdown"
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("tied", [True, False])
def test_weights_have_the_names_that_files_have(tied, tmp_path):
    """Of experts too, which transformers keeps together in memory."""
    safetensors = pytest.importorskip("safetensors.torch")
    settings = dict(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    experts = dict(num_experts=3, moe_intermediate_size=4, num_experts_per_tok=1, head_dim=4)
    config = Qwen3MoeConfig(**settings, **experts, num_key_value_heads=1, tie_word_embeddings=tied)
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path)
    expected = safetensors.load_file(tmp_path / "model.safetensors")
    weights = dict(checkpoint_weights(model))
    assert weights.keys() == expected.keys() and len(weights) > len(model.state_dict())
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_ranks_draw_their_share_with_the_seeds_of_one(vllm, tmp_path):
    """Two ranks one after the other: what each draws, joined, is what one draws."""
    config = settings(model=save(tmp_path / "model"), sampler="vllm", responses=5)
    model, tokenizer = make_model(), make_tokenizer()
    prompts = [[2, 5, 3], [2, 6, 7, 3], [2, 8, 3], [2, 9, 3], [2, 5, 5, 3]]
    seeds = [31, 32, 33, 34, 35]
    expected = make_sampler(config, model, tokenizer, 5, Ranks())(model, prompts, seeds)
    shares, other = [], [Drawn(torch.tensor([[1]]), torch.tensor([[-1.0]]))] * 2

    class OneByOne(Ranks):
        def gather(self, make) -> list:
            shares.append(make())
            return shares if len(shares) == 2 else [*shares, other]

    for rank in (0, 1):
        ranks = OneByOne(rank, 2, torch.device("cpu"))
        rollout = make_sampler(config, model, tokenizer, 5, ranks)(model, prompts, seeds)
    assert [len(share) for share in shares] == [3, 2]
    assert torch.equal(rollout.input_ids, expected.input_ids)
    assert torch.equal(rollout.response_mask, expected.response_mask)


@pytest.mark.parametrize(
    "outputs", [[], [SimpleNamespace(token_ids=(), logprobs=[])]], ids=["none", "empty"]
)
@pytest.mark.parametrize("every", [False, True], ids=["one given up", "all given up"])
@pytest.mark.parametrize(
    "objective, reward",
    [
        *(("em", None), ("grpo", "length"), ("grpo++", "random"), ("ppl", "random")),
        *(("grpo", "negative_entropy"), ("grpo", "self_certainty"), ("empo", None)),
        *(("high_entropy", "random"), ("clip_cov", "random"), ("kl_cov", "random")),
        ("l-grpo", None),
    ],
)
def test_requests_that_are_given_up_are_answers_without_a_token(
    vllm, tmp_path, monkeypatch, objective, reward, every, outputs
):
    own, count = LLM._draw, itertools.count()

    def draw(self, prompt, params):
        given_up = every or next(count) % 5 == 0
        return SimpleNamespace(outputs=outputs) if given_up else own(self, prompt, params)

    monkeypatch.setattr(LLM, "_draw", draw)
    common = dict(model=save(tmp_path / "model"), sampler="vllm", updates=1)
    if objective == "em":
        config = settings(**common, responses=10)
    else:
        config = rl_settings(objective=objective, reward=reward, **common)
    (line,) = train(config, progress=False).metrics
    numbers = [value for value in line.values() if isinstance(value, float)]
    assert all(map(math.isfinite, numbers)), line
    assert (line["response_tokens"] == 0) == every
    assert line["loss"] == 0 or not every


def test_an_answer_too_few_is_an_error(vllm, tmp_path, monkeypatch):
    own = LLM.generate
    monkeypatch.setattr(LLM, "generate", lambda *args, **kwargs: own(*args, **kwargs)[1:])
    with pytest.raises(EngineError, match="it gave 3 answers to 4 prompts"):
        run(settings(model=save(tmp_path / "model"), sampler="vllm", responses=4))


@pytest.mark.parametrize("name", [None, "model"])
def test_the_engine_is_given_an_adapter_merged_into_its_weights(vllm, tmp_path, name):
    """Under the names that the model has without it, and of the model below it."""
    peft = pytest.importorskip("peft")
    base = save(tmp_path / "model")
    torch.manual_seed(0)
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(load_model(base, "cpu")[0], adapter)
    seen = []

    def keep(line, model):
        seen.append(copy.deepcopy(model).merge_and_unload())

    named = name and str(tmp_path / name)
    run(settings(model=named, sampler="vllm", updates=2), model, on_step=keep)
    (engine,) = vllm.engines
    assert engine.options["model"] == base
    pushed = dict(engine.model.named_parameters())
    assert pushed.keys() == dict(seen[0].named_parameters()).keys()
    for key, value in seen[0].named_parameters():
        assert torch.allclose(pushed[key], value, atol=1e-6), key
    first, last = (dict(m.named_parameters()) for m in seen)
    changed = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(first[changed], last[changed], atol=1e-6)


def test_an_adapter_that_vllm_has_no_place_for(vllm, tmp_path):
    peft = pytest.importorskip("peft")
    base = save(tmp_path / "model")
    for changes in (
        dict(target_modules=["embed_tokens"]),
        dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ):
        model = peft.get_peft_model(load_model(base, "cpu")[0], peft.LoraConfig(r=2, **changes))
        with pytest.raises(ModelError, match="sampler='transformers'"):
            run(settings(sampler="vllm"), model)
    assert not vllm.engines


def test_vllm_that_is_not_installed_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install vllm.*sampler='transformers'"):
        run(settings(model=save(tmp_path / "model"), sampler="vllm"))


def test_bad_settings_of_the_sampler(vllm):
    with pytest.raises(ValueError, match="model must be a folder or a hub name"):
        run(settings(sampler="vllm"))
    with pytest.raises(ValueError, match="sampler must be one of"):
        settings(sampler="sglang")
    with pytest.raises(ValueError, match=r"vllm_memory must be in \(0, 1\]"):
        settings(vllm_memory=1.5)
