"""Settings: one field of a dataclass makes the checks, the flags and the documentation."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass

import pytest

from em_kernels.lm.settings import (
    add_flags,
    at_least,
    check_settings,
    documented,
    fraction,
    given_settings,
    path_text,
    redefined,
    setting,
)


@documented
@dataclass(frozen=True)
class Small:
    """A few settings."""

    where: str = setting(MISSING, "a folder", check=path_text)
    count: int = setting(3, "how many, 50% of all", check=at_least(1))
    share: float | None = setting(None, "a share", check=fraction, shown="all")
    mode: str = setting("slow", "how", choices=("slow", "fast"))
    kind: str | None = setting(None, "which", choices=(None, "round"))
    dry: bool = setting(False, "do nothing")
    rates: tuple[float, ...] = setting((1.0,), "of each", group="rates")
    own: tuple = setting((), "not for a command line", no_flag="--file fills it")

    def __post_init__(self):
        check_settings(self)


@documented
@dataclass(frozen=True)
class Large(Small):
    """More settings."""

    count: int = redefined(Small, "count", 5)
    mode: str = redefined(Small, "mode", choices=("slow", "fast", "odd"))
    depth: int = setting(1, "how deep", check=at_least(0), flag="--levels")


def parse(*words: str, **options) -> dict:
    parser = argparse.ArgumentParser()
    add_flags(parser, Small, others={"with --large": Large}, **options)
    return given_settings(parser.parse_args(words), Large)


@pytest.mark.parametrize(
    "changes, kind, message",
    [
        ({"count": 0}, ValueError, "count must be 1 or more, got 0"),
        ({"count": True}, TypeError, "count must be an int, got True"),
        ({"share": 2.0}, ValueError, "share must be in (0, 1] and finite, got 2.0"),
        ({"share": "x"}, TypeError, "share must be a number, got 'x'"),
        ({"mode": "odd"}, ValueError, "mode must be one of ('slow', 'fast'), got 'odd'"),
        ({"kind": "flat"}, ValueError, "kind must be one of (None, 'round'), got 'flat'"),
        ({"dry": "no"}, TypeError, "dry must be True or False, got 'no'"),
        ({"count": None}, TypeError, "count must be an int, got None"),
        ({"where": 3}, TypeError, "where must be a path or a name, got 3"),
    ],
)
def test_errors_name_the_setting_and_what_was_received(changes, kind, message):
    with pytest.raises(kind) as error:
        Small(**{"where": "a", **changes})
    assert str(error.value) == message


def test_checks_settle_values_and_let_none_through(tmp_path):
    config = Small(where=tmp_path, share=None)
    assert config.where == str(tmp_path)
    assert Large(where="a", mode="odd").mode == "odd"


def test_flags_are_the_settings_and_only_those_given():
    words = ["--where", "a", "--count", "4", "--rates", "1", "2", "--dry", "--levels", "2"]
    found = parse(*words, "--mode", "odd")
    assert found.pop("rates") == [1.0, 2.0]
    assert found == {"where": "a", "count": 4, "dry": True, "depth": 2, "mode": "odd"}
    assert parse("--where", "a", "--no-dry") == {"where": "a", "dry": False}
    assert parse("--count", "2", only=("count",)) == {"count": 2}
    assert parse(only=("count",), defaults={"count": 8}) == {"count": 8}


@pytest.mark.parametrize("words", [[], ["--where", "a", "--own", "b"], ["--kind", "None"]])
def test_flags_that_are_missing_or_not_there(words, capsys):
    with pytest.raises(SystemExit):
        parse(*words)
    assert "error:" in capsys.readouterr().err


def test_help_and_docstring_tell_every_default():
    parser = argparse.ArgumentParser()
    add_flags(parser, Small, others={"with --large": Large})
    text = " ".join(parser.format_help().split())
    assert "how many, 50% of all (default 3; 5 with --large)" in text
    assert "{slow,fast,odd} how (default slow)" in text
    assert "a share (default all)" in text
    assert "        share: a share (default all).\n" in Small.__doc__
    assert "count: how many, 50% of all (default 5)." in Large.__doc__
    assert "share" not in Large.__doc__  # as in Small
