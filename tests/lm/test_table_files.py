"""Problems in every form that people have them in, and what is said of those that are none."""

import gzip
import importlib.util
import json
import socket
import sys
import time

import pytest

from em_kernels.evaluator import EvalConfig, make_judge, read_problems
from em_kernels.lm.demonstrations import load_demonstrations
from em_kernels.lm.models import ModelError, load_model
from em_kernels.lm.problems import Source, load_problems, read_prompts
from em_kernels.lm.tables import rows_at
from em_kernels.trainer import RLConfig

needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="needs the package datasets"
)

ROWS = [{"problem": "1+1, or?", "answer": "2"}, {"problem": 'so "b"\nis é', "answer": "0.50"}]
PAIRS = [("1+1, or?", "2"), ('so "b"\nis é', "0.50")]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'problem,answer\n"1+1, or?",2\n"so ""b""\nis é",0.50\n'
PRETTY = json.dumps(ROWS, indent=1)

FILES = {
    "rows.jsonl": LINES,
    "blank.jsonl": "\n" + LINES.replace("\n", "\n\n"),
    "lines.json": LINES,
    "array.json": json.dumps(ROWS),
    "pretty.json": PRETTY,
    "array.jsonl": PRETTY,
    "data.json": json.dumps({"version": 1, "data": ROWS}),
    "pretty-data.json": json.dumps({"data": ROWS}, indent=2),
    "only.json": json.dumps({"problems": ROWS, "sources": ["x"]}),
    "rows.csv": CSV,
    "excel.csv": "\ufeff"
    + CSV.replace("problem,answer", "problem;answer").replace('",', '";').replace("\n", "\r\n", 1),
    "rows.tsv": CSV.replace("problem,", "problem\t").replace('",', '"\t'),
    "UPPER.CSV": CSV,
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_every_kind(tmp_path, name, packed):
    data = FILES[name].encode()
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(data) if packed else data)
    assert read_problems(path) == PAIRS
    assert RLConfig(problems=path).tasks == tuple(PAIRS)
    assert read_prompts(path) == tuple(problem for problem, _ in PAIRS)


def test_one_problem_is_one_row(tmp_path):
    for name, text in (
        ("math.json", json.dumps({**ROWS[0], "level": 5}, indent=1)),
        ("line.json", json.dumps(ROWS[0])),
        ("line.jsonl", json.dumps({**ROWS[0], "data": [{"a": 1}]})),
    ):
        (tmp_path / name).write_text(text)
        assert read_problems(tmp_path / name) == PAIRS[:1]
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "chat.json").write_text(json.dumps(chat, indent=1))
    (found,) = load_demonstrations(Source(str(tmp_path / "chat.json")))
    assert found.completion == "b"


def test_arrays_by_split(tmp_path):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"train": ROWS, "test": ROWS[:1]}))
    assert len(RLConfig(problems=path).tasks) == 2
    assert len(load_problems(EvalConfig("m", path, "o").source).problems) == 1
    with pytest.raises(
        ValueError, match=r"several arrays, 'train', 'test': .split. .--split. names"
    ):
        load_problems(EvalConfig("m", path, "o", split="validation").source)


def test_a_split_of_a_file_that_has_none_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(CSV)
    with pytest.raises(
        ValueError, match=r"split is for data sets and folders, got 'test' with .*csv"
    ):
        _ = EvalConfig("m", path, "o", split="test").source
    with pytest.raises(ValueError, match="split is for data sets and folders"):
        _ = RLConfig(problems=path, split="test").tasks


# The forms of the benchmarks as they are passed around, under their own names.
OWN_NAMES = {
    "gsm8k": {"question": "How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
    "math": {"problem": "How many?", "solution": "So $\\boxed{7}$.", "level": "1", "type": "x"},
    "aime": {"ID": "2024-I-1", "Year": 2024, "Problem": "How many?", "Answer": 7},
    "aime_solution": {"ID": "1", "Problem": "How many?", "Solution": "it is 8?", "Answer": 7},
    "kaggle": {"ID": "1", "Problem Number": 3, "Question": "How many?", "Answer": "007"},
    "olympiad": {"Question": "How many?", "Final Answer": ["$7$"]},
}


@pytest.mark.parametrize("name", OWN_NAMES)
def test_names_and_answers_of_the_benchmarks_need_no_flags(tmp_path, name):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(OWN_NAMES[name]))
    (found,) = read_problems(path)
    assert found.problem == "How many?"
    judge = make_judge("exact")
    assert judge("so \\boxed{7}", found.answer) and not judge("so \\boxed{8}", found.answer)
    assert RLConfig(problems=path).tasks == (found,)


def test_the_name_as_it_is_written_goes_first(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"Answer": "no", "answer": "2", "PROBLEM": "1+1"}]))
    assert read_problems(path) == [("1+1", "2")]


def test_what_is_not_recognised_says_what_there_is_and_which_setting_picks_it(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("task,gold\n1+1,2\n")
    with pytest.raises(
        ValueError, match=r"\['gold', 'task'\]; problem_field .--problem-field. names"
    ):
        read_problems(path)
    with pytest.raises(ValueError, match=r"answer_field .--answer-field. names the one to take"):
        load_problems(EvalConfig("m", path, "o", problem_field="task").source)
    with pytest.raises(ValueError, match=r"solution_field .--solution-field. names the one"):
        load_demonstrations(Source(str(path), problem=("task",)))
    fields = dict(problem_field="task", answer_field="gold")
    assert RLConfig(problems=path, **fields).tasks == (("1+1", "2"),)


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("rows.txt", b"1+1", r"rows are read from \.jsonl, .*\.csv.*\.parquet files"),
        ("rows.xlsx.gz", b"", r"rows are read from \.jsonl"),
        ("rows.csv", b"problem,answer\nm\xfcde,2\n", "not UTF-8 text .* save it as UTF-8"),
        ("rows.csv", b'problem,answer\n"1+1,2\n', "not valid CSV"),
        ("rows.csv", b"answer,answer\n1,2\n", "the header, has 'answer' twice"),
        ("rows.csv", b"problem,answer\n1,2,3\n", "row 1: 3 cells where the header has 2"),
        ("rows.csv", b"", "no problems in it"),
        ("rows.json", b'{\n "data": [{"problem": 1},]\n}', "not valid JSON .*line 2"),
        ("rows.json", b'[{"problem": 1},]', "not valid JSON"),
        ("rows.json", b"[1, 2]", "row 1: not a JSON object but int"),
        ("rows.json", b"7", "line 1: not a JSON object but int"),
        ("rows.json", b"", "not valid JSON"),
        ("rows.jsonl", b"", "no problems in it"),
        ("rows.jsonl.gz", b"no gzip", "not a whole gzip file"),
        ("rows.csv.gz", gzip.compress(b"a" * 5000, mtime=0)[:20], "not a whole gzip file"),
    ],
)
def test_odd_files_are_one_line_that_names_them(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_problems(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_long_cell_is_read_and_the_limit_of_csv_is_left_alone(tmp_path):
    import csv

    limit = csv.field_size_limit()
    path = tmp_path / "rows.csv"
    path.write_text(f"problem,answer\n{'a' * (limit + 1)},2\n")
    assert len(read_problems(path)[0].problem) == limit + 1
    assert csv.field_size_limit() == limit


@needs_datasets
def test_what_datasets_saved(tmp_path):
    import datasets

    one, two = datasets.Dataset.from_list(ROWS[:1]), datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "plain")
    assert read_problems(tmp_path / "plain") == PAIRS[:1]
    with pytest.raises(ValueError, match="split is for data sets and folders, got 'test'"):
        _ = EvalConfig("m", tmp_path / "plain", "o", split="test").source
    datasets.DatasetDict(train=two, test=one).save_to_disk(tmp_path / "both")
    assert RLConfig(problems=tmp_path / "both").tasks == tuple(PAIRS)
    assert read_problems(tmp_path / "both") == PAIRS[:1]
    with pytest.raises(
        ValueError, match=r"split 'dev': it has train, test; .split. .--split. names"
    ):
        load_problems(EvalConfig("m", tmp_path / "both", "o", split="dev").source)


@needs_datasets
def test_a_parquet_file_is_read_without_a_split(tmp_path):
    import datasets

    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(path)
    assert read_problems(path) == PAIRS and rows_at(str(path), "any").noun == "row"
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"rows\.parquet: "):
        read_problems(path)


class Deaf:
    """The hub's client without a network: it counts how often it is asked."""

    def __init__(self):
        self.asked = 0

    def head(self, url, timeout):
        assert timeout <= 5
        self.asked += 1
        raise OSError("Name or service not known")


@needs_datasets
def test_a_mistyped_folder_is_said_at_once(monkeypatch):
    import huggingface_hub.constants as constants
    from datasets import config
    from huggingface_hub import utils

    deaf, tried = Deaf(), []

    def find(*where, **_):
        tried.append(where)
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", find)
    monkeypatch.setattr(time, "sleep", tried.append)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(utils, "get_session", lambda: deaf)
    missing = "no folder runs/problms is here, nor is it in the cache .*Name or service not known"
    with pytest.raises(ValueError, match=f"cannot load the data set 'runs/problms', .*{missing}"):
        read_problems("runs/problms")
    with pytest.raises(ModelError, match=f"cannot load a causal .* from 'runs/problms': {missing}"):
        load_model("runs/problms")
    assert deaf.asked == 2 and tried == [], "the libraries ask by themselves, and wait to ask again"
    assert not constants.HF_HUB_OFFLINE and not config.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="cannot be asked: HF_HUB_OFFLINE is set"):
        load_model("runs/problms")
    assert deaf.asked == 2


def test_without_its_package_a_kind_says_what_brings_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "rows.parquet").write_bytes(b"")
    with pytest.raises(ImportError, match=r"pip install em-kernels\[datasets\].*JSON lines"):
        read_problems(tmp_path / "rows.parquet")
