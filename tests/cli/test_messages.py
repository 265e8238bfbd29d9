"""A message names what was typed: flags on the command line, names where a file gave them."""

from __future__ import annotations

import json
import re

import pytest
import tiny_qwen2
import torch
from command_line import error_of
from test_cli import FAST

from em_kernels import cli
from em_kernels.cli.app import _parser
from em_kernels.cli.messages import as_typed, in_flags
from em_kernels.lm.chat import Chat, encode_prompt
from em_kernels.lm.settings import settings_of
from em_kernels.trainer import RLConfig, TrainConfig

torch.set_num_threads(1)
FLAGS = {name: "--" + name.replace("_", "-") for name in ("top_p", "long", "updates", "sampler")}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_qwen2.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "a 1", "answer": 1}\n')
    return path


@pytest.mark.parametrize(
    "text, shown",
    [
        ("updates must be 1 or more, got 0", "--updates must be 1 or more, got 0"),
        ("a.yaml: updates must be 1", "a.yaml: --updates must be 1"),
        ("no updates were made, updates are few", None),
        ("raise top_p, or top_k", "raise --top-p, or top_k"),
        ("give more `updates`", "give more --updates"),
        ("is for sampler='vllm', got 2", "is for --sampler vllm, got 2"),
        ("top_p=0.5, and long=True", "--top-p 0.5, and --long"),
        ("long=False or sampler=None", "--no-long or no --sampler"),
        ("top_p=[1, 0.5], updates=(2,)", "--top-p 1 0.5, --updates 2"),
        ("no field 'top_p' in ['top_p', \"top_p\"]", None),
        ("no such file: top_p.jsonl", None),
        ("no such file: data/top_p or top_p/data", None),
        ("eval.json has no config.top_p", None),
        ("top_p (--top-p) names it, or `long` (--long)", "--top-p names it, or --long"),
        ("the model's top_p isn't", "the model's --top-p isn't"),
    ],
)
def test_names_of_settings_become_flags(text, shown):
    assert in_flags(text, FLAGS) == (text if shown is None else shown)


@pytest.mark.parametrize(
    "words, text",
    [
        (["--resume", "top_p"], "top_p is no training run"),
        (["--resume", "top_p/"], "top_p is no training run"),
        (["--resume", "./updates"], "updates: not read"),
        (["--output", "responses=2"], "folder, responses=2 holds a run"),
        (["--config", "model"], "model: settings are read from .yaml files"),
        (["--prompt", "a top_p", "--prompt", "b"], "in a top_p of b"),
    ],
)
def test_what_was_typed_stays_as_it_is(words, text):
    assert as_typed(text, _parser().parse_args(["train", *words])) == text


def test_what_was_typed_hides_no_other_setting():
    arguments = _parser().parse_args(["train", "--output", "top", "--model", "p", "--top-k", "0"])
    assert as_typed("top_p of top, p: top_k", arguments) == "--top-p of top, p: --top-k"
    arguments = _parser().parse_args(["train", "--output", "top_p", "--ppl-label", "sampler"])
    text = "top_p must be 1: top_p is for sampler='vllm', `sampler`"
    shown = "--top-p must be 1: --top-p is for --sampler vllm, --sampler"
    assert as_typed(text, arguments) == shown


def test_what_a_file_gives_keeps_its_name():
    def shown(text: str, *words: str) -> str:
        return as_typed(text, _parser().parse_args(["train", *words]))

    assert shown("top_p, top_k", "--config", "r.yaml", "--top-k", "0") == "--top-p, --top-k"
    assert shown("r.yaml: top_p, top_k", "--config", "r.yaml", "--top-k", "0").endswith(
        ": top_p, --top-k"
    )
    assert shown("run/train_config.json: top_p", "--resume", "run").endswith(": top_p")
    assert shown("with the settings of r: top_p", "--config", "r").endswith(": top_p")
    assert shown("top_p and r, for instance", "--config", "r").startswith("--top-p")
    assert shown("prompts must", "--prompt", "a") == "--prompt must"
    assert shown("prompts must", "--prompts", "a") == "--prompts must"
    assert shown("prompt must be shorter", "--problems", "a") == "prompt must be shorter"


def test_help_names_flags(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    assert "--gradient-checkpointing, a --micro-batch of 1" in text and "steers --repo-zeta" in text
    for name in settings_of(RLConfig):
        assert "_" not in name or not re.search(rf"(?<![\w-]){name}\b", text), name


def test_errors_name_flags(model, problems, tmp_path, capsys):
    train = ["train", "--model", model, "--output", tmp_path / "run", *FAST]
    grpo = [*train, "--objective", "grpo", "--problems", problems]
    asked = ["eval", "--model", model, "--problems", problems, "--quiet"]
    for words, told in (
        ([*train, "--vllm-memory", "0.5"], "--vllm-memory is for --sampler vllm, got 0.5 with"),
        ([*grpo, "--group-size", "4"], "--responses must be a multiple of --group-size 4, got 6"),
        ([*grpo, "--compat", "official"], "--compat must be left out here, got 'official'"),
        ([*grpo, "--schedule", "em:1,grop"], "--schedule: an objective must be one of"),
        ([*grpo, "--schedule", "em:1,grop"], "got 'grop'; did you mean grpo?"),
        ([*grpo, "--schedule", "em:5", "--updates", "3"], "--schedule: 'em:5' has 5 updates in"),
        (
            [*grpo, "--schedule", "em@1e999"],
            "--schedule: a learning rate must be 0 or more and fin",
        ),
        ([*grpo, "--schedule", "em@1.2.3"], "--schedule: expected NAME[:UPDATES][@"),
        ([*train, "--stop-entropy", "-1"], "--stop-entropy must be 0 or more"),
        ([*asked, "--json", problems / "x.json"], "p.jsonl is a file, and must be a folder"),
        ([*asked, "--output", problems / "x"], "p.jsonl is a file, and must be a folder"),
        ([*train, "--prompts", "gone.txt"], "no such file or folder: gone.txt"),
        ([*grpo, "--answer-field", "q", "--group-size", "2"], "in 'q' (--answer-field)"),
        ([*asked, "--problem-field", "q"], "--problem-field names the one to take"),
        ([*asked, "--temperatures", "-1"], "--temperatures must be 0 or more and finite"),
        ([*asked, "--temperatures", "2", "2"], "must be different numbers, 2 is there twice"),
        ([*asked, "--json", tmp_path], f"{tmp_path} is a folder, and must be a file or not there"),
        (
            ["select", *asked[1:], "--output", tmp_path],
            f"{tmp_path} is a folder, and must be a file or not there yet",
        ),
        ([*asked, "--output", problems], "p.jsonl is a file, and must be a folder or not there"),
        (["analyze", "law", "nothing", "--first", "0.2"], "error: no such folder: nothing"),
        (["analyze", "law", tmp_path], "is neither an evaluation nor a training run"),
        (["compare", "nothing", "nothing"], "error: no such folder: nothing"),
        (["merge", "nothing", "--output", "m"], "error: no such folder: nothing"),
    ):
        assert told in error_of(capsys, *words)
    assert not (tmp_path / "run").exists()


def test_settings_of_a_file_are_named_as_in_the_file(model, tmp_path, capsys):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"model": model, "max_new_tokens": 0}))
    words = ["train", "--config", path, "--output", tmp_path / "run"]
    assert f"{path}: max_new_tokens must be 1" in error_of(capsys, *words)
    told = error_of(capsys, *words, "--max-new-tokens", "2", "--updates", "0")
    assert "--updates must be 1 or more" in told


def test_a_folder_that_is_not_there_and_one_that_is_no_run(tmp_path, capsys):
    gone = tmp_path / "gone"
    for command in (["train", "--resume"], ["analyze", "run"]):
        more = ["--problems", "p.jsonl"] if "run" in command else []
        assert f"error: no such folder: {gone}\n" in error_of(capsys, *command, gone, *more)
        file = tmp_path / "file"
        file.touch()
        told = error_of(capsys, *command, file, *more)
        assert f"error: {file} is a file, and must be a folder\n" in told
        told = error_of(capsys, *command, tmp_path, *more)
        assert f"{tmp_path} is no training run: it has no train_config.json" in told


@pytest.mark.parametrize("words", (["report"], ["merge", "--output", "m"], ["analyze", "law"]))
def test_a_file_is_no_folder(words, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    told = error_of(capsys, *words, file)
    assert f"error: {file} is a file, and must be a folder\n" in told


def test_an_evaluation_of_other_settings_names_the_flag(model, problems, tmp_path, capsys):
    asked = ["eval", "--model", model, "--problems", problems, "--quiet", "--max-new-tokens", "3"]
    asked += ["--output", tmp_path / "eval"]
    assert cli.main(list(map(str, asked))) == 0
    told = error_of(capsys, *asked, "--samples", "2")
    assert f"{tmp_path / 'eval'} holds an evaluation with --samples 1, got 2" in told


def test_a_run_that_has_all_its_updates_says_how_many(model, tmp_path, capsys):
    run = str(tmp_path / "run")
    words = ["--output", run, "--updates", "2", "--prompt", "a 1"]
    assert cli.main(["train", "--model", model, *words, *FAST]) == 0
    for updates, told in (("2", "all of them"), ("1", "more than the 1 asked for")):
        with pytest.warns(UserWarning, match=f"has 2, {told}; to go on give `updates` above 2"):
            assert cli.main(["train", "--resume", run, "--updates", updates, "--quiet"]) == 0


def test_what_a_chat_template_reads_is_said_in_a_sentence():
    config = TrainConfig(model="m", chat_template_kwargs={"thinking": False})
    for template, reads in (
        (tiny_qwen2.TEMPLATE, "which reads nothing besides the messages; leave"),
        (
            tiny_qwen2.TEMPLATE + "{{ enable_thinking }}",
            "which reads 'enable_thinking' besides the messages; did you mean enable_thinking",
        ),
    ):
        tokenizer = tiny_qwen2.make_tokenizer(template=template)
        with pytest.raises(ValueError, match=f"'thinking' is not read by .*, {reads}"):
            encode_prompt(tokenizer, "a", Chat(None, config.chat_template_kwargs))


def test_a_read_without_texts_says_why(model, problems, tmp_path, capsys):
    found = tmp_path / "eval"
    asked = ["--problems", problems, "--max-new-tokens", "3", "--quiet", "--output", found]
    assert cli.main(list(map(str, ["eval", "--model", model, *asked]))) == 0
    capsys.readouterr()
    told = error_of(capsys, "analyze", "tokens", found, "--drawn-at", "3", "--quiet")
    assert "no text can be read, it has none at T = 3" in told
    words = ["analyze", "tokens", problems, "--model", model, "--output", tmp_path, "--quiet"]
    assert "1 left out: no text in 'response' or 'text'" in error_of(capsys, *words)
