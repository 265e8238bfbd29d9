"""Every setting of a run can be given on the command line, with the choices that its check has."""

from __future__ import annotations

import argparse

import pytest

from em_kernels import cli
from em_kernels.cli.app import _new_config, _parser
from em_kernels.evaluator import EvalConfig
from em_kernels.lm.settings import flag_of, settings_of
from em_kernels.trainer import RLConfig, TrainConfig

COMMANDS = {"train": (TrainConfig, RLConfig), "eval": (EvalConfig,), "select": (EvalConfig,)}
SETTINGS = [
    (command, name)
    for command, classes in COMMANDS.items()
    for name in dict.fromkeys(name for cls in classes for name in settings_of(cls))
    if (command, name) != ("select", "temperatures")  # it has --temperature, one
]


def options(command: str) -> dict[str, argparse.Action]:
    """The options of a command, by flag."""
    commands = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices[command]._option_string_actions


@pytest.mark.parametrize("command, name", SETTINGS)
def test_a_setting_has_a_flag_with_its_choices_or_a_reason_for_having_none(command, name):
    told = [settings_of(cls)[name] for cls in COMMANDS[command] if name in settings_of(cls)]
    if told[0].no_flag is not None:
        assert told[0].no_flag
        return
    option = options(command)[flag_of(name, told[0])]
    assert option.dest == name
    named = {choice for one in told for choice in one.named}
    assert set(option.choices or ()) == named


@pytest.fixture
def problems(tmp_path) -> list[str]:
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "1 + 1", "answer": 2}\n')
    return ["--objective", "grpo", "--problems", str(path)]


def read(*words: str) -> TrainConfig | RLConfig:
    arguments = _parser().parse_args(["train", "--model", "m", "--output", "o", *words])
    return _new_config(arguments)


@pytest.mark.parametrize("reduction", settings_of(RLConfig)["reduction"].named)
def test_every_reduction_of_an_objective_is_taken(reduction, problems):
    assert read(*problems, "--reduction", reduction).reduction == reduction


def test_a_reduction_that_entropy_minimisation_lacks_is_named(capsys):
    words = ["train", "--model", "m", "--output", "o", "--reduction", "sequence_mean_token_sum"]
    assert cli.main(words) == 2
    assert "reduction must be one of ('token_mean', 'sequence_mean')" in capsys.readouterr().err


def test_switches_that_are_on_can_be_turned_off(problems):
    assert read(*problems, "--no-normalize-std").normalize_std is False
    assert read("--no-shards-only").shards_only is False


def test_distillation_does_with_prompts_and_a_teacher():
    config = read("--objective", "opd", "--teacher", "t", "--prompt", "1 + 1", "--opd-kind", "js")
    assert (config.teacher, config.opd_kind, config.prompt_texts) == ("t", "js", ("1 + 1",))
    assert RLConfig.from_dict(config.to_dict()) == config


def test_a_teacher_without_distillation_is_refused(problems, capsys):
    words = ["train", "--model", "m", "--output", "o", "--teacher", "t"]
    assert cli.main([*words, *problems]) == 2
    assert "teacher is for the objective 'opd'" in capsys.readouterr().err
    assert cli.main(words) == 2
    assert "--teacher needs an --objective other than em" in capsys.readouterr().err


def test_the_help_of_train_has_its_settings_under_headings(capsys):
    with pytest.raises(SystemExit):
        _parser().parse_args(["train", "--help"])
    text = capsys.readouterr().out
    places = [("reinforcement learning", "--clip-low"), ("entropy control", "--entropy-target")]
    places += [("sampler and trainer", "--rollout-cap"), ("settings of one obj", "--dppo-k")]
    for heading, flag in places:
        body = text.partition(f"\n{heading}")[2].split("\n\n")[0]
        assert f"  {flag} " in body, heading
