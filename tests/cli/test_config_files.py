"""em-kernels train --config: the run.yaml of a run repeats it; flags go before it; bad files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny_qwen2
import yaml
from command_line import error_of
from rl_runs import rl_settings, run_rl
from test_cli import FAST, lines_of
from trainer_runs import run, settings

from em_kernels import cli
from em_kernels.cli.app import _new_config, _parser
from em_kernels.trainer import RLConfig, TrainConfig, train


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_qwen2.save(tmp_path_factory.mktemp("models") / "tiny")


def repeated(folder: Path, again: Path, *flags: str) -> None:
    """The run of folder/run.yaml, and that it has the same bits."""
    words = ["--config", str(folder / "run.yaml"), "--output", str(again), "--quiet", *flags]
    assert cli.main(["train", *words]) == 0
    assert lines_of(again) == lines_of(folder)
    weights = f"checkpoint-{len(lines_of(folder))}/model.safetensors"
    assert (again / weights).read_bytes() == (folder / weights).read_bytes()


def test_a_run_of_the_command_line_is_repeated_to_the_bit(model, tmp_path, capsys):
    first = ["--model", model, "--output", str(tmp_path / "em"), *FAST, "--prompt", "1e5"]
    assert cli.main(["train", *first, "--updates", "2", "--stop-entropy", "1e-9"]) == 0
    repeated(tmp_path / "em", tmp_path / "again")
    told = [yaml.safe_load((tmp_path / name / "run.yaml").open()) for name in ("em", "again")]
    assert told[0] == told[1]
    assert told[0]["prompts"] == ["1e5"] and "output" not in told[0]
    text = (tmp_path / "em" / "run.yaml").read_text()
    assert text.startswith("# em-kernels train --config run.yaml --output FOLDER  (")
    assert "Not in here" not in text


def test_a_schedule_with_problems_is_repeated_to_the_bit(model, tmp_path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"problem": "a 1", "answer": 1}\n{"problem": "a 2", "answer": 2}\n')
    sizes = ["--responses", "4", "--group-size", "2", "--max-new-tokens", "6", "--quiet"]
    what = ["--schedule", "em:1@1e-3,kl_cov", "--updates", "2", "--reward", "random"]
    files = ["--model", model, "--problems", str(problems), "--output", str(tmp_path / "rl")]
    assert cli.main(["train", *files, *sizes, *what]) == 0
    repeated(tmp_path / "rl", tmp_path / "again")


def test_a_run_of_python_is_repeated_once_its_model_has_a_name(model, tmp_path):
    config = rl_settings(output=tmp_path / "rl", updates=1, responses=4, group_size=2)
    run_rl(config)
    text = (tmp_path / "rl" / "run.yaml").read_text()
    assert "# Not in here: a model that was passed; give --model its name.\n" in text
    repeated(tmp_path / "rl", tmp_path / "again", "--model", model)


def test_entropy_minimisation_by_an_rl_config_is_repeated(model, tmp_path):
    options = dict(objective="em", updates=1, responses=2, max_new_tokens=4, device="cpu")
    config = RLConfig(model=model, output=tmp_path / "em", prompts="1 2", **options)
    train(config, progress=False)
    repeated(tmp_path / "em", tmp_path / "again")


def test_what_was_passed_and_cannot_be_named_is_said(tmp_path):
    def weigh(rollout, mask):
        return mask / mask.sum(), None

    small = dict(updates=1, responses=2, max_new_tokens=4)
    run(settings(output=tmp_path / "own", **small), objective=weigh)
    assert "# Not in here: the objective" in (tmp_path / "own" / "run.yaml").read_text()
    taught = rl_settings(output=tmp_path / "opd", objective="opd", reward=None, **small)
    run_rl(taught, teacher=tiny_qwen2.make_model(5))
    assert "# Not in here: a teacher that was passed" in (tmp_path / "opd/run.yaml").read_text()
    run(settings(output=tmp_path / "named", model="a/name", **small))
    assert "Not in here" not in (tmp_path / "named" / "run.yaml").read_text()


def test_a_resumed_run_tells_what_it_has_become(model, tmp_path):
    first = ["--model", model, "--output", str(tmp_path / "em"), *FAST, "--prompt", "1 2"]
    assert cli.main(["train", *first, "--updates", "1"]) == 0
    folder = tmp_path / "em"
    assert cli.main(["train", "--resume", str(folder), "--updates", "2", "--quiet"]) == 0
    repeated(folder, tmp_path / "again")


def read(tmp_path, text: str, *flags: str, name: str = "run.yaml") -> TrainConfig:
    (tmp_path / name).write_text(text)
    words = ["train", "--config", str(tmp_path / name), "--output", "o", *flags]
    return _new_config(_parser().parse_args(words))


def test_flags_go_before_the_file(tmp_path):
    text = "model: m\nupdates: 3\nlearning_rate: 2e-5\nprompts: [1 a, 2 b]\nlog_to: wandb\n"
    config = read(tmp_path, text, "--updates", "4")
    assert (config.model, config.updates, config.learning_rate) == ("m", 4, 2e-5)
    assert (config.prompts, config.log_to) == (("1 a", "2 b"), ("wandb",))
    assert read(tmp_path, text, "--prompt", "3").prompts == ("3",)
    assert read(tmp_path, text, "--log-to", "trackio", "--log-to", "wandb").log_to == (
        "trackio",
        "wandb",
    )
    pairs = "model: m\nschedule: em:1,grpo\nproblems: [[1 + 1, '2'], [a, null]]\nreward: random\n"
    assert read(tmp_path, pairs).problems == (("1 + 1", "2"), ("a", None))
    config = read(tmp_path, pairs, "--objective", "kl_cov")
    assert (config.objective, config.schedule) == ("kl_cov", None)


def test_a_file_of_prompts_is_read_from_a_file_of_settings(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "1 a"}\n{"prompt": "2 b"}\n')
    config = read(tmp_path, f"model: m\nprompts: {tmp_path / 'p.jsonl'}\n")
    assert config.prompts == ("1 a", "2 b")


def test_json_and_the_settings_of_a_resume_are_taken(tmp_path):
    written = TrainConfig(model="m", prompts="1", updates=3, output="elsewhere").to_written()
    config = read(tmp_path, json.dumps(written), name="train_config.json")
    assert (config.updates, config.output, config.prompts) == (3, "o", ("1",))


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: m\nlearningrate: 1\n", "no setting is called 'learningrate'; did you mean learn"),
        ("model: m\nupdates: ten\n", "updates must be an int, got 'ten'"),
        ("model: m\ngroup_size: 4\n", "group_size needs an --objective other than em"),
        ("model: m\nreduction: mean\n", "reduction must be one of "),
        ("model: m\nprompts: What is 1 + 1?\n", "prompts must be a list of texts, or a file"),
        ("updates: 3\n", "--model must be given: it is not in "),
        ("model: null\n", "--model must be given: it is not in "),
        ("[1]", "must hold settings by name"),
        ("model: m\nobjective: grpo\nproblems: [[1]]\n", "problems must be (problem, answer)"),
        (
            "model: m\nobjective: grpo\nresponses: 6\ngroup_size: 4\nproblems: [[a, b]]\n",
            "responses must be a multiple of group_size=4, got 6",
        ),
    ],
)
def test_bad_files_are_named_with_the_setting_in_one_line(text, message, tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    told = error_of(capsys, "train", "--config", path, "--output", tmp_path / "run")
    assert message in told and str(path) in told
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_its_own_settings(tmp_path, capsys):
    told = error_of(capsys, "train", "--resume", tmp_path, "--config", tmp_path / "run.yaml")
    assert "--config cannot be given with --resume" in told


def test_a_logger_that_is_not_installed_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = ["--model", "no such model", "--output", tmp_path / "run", "--log-to", "wandb"]
    told = error_of(capsys, "train", *words)
    assert "pip install 'em-kernels[wandb]'" in told and not (tmp_path / "run").exists()
