"""PEFT models in the trainer: what trains, checkpoints of adapters, resume, merged weights."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json

import pytest
import torch
from peft_models import KINDS, adapted, logits, native, trainable
from rl_runs import rl_settings
from tiny_qwen2 import make_model, make_tokenizer, save
from trainer_runs import run, settings, without_times

from em_kernels import cli
from em_kernels.evaluator.asking import weights_digest
from em_kernels.lm.adapters import base_parameters
from em_kernels.lm.models import list_checkpoints
from em_kernels.lm.ranks import Ranks
from em_kernels.trainer import CheckpointError, ModelError, Sampling, load_model, sample, train
from em_kernels.trainer.second_model import initial_model

peft = pytest.importorskip("peft")
pytest_plugins = ("peft_models",)  # its fixture `base`


@pytest.mark.parametrize("kind", KINDS)
def test_what_requires_grad_moves_and_nothing_else(base, kind):
    """LoRA's A has no gradient before its B has moved: three updates."""
    model = adapted(base, **copy.deepcopy(KINDS[kind]))
    before, frozen = trainable(model), copy.deepcopy(dict(base_parameters(model)))
    run(settings(updates=3, learning_rate=1e-2), model)
    still = [n for n, value in trainable(model).items() if torch.equal(value, before[n])]
    assert not still
    for name, value in base_parameters(model):
        assert torch.equal(value, frozen[name])


def test_gradient_checkpointing_changes_no_number(base):
    plain, spared = adapted(base), adapted(base)
    run(settings(updates=3, learning_rate=1e-2), plain)
    run(settings(updates=3, learning_rate=1e-2, gradient_checkpointing=True), spared)
    for name, value in trainable(plain).items():
        torch.testing.assert_close(trainable(spared)[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(target_modules=["q_proj", "lm_head"], use_dora=True), "LoRA that is not served"),
        (dict(kind=peft.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2)), "virtual tokens"),
        (
            dict(kind=peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
            "virtual tokens",
        ),
    ],
)
def test_adapters_that_the_loss_would_leave_out_are_refused(base, changes, message):
    model = adapted(base, **changes)
    before = trainable(model)
    with pytest.raises(ModelError, match=message):
        run(settings(updates=1), model)
    assert all(torch.equal(value, before[name]) for name, value in trainable(model).items())


def test_adapters_that_are_not_in_use_are_refused(base):
    merged = adapted(base)
    merged.merge_adapter()
    with pytest.raises(ModelError, match="would never move"):
        run(settings(updates=1), merged)
    two = adapted(base)
    two.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    two.base_model.set_adapter(["default", "other"])
    with pytest.raises(ModelError, match="one active adapter"):
        run(settings(updates=1), two)
    with pytest.raises(ModelError, match="get_peft_model returned"):
        run(settings(updates=1), adapted(base).get_base_model())


def test_what_the_adapters_files_do_not_hold_is_refused(base, tmp_path):
    model = adapted(base)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ModelError, match=r"model\.norm\.weight.*modules_to_save"):
        run(settings(updates=1, output=tmp_path), model)
    assert run(settings(updates=1), model).metrics  # nothing is to be written


@pytest.mark.parametrize("make", [adapted, native])
def test_resume_gives_the_bits_of_an_uninterrupted_run(base, tmp_path, make):
    common = dict(learning_rate=1e-2, save_every=1)
    whole = run(settings(updates=4, output=tmp_path / "whole", **common), make(base))
    parts = settings(updates=2, output=tmp_path / "parts", keep_checkpoints=1, **common)
    run(parts, make(base))
    assert [p.name for p in list_checkpoints(tmp_path / "parts")] == ["checkpoint-2"]
    seen, model = [], make(base)
    for value in (p for p in model.parameters() if p.requires_grad):
        value.data.normal_()  # what is loaded does not depend on how the new one was drawn
    resumed = run(
        dataclasses.replace(parts, updates=4),
        model,
        resume=True,
        on_step=lambda line, model: seen.append(line["update"]),
    )
    assert seen == [3, 4]
    assert without_times(resumed.metrics) == without_times(whole.metrics)
    expected = trainable(whole.model)
    assert all(torch.equal(value, expected[name]) for name, value in trainable(model).items())
    assert [p.name for p in list_checkpoints(tmp_path / "parts")] == ["checkpoint-4"]


def test_parameters_that_layers_share_are_resumed(base, tmp_path):
    """VB-LoRA has one bank of vectors for all layers, under one name in the file."""
    options = dict(r=2, num_vectors=4, vector_length=4, topk=2, target_modules=["q_proj"])

    def make():
        return adapted(base, kind=peft.VBLoRAConfig(**options))

    config = settings(updates=2, output=tmp_path, save_every=1, learning_rate=1e-2)
    whole = run(dataclasses.replace(config, updates=3, output=None), make())
    run(config, make())
    resumed = run(dataclasses.replace(config, updates=3), make(), resume=True)
    assert without_times(resumed.metrics) == without_times(whole.metrics)
    expected = trainable(whole.model)
    assert all(torch.equal(v, expected[name]) for name, v in trainable(resumed.model).items())


@pytest.mark.parametrize("name", ["weight", "model", "base_layer"])
def test_an_adapter_may_have_the_name_of_a_part_of_the_model(base, tmp_path, name):
    config = settings(updates=1, output=tmp_path, save_every=1, learning_rate=1e-2)
    model = run(config, adapted(base, name=name)).model
    loaded = load_model(str(tmp_path / "checkpoint-1"), "cpu")[0]
    torch.testing.assert_close(logits(loaded), logits(model))
    assert {n for n, _ in base_parameters(model)} == {n for n, _ in base_parameters(loaded)}


def test_a_model_compiled_below_its_adapter_is_refused_where_it_would_be_saved(base, tmp_path):
    below = torch.compile(load_model(base, "cpu")[0], backend="eager")
    model = peft.get_peft_model(below, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"fit no other: use model\.compile\(\)"):
        run(settings(updates=1, output=tmp_path / "run"), model)
    assert not (tmp_path / "run").exists()


def test_the_active_adapter_keeps_its_name_and_the_others_stay(base, tmp_path):
    def make():
        model = adapted(base, name="policy")
        model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["v_proj"]))
        return model

    config = settings(updates=2, output=tmp_path, save_every=1, learning_rate=1e-2)
    run(config, make())
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "checkpoint-2" / "policy").exists()
    resumed = run(dataclasses.replace(config, updates=3), make(), resume=True)
    assert resumed.model.active_adapters == ["policy"]
    assert [line["update"] for line in resumed.metrics] == [1, 2, 3]


def test_a_run_goes_on_from_the_command_line(base, tmp_path, capsys):
    config = settings(updates=2, output=tmp_path / "run", save_every=1, device="cpu")
    run(config, adapted(base))
    expected = run(settings(updates=3, device="cpu"), adapted(base))
    folder = str(tmp_path / "run")
    assert cli.main(["train", "--resume", folder, "--updates", "3", "--quiet"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert without_times(lines) == without_times(expected.metrics)
    (tmp_path / "problems.jsonl").write_text('{"problem": "1 2", "answer": "3"}\n')
    options = ["--problems", str(tmp_path / "problems.jsonl"), "--max-new-tokens", "4"]
    options += ["--output", str(tmp_path / "eval"), "--model", folder + "/checkpoint-3"]
    assert cli.main(["eval", *options, "--device", "cpu", "--quiet"]) == 0
    settings_of = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert settings_of["weights"] == weights_digest(load_model(folder + "/checkpoint-3", "cpu")[0])


def test_other_bases_and_adapters_are_refused(base, tmp_path):
    config = settings(updates=1, output=tmp_path / "run", save_every=1)
    run(config, adapted(base))
    more = dataclasses.replace(config, updates=2)
    with pytest.raises(ModelError, match="weights below the adapter"):
        run(more, adapted(save(tmp_path / "seed 7", seed=7)), resume=True)
    with pytest.raises(ModelError, match="lora_alpha was 8, got 32"):
        run(more, adapted(base, lora_alpha=32), resume=True)
    with pytest.raises(ModelError, match=r"target_modules was \['q_proj'\]"):
        run(more, adapted(base, target_modules=["v_proj"]), resume=True)
    with pytest.raises(ModelError, match="trains an adapter, got a model without one"):
        run(more, load_model(base, "cpu")[0], resume=True)
    plain = settings(updates=1, output=tmp_path / "plain", save_every=1)
    run(plain, load_model(base, "cpu")[0])
    with pytest.raises(ModelError, match="trains a whole model, got one with an adapter"):
        run(dataclasses.replace(plain, updates=2), adapted(base), resume=True)


def test_a_run_without_a_checkpoint_does_not_go_on_as_another(base, tmp_path, capsys):
    """Stopped before the first: the command line would train all of `config.model` instead."""
    config = settings(model=base, updates=2, output=tmp_path, save_every=0, device="cpu")

    def stop(line, model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, adapted(base), on_step=stop)
    assert cli.main(["train", "--resume", str(tmp_path), "--quiet"]) == 2
    assert "pass the PEFT model that it was started with" in capsys.readouterr().err
    resumed = run(config, adapted(base), resume=True)
    expected = run(dataclasses.replace(config, output=None), adapted(base))
    assert without_times(resumed.metrics) == without_times(expected.metrics)


def test_a_base_in_another_dtype(base, tmp_path):
    """A resumed run has that of its start; for an evaluation another may be asked for."""
    config = settings(updates=1, output=tmp_path, save_every=1, device="cpu")

    def half():
        model = load_model(base, "cpu", torch.bfloat16)[0]
        torch.manual_seed(0)
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))

    run(config, half())
    more = dataclasses.replace(config, updates=2)
    with pytest.raises(ModelError, match=r"weights of torch\.bfloat16, got torch\.float32"):
        run(more, adapted(base), resume=True)
    loaded = load_model(str(tmp_path / "checkpoint-1"), "cpu")[0]
    assert loaded.get_base_model().dtype == torch.float32
    resumed = train(more, resume=True, progress=False)
    assert resumed.model.get_base_model().dtype == torch.bfloat16
    expected = run(dataclasses.replace(more, output=None), half())
    assert without_times(resumed.metrics) == without_times(expected.metrics)


def test_settings_that_do_not_fit_the_model(base):
    with pytest.raises(ValueError, match="save_merged is for a PEFT model"):
        run(settings(updates=1, save_merged=True))
    with pytest.raises(ValueError, match="shards_only must be False"):
        run(settings(updates=1, shards_only=True), adapted(base))
    with pytest.raises(ModelError, match="cannot be merged"):
        run(settings(updates=1, save_merged=True), native(base))
    quantised = adapted(base)
    quantised.config.quantization_config = {"bits": 4}
    with pytest.raises(ModelError, match="quantised"):
        run(settings(updates=1, save_merged=True), quantised)


def test_a_disk_that_fills_up_leaves_the_last_good_adapter(base, tmp_path, monkeypatch):
    config = settings(output=tmp_path, updates=2, save_every=1, save_merged=True)
    kept = type(make_model()).save_pretrained

    def full(self, folder, **kwargs):
        kept(self, folder, **kwargs)
        if "checkpoint-2" in str(folder):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(make_model()), "save_pretrained", full)
    with pytest.raises(CheckpointError, match="No space left on device; the last good"):
        run(config, adapted(base))
    monkeypatch.setattr(type(make_model()), "save_pretrained", kept)
    assert [p.name for p in tmp_path.glob("*checkpoint-*")] == ["checkpoint-1"]
    resumed = run(config, adapted(base), resume=True)
    expected = run(dataclasses.replace(config, output=None), adapted(base))
    assert without_times(resumed.metrics) == without_times(expected.metrics)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_sampling_uses_and_keeps_no_generation_settings_of_the_model(base, task):
    """Those of the model inside a PEFT model, which is whose generate runs."""
    model, plain = adapted(base, task_type=task), load_model(base, "cpu")[0]
    model.get_base_model().generation_config.top_k = 1
    kept = model.get_base_model().generation_config
    arguments = (make_tokenizer(), [[2, 5, 3]] * 4, Sampling(max_new_tokens=8), 4)
    torch.manual_seed(3)
    drawn = sample(model, *arguments)
    torch.manual_seed(3)
    assert torch.equal(drawn.input_ids, sample(plain, *arguments).input_ids)
    assert model.get_base_model().generation_config is kept
    assert model.generation_config is kept


@pytest.mark.parametrize("estimator", ["k3", "exact"])
def test_rl_with_a_reference_and_old_log_probabilities(estimator, base, tmp_path):
    """The adapter trains, the reference stays, and it shares the weights below the adapter."""
    config = rl_settings(
        ref_kl=0.1,
        kl_estimator=estimator,
        epochs=2,
        updates=3,
        output=str(tmp_path / "parts"),
        save_every=1,
    )
    model = adapted(base)
    reference = initial_model(config, model, Ranks())
    shared = {p.data_ptr() for p in model.parameters()} & {
        p.data_ptr() for p in reference.parameters()
    }
    assert len(shared) == sum(not p.requires_grad for p in model.parameters())
    before = trainable(model)
    whole = run(dataclasses.replace(config, output=None), model)
    assert not any(torch.equal(v, before[n]) for n, v in trainable(model).items())
    assert whole.metrics[-1]["ref_kl"] > 0
    run(dataclasses.replace(config, updates=2), adapted(base))
    resumed = run(config, adapted(base), resume=True)
    assert without_times(resumed.metrics) == without_times(whole.metrics)
    with pytest.raises(ValueError, match="model must be given with ref_kl"):
        train(dataclasses.replace(config, updates=4), resume=True, progress=False)
