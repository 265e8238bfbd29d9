"""eval, compare and select: what they print and write, on a model whose answers are known."""

from __future__ import annotations

import json
import math

import pytest
import torch
from evaluations import letters, save_bigrams, sure, write_rows
from tiny_qwen2 import make_tokenizer

from em_kernels import cli
from em_kernels.evaluator import Records
from em_kernels.evaluator.asking import Asked
from em_kernels.evaluator.select import rank_prompts
from em_kernels.trainer import read_prompts
from em_kernels.trainer.checkpoint import read_config

# a: always 1; b: 2 or 9, even odds; c: 3 three times in four.
FOLLOW = {"a": {"1": 1.0}, "b": {"2": 0.5, "9": 0.5}, "c": {"3": 0.75, "9": 0.25}}

TRAIN = ("--objective", "grpo", "--responses", "2", "--group-size", "2", "--updates", "1")
TRAIN += ("--max-new-tokens", "3", "--device", "cpu", "--minibatches", "1")

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_bigrams(tmp_path_factory.mktemp("models") / "bigrams", FOLLOW)


@pytest.fixture(scope="module")
def better(tmp_path_factory):
    return save_bigrams(tmp_path_factory.mktemp("models") / "better", sure(1.0))


@pytest.fixture
def problems(tmp_path):
    return write_rows(tmp_path / "problems.jsonl", letters(8))


def run(capsys, *arguments) -> str:
    assert cli.main([*map(str, arguments), "--quiet"]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def compare(capsys, *arguments) -> str:
    assert cli.main(["compare", *map(str, arguments)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def error(capsys, *arguments) -> str:
    assert cli.main(list(map(str, arguments))) == 2
    return capsys.readouterr().err


def line_of(printed: str, start: str) -> str:
    return next(line for line in printed.splitlines() if line.strip().startswith(start))


def test_eval_prints_every_temperature_and_keeps_the_answers(model, problems, tmp_path, capsys):
    folder = tmp_path / "eval"
    given = ("eval", "--model", model, "--problems", problems, "--samples", 4)
    printed = run(capsys, *given, "--temperatures", 0.5, 1, "--output", folder)
    assert "24 problems of" in printed and "judged by math-verify" in printed
    # Greedy: a and c are right, and b where the tie falls on 2, the first.
    assert line_of(printed, "greedy").split()[2] == "1.000"
    found = {
        t["temperature"]: t
        for t in json.loads((folder / "summary.json").read_text())["temperatures"]
    }
    assert sorted(found) == [0, 0.5, 1]
    # At T = 1/2 probabilities are squared: c is right with 9/16 : 1/16, so 0.9.
    assert found[0.5]["mean"]["low"] < (1 + 0.5 + 0.9) / 3 < found[0.5]["mean"]["high"]
    assert found[1]["mean"]["low"] < (1 + 0.5 + 0.75) / 3 < found[1]["mean"]["high"]
    for text in ("pass@4", "majority@4", "Brier", "rows of the source that are no problems"):
        assert text in printed
    assert "answers without an end, T = 0.5" in printed


def test_an_interrupted_eval_goes_on(model, problems, tmp_path, capsys, monkeypatch):
    given = ["eval", "--model", model, "--problems", problems, "--batch-size", "8", "--quiet"]
    ask, asked = Asked.ask, []

    def stop_at_the_third(self, *arguments):
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return ask(self, *arguments)

    monkeypatch.setattr(Asked, "ask", stop_at_the_third)
    folder = tmp_path / "eval"
    assert cli.main([*given, "--output", str(folder)]) == 130
    assert "what was done is kept, the same command goes on" in capsys.readouterr().err
    assert len(list(Records(folder / "records.jsonl"))) == 16
    assert cli.main([*given, "--output", str(folder)]) == 0
    assert len(list(Records(folder / "records.jsonl"))) == 48 and len(asked) == 3 + 4
    asked.clear()
    capsys.readouterr()
    asked += [1, 1]
    assert cli.main(given) == 130
    assert "goes on" not in capsys.readouterr().err


def test_majority_is_over_all_samples_and_pass_over_a_power_of_two(
    model, problems, tmp_path, capsys
):
    given = ("eval", "--model", model, "--problems", problems, "--samples", 6, "--limit", 6)
    printed = run(capsys, *given, "--output", tmp_path / "eval")
    assert "pass@4" in printed and "majority@6" in printed
    at = json.loads((tmp_path / "eval" / "summary.json").read_text())["temperatures"][1]
    assert f"{at['pass']['4']['mean']:.3f} [" in printed
    assert f"{at['majority']['mean']:.3f} [" in line_of(printed, "T = 1")


def test_records_hold_the_tokens(model, problems, tmp_path, capsys):
    folder = tmp_path / "eval"
    run(capsys, "eval", "--model", model, "--problems", problems, "--output", folder)
    tokenizer = make_tokenizer()
    for record in Records(folder / "records.jsonl"):
        answer = record.answer
        assert len(answer.ids) == answer.tokens == 2
        assert tokenizer.decode(answer.ids) == answer.text + "<eos>"


def test_compare(model, better, problems, tmp_path, capsys):
    for name, path in (("a", model), ("b", better)):
        given = ("--problems", problems, "--samples", 4, "--output", tmp_path / name)
        run(capsys, "eval", "--model", path, *given)
    out = tmp_path / "compared"
    printed = compare(capsys, tmp_path / "a", tmp_path / "b", "--output", out)
    row = next(
        r
        for r in json.loads((out / "compare.json").read_text())["temperatures"]
        if r["temperature"] == 1
    )
    assert row["b"] == 1 and row["worse"] == 0 and 0 < row["better"] <= 16
    assert row["difference"] == pytest.approx(1 - row["a"]) and row["p_value"] < 0.01
    cells = line_of(printed, "T = 1").split()
    assert cells[3:7] == ["24", f"{row['a']:.3f}", "1.000", f"{row['difference']:+.3f}"]
    assert "1.000" in line_of(printed, "greedy"), "p of no difference"
    assert "it has no eval.json" in error(capsys, "compare", tmp_path, tmp_path / "b")


def test_select_ranks_by_variance_and_train_takes_it(model, problems, tmp_path, capsys):
    out = tmp_path / "selected.jsonl"
    given = ("select", "--model", model, "--problems", problems, "--samples", 16, "--top", 5)
    printed = run(capsys, *given, "--output", out, "--template", "{problem}")
    rows = [json.loads(line) for line in out.open()]
    assert len(rows) == 5 and f"5 prompts: {out}" in printed
    assert all(r["variance"] == r["accuracy"] * (1 - r["accuracy"]) for r in rows)
    variances = [r["variance"] for r in rows]
    assert variances == sorted(variances, reverse=True)
    assert "a" not in "".join(r["prompt"] for r in rows)
    assert read_prompts(out) == tuple(r["prompt"] for r in rows)
    everything = rank_prompts(tmp_path / "selected-eval")
    assert len(everything) == 24 and everything[:5] == rows
    certain = [r for r in everything if r["answer"] == "1"]
    assert all((r["variance"], r["semantic_entropy"], r["margin"]) == (0, 0, 1) for r in certain)


@pytest.mark.parametrize("by", ["entropy", "semantic_entropy", "margin"])
def test_select_without_labels(by, model, tmp_path, capsys):
    out = tmp_path / "selected.jsonl"
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": x} for x in "acb"])
    given = ("select", "--model", model, "--problems", path, "--samples", 64, "--output", out)
    printed = run(capsys, *given, "--unlabelled", "--by", by)
    rows = {r["prompt"]: r for r in map(json.loads, out.open())}
    assert list(rows) == ["b", "c", "a"]
    assert all(r["accuracy"] is r["variance"] is None for r in rows.values())
    # Two tokens an answer: the second, the end, is certain.
    assert rows["b"]["entropy"] == pytest.approx(math.log(2) / 2, rel=1e-2)
    share = (1 + rows["b"]["margin"]) / 2
    expected = -(share * math.log(share) + (1 - share) * math.log(1 - share))
    assert rows["b"]["semantic_entropy"] == pytest.approx(expected)
    assert "accuracy" in printed and "Calibration" not in printed
    assert "needs answers" in error(capsys, *given, "--unlabelled", "--by", "variance")


def test_what_cannot_be_selected(model, problems, tmp_path, capsys):
    given = ("select", "--model", model, "--problems", problems, "--output", tmp_path / "s.jsonl")
    assert "greedy answers do not vary" in error(capsys, *given, "--temperature", 0)
    folder = tmp_path / "eval"
    run(
        capsys,
        "eval",
        "--model",
        model,
        "--problems",
        problems,
        "--output",
        folder,
        "--temperatures",
        0.5,
        1,
    )
    with pytest.raises(ValueError, match=r"one temperature above 0 to rank by, has \[0.5, 1.0\]"):
        rank_prompts(folder)
    with pytest.raises(ValueError, match="by must be one of"):
        rank_prompts(folder, by="luck")
    with pytest.raises(ValueError, match="top must be 1 or more, got 0"):
        rank_prompts(folder, top=0)


@pytest.mark.parametrize("template", [r"Solve {problem} in \boxed{}", "math500"])
def test_one_template_for_training_evaluation_and_selection(template, model, tmp_path, capsys):
    """What is put to the model is the same text, whichever command puts it."""
    path = write_rows(tmp_path / "p.jsonl", [{"question": "a", "solution": "1"}])
    files = ("--model", model, "--problems", path, "--template", template)
    run(capsys, "eval", *files, "--output", tmp_path / "eval")
    run(capsys, "select", *files, "--output", tmp_path / "s.jsonl", "--samples", 2)
    run(capsys, "train", *files, "--output", tmp_path / "run", *TRAIN)
    trained = read_config(tmp_path / "run").prompt_texts
    (selected,) = map(json.loads, (tmp_path / "s.jsonl").open())
    put = json.loads((tmp_path / "eval" / "eval.json").read_text())["config"]["template"]
    assert trained == (selected["prompt"],) == (put.replace("{problem}", "a"),)
    assert trained[0].endswith(r"\boxed{}") or trained[0].endswith(r"\boxed{}.")


@pytest.mark.parametrize("command", ["eval", "select", "train"])
def test_a_template_without_a_place_for_the_problem(command, model, problems, tmp_path, capsys):
    given = ("--model", model, "--problems", problems, "--output", tmp_path / "out")
    more = TRAIN if command == "train" else ()
    for template in (r"Solve it in \boxed{}", "{}", "gsm9k", ""):
        told = error(capsys, command, *given, *more, "--template", template)
        wanted = "have {problem} in it, where the problem goes, got" if template else "not be empty"
        assert f"template must {wanted}" in told
    assert not (tmp_path / "out").exists()


def test_training_and_evaluation_read_the_fields_that_are_named(model, tmp_path, capsys):
    path = write_rows(tmp_path / "p.jsonl", [{"ask": "a", "solved": 1, "problem": "b"}])
    given = ("--model", model, "--problems", path, "--problem-field", "ask")
    fields = (*given, "--answer-field", "solved")
    printed = run(capsys, "eval", *fields, "--output", tmp_path / "eval")
    assert line_of(printed, "greedy").split()[2] == "1.000"
    run(capsys, "train", *fields, "--output", tmp_path / "run", *TRAIN)
    assert read_config(tmp_path / "run").tasks == (("a", "1"),)
    for command, more in (("eval", ()), ("train", TRAIN)):
        told = error(capsys, command, *given, "--output", tmp_path / command, *more)
        assert "answer" in told


def test_parts_of_a_data_set(model, tmp_path, capsys):
    pytest.importorskip("datasets")
    folder = tmp_path / "benchmark"
    folder.mkdir()
    for split, letter in (("train", "a"), ("test", "b"), ("validation", "c")):
        write_rows(folder / f"{split}.jsonl", [{"question": letter, "answer": "1"}])
    given = ("--model", model, "--problems", folder)
    for split, evaluated, trained in ((None, "b", "a"), ("validation", "c", "c")):
        more = ("--split", split) if split else ()
        run(capsys, "eval", *given, *more, "--output", tmp_path / f"eval-{split}")
        run(capsys, "train", *given, *more, "--output", tmp_path / f"run-{split}", *TRAIN)
        asked = json.loads((tmp_path / f"eval-{split}" / "eval.json").read_text())["problems"]
        assert [p["problem"] for p in asked] == [evaluated]
        assert read_config(tmp_path / f"run-{split}").prompt_texts == (trained,)
