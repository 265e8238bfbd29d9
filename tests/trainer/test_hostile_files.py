"""Nothing that a file holds is run: one payload for every kind of file that is read."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from command_line import error_of
from hostile import Evil, module
from tiny_qwen2 import make_model, make_tokenizer, save
from trainer_runs import settings

from em_kernels.lm.judge.judges import make_judge
from em_kernels.lm.models import load_model
from em_kernels.lm.problems import load_problems
from em_kernels.trainer import ModelError, TrainConfig, merge_checkpoint, read_config, train

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, and a run of one update of it."""
    root = tmp_path_factory.mktemp("made")
    model = save(root / "model")
    config = settings(
        model=model, output=root / "run", updates=1, responses=2, micro_batch=2, prompts=("1",)
    )
    train(config, progress=False)
    return root


@pytest.fixture
def mark(tmp_path):
    """What a payload makes; it must not be there at the end."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def model(made, tmp_path):
    return shutil.copytree(made / "model", tmp_path / "model")


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made / "run", tmp_path / "run")


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def weights_that_run(folder: Path, mark: Path, **options) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil(mark)}, folder / "pytorch_model.bin", **options)


def code_of_its_own(folder: Path, mark: Path) -> None:
    (folder / "own.py").write_text(module(mark))
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit(folder / "config.json", model_type="own", auto_map=classes)


def test_pickled_weights_are_read_as_tensors(model, mark):
    weights_that_run(model, mark)
    with pytest.raises(ModelError, match=r"weights hold a call of posix.mkdir, and only tensors"):
        load_model(str(model))


def test_a_pickle_in_the_place_of_weights(model, mark):
    (model / "model.safetensors").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(ModelError, match="cannot load a causal language model"):
        load_model(str(model))
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only tensors are read"):
        load_model(str(model))


@pytest.mark.parametrize("name", ["train", "teacher", "eval", "analyze", "merge", "resume"])
def test_code_of_a_model_is_not_run_by_any_command(made, model, run, tmp_path, mark, capsys, name):
    code_of_its_own(run / "checkpoint-1" if name in ("merge", "resume") else model, mark)
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"response": "1 2", "problem": "1", "answer": "1"}\n')
    new = ("--output", tmp_path / "new")
    said = error_of(
        capsys,
        *{
            "train": ("train", "--model", model, *new),
            "teacher": ("train", "--model", made / "model", "--objective", "opd")
            + ("--teacher", model, "--prompts", texts, *new),
            "eval": ("eval", "--model", model, "--problems", texts, *new),
            "analyze": ("analyze", "tokens", texts, "--model", model, *new),
            "merge": ("merge", run / "checkpoint-1", *new),
            "resume": ("train", "--resume", run, "--updates", "2"),
        }[name],
    )
    assert "Python code of its own, which is not run" in said and "--trust-remote-code" in said
    assert not (tmp_path / "new").exists()


def test_code_of_a_model_runs_where_a_flag_asks_for_it(model, tmp_path, monkeypatch):
    """The flag reaches transformers: the module is there then, and is looked at."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache")
    )
    code_of_its_own(model, tmp_path / "wanted")
    with pytest.raises(ModelError):
        load_model(str(model), trust_remote_code=True)
    assert (tmp_path / "wanted").exists()
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not p.startswith(str(tmp_path))])


def test_a_config_names_no_code_beside_a_class_that_is_known(model, mark):
    """transformers has the class itself: the folder's own is never looked at."""
    (model / "own.py").write_text(module(mark))
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "own.Model"})
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(module(mark))
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tokenizer", None]})
    load_model(str(model))


def test_a_config_names_no_kernels_of_the_hub(model):
    edit(model / "config.json", attn_implementation="somebody/kernels")
    with pytest.raises(ModelError, match="'somebody/kernels', code from the hub, which is not run"):
        load_model(str(model))


def test_a_chat_template_stays_in_its_sandbox(model, mark, tmp_path, capsys):
    (model / "chat_template.jinja").write_text(
        "{{ cycler.__init__.__globals__.os.mkdir('" + str(mark) + "') }}"
    )
    said = error_of(capsys, "train", "--model", model, "--output", tmp_path / "new")
    assert "the tokenizer's chat template refuses" in said and "is unsafe" in said


@pytest.mark.parametrize("name", ["train_config.json", "run.yaml"])
def test_no_file_can_ask_for_remote_code(run, name, tmp_path, capsys):
    if name == "run.yaml":
        with (run / name).open("a") as file:
            file.write("trust_remote_code: true\n")
        said = error_of(capsys, "train", "--config", run / name, "--output", tmp_path / "new")
        assert "trust_remote_code is not taken from a file" in said
    else:
        edit(run / name, trust_remote_code=True)
        assert read_config(run).trust_remote_code is False


def test_a_run_does_not_write_down_that_code_was_trusted(tmp_path):
    config = TrainConfig(model="x", output=str(tmp_path), trust_remote_code=True)
    assert "trust_remote_code" not in config.to_written()


def test_settings_in_yaml_are_plain(tmp_path, mark, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: !!python/object/apply:os.mkdir [{str(mark)!r}]\n")
    said = error_of(capsys, "train", "--config", path, "--output", tmp_path / "new")
    assert "not valid YAML" in said


def test_merge_does_not_look_at_parts_that_it_does_not_need(run, tmp_path, mark, monkeypatch):
    """The weights are in safetensors: nothing in shards/ is so much as opened."""
    checkpoint = run / "checkpoint-1"
    (checkpoint / "shards" / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    opened, watched = [], [True]

    def watch(event, arguments):
        if watched and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    merge_checkpoint(checkpoint, tmp_path / "merged")
    watched.clear()
    assert any("config.json" in path for path in opened)
    assert not any("shards" in path for path in opened)
    assert not (tmp_path / "merged" / "shards").exists()


@pytest.mark.parametrize("kind", [".metadata", "__0_0.distcp", "outside"])
def test_parts_of_a_checkpoint(run, kind, mark, capsys):
    shards = run / "checkpoint-1" / "shards"
    if kind == "outside":
        path = shards / ".metadata"
        path.write_bytes(path.read_bytes().replace(b"__0_0.distcp", b"/etc//passwd"))
    elif kind == ".metadata":
        (shards / kind).write_bytes(pickle.dumps(Evil(mark)))
    else:
        part = next(shards.glob("*.distcp"))
        size = part.stat().st_size
        torch.save(Evil(mark), part)
        part.write_bytes((part.read_bytes() * (size // part.stat().st_size + 1))[:size])
    said = error_of(capsys, "train", "--resume", run, "--updates", "2")
    assert f"cannot read {run / 'checkpoint-1' / 'shards'}" in said


def test_the_state_that_one_process_wrote_before(run, mark, capsys):
    checkpoint = run / "checkpoint-1"
    shutil.rmtree(checkpoint / "shards")
    torch.save({"optimizer": Evil(mark)}, checkpoint / "trainer_state.pt")
    said = error_of(capsys, "train", "--resume", run, "--updates", "2")
    assert "only tensors are read" in said
    torch.save({"optimizer": [1]}, checkpoint / "trainer_state.pt")
    assert "cannot read" in error_of(capsys, "train", "--resume", run, "--updates", "2")


@pytest.mark.parametrize("kind", ["weights", "module", "base"])
def test_adapters(made, tmp_path, mark, kind):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    folder = tmp_path / "adapter"
    peft.get_peft_model(make_model(), config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    path = folder / "adapter_config.json"
    edit(path, base_model_name_or_path=str(made / "model"))
    if kind == "weights":
        (folder / "adapter_model.safetensors").unlink()
        torch.save({"a": Evil(mark)}, folder / "adapter_model.bin")
        match = "only tensors are read"
    elif kind == "module":
        (tmp_path / "planted.py").write_text(module(mark))
        edit(path, megatron_config={"a": 1}, megatron_core="planted")
        match = "names a module to import"
    else:
        code_of_its_own(shutil.copytree(made / "model", tmp_path / "base"), mark)
        edit(path, base_model_name_or_path=str(tmp_path / "base"))
        match = "Python code of its own"
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(ModelError, match=match):
            load_model(str(folder))
    finally:
        sys.path.remove(str(tmp_path))


def test_a_data_set_has_no_script(tmp_path, mark):
    pytest.importorskip("datasets")
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own.py").write_text(module(mark))
    with pytest.raises(ValueError, match="cannot load the data set"):
        load_problems(str(folder))
    (folder / "test.pkl").write_bytes(pickle.dumps(Evil(mark)))
    (folder / "own.py").unlink()
    with pytest.raises(ValueError, match="cannot load the data set"):
        load_problems(str(folder))
    (folder / "dataset_info.json").write_text("{}")  # as `save_to_disk` leaves one
    (folder / "test.pkl").rename(folder / "data.arrow")
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    with pytest.raises(ValueError, match=r"cannot load|cannot be read|cannot read"):
        load_problems(str(folder))
    table = tmp_path / "table.parquet"
    table.write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(ValueError, match="not a Parquet file"):
        load_problems(str(table))


def test_an_answer_is_not_evaluated(mark):
    """Neither that of a problem nor that of a model, by the judge that reads mathematics."""
    judge = make_judge("auto")
    call = f"__import__('os').mkdir('{mark}')"
    for written in (call, rf"\boxed{{{call}}}", rf"\boxed{{\text{{{call}}}}}", f"#### {call}"):
        judge(written, "1")
        judge("1", written)
