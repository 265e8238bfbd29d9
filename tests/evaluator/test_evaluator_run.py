"""Evaluations on disk: known accuracies, resuming, what is counted, comparing two."""

import importlib.util
import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from tiny_qwen2 import make_bigram_model, make_tokenizer

from em_kernels.analysis.report import write_report
from em_kernels.evaluator import (
    EvalConfig,
    EvalError,
    Records,
    compare_folders,
    evaluate,
    rank_prompts,
    run_eval,
    summarise,
)
from em_kernels.evaluator import run as run_module
from em_kernels.evaluator.asking import Asked
from em_kernels.evaluator.records import Answer, Record, write_json
from em_kernels.lm.data import read_json_object

NO_MARK = "{% for message in messages %}{{ message.content }}{% endfor %}"
FOLLOW = {"a": "1", "b": "2", "c": "3"}

torch.set_num_threads(1)


def letters_model(sure=0.6):
    """Answers a with 1, b with 2 and c with 3, each with probability `sure`, else with 9."""
    return make_bigram_model({k: {v: sure, "9": 1 - sure} for k, v in FOLLOW.items()})


def evaluation(tmp_path, rows=None, *, model=None, name="eval", **settings):
    path = tmp_path / "problems.jsonl"
    if rows is not None:
        path.write_text("\n".join(rows), encoding="utf-8")
    chosen = dict(samples=4, temperatures=(0, 1.0), max_new_tokens=5, batch_size=7)
    config = EvalConfig("model", path, tmp_path / name, **{**chosen, **settings})
    tokenizer = make_tokenizer(template=NO_MARK)
    return run_eval(config, model=model or letters_model(), tokenizer=tokenizer, progress=False)


def problems(letters):
    return [json.dumps({"problem": x, "answer": FOLLOW[x]}) for x in letters]


def of(summary, temperature):
    return next(t for t in summary["temperatures"] if t["temperature"] == temperature)


def lines(tmp_path, name="eval"):
    return (tmp_path / name / "records.jsonl").read_text().splitlines()


def test_any_text_is_written_and_read_back(tmp_path):
    """Half of a surrogate pair, which UTF-8 has no bytes for, among them."""
    texts = ["\ud835", "a\udc00b \U0001d54f", "\0 \\ud835 \u2028 \x85\n", "\\"]
    records = Records(tmp_path / "records.jsonl")
    for i, text in enumerate(texts):
        records.add([Record(i, 0.0, 0, Answer(text, 1, True, False))])
    assert [record.answer.text for record in records] == texts
    write_json(tmp_path / "eval.json", dict(enumerate(texts)))
    assert list(read_json_object(tmp_path / "eval.json").values()) == texts


def test_the_report_of_an_evaluation_shows_any_answer(tmp_path, monkeypatch):
    decode = Asked.ask

    def ask(self, *args):
        return [replace(a, text=f"{a.text}\ud835 \0") for a in decode(self, *args)]

    monkeypatch.setattr(Asked, "ask", ask)
    evaluation(tmp_path, [*problems("abc"), '{"problem": "\\ud835", "answer": "1"}'])
    assert "\\ud835" in write_report(tmp_path / "eval").path.read_text(encoding="utf-8")


def test_accuracies_of_a_model_that_is_known(tmp_path):
    summary = evaluation(tmp_path, problems("abc" * 40), batch_size=64)
    greedy, drawn = of(summary, 0.0), of(summary, 1.0)
    assert greedy["mean"]["mean"] == 1.0 and greedy["samples"] == 1
    assert drawn["mean"]["low"] < 0.6 < drawn["mean"]["high"]
    assert drawn["pass"].keys() == {1, 2, 4}
    assert drawn["pass"][2]["low"] < 1 - 0.4**2 < drawn["pass"][2]["high"]
    assert drawn["pass"][4]["low"] < 1 - 0.4**4 < drawn["pass"][4]["high"]
    # Of four votes: 3 or 4 right wins, 2 to 2 counts half.
    right = 0.6**4 + 4 * 0.6**3 * 0.4 + 0.5 * 6 * 0.6**2 * 0.4**2
    assert drawn["majority"]["low"] < right < drawn["majority"]["high"]
    assert (drawn["without_end"], drawn["without_final_answer"]) == (0, 0)
    assert summary["missing_answers"] == 0
    assert json.loads((tmp_path / "eval" / "summary.json").read_text())["problems"] == 120


def test_answers_carry_the_models_own_entropy_and_log_probability(tmp_path):
    evaluation(tmp_path, problems("ab"), temperatures=(0, 2.0))
    expected = -(0.6 * math.log(0.6) + 0.4 * math.log(0.4))
    for record in Records(tmp_path / "eval" / "records.jsonl"):
        answer = record.answer
        first = 0.6 if answer.correct else 0.4
        assert answer.tokens == 2  # the digit and the end, which is certain
        assert answer.entropy == pytest.approx(expected / 2, rel=1e-2)
        assert answer.logprob == pytest.approx(math.log(first), rel=1e-2)
        assert answer.confidence == pytest.approx(first**0.5, rel=1e-2)


@pytest.mark.parametrize("kept", [0, 1, 7, 20])
def test_a_stopped_evaluation_goes_on_to_the_same_answers(tmp_path, kept):
    summary = evaluation(tmp_path, problems("abcab"))
    whole = lines(tmp_path)
    cut = "".join(line + "\n" for line in whole[:kept]) + '{"problem": 3, "tempe'
    (tmp_path / "eval" / "records.jsonl").write_text(cut)
    assert evaluation(tmp_path) == summary
    assert sorted(lines(tmp_path)) == sorted(whole)


def test_an_interrupted_evaluation_keeps_its_batches(tmp_path, monkeypatch):
    whole = evaluation(tmp_path, problems("abcab"), name="whole")
    asked = []
    ask = Asked.ask

    def stop_at_the_third(self, *arguments):
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return ask(self, *arguments)

    monkeypatch.setattr(Asked, "ask", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        evaluation(tmp_path)
    assert len(lines(tmp_path)) == 5 + 7
    assert evaluation(tmp_path) == whole
    assert sorted(lines(tmp_path)) == sorted(lines(tmp_path, "whole"))
    assert len(asked) == 3 + 2, "a batch was asked twice, or not at all"


def test_a_finished_evaluation_asks_nothing(tmp_path, monkeypatch):
    summary = evaluation(tmp_path, problems("abc"))
    monkeypatch.setattr(Asked, "ask", lambda *_: pytest.fail("asked"))
    assert evaluation(tmp_path) == summary


def test_the_seed_decides_the_answers(tmp_path):
    rows = problems("abc" * 10)
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        evaluation(tmp_path, rows, name=name, seed=seed)
    assert lines(tmp_path, "one") == lines(tmp_path, "same") != lines(tmp_path, "other")


def test_nothing_is_dropped_in_silence(tmp_path):
    model = make_bigram_model({"a": {"1": 1.0}, "1": {"1": 1.0}, "b": {"d": 1.0}})
    long = json.dumps({"problem": "a" * 600, "answer": "1"})
    rows = [*problems("ab"), long, "broken", '{"problem": "a"}']
    summary = evaluation(tmp_path, rows, model=model, temperatures=(0,))
    found = of(summary, 0.0)
    assert summary["problems"] == 3 and summary["too_long"] == [2]
    assert [row["row"] for row in summary["skipped_rows"]] == [4, 5]
    assert found["mean"]["mean"] == 0, "an answer that is cut off, one without, one not asked"
    assert found["without_end"] == found["without_final_answer"] == 0.5


def test_another_evaluation_is_not_mixed_in(tmp_path):
    evaluation(tmp_path, problems("ab"))
    with pytest.raises(EvalError, match="an evaluation with `samples` 4, got 2"):
        evaluation(tmp_path, samples=2)
    with pytest.raises(EvalError, match="an evaluation of other problems"):
        evaluation(tmp_path, problems("bc"))
    with pytest.raises(EvalError, match="an evaluation of other weights"):
        evaluation(tmp_path, problems("ab"), model=letters_model(0.7))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(EvalError, match="is not empty and holds no evaluation"):
        evaluation(tmp_path, name="mine")
    with pytest.raises(EvalError, match=r"it has no eval\.json"):
        compare_folders(tmp_path / "eval", tmp_path / "mine")


def test_two_models_are_compared_pair_by_pair(tmp_path):
    rows = problems("abc" * 20)
    evaluation(tmp_path, rows, name="a", samples=8)
    evaluation(tmp_path, rows[::-1], name="b", samples=8, model=letters_model(0.8))
    (row,) = [r for r in compare_folders(tmp_path / "a", tmp_path / "b") if r["temperature"] == 1]
    # Problems are paired by their text, so those that are repeated count once.
    assert row["problems"] == 3
    rows = [
        json.dumps({"problem": f"{i} {x}", "answer": FOLLOW[x]}) for i in range(20) for x in "abc"
    ]
    evaluation(tmp_path, rows, name="c", samples=8)
    evaluation(tmp_path, rows[::-1], name="d", samples=8, model=letters_model(0.8))
    (row,) = [r for r in compare_folders(tmp_path / "c", tmp_path / "d") if r["temperature"] == 1]
    assert row["problems"] == 60 and row["p_value"] < 0.01
    assert 0.1 < row["low"] < row["difference"] < row["high"] < 0.3
    assert row["b"] - row["a"] == pytest.approx(row["difference"])


def test_nothing_in_common(tmp_path):
    evaluation(tmp_path, problems("a"), name="a")
    evaluation(tmp_path, problems("b"), name="b")
    with pytest.raises(ValueError, match="no problem and temperature in common"):
        compare_folders(tmp_path / "a", tmp_path / "b")


def test_what_is_left_open_comes_from_the_preset(tmp_path, monkeypatch):
    preset = run_module.find_source("gsm8k", path=str(tmp_path / "problems.jsonl"))
    monkeypatch.setattr(run_module, "find_source", lambda name, **_: preset)
    evaluation(tmp_path, problems("a"), samples=None, temperatures=None, max_new_tokens=None)
    config = json.loads((tmp_path / "eval" / "eval.json").read_text())["config"]
    assert config["temperatures"] == [0, 0.6] and config["samples"] == 1
    assert config["max_new_tokens"] == 1024 and config["top_p"] == 0.95
    assert "\\boxed" in config["template"]


def test_an_evaluation_of_version_1_goes_on(tmp_path):
    """Its template has the braces doubled."""
    given = dict(temperatures=(0, 1.0), template=r"{problem} {\boxed{}} ")
    summary = evaluation(tmp_path, problems("ab"), **given)
    whole = lines(tmp_path)
    path = tmp_path / "eval" / "eval.json"
    settings = json.loads(path.read_text())
    assert settings.pop("version") == 3
    settings["config"]["template"] = r"{problem} {{\boxed{{}}}} "
    for name in ("problem_field", "answer_field", "split"):
        del settings["config"][name]
    path.write_text(json.dumps(settings))
    (tmp_path / "eval" / "records.jsonl").write_text(whole[0] + "\n")
    ranked = rank_prompts(tmp_path / "eval")
    assert [row["prompt"] for row in ranked] == []
    assert evaluation(tmp_path, **given) == summary
    ranked = rank_prompts(tmp_path / "eval")
    assert sorted(row["prompt"] for row in ranked) == [r"a {\boxed{}} ", r"b {\boxed{}} "]


def test_what_the_summary_needs_is_missed_before_anything_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(Asked, "ask", lambda *_: pytest.fail("asked"))
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"scipy.stats cannot be .*pip install 'em-kernels.eval"):
        evaluation(tmp_path, problems("a"))
    assert not (tmp_path / "eval").exists()


def test_answers_are_not_clustered_by_another_judge_than_they_were_judged_by(tmp_path, monkeypatch):
    evaluation(tmp_path, problems("ab"), judge="exact")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    summarise(tmp_path / "eval")
    path = tmp_path / "eval" / "eval.json"
    path.write_text(path.read_text().replace('"judge": "exact"', '"judge": "math-verify"'))
    for read in (summarise, rank_prompts):
        with pytest.raises(ImportError, match="judge 'math-verify' needs it installed"):
            read(tmp_path / "eval")


def test_in_memory_and_on_disk_are_one_evaluation(tmp_path):
    """Greedy answers need no random numbers: both ask, judge and summarise alike."""
    summary = evaluation(tmp_path, problems("abc"), temperatures=(0,), judge="exact")
    pairs = [(x, FOLLOW[x]) for x in "abc"]
    tokenizer = make_tokenizer(template=NO_MARK)
    options = dict(samples=0, max_new_tokens=5, judge="exact", progress=False)
    found = evaluate(letters_model(), tokenizer, pairs, **options)
    on_disk = [record.answer for record in Records(tmp_path / "eval" / "records.jsonl")]
    assert [replace(a, entropy=None, logprob=None) for a in on_disk] == [
        record.greedy for record in found.records
    ]
    assert found.greedy_accuracy == of(summary, 0.0)["mean"]["mean"]
    assert found.response_length == of(summary, 0.0)["response_length"]


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        (dict(samples=0), ValueError, "samples must be 1 or more"),
        (dict(samples=True), TypeError, "samples must be an int"),
        (dict(temperatures=(-1,)), ValueError, "temperatures must be 0 or more"),
        (dict(temperatures=()), ValueError, "temperatures must have one at least, got none"),
        (dict(temperatures=(0, 1, 1.0)), ValueError, "different numbers, 1 is there twice"),
        (dict(top_p=0.0), ValueError, "top_p must be in"),
        (dict(judge="mine"), ValueError, "judge must be one of"),
        (dict(dtype="int8"), ValueError, "dtype must be"),
    ],
)
def test_bad_settings(settings, error, text):
    with pytest.raises(error, match=text):
        EvalConfig("model", "problems.jsonl", "out", **settings)
