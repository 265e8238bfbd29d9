"""Settings in files: written and read to the last bit; what is wrong with one in a line."""

from __future__ import annotations

import sys

import pytest

from em_kernels.lm.setting_files import check_names, check_values, read_settings, settings_text
from em_kernels.trainer import RLConfig

TEXTS = (
    "1e5", "+2E-5", "1_0e5", "12", "1.5", "yes", "no", "null", "~", "", " x ", "#x", "a: b", "- a",
    "? b", "=", "<<", "2026-01-01", "12:30:45", "0o7", "0x1", "'", '"', "\\", "multi\nline  \n\n",
    "tab\t", "bell\x07", "\x85", "a\x85\nb", "\u2028", "\ufeff", "é \U0001f600", "x " * 200,
    "%", "@a", "`", "{problem}", "[1", "&a", "*a", "!t", "|", ">",
)  # fmt: skip
NUMBERS = (2e-5, 1e22, 1e300, -5e-324, 0.1, 1 / 3, 0, -7, 10**20, True, False, None)


def written(tmp_path, name: str, text: str | bytes):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_everything_is_read_back_as_it_was_written(tmp_path):
    values = {"texts": TEXTS, "numbers": NUMBERS, "pairs": (("a", None), ("b", "1e5"))}
    text = settings_text(values, ["a note"])
    assert text.startswith("# a note\n")
    found = read_settings(written(tmp_path, "run.yaml", text))
    assert found == values
    assert list(map(type, found["numbers"])) == list(map(type, NUMBERS))


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.yaml", "learning_rate: 2e-5  # a note\nprompts:\n- 1 a\n- '2'\nstop_skew: null\n"),
        ("a.yml", "\ufeff{learning_rate: 2.0e-5, prompts: [1 a, '2'], stop_skew: ~}"),
        ("a.json", '{"learning_rate": 2e-5, "prompts": ["1 a", "2"], "stop_skew": null}'),
        ("a.toml", 'learning_rate = 2e-5\nprompts = ["1 a", "2"]\n'),
    ],
)
def test_yaml_json_and_toml_say_the_same(name, text, tmp_path):
    if name.endswith("toml"):
        pytest.importorskip("tomllib")
    found = read_settings(written(tmp_path, name, text))
    assert found.pop("stop_skew", None) is None
    assert found == {"learning_rate": 2e-5, "prompts": ("1 a", "2")}


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.yaml", "", "must hold settings by name, as `updates: 10`, got nothing"),
        ("a.yaml", "- a\n- b", r"must hold settings by name, .* got \('a', 'b'\)"),
        ("a.yaml", "just text", "must hold settings by name, .* got 'just text'"),
        ("a.json", "3", "must hold settings by name, .* got 3"),
        ("a.yaml", "a: [", "not valid YAML .*line 1, column 5"),
        ("a.yaml", "a: !!python/object/apply:os.getcwd []", "not valid YAML .*constructor"),
        ("a.yaml", "a: 1\n---\na: 2", "not valid YAML .*single document"),
        ("a.yaml", "a: 1\nb: 2\na: 3", "'a' stands in it twice"),
        ("a.json", '{"a": 1, "a": 2}', "'a' stands in it twice"),
        ("a.json", "{'a': 1}", "not valid JSON"),
        ("a.yaml", "{" * 5000, "nested too deeply"),
        ("a.json", "[" * 200_000, "nested too deeply"),
        ("a.yaml", "a: &x [*x]", "nested too deeply"),
        ("a.yaml", b"a: \xff", "'utf-8' codec can't decode"),
        ("a.txt", "a: 1", "settings are read from .yaml, .yml, .toml, .json files"),
        ("a", "a: 1", "settings are read from .yaml, .yml, .toml, .json files"),
    ],
)
def test_a_file_that_is_none_is_named_in_one_line(name, text, message, tmp_path):
    path = written(tmp_path, name, text)
    with pytest.raises(ValueError, match=message) as error:
        read_settings(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_files_that_are_not_there(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    for name in ("none.yaml", "folder.yaml"):
        with pytest.raises(FileNotFoundError, match=f"no such file: .*{name}"):
            read_settings(tmp_path / name)


@pytest.mark.parametrize(
    "name, module, message",
    [("a.toml", "tomllib", "TOML needs Python 3.11 or newer"), ("a.yaml", "yaml", "pyyaml")],
)
def test_a_reader_that_is_missing(name, module, message, tmp_path, monkeypatch):
    from em_kernels.lm import setting_files

    setting_files._yaml.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises((ImportError, ValueError), match=message):
        read_settings(written(tmp_path, name, "a = 1"))


def test_an_unknown_name_is_named_with_its_file_and_what_was_meant():
    check_names("f.yaml", {"updates": 1}, ["updates"])
    with pytest.raises(ValueError, match=r"^f\.yaml: no setting is called 'micro-batch'; did you"):
        check_names("f.yaml", {"updates": 1, "micro-batch": 2}, ["updates", "micro_batch"])
    with pytest.raises(ValueError, match=r"^f\.yaml: no setting is called 3$"):
        check_names("f.yaml", {3: 2}, ["updates"])


@pytest.mark.parametrize(
    "name, value, kind, message",
    [
        ("updates", "ten", TypeError, "updates must be an int, got 'ten'"),
        ("updates", 1.0, TypeError, "updates must be an int, got 1.0"),
        ("learning_rate", "fast", TypeError, "learning_rate must be a number, got 'fast'"),
        ("clip", float("nan"), ValueError, "clip must be positive and finite, got nan"),
        ("normalize_std", "no", TypeError, "normalize_std must be True or False, got 'no'"),
        ("objective", "gpro", ValueError, "objective must be one of "),
        ("objective", ("grpo",), ValueError, "objective must be one of "),
        ("device", 0, TypeError, "device must be the name of a device, got 0"),
        ("template", 3, TypeError, "template must be text, got 3"),
        ("schedule", {"em": 10}, TypeError, "schedule must be text, got {'em': 10}"),
        ("problems", 5, TypeError, "problems must be text or a list, got 5"),
        ("prompts", {"a": 1}, TypeError, "prompts must be one text or several, got {'a': 1}"),
        ("log_to", ("mlflow",), ValueError, "log_to must be one of "),
        ("model", 7, TypeError, "model must be a path or a name, got 7"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_its_file(name, value, kind, message):
    with pytest.raises(kind) as error:
        check_values("f.yaml", {"seed": 3, name: value}, RLConfig)
    assert str(error.value).startswith(f"f.yaml: {message}")
