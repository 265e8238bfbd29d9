"""The evaluator: accuracies of models that are known by construction, judges, bad input."""

from __future__ import annotations

import importlib.util
import json
import threading

import pytest
import torch
from tiny_qwen2 import WORDS, make_bigram_model, make_model, make_tokenizer

from em_kernels.evaluator import evaluate, final_answer, make_judge, read_problems
from em_kernels.evaluator.asking import default_batch_size
from em_kernels.lm.judge import judges

NO_MARK = "{% for message in messages %}{{ message.content }}{% endfor %}"
LETTERS = {"a": "1", "b": "2", "c": "3"}


torch.set_num_threads(1)


def letters_model(sure: float = 1.0):
    """Answers a with 1, b with 2 and c with 3, each with probability `sure`, else with 9."""
    follow = {
        letter: {digit: sure, "9": 1 - sure} if sure < 1 else {digit: 1.0}
        for letter, digit in LETTERS.items()
    }
    return make_bigram_model(follow)


def ask(model, problems, **kwargs):
    tokenizer = make_tokenizer(template=NO_MARK)
    return evaluate(model, tokenizer, problems, max_new_tokens=5, progress=False, **kwargs)


def test_accuracies_of_a_model_that_is_known():
    problems = [("2 a", "1"), ("b", "2"), ("10 c", "3"), ("00 c", "4")]
    result = ask(letters_model(), problems, samples=2, batch_size=3)
    assert result.greedy_accuracy == result.sampled_accuracy == 0.75
    assert result.greedy_stderr == pytest.approx(0.25)
    assert (result.problems, result.samples, result.temperature) == (4, 2, 1.0)
    assert result.response_length == 2
    assert result.truncated == 0
    for record, (problem, answer) in zip(result.records, problems):
        assert (record.problem, record.answer) == (problem, answer)
        texts = [a.text for a in (*record.samples, record.greedy)]
        assert texts == [LETTERS[problem[-1]]] * 3
        assert record.greedy.correct == (answer != "4")


@pytest.mark.parametrize("temperature, expected", [(1.0, 0.6), (0.5, 0.36 / 0.52), (2.0, 0.5505)])
def test_sampled_accuracy_is_the_probability_of_the_answer(temperature, expected):
    problems = [(letter, digit) for letter, digit in LETTERS.items()] * 400
    result = ask(letters_model(0.6), problems, temperature=temperature)
    assert result.greedy_accuracy == 1.0
    assert result.sampled_accuracy == pytest.approx(expected, abs=5 * result.sampled_stderr)
    assert 0.013 < result.sampled_stderr < 0.015


def test_the_standard_error_is_over_problems_not_over_samples():
    result = ask(letters_model(), [("a", "1"), ("b", "5")], samples=50, greedy=False)
    assert result.sampled_accuracy == 0.5
    assert result.sampled_stderr == pytest.approx(0.5)
    assert result.greedy_accuracy is None and result.records[0].greedy is None


def test_one_problem_has_no_standard_error():
    result = ask(letters_model(), [("a", "1")], samples=0)
    assert (result.greedy_accuracy, result.greedy_stderr) == (1.0, None)
    assert result.sampled_accuracy is None


def test_an_evaluation_depends_on_its_seed_and_leaves_the_callers_random_state_alone():
    model, problems = letters_model(0.5), [("a", "1")] * 50
    torch.manual_seed(1)
    state = torch.get_rng_state()
    texts = [
        [r.samples[0].text for r in ask(model, problems, seed=seed).records] for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_unfinished_answers_are_counted():
    model = make_bigram_model({"a": {"1": 1.0}, "1": {"1": 1.0}})
    result = ask(model, [("a", "11111"), ("b", "")], greedy=False)
    assert result.truncated == 0.5
    assert result.records[0].samples[0].tokens == 5
    assert not result.records[0].samples[0].finished


def test_a_judge_may_be_a_function():
    seen = []

    def shouting(response, answer):
        seen.append((response, answer))
        return answer == "yes"

    result = ask(letters_model(), [("a", "yes"), ("b", "no")], samples=1, judge=shouting)
    assert result.sampled_accuracy == result.greedy_accuracy == 0.5
    assert result.judge == "shouting"
    assert sorted(seen) == [("1", "yes")] * 2 + [("2", "no")] * 2


def test_result_as_json(tmp_path):
    result = ask(letters_model(), [("a", "1"), ("b", "5")])
    path = tmp_path / "new" / "result.json"
    result.write_json(path)
    written = json.loads(path.read_text())
    records = written.pop("records")
    assert written == result.summary()
    expected = {"text": "2", "tokens": 2, "finished": True, "correct": False, "parsed": True}
    expected.update(entropy=None, logprob=None, ids=[WORDS.index("2"), 1])
    assert records[1]["greedy"] == records[1]["samples"][0] == expected


def test_small_models_are_asked_in_large_batches():
    assert default_batch_size(make_model()) == 256


# --- judges ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"thus \boxed{\frac{1}{2}} apples", r"\frac{1}{2}"),
        (r"\boxed{1} no, \boxed{ 2 }", "2"),
        ("3 + 4 = 7\n#### 7\nbye 9", "7"),
        (r"#### 7 \boxed{8}", "8"),
        ("first 3, then 1,234.50 in all.", "1,234.50"),
        ("from 5-3 we get -2", "-2"),
        ("5-3", "5-3"),
        ("half is .5", ".5"),
        (r"\boxed{unclosed", None),
        ("#### ", None),
        ("no number", None),
        ("", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


JUDGES = ["exact"] + ["math-verify"] * (importlib.util.find_spec("math_verify") is not None)


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize(
    "response, answer, right",
    [
        ("#### 72", "72", True),
        ("it is 72.", "72", True),
        ("72 or 73", "72", False),
        ("#### 1,234", "1234.0", True),
        ("#### -5", "5", False),
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"\boxed{0.5}", r"\frac{1}{2}", True),
        (r"\boxed{\$12.80}", "12.8", True),
        (r"\boxed{(1, 2)}", "(1,2)", True),
        (r"\boxed{\text{Monday}}", "monday", True),
        ("so 7", "it follows\n#### 7", True),
        ("", "7", False),
        ("nothing", "7", False),
    ],
)
def test_judges(judge, response, answer, right, patient_judge):
    assert make_judge(judge)(response, answer) is right


@pytest.mark.skipif("math-verify" not in JUDGES, reason="math-verify is not installed")
def test_math_verify_knows_expressions_and_survives_what_it_cannot_read(monkeypatch, patient_judge):
    judge = make_judge("math-verify")
    assert judge(r"\boxed{1+x^2}", "x^2+1")
    assert not make_judge("exact")(r"\boxed{1+x^2}", "x^2+1")
    assert not judge(r"\boxed{\frac{1}{}^^^{{}", "x^2+1")
    monkeypatch.setattr(judges, "TIME_LIMIT_SECONDS", 1)
    assert not judge(r"\boxed{\sum_{i=1}^{10^{12}} \sin(i)}", "x^2+1")
    assert make_judge("auto") is judge


@pytest.mark.skipif("math-verify" not in JUDGES, reason="math-verify is not installed")
def test_math_verify_works_off_the_main_thread(patient_judge):
    verdicts = []
    judge = make_judge("math-verify")
    thread = threading.Thread(target=lambda: verdicts.append(judge(r"\boxed{1+x}", "x+1")))
    thread.start()
    thread.join()
    assert verdicts == [True]


def test_auto_falls_back_to_exact(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert make_judge("auto") is make_judge("exact")
    with pytest.raises(ImportError, match="pip install math-verify"):
        make_judge("math-verify")


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(samples=-1), "samples must be 0 or more, got -1"),
        (dict(samples=0, greedy=False), "nothing to do"),
        (dict(temperature=0.0), "temperature must be positive and finite, got 0.0"),
        (dict(top_p=0.0), "top_p must be in"),
        (dict(batch_size=0), "batch_size must be 1 or more, got 0"),
        (dict(judge="oracle"), "judge must be one of .*, got 'oracle'"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ask(make_model(), [("a", "1")], **kwargs)


def test_problems_without_an_answer_or_a_question():
    with pytest.raises(ValueError, match="at least one problem"):
        ask(make_model(), [])
    with pytest.raises(ValueError, match="problems must be text that is not empty"):
        ask(make_model(), [(" ", "1")])
    with pytest.raises(TypeError, match="answers of problems must be text, got None"):
        ask(make_model(), [("a", None)])
    with pytest.raises(ValueError, match="64 positions, got 80 tokens"):
        ask(make_model(), [("a" * 80, "1")])


def test_problems_are_read(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"problem": "one", "answer": 1}\n\n{"problem": "two", "answer": "2"}\n')
    assert read_problems(path) == [("one", "1"), ("two", "2")]
    assert read_problems(path, limit=1) == [("one", "1")]


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"problem": "1", "answer": "1"}\n{broken\n', "line 2: not valid JSON"),
        ('{"problem": "1"}\n', "line 1: no field 'answer' or .*, only"),
        ('{"answer": "1"}\n', "line 1: no field 'problem' or .*, only"),
        ('{"problem": "1", "answer": ""}\n', "line 1: 'answer' must be text that is not empty"),
        ('{"problem": ["1"], "answer": "1"}\n', "line 1: 'problem' must be text"),
        ("", "no problems in it"),
    ],
)
def test_broken_lines_are_named_by_number(tmp_path, text, message):
    path = tmp_path / "problems.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_problems(path)
