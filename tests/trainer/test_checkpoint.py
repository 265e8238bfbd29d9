"""Checkpoints: resume, full disks, interrupted saves."""

from __future__ import annotations

import dataclasses
import errno
import json
import resource

import pytest
import torch
import transformers
from tiny_qwen2 import make_model, make_tokenizer, save
from trainer_runs import run, settings, without_times

from em_kernels.lm.chat import encode_prompt
from em_kernels.trainer import CheckpointError, train
from em_kernels.trainer import checkpoint as checkpoints


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


def test_resume_into_a_model_that_is_compiled(tmp_path):
    """What torch.compile returned has other names for the weights."""
    config = settings(updates=1, output=str(tmp_path))
    first = run(config)
    model = torch.compile(make_model(seed=5), backend="eager")
    resumed = train(config, model, make_tokenizer(), resume=True, progress=False)
    expected = first.model.state_dict()
    for name, value in resumed.model._orig_mod.state_dict().items():
        assert torch.equal(value, expected[name])


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
    with pytest.raises(ValueError, match=r"learning_rate cannot change .* 0.001, got 0.5"):
        run(dataclasses.replace(config, learning_rate=0.5), resume=True)
    with pytest.raises(ValueError, match="holds a run already"):
        run(config)
    (tmp_path / "empty").mkdir()
    for name, reason in (("nothing", "no such folder: .*nothing"), ("empty", "no training run")):
        with pytest.raises(FileNotFoundError, match=reason):
            run(dataclasses.replace(config, output=str(tmp_path / name)), resume=True)
    assert not (tmp_path / "nothing").exists()


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
    kept = checkpoints.write_published

    def full(model, tokenizer, folder, merged):
        kept(model, tokenizer, folder, merged)
        if "checkpoint-2" in folder.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_published", full)
    with pytest.raises(CheckpointError, match="No space left on device; the last good"):
        run(config)
    monkeypatch.setattr(checkpoints, "write_published", kept)
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
