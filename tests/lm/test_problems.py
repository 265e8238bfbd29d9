"""Sources of problems: files in the formats of the benchmarks, made here, and what can be wrong."""

import importlib.util
import json

import pytest

from em_kernels.lm.problems import PRESETS, Problem, Source, find_source, load_problems

needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="needs the package datasets"
)

# A row of each benchmark, with its own field names and form of the answer.
ROWS = {
    "math500": ({"problem": "1+1?", "solution": "so \\boxed{2}", "answer": "2", "level": 1}, "2"),
    "minerva": ({"question": "1+1?", "answer": "2"}, "2"),
    "olympiadbench": ({"question": "1+1?", "final_answer": ["$2$"], "unit": None}, "$2$"),
    "amc23": ({"id": 0, "question": "1+1?", "answer": 2.0, "url": "x"}, "2.0"),
    "aime24": ({"id": 60, "problem": "1+1?", "solution": "...", "answer": "002"}, "002"),
    "aime25": ({"id": "0", "problem": "1+1?", "answer": "2"}, "2"),
    "gsm8k": ({"question": "1+1?", "answer": "It is 2.\n#### 2"}, "It is 2.\n#### 2"),
}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_read_rows_of_their_benchmark(name, tmp_path):
    row, answer = ROWS[name]
    path = write_lines(tmp_path / "rows.jsonl", [row])
    found = load_problems(find_source(name, path=path))
    assert found.problems == [Problem("1+1?", answer)] and not found.skipped
    prompt = found.source.prompt("1+1?")
    assert prompt.startswith("1+1?\n") and prompt.endswith("\\boxed{}.")
    assert found.source.settings["samples"] >= 1


@pytest.mark.parametrize("name", PRESETS)
def test_the_right_answer_of_every_preset_is_judged_right(name):
    from em_kernels.evaluator import make_judge

    _, answer = ROWS[name]
    for judge in map(make_judge, ("exact", "auto")):
        assert judge("so the answer is \\boxed{2}", answer)
        assert not judge("so the answer is \\boxed{3}", answer)


@needs_datasets
@pytest.mark.parametrize("name", ["gsm8k", "olympiadbench"])
def test_parquet(name, tmp_path):
    import datasets

    row, answer = ROWS[name]
    path = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_list([row, row]).to_parquet(path)
    source = find_source(name, path=path)
    assert load_problems(source, limit=1).problems == [Problem("1+1?", answer)]
    assert len(load_problems(source).problems) == 2


@needs_datasets
def test_a_data_set_by_name(tmp_path):
    folder = tmp_path / "benchmark"
    folder.mkdir()
    write_lines(folder / "test.jsonl", [ROWS["minerva"][0]])
    write_lines(folder / "train.jsonl", [ROWS["minerva"][0]] * 2)
    assert load_problems(str(folder)).problems == [Problem("1+1?", "2")]
    assert len(load_problems(Source(str(folder), split="train")).problems) == 2
    with pytest.raises(ValueError, match="split 'validation'"):
        load_problems(Source(str(folder), split="validation"))


def test_other_files_are_refused(tmp_path):
    (tmp_path / "problems.csv").write_text("problem,answer")
    with pytest.raises(ValueError, match=r"are read from \.jsonl"):
        load_problems(str(tmp_path / "problems.csv"))


@needs_datasets
def test_a_data_set_that_is_not_there_says_so(monkeypatch):
    import datasets

    def refuse(kind, /, **options):
        assert (kind, options) == ("nobody/nothing", {"split": "test", "name": None})
        raise ConnectionError("the hub\ncannot be reached")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"cannot load the data set 'nobody/nothing'.*cannot be"):
        load_problems("nobody/nothing")


@needs_datasets
def test_a_preset_asks_the_hub_for_its_data_set(monkeypatch):
    import datasets

    def load(kind, /, **options):
        assert (kind, options) == ("openai/gsm8k", {"split": "test", "name": "main"})
        return datasets.Dataset.from_list([ROWS["gsm8k"][0]])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(load_problems("GSM8K").problems) == 1


def test_rows_that_are_no_problems_are_kept_with_their_reason(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"problem": "p", "answer": "a"}).encode()
    lines = [
        b"\xef\xbb\xbf" + good,
        b"{broken",
        b"[1, 2]",
        b'{"problem": "p"}',
        b'{"problem": "", "answer": "a"}',
        b'{"problem": "p", "answer": null}',
        b'{"problem": "p", "answer": true}',
        b'{"problem": "\xff"}',
        b"",
        good,
    ]
    path.write_bytes(b"\n".join(lines))
    found = load_problems(str(path))
    assert found.problems == [Problem("p", "a")] * 2
    reasons = [
        (2, "not valid JSON"),
        (3, "not a JSON object but list"),
        (4, "no field 'answer' or 'final_answer' or 'solution', only ['problem']"),
        (5, "'problem' must be text that is not empty, got ''"),
        (6, "'answer' must be text that is not empty, got None"),
        (7, "'answer' must be text that is not empty, got True"),
        (8, "not UTF-8 text"),
    ]
    assert len(found.skipped) == len(reasons)
    for skipped, (row, reason) in zip(found.skipped, reasons):
        assert skipped.row == row and reason in skipped.reason


@pytest.mark.parametrize("field", ["problem", "answer"])
@pytest.mark.parametrize(
    "value, reason",
    [
        ('"x \\ud835 y"', "must be Unicode text, got half of a surrogate pair, '\\ud835', as char"),
        (
            '"\\udc00"',
            "must be Unicode text, got half of a surrogate pair, '\\udc00', as char",
        ),
        ('["1", "\\ud835"]', "must be Unicode text"),
        ("null", "must be text that is not empty, got None"),
        ("[]", "must be text that is not empty, got []"),
        ('{"a": 1}', "must be text that is not empty, got {'a': 1}"),
        ("NaN", "must be text that is not empty, got nan"),
        ("-Infinity", "must be text that is not empty, got -inf"),
        ("[1, 1e999]", "must be text that is not empty, got [1, inf]"),
        ("1" + "0" * 5000, "not valid JSON (Exceeds the limit"),
        ("[" * 400 + "1" + "]" * 400, "must be text that is not empty, got [[["),
        ("[" * 100_000 + "]" * 100_000, "not valid JSON (nested too deeply)"),
    ],
    ids=lambda value: value[:12],
)
def test_odd_rows_are_counted_and_the_others_are_problems(tmp_path, field, value, reason):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"problem": "\U0001d54f \0", "answer": "1"})  # a whole pair, as two escapes
    values = {"problem": '"p"', "answer": '"a"', field: value}
    odd = "{" + ", ".join(f'"{name}": {text}' for name, text in values.items()) + "}"
    path.write_text(f"{good}\n{odd}\n{good}\n", encoding="ascii")
    found = load_problems(str(path))
    assert found.problems == [Problem("\U0001d54f \0", "1")] * 2
    (skipped,) = found.skipped
    assert skipped.row == 2 and reason in skipped.reason and len(skipped.reason) < 200
    json.dumps(skipped.reason).encode()


def test_nothing_usable(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"q": 1}])
    with pytest.raises(ValueError, match="no usable problems among 1 rows; row 1: no field"):
        load_problems(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_problems(str(tmp_path / "missing.jsonl"))


@pytest.mark.parametrize("template", ["no place", "{other}", "{problem", "{}", "{problem} \ud835"])
def test_bad_templates(template):
    with pytest.raises(ValueError, match="template"):
        Source("x", template=template)


def test_bad_limit(tmp_path):
    with pytest.raises(ValueError, match="limit must be 1 or more"):
        load_problems(write_lines(tmp_path / "r.jsonl", [ROWS["aime25"][0]]), limit=0)
