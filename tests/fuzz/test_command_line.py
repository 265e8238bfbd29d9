"""Settings and the command line on junk: refused by name, in one line, never a traceback."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields

import hypothesis.strategies as st
import pytest
from hypothesis import given, note

pytest.importorskip("transformers")
from em_kernels import cli
from em_kernels.cli.app import _parser
from em_kernels.evaluator import EvalConfig
from em_kernels.trainer import RLConfig, TrainConfig
from fuzz.budget import examples

CLASSES = (TrainConfig, RLConfig, EvalConfig)
JUNK = (object(), 1j, b"bytes", {"a": 1}, [object()], ValueError)
WORDS = st.one_of(
    st.sampled_from(
        ("0", "1", "-1", "2.5", "nan", "inf", "-inf", "1e400", "", " ", "none", "True")
    ),
    st.sampled_from(("/no/such/path", "--", "-x", "1_000", "٣", "\x00", "\udce9", "{}", "[1]")),
    st.text(max_size=8),
)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_no_setting_takes_junk(cls):
    needed = {f.name: "x" for f in fields(cls) if f.default is MISSING}
    if cls is RLConfig:
        needed["problems"] = (("1 + 1", "2"),)
    wrong = []
    for item in fields(cls):
        for junk in JUNK:
            if item.name == "chat_template_kwargs" and isinstance(junk, dict):
                junk = {"a": object()}  # any mapping of JSON is one
            try:
                cls(**{**needed, item.name: junk})
                wrong.append(f"{item.name}={junk!r}: accepted")
            except (TypeError, ValueError) as error:
                named = item.name.rstrip("s")
                if named not in str(error):
                    wrong.append(f"{item.name}={junk!r}: not named: {error}")
            except Exception as error:
                wrong.append(f"{item.name}={junk!r}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def commands(parser=None, before=()):
    """(words of a command, its parser), those of its own commands too."""
    parser = parser or _parser()
    inner = [a for a in parser._actions if hasattr(a, "choices") and isinstance(a.choices, dict)]
    if not inner:
        yield before, parser
    for action in inner:
        for name, one in action.choices.items():
            yield from commands(one, (*before, name))


EVERY = {" ".join(words): parser for words, parser in commands()}
HARMLESS = {"info"}  # takes nothing


@pytest.mark.parametrize("command", [name for name in EVERY if name not in HARMLESS])
@examples(12)
@given(data=st.data())
def test_a_command_line_ends_in_one_line(command, data, tmp_path_factory, capsys, monkeypatch):
    """The model does not exist, so that nothing is trained or asked."""
    folder = tmp_path_factory.mktemp("run")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    actions = [a for a in EVERY[command]._actions if a.option_strings and a.dest != "help"]
    words = command.split()
    for action in data.draw(st.lists(st.sampled_from(actions), max_size=4, unique=True)):
        words.append(data.draw(st.sampled_from(action.option_strings)))
        if action.nargs != 0:
            given = data.draw(st.sampled_from(tuple(action.choices))) if action.choices else None
            words.append(data.draw(st.sampled_from((given or "x", data.draw(WORDS)))))
    positional = [a for a in EVERY[command]._actions if not a.option_strings]
    words += ["no/such/folder" for _ in positional]
    if any(a.dest == "model" for a in actions):
        words += ["--model", "no/such/model"]
    if command != "merge" and any(a.dest == "output" for a in actions):
        words += ["--output", str(folder / "out")]
    note(repr(words))
    capsys.readouterr()
    try:
        code = cli.main(words)
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err.strip()
    assert code in (0, 2)
    if code:
        assert re.search(r"em-kernels[^:\n]*: error: \S", error), error
        assert "Traceback" not in error or "--traceback" in words
