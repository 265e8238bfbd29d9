"""Train and eval modes are the user's: kept module by module, after errors too."""

from __future__ import annotations

import pytest
import torch
from rl_runs import rl_settings, run_rl
from tiny_qwen2 import make_model, make_tokenizer
from trainer_runs import run, settings

from em_kernels.evaluator.accuracy import evaluate
from em_kernels.evaluator.asking import sequence_signals
from em_kernels.lm.heads import read_head
from em_kernels.lm.models import check_causal
from em_kernels.lm.modes import eval_mode
from em_kernels.trainer import Sampling, sample


def mixed_model():
    """In train mode, but for its first layer; with dropout in attention, which shows the mode."""
    model = make_model(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    model.model.norm.training = False
    return model


def modes(model) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


class Broken(Exception):
    """Stands for whatever ends a call: no memory, Ctrl-C."""


def fail_at(monkeypatch, model, call: int, error: BaseException) -> None:
    """The model's call number `call` fails."""
    inner, seen = model.model.forward, []

    def forward(*args, **kwargs):
        seen.append(1)
        if len(seen) == call:
            raise error
        return inner(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", forward)


def draw(model):
    return sample(model, make_tokenizer(), [[2, 5, 3]] * 2, Sampling(max_new_tokens=4), 2)


CALLS = {
    "sample": draw,
    "check_causal": lambda model: check_causal(model, read_head(model), [2, 5, 3]),
    "signals": lambda model: sequence_signals(
        model, read_head(model), draw(make_model(attention_dropout=0.5))
    ),
    "evaluate": lambda model: evaluate(
        model, make_tokenizer(), [("1 2", "3")], samples=2, max_new_tokens=4, progress=False
    ),
    "train": lambda model: run(settings(updates=2), model),
    "rl": lambda model: run_rl(rl_settings(updates=2), model),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_module_keeps_its_mode(call):
    model = mixed_model()
    before = modes(model)
    CALLS[call](model)
    assert modes(model) == before
    plain = make_model().eval()
    CALLS[call](plain)
    assert not any(modes(plain).values())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", CALLS)
def test_every_module_keeps_its_mode_after_an_error(monkeypatch, call, error):
    model = mixed_model()
    before, settings_of = modes(model), model.generation_config
    fail_at(monkeypatch, model, 1, error)
    with pytest.raises(type(error)):
        CALLS[call](model)
    assert modes(model) == before
    assert model.generation_config is settings_of


@pytest.mark.parametrize("failing", [6, 20, 30])
def test_a_run_that_fails_anywhere_keeps_modes_and_random_numbers(monkeypatch, failing):
    model = mixed_model()
    before, numbers = modes(model), torch.get_rng_state()
    fail_at(monkeypatch, model, failing, Broken())
    with pytest.raises(Broken):
        run(settings(updates=3), model)
    assert modes(model) == before
    assert torch.equal(torch.get_rng_state(), numbers)


def modes_in_training(model) -> list[dict[str, bool]]:
    """Of the calls in train mode of a run with two updates."""
    seen = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args: seen.append(modes(model)) if torch.is_grad_enabled() else None
    )
    run(settings(updates=2), model)
    hook.remove()
    return seen


def test_modules_in_eval_mode_below_a_model_in_train_mode_stay_so():
    model = mixed_model()
    before = modes(model)
    seen = modes_in_training(model)
    assert seen and all(now == before for now in seen)


def test_a_model_in_eval_mode_is_trained_in_train_mode():
    seen = modes_in_training(make_model().eval())
    assert seen and all(all(now.values()) for now in seen)


def test_a_train_method_of_the_models_own_is_called():
    """One that keeps a part in eval mode, as models with a frozen normalisation do."""
    model = make_model().eval()
    inner = model.train

    def train(mode: bool = True):
        inner(mode)
        model.model.norm.training = False
        return model

    model.train = train
    assert all(now["model.norm"] is False for now in modes_in_training(model))


def test_an_interrupted_run_leaves_no_gradient_to_the_next(monkeypatch):
    expected = run(settings(updates=1), make_model())
    model = make_model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    result = run(settings(updates=1), model)
    assert result.metrics[0]["grad_norm"] == expected.metrics[0]["grad_norm"]


def test_the_model_of_on_step_is_in_eval_mode():
    seen = []
    run(settings(updates=2), mixed_model(), on_step=lambda line, model: seen.append(modes(model)))
    assert len(seen) == 2 and not any(any(now.values()) for now in seen)


def test_eval_mode_nests():
    model = mixed_model()
    before = modes(model)
    with eval_mode(model):
        with eval_mode(model):
            model.model.train()
        assert not any(modes(model).values())
    assert modes(model) == before
