"""Long answers on little memory: --long, parameters and states in few bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import transformers
from rl_runs import rl_settings, run_rl
from safetensors.torch import load_file
from tiny_qwen2 import WORDS, make_model, make_tokenizer, save
from trainer_runs import run, settings, without_times

from em_kernels import cli
from em_kernels.lm import pieces
from em_kernels.trainer import ModelError, TrainConfig, adamw, read_config, train
from em_kernels.trainer import run as start
from em_kernels.trainer.adamw import RoundingAdamW
from em_kernels.trainer.run import start_run


@pytest.fixture
def small_pieces(monkeypatch):
    """Those of the tiny model's sequences; returns the tokens that its MLPs are given."""
    monkeypatch.setattr(pieces, "PIECE", 4)
    seen, kind = [], type(make_model().model.layers[0].mlp)
    whole = kind.forward
    monkeypatch.setattr(
        kind, "forward", lambda self, x: (seen.append(x.shape[:2].numel()), whole(self, x))[1]
    )
    return seen


def check_same_numbers(actual: list[dict], expected: list[dict]) -> None:
    for ours, theirs in zip(without_times(actual), without_times(expected), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            near = value if isinstance(value, str | None) else pytest.approx(value, 1e-4, 1e-6)
            assert ours[name] == near, name


def test_long_changes_the_numbers_by_no_more_than_rounding(small_pieces):
    expected = run(settings(micro_batch=1))
    assert max(small_pieces) > 14
    small_pieces.clear()
    result = run(settings(long=True, micro_batch=None))
    check_same_numbers(result.metrics, expected.metrics)
    assert max(small_pieces) <= 14  # the prompt twice, before the MLPs are split
    assert not any("forward" in module.__dict__ for module in result.model.modules())


def test_long_in_reinforcement_learning(small_pieces):
    changes = dict(updates=1, objective="grpo", ref_kl=0.1)
    expected = run_rl(rl_settings(**changes))
    result = run_rl(rl_settings(**changes, long=True))
    check_same_numbers(result.metrics, expected.metrics)


def test_long_has_one_answer_at_a_time_and_checkpoints_the_layers(monkeypatch):
    assert TrainConfig(long=True).micro_batch == 1
    assert TrainConfig(long=True, micro_batch=4).micro_batch == 4
    assert TrainConfig(long=True, compat="official").micro_batch == 2  # the loss depends on it
    assert TrainConfig().micro_batch == 2
    given_back = []
    monkeypatch.setattr(start, "give_back_freed", lambda: given_back.append(True))
    state = start_run(settings(long=True), make_model(), make_tokenizer(), resume=False)
    assert any(getattr(part, "gradient_checkpointing", False) for part in state.model.modules())
    assert given_back == [True]


@pytest.mark.parametrize("long", [False, True])
def test_long_needs_no_mask_of_all_pairs_of_tokens(long, monkeypatch):
    masks, own = [], F.scaled_dot_product_attention

    def watched(*args, attn_mask=None, **others):
        if torch.is_grad_enabled():
            masks.append(attn_mask is not None)
        return own(*args, attn_mask=attn_mask, **others)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    run(settings(updates=1, long=long, micro_batch=None))
    assert any(masks) is not long and masks


def test_a_model_whose_mlp_is_no_module_is_said():
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=24,
            word_embed_proj_dim=16,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )
    with pytest.warns(UserWarning, match="2 of 2 layers of OPTForCausalLM have no MLP that can"):
        run(settings(updates=1, responses=2, long=True), model)


def test_pure_bfloat16_has_parameters_gradients_and_states_in_bfloat16(tmp_path):
    config = settings(
        model=save(tmp_path / "model"), output=tmp_path / "run", updates=1, dtype="pure_bfloat16"
    )
    result = train(config, progress=False)
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    weights = load_file(result.checkpoint / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    start = make_model().to(torch.bfloat16).state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in weights.items())
    expected = run(settings(updates=1)).metrics[0]["loss"]
    assert result.metrics[0]["loss"] == pytest.approx(expected, rel=0.2)


def test_a_model_that_is_passed_has_the_dtype_that_is_asked_for():
    with pytest.raises(ModelError, match=r"parameters are bfloat16, got torch.float32: pass model"):
        run(settings(dtype="pure_bfloat16"))
    model = make_model().to(torch.bfloat16)
    state = start_run(settings(dtype="pure_bfloat16"), model, make_tokenizer(), resume=False)
    assert type(state.optimizer) is RoundingAdamW


@pytest.mark.parametrize("states", [None, "float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("dtype", ["float32", "pure_bfloat16"])
def test_resume_gives_the_bits_of_an_uninterrupted_run(dtype, states, tmp_path, monkeypatch):
    monkeypatch.setattr(adamw, "LEAST", 32)
    config = settings(
        model=save(tmp_path / "model"),
        output=tmp_path / "whole",
        updates=3,
        responses=4,
        save_every=0,
        dtype=dtype,
        optimizer_dtype=states,
        long=True,
    )
    expected = train(config, progress=False)
    parts = dataclasses.replace(config, output=str(tmp_path / "parts"), updates=2)
    train(parts, progress=False)
    actual = train(dataclasses.replace(parts, updates=3), resume=True, progress=False)
    assert without_times(actual.metrics) == without_times(expected.metrics)
    for name, value in expected.model.state_dict().items():
        assert torch.equal(actual.model.state_dict()[name], value)
    with pytest.raises(ValueError, match="dtype cannot change when a run is resumed"):
        other = "bfloat16" if states != "bfloat16" else "8bit"
        train(dataclasses.replace(parts, optimizer_dtype=other), resume=True, progress=False)


def test_pure_bfloat16_of_checkpoints_in_parts(tmp_path):
    from em_kernels.lm.models import load_architecture

    save(tmp_path / "model")
    model, _ = load_architecture(tmp_path / "model", "cpu", torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_command_line(tmp_path, capsys):
    flags = "--long --dtype pure_bfloat16 --optimizer-dtype 8bit --updates 3 --responses 2"
    flags += " --max-new-tokens 4 --save-every 1 --quiet --prompt 3"
    output = str(tmp_path / "run")
    command = ["train", "--model", save(tmp_path / "model"), "--output", output, *flags.split()]
    assert cli.main(command) == 0
    config = read_config(output)
    assert (config.long, config.dtype, config.optimizer_dtype) == (True, "pure_bfloat16", "8bit")
    left = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert left == ["checkpoint-2", "checkpoint-3"]
    assert "--keep-checkpoints" in capsys.readouterr().out
