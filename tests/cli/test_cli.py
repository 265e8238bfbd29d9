"""The command line: train, a killed run resumed, eval, info, errors of one line."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import tiny_qwen2
import torch
import transformers
from command_line import error_of

import em_kernels
from em_kernels import cli
from em_kernels.trainer import TrainConfig, train
from em_kernels.trainer.checkpoint import write_config

ROOT = Path(__file__).parents[2]
TIMES = ("tokens_per_second", "sample_seconds", "loss_seconds")
ALL = ["--keep-checkpoints", "0"]
FAST = ["--responses", "6", "--max-new-tokens", "8", "--learning-rate", "0.01", "--quiet"]


torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_qwen2.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    path.write_text("".join(f'{{"problem": "a {i}", "answer": {i}}}\n' for i in range(4)))
    return path


def start(*arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "em_kernels", *arguments]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # What a shell starts in the background ignores Ctrl-C, and so would what is started here.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, env=environment, preexec_fn=heard, **pipes)


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 600) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        if process.poll() is not None:
            raise AssertionError(f"ended early: {process.communicate()[1]}")
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.01)


def lines_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def test_train_writes_a_run(model, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["train", "--model", model, "--output", str(run), "--prompt", "1 a"]
    assert cli.main([*arguments, *FAST, "--updates", "2"]) == 0
    assert [line["update"] for line in lines_of(run)] == [1, 2]
    output = capsys.readouterr().out
    assert f"loss {lines_of(run)[1]['loss']:.4f}" in output
    assert f"checkpoint: {run / 'checkpoint-2'}" in output
    transformers.AutoModelForCausalLM.from_pretrained(run / "checkpoint-2")


def test_prompts_come_from_the_command_line_or_a_file(model, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "1 a"}\n{"problem": "2 b"}\n')
    common = ["train", "--model", model, *FAST, "--updates", "1"]
    assert cli.main([*common, "--output", str(tmp_path / "a"), "--prompts", str(path)]) == 0
    both = ["--prompt", "1 a", "--prompt", "2 b"]
    assert cli.main([*common, "--output", str(tmp_path / "b"), *both]) == 0
    assert lines_of(tmp_path / "a") == lines_of(tmp_path / "b")


def test_a_killed_run_goes_on_with_the_numbers_of_an_uninterrupted_one(model, tmp_path):
    run = tmp_path / "run"
    arguments = ["train", "--model", model, "--output", str(run), "--prompt", "1 a", *FAST]
    process = start(*arguments, "--updates", "100000", "--save-every", "2", *ALL)
    wait_for(run / "checkpoint-4", process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    saved = max(int(p.name.split("-")[1]) for p in run.glob("checkpoint-*"))
    assert saved >= 4
    assert cli.main(["train", "--resume", str(run), "--updates", str(saved + 3), "--quiet"]) == 0
    config = TrainConfig(
        model=model,
        output=tmp_path / "whole",
        prompts="1 a",
        responses=6,
        max_new_tokens=8,
        learning_rate=0.01,
        updates=saved + 3,
        save_every=0,
    )
    train(config, progress=False)
    assert lines_of(run) == lines_of(tmp_path / "whole")
    weights = f"checkpoint-{saved + 3}/model.safetensors"
    assert (run / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_ctrl_c_tells_where_to_go_on(model, tmp_path):
    run = tmp_path / "run"
    arguments = ["train", "--model", model, "--output", str(run), "--prompt", "1 a", *FAST]
    process = start(*arguments, "--updates", "100000", "--save-every", "1", *ALL)
    wait_for(run / "checkpoint-1", process)
    process.send_signal(signal.SIGINT)
    try:
        written = process.communicate(timeout=600)[1].strip()
    finally:
        process.kill()
    assert process.returncode == 130
    message = written.splitlines()[-1]  # torchao, where it is installed, remarks on its own build
    assert message.startswith("em-kernels: interrupted; the last checkpoint is ")
    assert message.endswith(f"go on with: em-kernels train --resume {run}")
    assert "Traceback" not in written


def test_ctrl_c_before_the_first_checkpoint(model, tmp_path, monkeypatch, capsys):
    def interrupted(config, *args, **kwargs):
        write_config(tmp_path, config)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.app, "train", interrupted)
    arguments = ["train", "--model", model, "--output", str(tmp_path), *FAST]
    assert cli.main(arguments) == 130
    assert "there is no checkpoint yet" in capsys.readouterr().err


def rl_arguments(model, problems, folder, *options) -> list[str]:
    sizes = ["--responses", "4", "--group-size", "2", "--max-new-tokens", "6", "--quiet"]
    files = ["--model", model, "--problems", str(problems), "--output", str(folder)]
    return ["train", *files, *sizes, "--device", "cpu", *options]


def test_objectives_run_by_name_and_go_on(model, problems, tmp_path, capsys):
    options = ["--objective", "kl_cov", "--reward", "random", "--ratio", "0.1", "--updates", "1"]
    assert cli.main(rl_arguments(model, problems, tmp_path / "run", *options)) == 0
    assert ", reward " in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "train_config.json").read_text())
    assert (config["objective"], config["ratio"], config["top_p"]) == ("kl_cov", 0.1, 1.0)
    assert cli.main(["train", "--resume", str(tmp_path / "run"), "--updates", "2", "--quiet"]) == 0
    lines = lines_of(tmp_path / "run")
    assert [line["update"] for line in lines] == [1, 2]
    assert {line["objective"] for line in lines} == {"kl_cov"}
    assert all(line["selected_fraction"] > 0 for line in lines)


def test_a_schedule_runs_by_name(model, problems, tmp_path):
    options = ["--schedule", "em:1@1e-3,em+grpo", "--updates", "2", "--no-measure-change"]
    assert cli.main(rl_arguments(model, problems, tmp_path / "run", *options)) == 0
    lines = lines_of(tmp_path / "run")
    assert [line["objective"] for line in lines] == ["em", "em+grpo"]
    assert "entropy_change" not in lines[1]


def test_errors_of_objectives(model, problems, tmp_path, capsys):
    run = ["train", "--model", model, "--output", str(tmp_path / "run")]
    told = error_of(capsys, *run, "--group-size", "4")
    assert "--group-size needs an --objective other than em" in told
    told = error_of(capsys, *run, "--objective", "grpo")
    assert "problems must be given for 'grpo'" in told
    told = error_of(capsys, *run, "--objective", "grpo", "--problems", str(tmp_path / "none"))
    assert "no such file" in told
    told = error_of(capsys, *run, "--schedule", "em,grpo", "--problems", str(problems))
    assert "all stages but the last need their updates" in told
    assert not (tmp_path / "run").exists()


def test_eval_prints_and_writes_what_it_found(model, problems, tmp_path, capsys):
    out = tmp_path / "result.json"
    arguments = ["eval", "--model", model, "--problems", str(problems), "--samples", "3"]
    options = ["--max-new-tokens", "6", "--judge", "exact", "--json", str(out), "--quiet"]
    assert cli.main([*arguments, *options]) == 0
    result = json.loads(out.read_text())
    assert (result["problems"], result["samples"], result["judge"]) == (4, 3, "exact")
    assert len(result["records"]) == 4 * (1 + 3)
    greedy, drawn = result["temperatures"]
    assert (greedy["temperature"], drawn["temperature"]) == (0, 1)
    printed = capsys.readouterr().out
    assert f"4 problems of {problems}, judged by exact" in printed
    mean = drawn["mean"]
    assert f"{mean['mean']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]" in printed
    assert "greedy" in printed
    assert cli.main([*arguments, *options, "--no-greedy", "--limit", "2"]) == 0
    assert json.loads(out.read_text())["problems"] == 2
    assert "greedy" not in capsys.readouterr().out


def test_info_tells_versions_and_why_a_backend_is_off(capsys):
    assert cli.main(["info"]) == 0
    output = capsys.readouterr().out
    for version in (em_kernels.__version__, torch.__version__, transformers.__version__):
        assert version in output
    for name, state in em_kernels.backends().items():
        assert any(line.split(None, 1) == [name, state] for line in output.splitlines())
    assert f"{torch.get_num_threads()} threads" in output
    assert "GPU" in output


def test_the_module_runs():
    process = start("--version")
    output, errors = process.communicate()
    assert (process.returncode, output.strip(), errors) == (0, em_kernels.__version__, "")


def test_missing_transformers_is_one_clear_line(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    output = tmp_path / "run"
    message = error_of(capsys, "train", "--model", model, "--output", output, *FAST)
    assert "transformers cannot be imported" in message
    assert "pip install em-kernels[train]" in message
    assert cli.main(["info"]) == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_the_terminal_has_no_letters_for_is_shown_as_an_escape(monkeypatch, encoding):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(cli.app, "_version", lambda package: "\u2264 1 \ud835")
    assert cli.main(["info"]) == 0
    assert b"\\u2264 1 \\ud835" in out.buffer.getvalue()
    assert cli.main(["report", "\u2264 \ud835"]) == cli.app.FAILED
    assert b"no such folder: \\u2264 \\ud835" in err.buffer.getvalue()


def test_errors_of_train(model, problems, tmp_path, capsys):
    run = tmp_path / "run"
    given = ("train", "--model", model, "--output", run, *FAST)
    assert "--model must be given" in error_of(capsys, "train", "--output", run)
    assert "--output must be given" in error_of(capsys, "train", "--model", model)
    assert "prompt must not be empty, got ''" in error_of(capsys, *given, "--prompt", "")
    both = ("--prompt", "1", "--prompts", problems)
    assert "prompt must be Unicode text" in error_of(capsys, *given, "--prompt", "1 \udcff")
    assert "--prompt or --prompts, not both" in error_of(capsys, *given, *both)
    assert "no such file: nothing.jsonl" in error_of(capsys, *given, "--prompts", "nothing.jsonl")
    assert "--loss-temperature must be positive" in error_of(
        capsys, *given, "--loss-temperature", -1
    )
    assert "no such folder: ./nothing" in error_of(
        capsys, "train", "--model", "./nothing", "--output", run
    )
    assert f"no such folder: {run}" in error_of(capsys, "train", "--resume", run)
    assert not run.exists()
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "1"}\n{"prompt": 1\n')
    assert "broken.jsonl, line 2: not valid JSON" in error_of(capsys, *given, "--prompts", broken)


def test_errors_of_resume(model, tmp_path, capsys):
    run = tmp_path / "run"
    given = ["train", "--model", model, "--output", str(run), "--prompt", "1", *FAST]
    assert cli.main([*given, "--updates", "1"]) == 0
    capsys.readouterr()
    assert "holds a run already" in error_of(capsys, *given)
    assert "seed cannot change" in error_of(capsys, "train", "--resume", run, "--seed", 3)
    moved = ("train", "--resume", run, "--output", tmp_path / "b")
    assert "--output cannot be given with --resume" in error_of(capsys, *moved)
    (run / "checkpoint-1" / "shards" / ".metadata").write_bytes(b"broken")
    resumed = error_of(capsys, "train", "--resume", run, "--updates", 2, "--quiet")
    assert f"cannot read {run / 'checkpoint-1' / 'shards'}" in resumed


def test_errors_of_eval(model, problems, tmp_path, capsys):
    given = ("eval", "--model", model, "--quiet", "--problems")
    assert "no such file" in error_of(capsys, *given, tmp_path / "nothing.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"problem": "1", "answer": 1}\n{"problem": "2"}\n')
    assert cli.main(["eval", "--model", model, "--problems", str(broken), "--quiet"]) == 0
    assert "row 2: no field 'answer'" in capsys.readouterr().out
    broken.write_text('{"problem": "1"}\n')
    assert "no usable problems among 1 rows; row 1: no" in error_of(capsys, *given, broken)
    assert "samples must be" in error_of(capsys, *given, problems, "--samples", -1)
    assert "limit must be 1 or more" in error_of(capsys, *given, problems, "--limit", 0)
    assert "no such file" in error_of(capsys, *given, "none.jsonl", "--temperatures", 0.5)


def test_traceback_is_there_for_who_asks(capsys):
    arguments = ["train", "--model", "./nothing", "--output", "x", "--traceback"]
    assert cli.main(arguments) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["fly"], ["train", "--updates", "many"]])
def test_bad_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: em-kernels" in capsys.readouterr().err
