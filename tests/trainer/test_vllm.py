"""Sampling with vLLM, against a stand-in with the part of vLLM's interface that is used."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from rl_runs import rl_settings
from tiny_qwen2 import make_model, make_tokenizer, save
from trainer_runs import Spy, run, settings, without_times

from em_kernels.lm.ranks import Ranks
from em_kernels.trainer import ModelError, Sampling, load_model, sample, train
from em_kernels.trainer.samplers import VllmSampler


@dataclass
class SamplingParams:
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    max_tokens: int
    stop_token_ids: list[int]
    seed: int
    detokenize: bool


class LLM:
    """Draws with transformers, from the weights that were pushed last."""

    def __init__(self, model: str, **options):
        self.options, self.calls, self.seen, self.stale = {"model": model, **options}, [], [], True
        self.model = make_model(seed=9)
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self._load))
        self.worker = SimpleNamespace(model_runner=runner)

    def _load(self, weights: list) -> None:
        self.calls.append("load_weights")
        missing = self.model.load_state_dict(dict(weights), strict=False).missing_keys
        assert missing == ["lm_head.weight"]
        self.stale = True

    def collective_rpc(self, method, args=()) -> list:
        return [method(self.worker, *args)]

    def reset_prefix_cache(self) -> bool:
        self.stale = False
        return True

    def generate(self, prompts, sampling_params, use_tqdm) -> list:
        assert not self.stale and len(prompts) == len(sampling_params)
        self.calls.append("generate")
        self.seen += sampling_params
        return [self._draw(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params)]

    def _draw(self, prompt: list[int], params: SamplingParams):
        assert params.stop_token_ids == [1]
        names = ("temperature", "top_p", "min_p", "repetition_penalty")
        values = {name: getattr(params, name) for name in names}
        values["top_k"] = 0 if params.top_k == -1 else params.top_k
        torch.manual_seed(params.seed)
        sampling = Sampling(**values, max_new_tokens=params.max_tokens)
        drawn = sample(self.model, make_tokenizer(), [prompt], sampling, 1)
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(drawn.answers()[0]))])


@pytest.fixture
def vllm(monkeypatch):
    """The engines that were made."""
    module = ModuleType("vllm")
    module.engines = []

    def make(**options) -> LLM:
        module.engines.append(LLM(**options))
        return module.engines[-1]

    module.LLM, module.SamplingParams = make, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "0")  # so that what is set here is undone
        monkeypatch.delenv(name)
    return module


def test_the_engine_is_given_the_weights_before_every_update(vllm, tmp_path):
    config = settings(model=save(tmp_path / "model"), sampler="vllm", updates=3, seed=2)
    spy = Spy()
    result = train(config, objective=spy, progress=False)
    (engine,) = vllm.engines
    assert engine.calls == ["load_weights", "generate"] * 3
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
    engine = LLM("by hand")
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


def test_ranks_draw_their_share_with_the_seeds_of_one(vllm, tmp_path):
    """Two ranks one after the other: what each draws, joined, is what one draws."""
    config = settings(model=save(tmp_path / "model"), sampler="vllm", responses=5)
    model, tokenizer = make_model(), make_tokenizer()
    prompts = [[2, 5, 3], [2, 6, 7, 3], [2, 8, 3], [2, 9, 3], [2, 5, 5, 3]]
    seeds = [31, 32, 33, 34, 35]
    expected = VllmSampler(config, model, tokenizer, 5, Ranks())(model, prompts, seeds)
    shares = []

    class OneByOne(Ranks):
        def gather(self, make) -> list:
            shares.append(make())
            return shares if len(shares) == 2 else [*shares, [[1], [1]]]

    for rank in (0, 1):
        ranks = OneByOne(rank, 2, torch.device("cpu"))
        rollout = VllmSampler(config, model, tokenizer, 5, ranks)(model, prompts, seeds)
    assert [len(share) for share in shares] == [3, 2]
    assert torch.equal(rollout.input_ids, expected.input_ids)
    assert torch.equal(rollout.response_mask, expected.response_mask)


@pytest.mark.parametrize("outputs", [[], [SimpleNamespace(token_ids=())]], ids=["none", "empty"])
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
    with pytest.raises(ValueError, match="vLLM gave 3 answers to 4 prompts"):
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
