"""The training loop: its loss against plain PyTorch, its hooks, its settings."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy
import pytest
import torch
from tiny_qwen2 import WORDS, make_model, make_tokenizer
from trainer_runs import TIMES, Spy, plain_entropy, run, settings, without_times

from em_kernels.objectives.em import (
    micro_batch_mean_weights,
    sequence_mean_weights,
    token_mean_weights,
)
from em_kernels.trainer import ONE_SHOT_PROMPT, Rollout, TrainConfig
from em_kernels.trainer.entropy_update import EntropyUpdate, entropy_minimisation
from em_kernels.trainer.policy_update import accumulate_gradients
from em_kernels.trainer.run import start_run


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
    state = start_run(config, make_model(), make_tokenizer(), resume=False)
    update = EntropyUpdate(state, entropy_minimisation(config))
    parts = update.parts(update.weigh(rollout))
    loss = accumulate_gradients(state, 1, 0, parts, update.loss)["loss"]
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
    advantage[3] = 0

    def weigh(rollout, mask):
        return None, -advantage[:, None] * mask / mask.sum()

    spy = Spy(weigh)
    line = run(settings(updates=1, loss_temperature=1.0), objective=spy).metrics[0]
    rollout, model = spy.rollouts[0], make_model()
    loss = 0.0
    entropies = []
    for i, (ids, shown, generated) in enumerate(zip(*rollout[:3])):
        logp = model(input_ids=ids[shown][None]).logits[0, :-1].double().log_softmax(-1)
        picked = logp.gather(1, ids[shown][1:, None])[:, 0][generated[shown][1:]]
        loss = loss - advantage[i] * picked.sum() / rollout.response_mask.sum()
        if advantage[i] != 0:
            entropies.append(-(logp.exp() * logp).sum(-1)[generated[shown][1:]])
    loss.backward()
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert line["grad_norm"] == pytest.approx(grad_norm(model), rel=1e-4)
    assert line["mean_entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-4)


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
    lines = run(settings(updates=8, loss_temperature=1.0, learning_rate=1e-2)).metrics
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


def test_weights_of_the_reductions_by_hand():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert torch.equal(token_mean_weights(mask), mask / 4)
    by_row = torch.tensor([[1 / 6] * 3 + [0], [1 / 2, 0, 0, 0], [0] * 4])
    assert torch.allclose(sequence_mean_weights(mask), by_row)
    by_part = torch.tensor([[1 / 8] * 3 + [0], [1 / 8, 0, 0, 0], [0] * 4])
    assert torch.allclose(micro_batch_mean_weights(mask, 2), by_part)
    for weigh in (token_mean_weights, sequence_mean_weights):
        assert torch.equal(weigh(torch.zeros(2, 3)), torch.zeros(2, 3))


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
    asked = [WORDS[row[row.index(WORDS.index("<user>")) + 1]] for row in rows]
    assert asked == ["1", "2", "3", "1", "2", "3", "1", "2"]


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
        (
            dict(prompts=("1", "2\ud835")),
            "prompt must be Unicode text, got half of a surrogate pair",
        ),
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


def test_a_loss_that_is_not_finite_stops_before_the_step():
    model = make_model()
    poison = Spy(lambda rollout, mask: (token_mean_weights(mask) * math.inf, None))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="update 1: the loss is nan"):
        run(settings(), model, objective=poison)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
