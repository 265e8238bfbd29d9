"""Folders of evaluations with odd files, and records that are not the evaluation's."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from command_line import error_of
from evaluations import letters, save_bigrams, sure, write_rows
from hostile import ODD_OBJECTS

from em_kernels.cli.app import main
from em_kernels.evaluator import InUseError, Records, summarise
from em_kernels.evaluator.asking import Asked
from em_kernels.lm.lock import held

torch.set_num_threads(1)
READERS = ("report", "compare", "law", "tokens", "eval")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(model, problems, folder of an evaluation of them)."""
    root = tmp_path_factory.mktemp("made")
    model = save_bigrams(root / "model", sure(0.6))
    problems = write_rows(root / "problems.jsonl", letters(1))
    assert main(command(model, problems, root / "eval")) == 0
    return model, problems, root / "eval"


def command(model, problems, folder) -> list[str]:
    asked = ["--problems", str(problems), "--samples", "2", "--max-new-tokens", "3"]
    return ["eval", "--model", str(model), *asked, "--output", str(folder), "--quiet"]


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[2], tmp_path / "eval")


def reader(made, folder, name) -> list[str]:
    model, problems, other = made
    at = str(folder)
    return {
        "report": ["report", at],
        "compare": ["compare", at, str(other)],
        "law": ["analyze", "law", at],
        "tokens": ["analyze", "tokens", at, "--quiet"],
        "eval": command(model, problems, at),
    }[name]


def change(folder, **changes) -> None:
    path = folder / "eval.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("kind", ODD_OBJECTS)
def test_an_odd_eval_json_is_one_line_of_error(made, folder, capsys, kind):
    (folder / "eval.json").write_bytes(ODD_OBJECTS[kind])
    for name in READERS if kind == "empty" else READERS[:1]:
        assert "eval.json" in error_of(capsys, *reader(made, folder, name))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"config": 3}, "config cannot be 3"),
        ({"problems": []}, r"problems cannot be \[\]"),
        ({"problems": [{"problem": 1, "answer": "x"}]}, "problems cannot be"),
        ({"too_long": None}, "too_long cannot be None"),
        ({"version": 99}, "its version is 99, this em_kernels reads 1 to 3"),
        ({"skipped": [[1]]}, "skipped cannot be"),
    ],
)
def test_an_eval_json_with_an_odd_entry(folder, changes, message):
    change(folder, **changes)
    with pytest.raises(ValueError, match=message):
        summarise(folder)


def test_line_ends_and_marks_of_other_systems_change_nothing(made, folder):
    expected = summarise(made[2])
    for name in ("eval.json", "records.jsonl"):
        text = (folder / name).read_bytes().replace(b"\n", b"\r\n")
        (folder / name).write_bytes(b"\xef\xbb\xbf" + text)
    assert summarise(folder) == expected


ODD_LINES = {
    "list": b"[1, 2]",
    "number": b"7",
    "answer": b'{"problem": 0, "temperature": 0.0, "sample": 0, "answer": 5}',
    "key": b'{"problem": "0", "temperature": 0.0, "sample": 0, "answer": {}}',
    "half": b'{"problem": 0, "temp',
    "deep": b"[" * 100_000,
    "bytes": b"\xff\xfe\0",
}


def test_odd_lines_of_records_are_left_out_and_counted(made, folder, capsys):
    expected = summarise(folder)
    path = folder / "records.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in ODD_LINES.values()) + path.read_bytes())
    found = summarise(folder)
    assert sum(found.pop("left_out_records").values()) == len(ODD_LINES)
    expected.pop("left_out_records")
    assert found == expected
    assert main(reader(made, folder, "eval")) == 0
    assert "records left out: no record: the answer is no object but int" in capsys.readouterr().out
    written = json.loads((folder / "eval.json").read_text())["left_out_records"]
    assert sum(written.values()) == len(ODD_LINES)


def numbers(field: str, value) -> bytes:
    answer = {"text": "x", "tokens": 1, "finished": True, "correct": True, field: value}
    return json.dumps({"problem": 0, "temperature": 0.0, "sample": 0, "answer": answer}).encode()


@pytest.mark.parametrize(
    "field, value",
    [
        ("text", 5),
        ("tokens", "1"),
        ("correct", 1),
        ("entropy", "0.1"),
        ("entropy", float("nan")),
        ("logprob", 1e6),
        ("ids", ["a"]),
    ],
)
def test_an_answer_with_an_odd_entry_is_left_out(folder, field, value):
    path = folder / "records.jsonl"
    path.write_bytes(numbers(field, value) + b"\n" + path.read_bytes())
    assert summarise(folder)["left_out_records"] == {
        f"no record: no usable {field!r} in the answer": 1
    }


def test_records_that_do_not_belong_are_not_averaged_in(made, folder, capsys):
    """Of another seed, another model and problem, another temperature, one too many, doubled."""
    expected = summarise(folder)
    records = list(Records(folder / "records.jsonl"))
    drawn = next(record for record in records if record.temperature > 0)
    wrong = replace(drawn.answer, correct=not drawn.answer.correct, text="9 9 9")
    foreign = [
        replace(drawn, answer=wrong, of="0123456789abcdef"),
        replace(drawn, answer=wrong, of=None),
        replace(drawn, answer=wrong, temperature=0.7),
        replace(drawn, answer=wrong, sample=2),
        replace(drawn, answer=wrong, problem=3),
        replace(drawn, answer=wrong, problem=(drawn.problem + 1) % 3),
    ]
    path = folder / "records.jsonl"
    before = path.read_text()
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in foreign) + before + before)
    found = summarise(folder)
    counted = found.pop("left_out_records")
    assert counted == {
        "of another evaluation (model, problem, prompt, seed or settings)": 3,
        "of another temperature": 1,
        "of a sample beyond those asked for": 1,
        "of a problem that the evaluation does not have": 1,
        "doubled": len(records),
    }
    expected.pop("left_out_records")
    assert found == expected


def test_an_evaluation_with_another_seed_gives_other_marks(made, tmp_path, capsys):
    """So that its records are refused here, whatever else is the same."""
    model, problems, first = made
    assert main([*command(model, problems, tmp_path / "other"), "--seed", "1"]) == 0
    marks = [
        {record.of for record in Records(folder / "records.jsonl")}
        for folder in (first, tmp_path / "other")
    ]
    assert len(marks[0]) == len(marks[1]) == 3 and not marks[0] & marks[1]


def test_a_second_evaluation_into_a_folder_is_told_who_is_there(made, folder, capsys, monkeypatch):
    monkeypatch.setattr(Asked, "ask", lambda *_: pytest.fail("asked"))
    with held(folder, "an evaluation"):
        said = error_of(capsys, *reader(made, folder, "eval"))
        for name in ("report", "compare", "law", "tokens"):  # these only read it
            assert main(reader(made, folder, name)) == 0
    assert "is in use (an evaluation, process" in said
    with pytest.raises(InUseError), held(folder, "a"), held(folder, "b"):
        pass


@pytest.mark.parametrize("name", ["compare", "selection", "run", "law", "drift", "shift", "forks"])
def test_an_odd_result_of_an_analysis_is_one_line_of_error(made, folder, capsys, name):
    for kind in ("empty", "list", "deep", "latin") if name == "law" else ("empty",):
        (folder / f"{name}.json").write_bytes(ODD_OBJECTS[kind])
        assert f"{name}.json is not as em-kernels writes it" in error_of(capsys, "report", folder)


def test_odd_tokens_are_read_anew(made, folder, capsys):
    assert main(reader(made, folder, "tokens")) == 0
    path = folder / "tokens.jsonl"
    whole = path.read_text()
    for odd in ("[1]\n", whole + '{"key": 3}\n', "\0\n", whole + "[" * 100_000 + "\n"):
        path.write_text(odd)
        assert main(reader(made, folder, "tokens")) == 0
        assert path.read_text() == whole


def test_texts_do_not_steer_the_terminal(tmp_path, made, capsys):
    path = write_rows(tmp_path / "p.jsonl", [*letters(1), {"problem": "\x1b[2J", "answer": 1}])
    model = made[0]
    arguments = ["--problems", path, "--output", str(tmp_path / "chosen.jsonl"), "--samples", "2"]
    assert main(["select", "--model", model, *arguments, "--max-new-tokens", "3", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"\x1b[2J" in out
