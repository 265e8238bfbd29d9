"""`make matrix`: which pairs are run, in what steps, what is said. Nothing is installed."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import matrix
from benchmarks.matrix import Pair, Result, counts, pairs_of, steps, table

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def test_every_pair_or_each_of_them_once():
    torches, pythons = ["2.11", "2.12", "2.13"], ["3.10", "3.11", "3.12", "3.13"]
    assert len(set(pairs_of(torches, pythons, cover=False))) == 12
    few = pairs_of(torches, pythons, cover=True)
    assert len(few) == 4
    assert {p.torch for p in few} == {*torches} and {p.python for p in few} == {*pythons}
    assert pairs_of(["2.11", "2.12"], ["3.10"], cover=True) == [("2.11", "3.10"), ("2.12", "3.10")]


def test_the_python_that_runs_is_found():
    found = matrix.pythons()
    asked = subprocess.run([found[HERE], "-c", "print(1)"], capture_output=True, text=True)
    assert asked.stdout == "1\n"


def test_each_step_is_taken_in_the_environment_of_its_pair():
    made = dict(steps(Pair("2.12", "3.11"), "/usr/bin/python3.11", ["tests/ops"]))
    assert made["venv"][0] == "/usr/bin/python3.11" and "torch==2.12.*" in made["torch"]
    own = {command[0] for name, command in made.items() if name != "venv"}
    assert own == {str(matrix.FOLDER / "torch-2.12-python-3.11/venv/bin/python")}
    assert made["tests"][-1] == "tests/ops"


@pytest.mark.parametrize(
    "printed, said",
    [
        ("....\n12 passed, 3 skipped in 4.05s\n", "12 passed, 3 skipped"),
        ("=== 1 failed, 11 passed in 75.00s (0:01:15) ===\n", "1 failed, 11 passed"),
        ("ERROR: No matching distribution found for torch\n", ""),
    ],
)
def test_the_counts_of_pytest(printed, said):
    assert counts(printed) == said


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """Commands are not run: one that holds a word of `broken` fails."""
    broken = []

    def run(command, **_):
        failed = any(word in part for part in command for word in broken)
        said = "9 passed in 1.00s" if "pytest" in command else "2.12.1"
        return SimpleNamespace(returncode=int(failed), stdout="no" if failed else said)

    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "FOLDER", tmp_path / ".matrix")
    monkeypatch.setattr(matrix, "copy_tree", lambda folder: folder.mkdir(parents=True))
    monkeypatch.setattr(matrix, "pythons", lambda: {"3.11": "python3.11"})
    monkeypatch.setattr(matrix.subprocess, "run", run)
    return broken


def test_a_run_keeps_its_result_and_shows_it_again(pretended, tmp_path, capsys):
    arguments = ["--torch", "2.12", "--python", "3.11", "3.14"]
    assert matrix.main([*arguments, "--keep"]) == 0
    pair = tmp_path / ".matrix/torch-2.12-python-3.11"
    assert pair.exists() and json.loads(pair.with_name(f"{pair.name}.json").read_text())["passed"]
    assert matrix.main([*arguments, "--show", "--out", str(tmp_path / "matrix.md")]) == 0
    text = (tmp_path / "matrix.md").read_text()
    assert "| 2.12.1 | 3.11 | passed | 9 passed |" in text and "Python 3.14" in text
    assert text.split("\n\n", 1)[1] in capsys.readouterr().out


def test_a_step_that_fails_is_the_result(pretended, tmp_path):
    pretended.append("torch==")
    assert matrix.main(["--torch", "2.12", "--python", "3.11"]) == 1
    result = Result(**json.loads((tmp_path / ".matrix/torch-2.12-python-3.11.json").read_text()))
    assert not result.passed and result.torch == "2.12"
    assert result.said == "torch failed: .matrix/torch-2.12-python-3.11.log"
    assert not (tmp_path / ".matrix/torch-2.12-python-3.11").exists()


def test_no_python_is_an_error_that_says_so(pretended, capsys):
    assert matrix.main(["--python", "3.9"]) == 1
    assert "found none of Python 3.9" in capsys.readouterr().out


def test_the_table_names_what_was_not_found():
    said = table([Result("2.11.0", "3.10", False, "1 failed", "2026-01-01")], ["3.14"])
    assert "| 2.11.0 | 3.10 | failed | 1 failed | 2026-01-01 |" in said
    assert said.endswith("Not found here: Python 3.14.")
