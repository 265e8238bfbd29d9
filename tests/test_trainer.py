"""The trainer: masks, the loss against plain PyTorch, resume, checkpoints, bad input."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import random
import resource

import numpy
import pytest
import torch
import transformers
from tiny_qwen2 import WORDS, make_bigram_model, make_model, make_tokenizer, save

from em_kernels.objectives.em import (
    micro_batch_mean_weights,
    sequence_mean_weights,
    token_mean_weights,
)
from em_kernels.trainer import (
    ONE_SHOT_PROMPT,
    CheckpointError,
    ModelError,
    Sampling,
    TrainConfig,
    load_model,
    loop,
    sample,
    train,
)
from em_kernels.trainer import checkpoint as checkpoints
from em_kernels.trainer.data import encode_prompt, read_jsonl, read_prompts
from em_kernels.trainer.models import check_causal, hidden_states, read_head
from em_kernels.trainer.rollout import Rollout, aligned_mask, answer_mask, official_masks

TIMES = ("tokens_per_second", "sample_seconds", "loss_seconds")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settings(**changes) -> TrainConfig:
    base = dict(prompts=("1 2 a", "3"), updates=2, responses=10, micro_batch=3, learning_rate=1e-2)
    return TrainConfig(**{**base, "max_new_tokens": 12, **changes})


def run(config, model=None, tokenizer=None, **kwargs):
    model = model or make_model()
    return train(config, model, tokenizer or make_tokenizer(), progress=False, **kwargs)


def without_times(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def plain_entropy(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    logp = (logits.double() / temperature).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


class Spy:
    """An objective that keeps the rollouts it was shown."""

    def __init__(self, weigh=lambda rollout, mask: (token_mean_weights(mask), None)):
        self.weigh, self.rollouts, self.masks = weigh, [], []

    def __call__(self, rollout, loss_mask):
        self.rollouts.append(rollout)
        self.masks.append(loss_mask)
        return self.weigh(rollout, loss_mask)


# --- masks -------------------------------------------------------------------------------------


def test_answer_mask_goes_up_to_the_first_end_token_whatever_follows():
    answers = torch.tensor([[5, 1, 1, 1], [1, 0, 0, 0], [5, 6, 7, 8], [5, 2, 0, 6]])
    mask, finished = answer_mask(answers, [1, 2])
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert finished.tolist() == [True, True, False, True]


def rollout_of(prompts: list[list[int]], answers: list[list[int]], filler: int) -> Rollout:
    """As `sample` gives it: prompts left-padded, answers right-padded."""
    left, right = max(map(len, prompts)), max(map(len, answers))
    rows, attended, generated = [], [], []
    for p, a in zip(prompts, answers):
        before, after = left - len(p), right - len(a)
        rows.append([filler] * before + p + a + [filler] * after)
        attended.append([0] * before + [1] * (len(p) + len(a)) + [0] * after)
        generated.append([0] * left + [1] * len(a) + [0] * after)
    masks = (torch.tensor(attended).bool(), torch.tensor(generated).bool())
    return Rollout(torch.tensor(rows), *masks, torch.ones(len(rows)).bool())


@pytest.mark.parametrize("filler", [0, 1], ids=["PAD", "PAD = EOS"])
def test_aligned_mask_is_one_left_of_every_generated_token(filler):
    rollout = rollout_of([[7, 8, 9], [7]], [[5, 1], [5, 6, 6, 1]], filler)
    assert rollout.prompt_width == 3
    expected = [[0, 0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0]]
    assert aligned_mask(rollout).int().tolist() == expected


def test_official_mask_is_unshifted_and_lets_left_padded_prompts_leak():
    rollout = rollout_of([[7, 8, 9], [7]], [[5, 1], [5, 6, 6, 1]], 0)
    attention, mask = official_masks(rollout, 0)
    assert attention.int().tolist() == [[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]]
    assert mask.int().tolist() == [[0, 0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]]


def test_official_mask_drops_the_end_token_where_pad_is_eos():
    rollout = rollout_of([[7, 8, 9]], [[5, 6, 1]], 1)
    assert official_masks(rollout, 1)[1].int().tolist() == [[0, 0, 0, 1, 1, 0]]


# --- sampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_sample_masks_prompts_of_unequal_length_and_keeps_the_end_token(pad):
    model = make_bigram_model({"<assistant>": {"7": 1.0}, "7": {"7": 0.6, "<eos>": 0.4}})
    tokenizer = make_tokenizer(pad)
    prompts = [encode_prompt(tokenizer, text) for text in ("1 2 3 4", "1")] * 16
    torch.manual_seed(0)
    rollout = sample(model, tokenizer, prompts, Sampling(max_new_tokens=9), batch=8)
    seven, end = WORDS.index("7"), WORDS.index("<eos>")
    lengths = set()
    for i, answer in enumerate(rollout.answers()):
        tail = [end] if rollout.finished[i] else [seven]
        assert answer.tolist() == [seven] * (len(answer) - 1) + tail
        lengths.add(len(answer))
    assert len(lengths) > 2
    shown = [ids[m].tolist() for ids, m in zip(rollout.input_ids, rollout.attention_mask)]
    assert shown == [p + a.tolist() for p, a in zip(prompts, rollout.answers())]


def test_sampling_ignores_the_checkpoints_generation_settings():
    model = make_bigram_model({"<assistant>": {str(i): 0.1 for i in range(10)}})
    model.generation_config.update(top_k=1, do_sample=False, min_new_tokens=5, temperature=0.01)
    kept = model.generation_config
    prompts = [encode_prompt(make_tokenizer(), "1")] * 200
    torch.manual_seed(0)
    rollout = sample(model, make_tokenizer(), prompts, Sampling(max_new_tokens=4), batch=200)
    firsts = {answer[0].item() for answer in rollout.answers()}
    assert len(firsts) == 10
    assert {len(answer) for answer in rollout.answers()} == {2}
    assert model.generation_config is kept


def test_sampling_temperature_and_nucleus_shape_what_is_drawn():
    model = make_bigram_model({"<assistant>": {"7": 0.8, "8": 0.2}})
    prompts = [encode_prompt(make_tokenizer(), "1")] * 2000
    seven = WORDS.index("7")

    def share(**kwargs) -> float:
        torch.manual_seed(0)
        drawn = sample(model, make_tokenizer(), prompts, Sampling(max_new_tokens=2, **kwargs), 2000)
        return sum(a[0].item() == seven for a in drawn.answers()) / len(prompts)

    assert share() == pytest.approx(0.8, abs=0.04)
    assert share(temperature=0.5) == pytest.approx(0.64 / 0.68, abs=0.03)
    assert share(top_p=0.7) == 1.0
    assert share(temperature=0) == 1.0


def test_repetition_penalty_reaches_the_prompt():
    model = make_bigram_model({"<assistant>": {"7": 0.6, "8": 0.4}})
    prompts = [encode_prompt(make_tokenizer(), "7")]
    sampling = Sampling(temperature=0, max_new_tokens=1, repetition_penalty=5.0)
    assert sample(model, make_tokenizer(), prompts, sampling, 1).answers()[0] == WORDS.index("8")


def test_answers_are_cut_to_the_models_positions():
    model = make_bigram_model({"<assistant>": {"7": 1.0}, "7": {"7": 1.0}})
    prompts = [encode_prompt(make_tokenizer(), "1")]
    rollout = sample(model, make_tokenizer(), prompts, Sampling(max_new_tokens=500), batch=1)
    assert rollout.input_ids.shape[1] == 64
    assert not rollout.finished.any()
    with pytest.raises(ValueError, match="64 positions, got 70 tokens"):
        sample(model, make_tokenizer(), [[5] * 70], Sampling(), batch=1)


# --- the loss ----------------------------------------------------------------------------------


def plain_loss(model, rollout: Rollout, temperature: float, reduction: str) -> torch.Tensor:
    """From full logits, one row at a time and without padding."""
    sums, counts = [], []
    for ids, shown, generated in zip(*rollout[:3]):
        logits = model(input_ids=ids[shown][None]).logits[0, :-1]
        entropy = plain_entropy(logits, temperature)[generated[shown][1:]]
        sums.append(entropy.sum())
        counts.append(entropy.numel())
    if reduction == "token_mean":
        return torch.stack(sums).sum() / sum(counts)
    return torch.stack([s / n for s, n in zip(sums, counts)]).mean()


def grad_norm(model) -> float:
    return math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in model.parameters()))


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_loss_and_gradient_are_those_of_full_logits(reduction, pad):
    weigh = {"token_mean": token_mean_weights, "sequence_mean": sequence_mean_weights}[reduction]
    spy = Spy(lambda rollout, mask: (weigh(mask), None))
    config = settings(updates=1, reduction=reduction, loss_temperature=0.7)
    line = run(config, tokenizer=make_tokenizer(pad), objective=spy).metrics[0]
    model = make_model()
    loss = plain_loss(model, spy.rollouts[0], 0.7, reduction)
    loss.backward()
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(grad_norm(model), rel=1e-4)
    default = run(config, tokenizer=make_tokenizer(pad)).metrics[0]
    assert without_times([default]) == without_times([line])


@pytest.mark.parametrize("compat", [None, "official"])
def test_metrics_describe_the_rollout(compat):
    spy = Spy()
    line = run(settings(updates=1, compat=compat), objective=spy).metrics[0]
    rollout = spy.rollouts[0]
    assert line["response_tokens"] == sum(len(a) for a in rollout.answers())
    assert line["response_length"] == line["response_tokens"] / 10
    assert line["truncated"] == pytest.approx((~rollout.finished).float().mean().item())
    assert line["mean_entropy"] == pytest.approx(line["loss"], rel=1e-5)
    assert all(line[name] > 0 for name in TIMES)


def gradients(config: TrainConfig, rollout: Rollout, **changes) -> tuple[float, torch.Tensor]:
    """The loss of a given rollout, and its gradient as one vector."""
    config = dataclasses.replace(config, **changes)
    state = loop._start(config, make_model(), make_tokenizer(), resume=False)
    batch = loop._batch(state, rollout, loop._entropy_minimisation(config))
    loss, _ = loop._accumulate_gradients(state, batch)
    return loss, torch.cat([p.grad.flatten() for p in state.model.parameters()])


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_the_loss_does_not_depend_on_the_micro_batches(reduction):
    spy = Spy()
    config = settings(updates=1, reduction=reduction)
    run(config, objective=spy)
    expected, whole = gradients(config, spy.rollouts[0], micro_batch=10)
    for size in (1, 2, 3, 7):
        loss, gradient = gradients(config, spy.rollouts[0], micro_batch=size)
        assert loss == pytest.approx(expected, rel=1e-6)
        assert (gradient - whole).norm() <= 1e-5 * whole.norm()


def official_script_loss(model, rollout: Rollout, filler: int, config: TrainConfig) -> float:
    """What the published script computes, written the way it is described: plain and unshifted."""
    losses = []
    width = rollout.prompt_width
    for start in range(0, config.responses, config.micro_batch):
        ids = rollout.input_ids[start : start + config.micro_batch]
        counted, total = 0, 0.0
        kept = ids != filler
        logits = model(input_ids=ids, attention_mask=kept.long()).logits
        entropy = plain_entropy(logits, config.loss_temperature)
        for row in range(ids.shape[0]):
            prompt_tokens = int((ids[row, :width] != filler).sum())
            for t in range(prompt_tokens, ids.shape[1]):
                if ids[row, t] != filler:
                    total = total + entropy[row, t]
                    counted += 1
        losses.append(total / counted)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("prompts", [("1 2 a",), ("1 2 a", "3")], ids=["one prompt", "two"])
@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_official_compat_is_the_published_scripts_loss(pad, prompts):
    config = settings(updates=1, compat="official", prompts=prompts, micro_batch=4)
    spy = Spy(lambda rollout, mask: (micro_batch_mean_weights(mask, 4), None))
    tokenizer = make_tokenizer(pad)
    line = run(config, tokenizer=tokenizer, objective=spy).metrics[0]
    model = make_model()
    loss = official_script_loss(model, spy.rollouts[0], tokenizer.pad_token_id, config)
    loss.backward()
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(grad_norm(model), rel=1e-4)
    assert line["loss"] == run(config, tokenizer=tokenizer).metrics[0]["loss"]
    assert line["loss"] != pytest.approx(run(settings(updates=1)).metrics[0]["loss"], rel=1e-3)


def test_official_steps_count_micro_batches():
    lines = run(settings(compat="official", responses=10, micro_batch=3)).metrics
    assert [(line["update"], line["step"]) for line in lines] == [(1, 4), (2, 8)]
    lines = run(settings(responses=10, micro_batch=3)).metrics
    assert [(line["update"], line["step"]) for line in lines] == [(1, 1), (2, 2)]


def test_an_objective_may_weigh_log_probabilities():
    """A policy gradient: loss = -sum_i A_i log p(answer i) / tokens, by plain autograd."""
    advantage = torch.linspace(-1, 1, 10)

    def weigh(rollout, mask):
        return None, -advantage[:, None] * mask / mask.sum()

    spy = Spy(weigh)
    line = run(settings(updates=1, loss_temperature=1.0), objective=spy).metrics[0]
    rollout, model = spy.rollouts[0], make_model()
    loss = 0.0
    for i, (ids, shown, generated) in enumerate(zip(*rollout[:3])):
        logp = model(input_ids=ids[shown][None]).logits[0, :-1].double().log_softmax(-1)
        picked = logp.gather(1, ids[shown][1:, None])[:, 0][generated[shown][1:]]
        loss = loss - advantage[i] * picked.sum() / rollout.response_mask.sum()
    loss.backward()
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert line["grad_norm"] == pytest.approx(grad_norm(model), rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_changes_nothing(checkpointing):
    result = run(settings(gradient_checkpointing=checkpointing))
    assert without_times(result.metrics) == without_times(run(settings()).metrics)


def test_bfloat16_is_autocast_around_float32_parameters():
    spy = Spy()
    result = run(settings(updates=1, dtype="bfloat16"), objective=spy)
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    expected = plain_loss(make_model(), spy.rollouts[0], 0.5, "token_mean").item()
    assert result.metrics[0]["loss"] == pytest.approx(expected, rel=0.05)
    assert result.metrics[0]["loss"] != pytest.approx(expected, rel=1e-6)


def test_frozen_parameters_stay():
    model = make_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = model.model.embed_tokens.weight.clone()
    result = run(settings(updates=1), model)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert result.metrics[0]["grad_norm"] > 0
    with pytest.raises(ValueError, match="no parameter to train"):
        run(settings(), model.requires_grad_(False))


def test_entropy_falls():
    lines = run(settings(updates=8, loss_temperature=1.0, sampling_temperature=1.0)).metrics
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


# --- objectives --------------------------------------------------------------------------------


def test_weights_of_the_reductions_by_hand():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert torch.equal(token_mean_weights(mask), mask / 4)
    by_row = torch.tensor([[1 / 6] * 3 + [0], [1 / 2, 0, 0, 0], [0] * 4])
    assert torch.allclose(sequence_mean_weights(mask), by_row)
    by_part = torch.tensor([[1 / 8] * 3 + [0], [1 / 8, 0, 0, 0], [0] * 4])
    assert torch.allclose(micro_batch_mean_weights(mask, 2), by_part)
    for weigh in (token_mean_weights, sequence_mean_weights):
        assert torch.equal(weigh(torch.zeros(2, 3)), torch.zeros(2, 3))


# --- heads -------------------------------------------------------------------------------------

SMALL = dict(
    vocab_size=len(WORDS),
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=None,
)
OTHERS = {
    "gemma2": (transformers.Gemma2Config, dict(final_logit_softcapping=3.0)),
    "granite": (transformers.GraniteConfig, dict(logits_scaling=4.0)),
    "cohere": (transformers.CohereConfig, dict(logit_scale=0.25)),
    "phi": (transformers.PhiConfig, {}),
    "gpt2": (transformers.GPT2Config, dict(n_positions=64, n_embd=32, n_layer=2, n_head=2)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_heads_with_softcap_scale_and_bias_match_the_models_logits(name):
    kind, changes = OTHERS[name]
    torch.manual_seed(0)
    config = kind(**{**SMALL, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    head = read_head(model)
    check_causal(model, head, [5, 6, 7])
    ids = torch.tensor([[0, 0, 5, 6, 7], [5, 6, 7, 8, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    hidden = hidden_states(model, ids, mask)
    for row, start in ((0, 2), (1, 0)):
        expected = model(input_ids=ids[row : row + 1, start:]).logits[0]
        actual = head.logits(hidden[row, start:])
        assert torch.allclose(actual, expected, atol=1e-4 * expected.abs().max().item())


def test_a_head_that_is_not_linear_is_refused():
    model = make_model()
    model.lm_head.register_forward_hook(lambda module, args, output: output.sin())
    with pytest.raises(ModelError, match="such a head is not supported"):
        run(settings(), model)


def test_a_model_that_sees_later_tokens_is_refused():
    shape = dict(num_hidden_layers=1, num_attention_heads=2, hidden_size=32, intermediate_size=48)
    config = transformers.BertConfig(vocab_size=len(WORDS), is_decoder=False, **shape)
    with pytest.raises(ModelError, match=r"BertLMHeadModel.*not (causal|supported)"):
        run(settings(), transformers.BertLMHeadModel(config))


# --- random state, hooks -----------------------------------------------------------------------


def test_a_run_depends_on_its_seed_and_leaves_the_callers_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate()
    model, tokenizer = make_model(), make_tokenizer()
    torch.set_rng_state(before[0])
    first = run(settings(seed=3), model, tokenizer)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (numpy.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]
    assert without_times(run(settings(seed=3)).metrics) == without_times(first.metrics)
    assert without_times(run(settings(seed=4)).metrics) != without_times(first.metrics)


def test_on_step_sees_the_model_and_adds_to_the_metrics_without_disturbing_the_run():
    seen = []

    def look(line, model):
        torch.manual_seed(99)
        assert not model.training
        seen.append(line["update"])
        return {"drawn": torch.rand(()).item()}

    looked = run(settings(updates=3), on_step=look)
    plain = run(settings(updates=3))
    assert seen == [1, 2, 3]
    stripped = [{k: v for k, v in line.items() if k != "drawn"} for line in looked.metrics]
    assert without_times(stripped) == without_times(plain.metrics)
    assert all("drawn" in line for line in looked.metrics)


def test_prompts_take_turns_over_the_run():
    spy = Spy()
    run(settings(prompts=("1", "2", "3"), responses=4), objective=spy)
    rows = [row.tolist() for rollout in spy.rollouts for row in rollout.input_ids]
    assert [WORDS[row[row.index(WORDS.index("<user>")) + 1]] for row in rows] == [
        "1",
        "2",
        "3",
        "1",
        "2",
        "3",
        "1",
        "2",
    ]


# --- checkpoints and resume --------------------------------------------------------------------


def test_resume_gives_the_numbers_of_an_uninterrupted_run(tmp_path):
    model = save(tmp_path / "model")
    whole = settings(model=model, output=tmp_path / "whole", updates=5, save_every=2)
    expected = train(whole, progress=False)
    parts = dataclasses.replace(whole, output=str(tmp_path / "parts"), updates=3)
    train(parts, progress=False)
    (tmp_path / "parts" / "checkpoint-3").rename(tmp_path / "elsewhere")
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"update": 4, "lo')
    actual = train(dataclasses.replace(parts, updates=5), resume=True, progress=False)
    assert without_times(actual.metrics) == without_times(expected.metrics)
    lines = [json.loads(s) for s in (tmp_path / "parts" / "metrics.jsonl").open()]
    assert lines == actual.metrics
    for name, value in expected.model.state_dict().items():
        assert torch.equal(actual.model.state_dict()[name], value)


def test_resume_into_a_model_that_is_passed(tmp_path):
    config = settings(output=tmp_path, updates=2, save_every=1)
    run(config)
    longer = dataclasses.replace(config, updates=4)
    resumed = run(longer, make_model(seed=7), resume=True)
    assert without_times(resumed.metrics) == without_times(run(settings(updates=4)).metrics)


def test_resume_before_the_first_checkpoint_starts_over(tmp_path):
    config = settings(output=tmp_path, updates=2, save_every=0)

    def stop(line, model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, on_step=stop)
    resumed = run(config, resume=True)
    assert without_times(resumed.metrics) == without_times(run(settings(updates=2)).metrics)


def test_checkpoints_load_in_transformers_with_the_same_logits(tmp_path):
    result = run(settings(output=tmp_path, updates=2, save_every=1))
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert result.checkpoint == tmp_path / "checkpoint-2"
    assert (result.checkpoint / "model.safetensors").is_file()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(result.checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.checkpoint)
    ids = torch.tensor([encode_prompt(tokenizer, "1 2 a")])
    assert ids.tolist() == [encode_prompt(make_tokenizer(), "1 2 a")]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, result.model.eval()(ids).logits)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run(settings(output=tmp_path, updates=5, save_every=1, keep_checkpoints=2))
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]


def test_the_settings_of_a_resumed_run_cannot_change(tmp_path):
    config = settings(output=tmp_path, updates=1)
    run(config)
    with pytest.raises(ValueError, match=r"learning_rate cannot change .* 0.01, got 0.5"):
        run(dataclasses.replace(config, learning_rate=0.5), resume=True)
    with pytest.raises(ValueError, match="holds a run already"):
        run(config)
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        run(dataclasses.replace(config, output=str(tmp_path / "nothing")), resume=True)


def fill_disk_at(update: int):
    """From then on, no file can grow beyond 8 kB: a write fails half-way, as on a full disk."""

    def hook(line, model):
        if line["update"] == update:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))

    return hook


@pytest.fixture
def file_size_limit():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def check_first_checkpoint_survived(tmp_path, config):
    assert [p.name for p in tmp_path.glob("*checkpoint-*")] == ["checkpoint-1"]
    resumed = run(config, resume=True)
    expected = run(dataclasses.replace(config, output=None))
    assert without_times(resumed.metrics) == without_times(expected.metrics)


def test_a_checkpoint_that_does_not_fit_leaves_the_last_good_one(tmp_path, file_size_limit):
    config = settings(output=tmp_path, updates=2, save_every=1)
    with pytest.raises(CheckpointError, match=r"cannot write .*checkpoint-2.*good.*checkpoint-1"):
        run(config, on_step=fill_disk_at(2))
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, soft))
    check_first_checkpoint_survived(tmp_path, config)


def test_a_disk_that_fills_up_after_the_weights_leaves_the_last_good_one(tmp_path, monkeypatch):
    config = settings(output=tmp_path, updates=2, save_every=1)
    kept = torch.save

    def full(value, path):
        kept(value, path)
        if value["update"] == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left on device; the last good"):
        run(config)
    monkeypatch.setattr(torch, "save", kept)
    check_first_checkpoint_survived(tmp_path, config)


def test_an_interrupted_save_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    config = settings(output=tmp_path, updates=2, save_every=1)
    kept = checkpoints._flush

    def interrupt(folder):
        if "checkpoint-2" in folder.name:
            raise KeyboardInterrupt
        kept(folder)

    monkeypatch.setattr(checkpoints, "_flush", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.setattr(checkpoints, "_flush", kept)
    check_first_checkpoint_survived(tmp_path, config)


def test_metrics_that_cannot_be_written_stop_the_run(tmp_path):
    config = settings(output=tmp_path, updates=2, save_every=1)

    def block(line, model):
        if line["update"] == 2:
            (tmp_path / "metrics.jsonl").unlink()
            (tmp_path / "metrics.jsonl").mkdir()

    with pytest.raises(CheckpointError, match=r"cannot write .*metrics.jsonl"):
        run(config, on_step=block)


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(updates=0), "updates must be 1 or more, got 0"),
        (dict(micro_batch=0), "micro_batch must be 1 or more, got 0"),
        (dict(loss_temperature=0.0), "loss_temperature must be positive and finite, got 0.0"),
        (dict(sampling_temperature=-1), "sampling_temperature must be positive"),
        (dict(clip=float("nan")), "clip must be positive and finite, got nan"),
        (dict(top_p=1.5), r"top_p must be in \(0, 1\]"),
        (dict(top_k=-1), "top_k must be 0 or more, got -1"),
        (dict(learning_rate=-1e-3), "learning_rate must be 0 or more"),
        (dict(reduction="mean"), "reduction must be one of .*, got 'mean'"),
        (dict(dtype="float16"), "dtype must be one of"),
        (dict(compat="offical"), "compat must be one of"),
        (dict(compat="official", reduction="sequence_mean"), "reduction must be 'token_mean'"),
        (dict(prompts=()), "prompts must have at least one prompt"),
        (dict(prompts="  "), "prompt must not be empty, got '  '"),
        (dict(seed=-1), "seed must be 0 or more"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


@pytest.mark.parametrize("changes", [dict(updates=2.0), dict(clip="1"), dict(prompts=(3,))])
def test_settings_of_the_wrong_type_are_named(changes):
    with pytest.raises(TypeError, match=next(iter(changes))):
        settings(**changes)


def test_defaults_are_the_published_ones():
    config = TrainConfig()
    assert (config.loss_temperature, config.sampling_temperature) == (0.5, 0.5)
    assert (config.top_p, config.top_k, config.repetition_penalty) == (0.95, 0, 1.15)
    assert (config.responses, config.micro_batch, config.updates) == (64, 2, 10)
    assert (config.learning_rate, config.clip) == (2e-5, 1.0)
    assert config.prompts == (ONE_SHOT_PROMPT,)


def test_paths_are_not_taken_for_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("./nothing", "/no/such/folder", "../nothing", "runs/nothing", "a/b/c", "~/x/"):
        with pytest.raises(ModelError, match="no such folder"):
            load_model(name)
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model("runs")
    with pytest.raises(ModelError, match="a model is a folder, got the file"):
        load_model("file")


def test_a_runs_folder_points_to_its_newest_checkpoint(tmp_path):
    run(settings(output=tmp_path, updates=1))
    with pytest.raises(ModelError, match=r"did you mean .*checkpoint-1\?"):
        load_model(str(tmp_path))


def test_a_model_without_a_causal_head_is_refused(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "base")
    make_model(tie_word_embeddings=False).model.save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=r"no weights for lm_head.weight"):
        load_model(str(tmp_path / "base"))
    make_tokenizer().save_pretrained(tmp_path / "vision")
    shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    vision = transformers.ViTModel(transformers.ViTConfig(**shape))
    vision.save_pretrained(tmp_path / "vision")
    with pytest.raises(ModelError, match="cannot load a causal language model"):
        load_model(str(tmp_path / "vision"))
    with pytest.raises(ModelError, match="ViTModel"):
        run(settings(), vision)
    with pytest.raises(ModelError, match="got Linear"):
        run(settings(), torch.nn.Linear(2, 2))


def test_a_device_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="device 'gpu' cannot be used"):
        load_model(save(tmp_path / "model"), device="gpu")


def test_a_damaged_model_file_is_an_error(tmp_path):
    folder = save(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load"):
        load_model(folder)


def test_model_and_tokenizer_come_together():
    with pytest.raises(ValueError, match="must be passed together"):
        train(settings(), make_model())
    with pytest.raises(ValueError, match="model must be given"):
        train(settings())


def test_a_failed_start_leaves_no_run_behind(tmp_path):
    config = settings(model=str(tmp_path / "nothing"), output=tmp_path / "run")
    with pytest.raises(ModelError):
        train(config, progress=False)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_before_the_step():
    model = make_model()
    poison = Spy(lambda rollout, mask: (token_mean_weights(mask) * math.inf, None))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="update 1: the loss is nan"):
        run(settings(), model, objective=poison)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": "1"}\n{"prompt": \n', "line 2: not valid JSON"),
        ('{"prompt": "1"}\n\n["1"]\n', "line 3: expected a JSON object, got list"),
        ('{"text": "1"}\n', "line 1: no field 'prompt' or 'problem', got"),
        ('{"prompt": "1"}\n{"prompt": " "}\n', "line 2: 'prompt' must be text that is not empty"),
        ('{"problem": null}\n', "line 1: 'problem' must be text that is not empty, got None"),
        ("\n", "no prompts in the file"),
    ],
)
def test_broken_lines_are_named_by_number(tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_lines_that_are_not_utf8_are_named_by_number(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "1"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        read_prompts(path)
    assert next(read_jsonl(path)) == (1, {"prompt": "1"})
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_prompts(tmp_path / "nothing.jsonl")


def test_prompts_of_either_field_are_read(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n{"problem": "two", "answer": 2}\n')
    assert read_prompts(path) == ("one", "two")


def test_a_tokenizer_without_chat_template_takes_the_bare_prompt():
    tokenizer = make_tokenizer(template=None)
    assert encode_prompt(tokenizer, "1a") == [WORDS.index("1"), WORDS.index("a")]
    words = [WORDS[i] for i in encode_prompt(make_tokenizer(), "1 a")]
    assert words == ["<user>", "1", "Ġ", "a", "<assistant>"]
