"""What a newcomer meets: models of ten architectures, templates of every kind, words mistyped."""

from __future__ import annotations

import io
import json
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from command_line import error_of
from tiny_qwen2 import TEMPLATE, WORDS, make_tokenizer
from tiny_qwen2 import save as save_qwen2

from em_kernels import cli
from em_kernels.cli.parser import short_warnings
from em_kernels.lm.progress import Progress
from em_kernels.trainer import RLConfig, TrainConfig, train
from em_kernels.trainer.checkpoint import CONFIG_FILE

torch.set_num_threads(1)

SMALL = dict(
    vocab_size=len(WORDS),
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=None,
    initializer_range=0.3,
)
MODELS = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma2": dict(final_logit_softcapping=3.0),
    "Mistral": {},
    "Phi3": dict(tie_word_embeddings=False),
    "GPT2": dict(n_positions=64, n_embd=16, n_layer=1, n_head=2),
    "Cohere": dict(logit_scale=0.25),
    "Granite": dict(logits_scaling=4.0),
    "Mixtral": dict(num_local_experts=2),
    "Olmo2": {},
    "GPTNeoX": {},
}
SYSTEM_ONLY = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('Begin with a system turn') }}"
    "{% endif %}" + TEMPLATE
)
THINKS = TEMPLATE + "{% if enable_thinking is false %}0{% endif %}"
# No template; no system turn, no PAD of its own; a toggle; and a system turn that must be there.
KINDS = [
    (None, []),
    (TEMPLATE, []),
    (THINKS, ["--chat-template-kwargs", "enable_thinking=false"]),
    (SYSTEM_ONLY, ["--system", "b"]),
]
FAST = ["--updates", "1", "--responses", "4", "--max-new-tokens", "4", "--quiet"]


def save(folder: Path, name: str, template: str | None) -> str:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **MODELS[name]})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = make_tokenizer(template=template, pad="<pad>" if template else "<eos>")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<eos>",
        pad_token="<pad>" if template else None,
        chat_template=template,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_qwen2(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def problems(tmp_path) -> Path:
    path = tmp_path / "aime.csv"
    path.write_text("ID,Year,Problem,Answer\n1,2024,a 1,1\n2,2024,a 2,2\n")
    return path


def usage_of(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    assert stopped.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("em-kernels: error: ") and second.startswith("usage: em-kernels")
    return first


@pytest.mark.filterwarnings("ignore:all answers", "ignore:the tokenizer has no chat template")
@pytest.mark.parametrize("number, name", list(enumerate(MODELS)))
def test_every_command_on_every_architecture(number, name, problems, tmp_path, capsys):
    template, chat = KINDS[number % len(KINDS)]
    folder, run, found = save(tmp_path / "m", name, template), tmp_path / "run", tmp_path / "eval"
    kind = [["--prompt", "a 1"], ["--objective", "grpo", "--problems", str(problems)]][number % 2]
    group = ["--group-size", "2"] if number % 2 else []
    assert (
        cli.main(["train", "--model", folder, "--output", str(run), *kind, *group, *FAST, *chat])
        == 0
    )
    trained = str(run / "checkpoint-1")
    asked = [
        "--problems",
        str(problems),
        "--max-new-tokens",
        "4",
        "--quiet",
        "--output",
        str(found),
    ]
    assert cli.main(["eval", "--model", trained, *asked, *chat]) == 0
    assert cli.main(["analyze", "tokens", str(found), "--quiet"]) == 0
    written = json.loads((found / "eval.json").read_text())["config"]
    assert (written["system"] is not None) == ("--system" in chat)
    assert (written["chat_template_kwargs"] is not None) == ("--chat-template-kwargs" in chat)
    assert "Traceback" not in capsys.readouterr().err


def test_a_template_that_wants_a_system_turn_says_so(problems, tmp_path, capsys):
    folder = save(tmp_path / "m", "Llama", SYSTEM_ONLY)
    wanted = "refuses a chat of user: Begin with a system turn; .* given it by --system"
    for command in (["train", "--output", tmp_path / "run"], ["eval", "--problems", problems]):
        error = error_of(capsys, *command, "--model", folder, "--quiet")
        assert re.search(wanted, error)
    assert not (tmp_path / "run").exists()


def test_the_chat_is_part_of_what_a_run_and_an_evaluation_are(model, problems, tmp_path, capsys):
    run, found = tmp_path / "run", tmp_path / "eval"
    begun = ["train", "--model", model, "--output", run, "--prompt", "a", *FAST, "--system", "b"]
    assert cli.main(list(map(str, begun))) == 0
    assert "system: b\n" in (run / "run.yaml").read_text()
    assert "system cannot change" in error_of(capsys, "train", "--resume", run, "--system", "c")
    asked = ["eval", "--model", model, "--problems", problems, "--max-new-tokens", "4", "--quiet"]
    assert cli.main(list(map(str, [*asked, "--output", found, "--system", "b"]))) == 0
    capsys.readouterr()
    assert "with --system 'b', got None" in error_of(capsys, *asked, "--output", found)
    again = ["eval", "--config", found / "eval.json", "--output", tmp_path / "again", "--quiet"]
    assert cli.main(list(map(str, again))) == 0
    old, new = (json.loads((f / "eval.json").read_text()) for f in (found, tmp_path / "again"))
    assert {**old["config"], "output": ""} == {**new["config"], "output": ""}


def test_what_is_drawn_without_an_end_or_a_template_is_a_warning(tmp_path, capsys, problems):
    folder = save(tmp_path / "m", "Llama", None)
    for change in (tmp_path / "m").glob("*config.json"):
        told = json.loads(change.read_text())
        change.write_text(json.dumps({**told, "eos_token": None, "eos_token_id": None}))
    with pytest.warns(UserWarning) as caught:
        run = ["train", "--model", folder, "--output", str(tmp_path / "r"), "--prompt", "a", *FAST]
        assert cli.main(run) == 0
        assert cli.main(["eval", "--model", folder, "--problems", str(problems), *FAST[4:]]) == 0
    said = [str(warning.message) for warning in caught]
    bare = [text for text in said if "no chat template: prompts are sent as bare text" in text]
    cut = [text for text in said if "were cut, at max_new_tokens=4" in text]
    assert [text.split("beginning with ")[1][:4] for text in bare] == ["'a';", "'a 1"]
    assert [text.partition(" were")[0] for text in cut] == [
        "all answers of an update",
        "all answers at temperature 0",
        "all answers at temperature 1",
    ]
    assert all("nor its tokenizer name an end token" in text for text in cut)


def test_a_warning_is_one_line():
    with short_warnings():
        text = warnings.formatwarning(UserWarning("a\nb"), UserWarning, "file.py", 3)
    assert text == "em-kernels: warning: a b\n"
    assert "file.py" in warnings.formatwarning(UserWarning("a"), UserWarning, "file.py", 3)


def test_words_that_are_mistyped(model, capsys):
    error = usage_of(capsys, "train", "--objective", "grop")
    assert "invalid choice: 'grop'" in error and error.endswith("did you mean grpo?")
    error = usage_of(capsys, "train", "--learning-rat", "1")
    assert error.endswith("unrecognized arguments: --learning-rat 1; did you mean --learning-rate?")
    assert "unrecognized arguments: --temp 1" in usage_of(
        capsys, "eval", "--model", "m", "--problems", "p.csv", "--temp", "1"
    )
    assert usage_of(capsys, "trian").endswith("did you mean train?")
    with pytest.raises(ValueError, match=r"objective must be one of .*; did you mean grpo\?"):
        RLConfig(objective="grop", problems=(("1", "1"),))


def test_flags_that_leave_nothing_to_do_or_name_nothing(model, problems, capsys):
    asked = ["eval", "--model", model, "--problems", problems, "--quiet"]
    error = error_of(capsys, *asked, "--temperatures", 0, "--no-greedy")
    assert "--temperatures must have one at least, got none: --no-greedy leaves out 0" in error
    assert "no such file or folder: /nosuch" in error_of(capsys, "analyze", "tokens", "/nosuch")
    both = ["--objective", "grpo", "--problems", problems, "--prompt", "x"]
    error = error_of(capsys, "train", "--model", model, "--output", "o", *both)
    assert "--prompt is for the objectives 'em' and 'opd', got ('x',) for 'grpo'" in error
    assert "--model must be given" in error_of(capsys, "eval", "--problems", problems)


def test_settings_of_an_evaluation_in_a_file(model, problems, tmp_path, capsys):
    path = tmp_path / "settings.json"
    told = dict(model=model, problems=str(problems), max_new_tokens=3, temperatures=0.5)
    path.write_text(json.dumps(told))
    out = tmp_path / "out"
    assert cli.main(["eval", "--config", str(path), "--output", str(out), "--quiet"]) == 0
    config = json.loads((out / "eval.json").read_text())["config"]
    assert (config["max_new_tokens"], config["temperatures"]) == (3, [0.5])
    path.write_text(json.dumps({**told, "temperature": 1}))
    error = error_of(capsys, "eval", "--config", path)
    assert "no setting is called 'temperature'; did you mean temperatures?" in error


def test_a_prompt_from_stdin(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a 1\n"))
    run = tmp_path / "run"
    assert cli.main(["train", "--model", model, "--output", str(run), "--prompt", "-", *FAST]) == 0
    assert json.loads((run / CONFIG_FILE).read_text())["prompts"] == ["a 1"]


def test_interrupted_before_anything_was_written_names_no_resume(
    model, tmp_path, capsys, monkeypatch
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.app, "train", interrupt)
    run = tmp_path / "run"
    assert cli.main(["train", "--model", model, "--output", str(run)]) == 130
    error = capsys.readouterr().err
    assert "nothing was begun yet: start it again with the same command" in error
    assert "--resume" not in error


def test_a_line_an_update_where_there_is_no_terminal(model, capsys):
    config = TrainConfig(model=model, prompts="a", updates=2, responses=2, max_new_tokens=3)
    result = train(config)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train: ")]
    assert [line.split(",")[0] for line in lines] == ["train: update 1/2", "train: update 2/2"]
    assert f"loss {result.metrics[0]['loss']:.4f}, entropy" in lines[0]
    train(config, progress=False)
    assert "train:" not in capsys.readouterr().err
    shown = repr(result)
    assert shown.startswith("TrainResult(Qwen2ForCausalLM, 2 updates") and len(shown) < 700


def test_lines_are_not_more_than_are_read(capsys):
    with Progress("eval", "answer", 5) as progress:
        for _ in range(5):
            progress.advance()
    assert capsys.readouterr().err == "eval: answer 5/5, 0 s\n"
