"""Runs with odd files, with files of other runs, and runs that are killed again and again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from command_line import error_of
from hostile import ODD_OBJECTS
from tiny_qwen2 import make_model, make_tokenizer, save
from trainer_runs import run as run_in_memory
from trainer_runs import settings, without_times

from em_kernels.analysis.metrics import read_metrics
from em_kernels.cli.app import main
from em_kernels.evaluator import EvalConfig
from em_kernels.lm.lock import LOCK, held
from em_kernels.trainer import CheckpointError, InUseError, ModelError, TrainConfig, train

torch.set_num_threads(1)


def config(root, name="run", **changes) -> TrainConfig:
    given = dict(responses=2, micro_batch=2, prompts=("1",), max_new_tokens=4, save_every=1)
    return settings(model=str(root / "model"), output=str(root / name), **{**given, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, and two runs of it of two updates, with different seeds."""
    root = tmp_path_factory.mktemp("made")
    save(root / "model")
    for name, seed in (("run", 0), ("other", 1)):
        train(config(root, name, seed=seed), progress=False)
    return root


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made / "run", tmp_path / "run")


def resume(run, updates=3, **changes):
    return train(config(run.parent, updates=updates, **changes), resume=True, progress=False)


@pytest.fixture
def going_on(made, run):
    """What resumes the run, with the model where it was."""
    shutil.copytree(made / "model", run.parent / "model")
    path = run / "train_config.json"
    path.write_text(path.read_text().replace(str(made), str(run.parent)))
    return lambda **changes: resume(run, **changes)


# One at a time


def test_a_second_trainer_is_told_who_is_there(going_on, run):
    with held(run, "a training run"), pytest.raises(InUseError, match=r"in use \(a training run"):
        going_on()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    going_on()
    assert not (run / LOCK).exists()


def test_the_second_of_two_commands_ends_with_2(run, capsys):
    with held(run, "a training run"):
        said = error_of(capsys, "train", "--resume", run)
    assert f"{run} is in use (a training run, process {os.getpid()} on" in said


def test_a_run_that_is_killed_again_and_again_is_that_of_one_that_was_not(made, tmp_path):
    """At whatever moment it is killed; each time the next one takes over what it left."""
    updates, kills, seed = 3, 20 if "EM_KERNELS_BIG_TESTS" in os.environ else 4, random.Random(0)
    begun = time.monotonic()
    whole = train(config(made, "whole", updates=updates), progress=False)
    took = time.monotonic() - begun
    given = replace(config(made, updates=updates), output=str(tmp_path / "killed"))
    code = (
        "import sys, torch; torch.set_num_threads(1); sys.path[:0] = sys.argv[1:2]\n"
        "from em_kernels.trainer import TrainConfig, train\n"
        "from pathlib import Path\n"
        "import json, os, time\n"
        "values = json.loads(sys.argv[2])\n"
        "config = TrainConfig(**{**values, 'prompts': tuple(values['prompts'])})\n"
        "for _ in range(25):\n"  # a fork each: the imports are made once
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        resume = (Path(config.output) / 'train_config.json').exists()\n"
        "        train(config, resume=resume, progress=False)\n"
        "        os._exit(0)\n"
        "    print(child, flush=True)\n"
        "    if os.waitpid(child, 0)[1] == 0: break\n"
    )
    values = {k: v for k, v in given.to_written().items() if k != "log_to"}
    command = [sys.executable, "-W", "ignore", "-c", code, os.path.dirname(__file__)]
    process = subprocess.Popen(
        [*command, json.dumps(values)], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdout is not None
    kinds = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    for number, line in enumerate(process.stdout):
        if number >= kills:
            continue
        time.sleep(seed.uniform(0.0, 0.4 * took))
        try:
            os.kill(int(line), kinds[number % 3])
        except ProcessLookupError:
            break
    assert process.wait() == 0
    process.stdout.close()
    found = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").open()]
    assert without_times(found) == without_times(whole.metrics)
    last = tmp_path / "killed" / f"checkpoint-{updates}" / "model.safetensors"
    for name, value in safetensors.torch.load_file(whole.checkpoint / last.name).items():
        assert torch.equal(safetensors.torch.load_file(last)[name], value)
    assert not (tmp_path / "killed" / LOCK).exists()


# Files of another run


@pytest.mark.parametrize(
    "part, what",
    [
        ("checkpoint-2/model.safetensors", "the weights"),
        ("checkpoint-2/shards/__0_0.distcp", "the states of the optimiser"),
        ("metrics.jsonl", "the lines of metrics.jsonl"),
        ("checkpoint-2", "the lines of metrics.jsonl"),
    ],
)
def test_files_of_another_run_of_the_same_shapes_are_refused(made, run, going_on, part, what):
    if (run / part).is_dir():
        shutil.rmtree(run / part)
        shutil.copytree(made / "other" / part, run / part)
    else:
        shutil.copy(made / "other" / part, run / part)
    with pytest.raises(CheckpointError, match=f"checkpoint-2: {what}.* are not those that it was"):
        going_on()


def test_a_checkpoint_under_another_name_is_refused(run, going_on):
    lines = (run / "metrics.jsonl").read_text()
    (run / "checkpoint-2").rename(run / "checkpoint-3")
    (run / "metrics.jsonl").write_text(lines + lines.splitlines()[1].replace("2", "3", 1) + "\n")
    with pytest.raises(CheckpointError, match="checkpoint-3: the updates that its name says"):
        going_on(updates=4)


def test_a_checkpoint_of_before_there_were_digests_is_gone_on_with(run, going_on):
    (run / "checkpoint-2" / "shards" / "belongs.json").unlink()
    assert [line["update"] for line in going_on().metrics] == [1, 2, 3]


# Odd files


@pytest.mark.parametrize("kind", ODD_OBJECTS)
def test_odd_settings_of_a_run(run, capsys, kind):
    for name in ("train_config.json",):
        (run / name).write_bytes(ODD_OBJECTS[kind])
        if kind != "empty":  # all settings at their defaults, which are not those of the run
            assert name in error_of(capsys, "train", "--resume", run)
            assert name in error_of(capsys, "report", run)
    for suffix in ("json", "yaml", "toml"):
        path = run / f"odd.{suffix}"
        path.write_bytes(ODD_OBJECTS[kind])
        said = error_of(capsys, "train", "--config", path, "--output", run.parent / "new")
        assert path.name in said or "model must be given" in said


@pytest.mark.parametrize(
    "values", [{"objective": []}, {"objective": "none"}, {"objective": {}, "schedule": 3}]
)
def test_settings_of_a_run_with_odd_entries(run, capsys, values):
    (run / "train_config.json").write_text(json.dumps(values))
    assert "train_config.json: " in error_of(capsys, "train", "--resume", run)


@pytest.mark.parametrize("kind", ODD_OBJECTS)
def test_odd_digests_of_a_checkpoint(run, going_on, kind):
    path = run / "checkpoint-2" / "shards" / "belongs.json"
    path.write_bytes(ODD_OBJECTS[kind])
    with pytest.raises(CheckpointError, match=r"belongs\.json|are not those that it was"):
        going_on()


ODD_METRICS = {
    "list": "[1]\n",
    "update": '{"update": "1"}\n',
    "loss": '{"update": 1, "loss": "0.1"}\n',
    "half": '{"update": 1, "lo\n',
    "nul": "\0\n",
    "deep": "[" * 100_000 + "\n",
}


@pytest.mark.parametrize("kind", ODD_METRICS)
def test_odd_lines_of_metrics(run, going_on, kind):
    path = run / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(ODD_METRICS[kind] + whole)
    with pytest.raises(CheckpointError, match=r"metrics.jsonl, line 1: .*put the file back"):
        going_on()
    lines, broken = read_metrics(run)
    assert [line["update"] for line in lines] == [1, 2] and len(broken) == 1
    path.write_text(whole)
    assert len(going_on().metrics) == 3


def test_metrics_that_two_wrote_or_that_end_early(run, going_on):
    path = run / "metrics.jsonl"
    first, second = path.read_text().splitlines(keepends=True)
    path.write_text(first + first + second + second)
    with pytest.raises(CheckpointError, match="line 2: update 1 where 2 should be"):
        going_on()
    assert read_metrics(run)[1] == [f"line {i}: update {i // 2} for a second time" for i in (2, 4)]
    path.write_text(first)
    with pytest.raises(CheckpointError, match=r"ends before update 2, of which there is a check"):
        going_on()


def test_line_ends_of_other_systems_change_nothing(run, going_on):
    for name in ("metrics.jsonl", "train_config.json"):
        text = (run / name).read_bytes().replace(b"\n", b"\r\n")
        (run / name).write_bytes(b"\xef\xbb\xbf" + text)
    assert [line["update"] for line in going_on().metrics] == [1, 2, 3]


def test_a_weight_that_is_nan_is_named(made, tmp_path, capsys):
    folder = shutil.copytree(made / "model", tmp_path / "model")
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"problem": "1", "answer": "1"}\n')
    named = "1 of the 1536 numbers of its parameter model.layers.1.mlp.up_proj.weight are NaN"
    new = ("--output", tmp_path / "new")
    assert named in error_of(capsys, "train", "--model", folder, *new)
    assert named in error_of(capsys, "eval", "--model", folder, "--problems", problems, *new)
    model = make_model()
    model.model.norm.weight.data[2] = float("nan")
    with pytest.raises(ModelError, match=r"model\.norm\.weight are NaN"):
        run_in_memory(settings(updates=1), model, make_tokenizer())


# What is said


def test_a_finished_run_says_that_nothing_was_done(run, going_on):
    with pytest.warns(UserWarning, match="no update was made: .* has 2, all of them; .*`updates`"):
        going_on(updates=2)
    before = {path: path.read_bytes() for path in run.glob("*.*")}
    with pytest.warns(UserWarning, match="has 2, more than the 1 asked for"):
        assert len(going_on(updates=1).metrics) == 2
    assert {path: path.read_bytes() for path in run.glob("*.*")} == before


def test_a_warning_of_a_command_is_one_line(run, going_on, capsys):
    with warnings.catch_warnings():  # pytest's way of showing them is not the interpreter's
        warnings.simplefilter("always")
        warnings.showwarning = lambda *told: sys.stderr.write(warnings.formatwarning(*told[:4]))
        assert main(["train", "--resume", str(run), "--quiet"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "no update" in line]
    assert len(lines) == 1 and lines[0].startswith("em-kernels: warning: no update was made")


@pytest.mark.parametrize(
    "arguments, name",
    [
        (["train", "--model", "x", "--output", ""], "--output"),
        (["train", "--resume", " "], "--resume"),
        (["train", "--config", "", "--output", "x"], "--config"),
        (["eval", "--model", "", "--problems", "x"], "--model"),
        (["eval", "--model", "x", "--problems", "x", "--output", ""], "--output"),
        (["merge", "x", "--output", ""], "--output"),
        (["report", ""], "--folder"),
        (["analyze", "law", "x", ""], "--folders"),
    ],
)
def test_an_empty_name_is_refused(arguments, name, capsys):
    assert f"{name} must not be empty" in error_of(capsys, *arguments)


@pytest.mark.parametrize("value", ["", " ", "a\0b"])
def test_an_empty_path_is_no_setting(value):
    for make in (
        lambda: TrainConfig(output=value),
        lambda: TrainConfig(model=value),
        lambda: EvalConfig("model", "problems", value),
    ):
        with pytest.raises(ValueError, match="must be a path or a name, got"):
            make()


def test_a_long_path_is_shortened_in_every_message(capsys):
    long = "/".join(["a" * 200] * 20)
    for arguments in (
        ["train", "--model", long, "--output", "x"],
        ["train", "--resume", long],
        ["report", long],
        ["merge", long, "--output", "x"],
        ["eval", "--model", "x", "--problems", f"{long} {long}.jsonl"],
    ):
        said = error_of(capsys, *arguments)
        assert len(said) < 1700 and "a" * 200 not in said and "..." in said


def test_a_run_that_is_not_resumed_is_as_it_was(made):
    """The digests are those of the files, whoever computes them."""
    one = json.loads((made / "run/checkpoint-2/shards/belongs.json").read_text())
    again = train(config(made, "again"), progress=False)
    assert again.checkpoint is not None
    other = json.loads((again.checkpoint / "shards/belongs.json").read_text())
    assert {**one, "metrics": None} == {**other, "metrics": None}
    assert replace(config(made), seed=1) != config(made)
