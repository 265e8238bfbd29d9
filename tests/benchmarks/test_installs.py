"""`make installs`: what is packed and installed, and what is said of it. Nothing is installed."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import installs, matrix
from benchmarks.installs import AVAILABLE, WAYS, Environment, Result, table


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """Commands are not run: each installation is as its way expects, but for those in `broken`."""
    broken, expected = [], []

    def run(command, env, **_):
        line = " ".join(command)
        if "--force-reinstall" in command:
            (way,) = (
                way
                for way in WAYS
                if way.arguments == tuple(command[command.index("--force-reinstall") + 1 :])
                and way.environment == {name: env[name] for name in ("CC", "CXX") if name in env}
            )
            expected[:] = [way.expected]
        said = f"2.13.0\n{'nothing' if 'said' in broken else expected[0]}" if expected else ""
        return SimpleNamespace(returncode=int(any(w in line for w in broken)), stdout=said)

    monkeypatch.setattr(installs, "FOLDER", tmp_path / ".installs")
    monkeypatch.setattr(installs, "copy_tree", lambda folder: folder.mkdir(parents=True))
    monkeypatch.setattr(installs, "pythons", lambda: {"3.11": "python3.11"})
    monkeypatch.setattr(matrix.subprocess, "run", run)
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return broken


def kept(tmp_path):
    rows = json.loads((tmp_path / ".installs/python-3.11.json").read_text())
    return [Result(**row) for row in rows]


def test_each_way_is_tried_and_shown_again(pretended, tmp_path, capsys):
    assert installs.main(["--python", "3.11", "3.14", "--keep"]) == 0
    assert [row.way for row in kept(tmp_path)] == [way.name for way in WAYS]
    assert installs.main(["--python", "3.11", "3.14", "--show", "--out", str(tmp_path / "x")]) == 0
    text = (tmp_path / "x").read_text()
    assert text.count("| passed |") == len(WAYS) and "Not found here: Python 3.14." in text
    assert text.split("\n\n", 1)[1] in capsys.readouterr().out


def test_kernels_that_are_not_as_expected_fail(pretended, tmp_path):
    pretended.append("said")
    assert installs.main(["--python", "3.11"]) == 1
    assert not any(row.passed for row in kept(tmp_path))
    assert not (tmp_path / ".installs/python-3.11").exists()


@pytest.mark.parametrize(
    "word, said", [("--no-isolation", "wheel failed"), ("--force-reinstall", "not installed")]
)
def test_a_step_that_fails_is_the_result(pretended, tmp_path, word, said):
    pretended.append(word)
    assert installs.main(["--python", "3.11"]) == 1
    assert {row.said for row in kept(tmp_path)} == {said}


def test_what_is_installed_is_what_was_packed(monkeypatch, tmp_path):
    monkeypatch.setattr(installs, "FOLDER", tmp_path)
    environment = Environment("3.12", "2.13")
    (environment.folder / "wheel").mkdir(parents=True)
    wheel = environment.folder / "wheel/em_kernels-0.1.0.whl"
    wheel.touch()
    assert environment.install(WAYS[0])[-1] == str(wheel)
    packed = {name: (command, env) for name, command, env in environment.pack("python3.12")}
    assert "--no-isolation" in packed["wheel"][0] and "--no-isolation" not in packed["isolated"][0]
    assert packed["without"][1] == {"EM_KERNELS_NO_EXTENSION": "1"}


def test_no_python_is_an_error_that_says_so(pretended, capsys):
    assert installs.main(["--python", "3.9"]) == 1
    assert "found none of Python 3.9" in capsys.readouterr().out


def test_the_table_has_a_way_a_line_and_a_python_a_column():
    passed = Result("3.9", "2.13.0", "wheel", True, AVAILABLE, "2026-01-01")
    failed = passed._replace(python="3.11", passed=False, said="nothing\nat all " + "x" * 200)
    text = table([failed, passed, passed._replace(way="sdist")], [])
    assert "| way | 3.9 | 3.11 | the CPU kernels there |" in text
    assert f"| wheel | passed | failed: nothing at all {'x' * 95} | available |" in text
    assert "| sdist | passed | - | available |" in text
    assert "torch 2.13.0; 2026-01-01" in text
