"""Checkpoints of adapters: what loads them, and merged weights."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys

import pytest
import torch
import transformers
from peft_models import KINDS, adapted, logits
from tiny_qwen2 import make_model, make_tokenizer, save
from trainer_runs import run, settings, without_times

from em_kernels.evaluator.asking import weights_digest
from em_kernels.lm.adapters import is_adapted, merged_copy
from em_kernels.lm.ranks import Ranks
from em_kernels.trainer import ModelError, load_model, merge_checkpoint, train
from em_kernels.trainer.run import check_shardable

peft = pytest.importorskip("peft")
pytest_plugins = ("peft_models",)  # its fixture `base`


def test_a_checkpoint_loads_with_the_logits_of_the_run(base, tmp_path, monkeypatch):
    """From any folder, though the base was named by a relative path."""
    monkeypatch.chdir(tmp_path)
    save("model")
    result = run(settings(updates=2, output="run", learning_rate=1e-2), adapted("model"))
    monkeypatch.chdir("/")
    loaded, tokenizer = load_model(tmp_path / "run" / "checkpoint-2", "cpu")
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(result.model))
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    further = train(
        settings(model=tmp_path / "run" / "checkpoint-2", updates=1, device="cpu"), progress=False
    )
    assert not torch.equal(logits(further.model), logits(result.model))
    assert is_adapted(further.model)


def test_a_folder_that_cannot_be_loaded_says_why(base, tmp_path, monkeypatch):
    folder = tmp_path / "run" / "checkpoint-1"
    model = save(tmp_path / "model")
    run(settings(updates=1, output=tmp_path / "run"), adapted(model))
    shown = json.loads((folder / "adapter_config.json").read_text())
    make_model(seed=3).save_pretrained(model)
    with pytest.raises(ModelError, match="weights below the adapter"):
        load_model(str(folder), "cpu")
    written = (folder / "base_model.json").read_text()
    for broken in ("{", "[]", "{}", written.replace("weights", "digest")):
        (folder / "base_model.json").write_text(broken)
        with pytest.raises(ModelError, match=r"base_model\.json cannot be read .*remove it"):
            load_model(str(folder), "cpu")
    (folder / "base_model.json").write_text(written)
    for name, message in (
        (None, "names no model below"),
        (str(tmp_path / "gone"), "is an adapter.*no such folder.*base_model_name_or_path"),
        (str(folder), "is an adapter itself"),
    ):
        shown["base_model_name_or_path"] = name
        (folder / "adapter_config.json").write_text(json.dumps(shown))
        with pytest.raises(ModelError, match=message):
            load_model(str(folder), "cpu")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install em-kernels\[peft\]"):
        load_model(str(folder), "cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_load_in_transformers_and_leave_the_run_alone(base, tmp_path, kind):
    config = settings(updates=2, learning_rate=1e-2, save_every=1)
    expected = run(config, adapted(base, **copy.deepcopy(KINDS[kind])))
    model = adapted(base, **copy.deepcopy(KINDS[kind]))
    saved = dataclasses.replace(config, output=str(tmp_path), save_merged=True)
    result = run(saved, model)
    assert without_times(result.metrics) == without_times(expected.metrics)
    assert weights_digest(result.model) == weights_digest(expected.model)
    merged = result.checkpoint / "merged"
    plain = transformers.AutoModelForCausalLM.from_pretrained(merged)
    assert type(plain) is type(make_model())
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(plain), logits(load_model(base, "cpu")[0]), atol=1e-3)
    assert plain.generation_config.eos_token_id == 1
    assert load_model(str(merged), "cpu")[1].get_vocab() == make_tokenizer().get_vocab()


def test_an_adapter_is_merged_afterwards(base, tmp_path):
    result = run(settings(updates=2, output=tmp_path / "run", learning_rate=1e-2), adapted(base))
    assert not (result.checkpoint / "merged").exists()
    merged = merge_checkpoint(result.checkpoint, tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(logits(plain), logits(result.model), rtol=1e-4, atol=1e-4)


def test_an_adapter_on_quantised_weights(base, tmp_path):
    """Resumed on these; loaded and merged on the weights that they were made of."""
    quantization = pytest.importorskip("torchao.quantization")

    def make():
        model = load_model(base, "cpu")[0]
        quantization.quantize_(
            model,
            quantization.Int8WeightOnlyConfig(),
            filter_fn=lambda layer, name: name.endswith("_proj"),
        )
        torch.manual_seed(0)
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))

    config = settings(updates=2, output=tmp_path / "run", save_every=1, learning_rate=1e-2)
    with pytest.raises(ModelError, match="not merged into quantised weights"):
        run(dataclasses.replace(config, save_merged=True), make())
    run(config, make())
    more = dataclasses.replace(config, updates=3)
    with pytest.raises(ModelError, match="weights below the adapter"):
        run(more, adapted(base), resume=True)
    resumed = run(more, make(), resume=True)
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    torch.testing.assert_close(
        logits(load_model(checkpoint, "cpu")[0]), logits(resumed.model), rtol=0.1, atol=0.1
    )
    merge_checkpoint(checkpoint, tmp_path / "whole")
    with pytest.raises(ModelError, match="cannot be sharded over several ranks: train in one"):
        check_shardable(make(), Ranks(0, 2))
    check_shardable(make(), Ranks())
    check_shardable(adapted(base), Ranks(0, 2))
    assert weights_digest(make()) != weights_digest(adapted(base))


def test_an_adapter_that_peft_cannot_merge(base):
    model = adapted(base, kind=peft.LilyConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"cannot be merged: .*Lily"):
        merged_copy(model)


def test_digests_tell_adapters_apart(base):
    one = adapted(base)
    assert weights_digest(one) == weights_digest(adapted(base))
    assert weights_digest(one) != weights_digest(adapted(base, lora_alpha=32))
    assert weights_digest(one) != weights_digest(adapted(base, seed=1))


def test_a_merged_copy_changes_neither_model_nor_modes(base):
    model = adapted(base, init_lora_weights=False, target_modules=["q_proj", "embed_tokens"])
    model.train()
    before, digest = logits(copy.deepcopy(model)), weights_digest(model)
    merged = merged_copy(model)
    assert weights_digest(model) == digest and model.training and not is_adapted(merged)
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)
    assert not merged.config.tie_word_embeddings and model.config.tie_word_embeddings
