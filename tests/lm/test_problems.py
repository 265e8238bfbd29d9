"""Sources of problems: files in the formats of the benchmarks, made here, and what can be wrong."""

import importlib.util
import json

import pytest

from em_kernels.evaluator import EvalConfig, read_problems
from em_kernels.lm.problems import (
    PRESETS,
    Problem,
    Source,
    find_source,
    find_template,
    load_problems,
)
from em_kernels.trainer import RLConfig

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


def test_several_answers_are_one_text_and_several_problems_are_none(tmp_path):
    rows = [
        {"problem": "p", "answer": ["1", 2, 1e-05]},
        {"problem": "p", "answer": ["1", "\ud835"]},
        {"problem": "p", "answer": ["1", ["2"]]},
        {"problem": ["p", "q"], "answer": "1"},
    ]
    found = load_problems(write_lines(tmp_path / "rows.jsonl", rows))
    assert found.problems == [("p", "1, 2, 0.00001")]
    reasons = [skipped.reason for skipped in found.skipped]
    assert "'answer' must be Unicode text" in reasons[0]
    assert "'answer' must be text that is not empty" in reasons[1]
    assert "'problem' must be text that is not empty, got ['p', 'q']" in reasons[2]


def test_nothing_usable(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"q": 1}])
    with pytest.raises(ValueError, match="no usable problems among 1 rows; row 1: no field"):
        load_problems(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_problems(str(tmp_path / "missing.jsonl"))


@pytest.mark.parametrize(
    "template, prompt",
    [
        (r"Solve {problem} in \boxed{}", r"Solve 1+1? in \boxed{}"),
        (r"{problem} \boxed{{}}", r"1+1? \boxed{{}}"),
        ("{problem} {other} {0} {", "1+1? {other} {0} {"),
        ("}{problem}{problem}", "}1+1?1+1?"),
        ("{{problem}}", "{1+1?}"),
    ],
)
def test_only_the_place_of_the_problem_is_filled(template, prompt):
    assert Source("x", template=template).prompt("1+1?") == prompt
    assert RLConfig(problems=(("1+1?", "2"),), template=template).prompt_texts == (prompt,)
    assert find_template(template) == template


def test_a_problem_is_put_as_it_is():
    problem = r"{problem} \frac{1}{2} {} %s"
    assert Source("x", template="<{problem}>").prompt(problem) == f"<{problem}>"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_asks_for_a_box_in_training_and_evaluation(name, tmp_path):
    row, _ = ROWS[name]
    path = write_lines(tmp_path / "rows.jsonl", [row])
    expected = "1+1?\nPlease reason step by step, and put your final answer within \\boxed{}."
    config = RLConfig(problems=path, template=name)
    assert config.prompt_texts == (expected,) == (find_source(name).prompt("1+1?"),)
    assert EvalConfig("m", path, "o", template=name.upper()).source.prompt("1+1?") == expected
    assert RLConfig(problems=path).prompt_texts == ("1+1?",)


@pytest.mark.parametrize("template", ["no place", "{other}", "{problem", "{}", "{problem} \ud835"])
def test_bad_templates(template):
    for make in (
        lambda: Source("x", template=template),
        lambda: RLConfig(problems=(("1", "1"),), template=template),
        lambda: RLConfig(problems="x.jsonl", template=template),
        lambda: EvalConfig("m", "x.jsonl", "o", template=template),
    ):
        with pytest.raises(ValueError, match="template must"):
            make()


@pytest.mark.parametrize("name", PRESETS)
def test_training_reads_the_rows_that_evaluation_reads(name, tmp_path):
    row, answer = ROWS[name]
    path = write_lines(tmp_path / "rows.jsonl", [row, {**row, "extra": 1}])
    assert RLConfig(problems=path).tasks == (("1+1?", answer),) * 2
    assert load_problems(EvalConfig("m", path, "o").source).problems == [("1+1?", answer)] * 2
    assert read_problems(path) == [("1+1?", answer)] * 2


@needs_datasets
def test_training_reads_parquet_and_data_sets(tmp_path):
    import datasets

    path = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_list([ROWS["gsm8k"][0]] * 2).to_parquet(path)
    assert RLConfig(problems=path).tasks == (("1+1?", ROWS["gsm8k"][1]),) * 2
    folder = tmp_path / "benchmark"
    folder.mkdir()
    for split, times in (("train", 3), ("test", 1), ("validation", 2)):
        write_lines(folder / f"{split}.jsonl", [ROWS["minerva"][0]] * times)
    read = {None: 3, "train": 3, "test": 1, "validation": 2}
    for split, times in read.items():
        assert len(RLConfig(problems=str(folder), split=split).tasks) == times
        config = EvalConfig("m", str(folder), "o", split=split)
        assert len(load_problems(config.source).problems) == (times if split else read["test"])


@needs_datasets
def test_training_asks_the_hub_for_the_part_to_train_on(monkeypatch):
    import datasets

    asked = []

    def load(kind, /, **options):
        asked.append((kind, options["name"], options["split"]))
        return datasets.Dataset.from_list([ROWS["gsm8k"][0]])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (prompt,) = RLConfig(problems="gsm8k").prompt_texts
    assert prompt.endswith("\\boxed{}."), "by name the preset brings its template along"
    assert RLConfig(problems="gsm8k", split="test", template="{problem}").prompt_texts == ("1+1?",)
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]


def test_fields_are_named_in_both(tmp_path):
    row = {"problem": "not this", "answer": "0", "ask": "1+1?", "solved": 2}
    path = write_lines(tmp_path / "rows.jsonl", [row])
    fields = {"problem_field": "ask", "answer_field": "solved"}
    assert RLConfig(problems=path, **fields).tasks == (("1+1?", "2"),)
    assert load_problems(EvalConfig("m", path, "o", **fields).source).problems == [("1+1?", "2")]
    wrong = EvalConfig("m", path, "o", problem_field="nothing").source
    with pytest.raises(ValueError, match="no field 'nothing', only"):
        load_problems(wrong)
    with pytest.raises(ValueError, match="problem_field must be None where problems are pairs"):
        RLConfig(problems=(("1", "1"),), problem_field="ask")
    with pytest.raises(ValueError, match="answer_field is for problems with answers"):
        EvalConfig("m", path, "o", answer_field="ask", labelled=False)


def test_training_names_the_row_that_is_no_problem(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"problem": "1", "answer": "1"}, {"q": 1}])
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: no field 'problem' or .*, only"):
        _ = RLConfig(problems=path).tasks
    (tmp_path / "rows.jsonl").write_text('{"problem": "1"}\n[]\n')
    with pytest.raises(ValueError, match="line 2: not a JSON object but list"):
        _ = RLConfig(problems=path, reward="format").tasks


def test_answers_may_be_missing_where_no_reward_looks_at_them(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"problem": "1"}, {"question": "2", "answer": 3}])
    assert RLConfig(problems=path, reward="majority").tasks == (("1", None), ("2", "3"))
    with pytest.raises(ValueError, match="problems need answers for the reward 'verified'"):
        _ = RLConfig(problems=path).tasks
    found = load_problems(EvalConfig("m", path, "o", labelled=False).source)
    assert found.problems == [("1", None), ("2", None)]


@pytest.mark.parametrize(
    "name", ["/none", "./none", "a/b/c", "../data/train", "~/none", "runs/a b"]
)
def test_a_path_that_is_not_there_asks_no_hub(name):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_problems(name)


def test_bad_limit(tmp_path):
    with pytest.raises(ValueError, match="limit must be 1 or more"):
        load_problems(write_lines(tmp_path / "r.jsonl", [ROWS["aime25"][0]]), limit=0)


def test_a_field_that_is_null_is_not_there_if_there_is_another(tmp_path):
    row = {"problem": None, "question": "p", "answer": None, "solution": "1"}
    path = write_lines(tmp_path / "rows.jsonl", [row])
    assert load_problems(path).problems == [("p", "1")]
    assert RLConfig(problems=path).tasks == (("p", "1"),)
    write_lines(tmp_path / "rows.jsonl", [{"problem": "p", "answer": None}])
    assert RLConfig(problems=path, reward="majority").tasks == (("p", None),)
    with pytest.raises(ValueError, match="'answer' must be text that is not empty, got None"):
        load_problems(path)
