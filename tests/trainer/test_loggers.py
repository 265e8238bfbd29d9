"""Metrics in other loggers: the numbers of metrics.jsonl, each update once, whatever happens."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from logger_stand_ins import PACKAGES, put_in, shown
from rl_runs import rl_settings, run_rl
from tiny_qwen2 import make_model, make_tokenizer
from trainer_runs import run, settings

from em_kernels.trainer import TrainConfig
from em_kernels.trainer.loggers import LOGGERS, numbers

NAMES = tuple(LOGGERS)
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def small(folder: Path | None, *names: str, **changes) -> TrainConfig:
    options = dict(output=folder, log_to=names, responses=2, max_new_tokens=4, prompts="1 2")
    return settings(**{**options, **changes})


def expected(folder: Path, name: str = "") -> list[tuple[int, str, float]]:
    """What metrics.jsonl has; to trackio "step" is the update itself."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    rows = [(line["update"], *pair) for line in lines for pair in numbers(line).items()]
    return [row for row in rows if (name, row[1]) != ("trackio", "step")]


def untimed(rows: list[tuple[int, str, float]]) -> list[tuple[int, str, float]]:
    return [row for row in rows if "second" not in row[1]]


def test_stand_ins_are_of_all_loggers():
    assert {name: logger.package for name, logger in LOGGERS.items()} == PACKAGES


@pytest.mark.parametrize("name", NAMES)
def test_a_logger_has_what_metrics_jsonl_has(name, tmp_path, monkeypatch):
    store = put_in(monkeypatch, name)
    run(small(tmp_path, name))
    assert shown(name, store, tmp_path) == expected(tmp_path, name)
    assert {row[0] for row in expected(tmp_path)} == {1, 2}
    assert store.ends == [0 if name == "wandb" else None]


def test_several_at_once_and_settings_that_the_environment_has(tmp_path, monkeypatch):
    wandb, trackio = put_in(monkeypatch, "wandb"), put_in(monkeypatch, "trackio")
    for name in ("WANDB_PROJECT", "WANDB_NAME", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    run(small(tmp_path / "run", "wandb", "trackio", updates=1))
    for name, store in (("wandb", wandb), ("trackio", trackio)):
        assert shown(name, store, tmp_path) == expected(tmp_path / "run", name)
    (begun,), (other,) = wandb.inits, trackio.inits
    assert (begun["project"], begun["name"]) == ("em-kernels", "run")
    assert other["project"] == "em-kernels" and other["name"].startswith("run-")
    assert begun["config"] == other["config"]
    assert begun["config"]["prompts"] == ["1 2"]
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_NAME", "first")
    monkeypatch.setenv("TRACKIO_PROJECT", "mine too")
    run(small(None, "wandb", "trackio", updates=1))
    assert (wandb.inits[1]["project"], wandb.inits[1]["name"]) == ("mine", "first")
    assert (trackio.inits[1]["project"], trackio.inits[1]["name"]) == ("mine too", None)


def stopped(at: int):
    """An `on_step` in which the process ends, with the metrics of `at` not yet written."""

    def on_step(line, model):
        if line["update"] == at:
            raise KeyboardInterrupt

    return on_step


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("saved", [0, 2])
def test_a_resumed_run_goes_on_in_the_same_without_doubled_steps(
    name, saved, tmp_path, monkeypatch
):
    store = put_in(monkeypatch, name)
    config = small(tmp_path, name, updates=5, save_every=saved)
    with pytest.raises(KeyboardInterrupt):
        run(config, on_step=stopped(4))
    assert {row[0] for row in shown(name, store, tmp_path)} == {1, 2, 3}
    assert store.ends == [1 if name == "wandb" else None]
    run(config, resume=True)  # from update 2, or from the start
    assert untimed(shown(name, store, tmp_path)) == untimed(expected(tmp_path, name))
    if name == "tensorboard":  # which takes back what is not the run's any more
        assert shown(name, store, tmp_path) == expected(tmp_path, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_logger_that_comes_later_gets_the_lines_before(name, tmp_path, monkeypatch):
    store = put_in(monkeypatch, name)
    run(small(tmp_path))
    run(small(tmp_path, name, updates=3), resume=True)
    assert shown(name, store, tmp_path) == expected(tmp_path, name)
    run(small(tmp_path, updates=4), resume=True)
    run(small(tmp_path, name, updates=5), resume=True)
    assert shown(name, store, tmp_path) == expected(tmp_path, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_logger_that_fails_for_a_while_is_a_warning_and_gets_the_rest(
    name, tmp_path, monkeypatch
):
    store = put_in(monkeypatch, name)
    first = 1 if name == "tensorboard" else 2  # the first scalar of update 1, or update 2
    store.fails = {first, first + 1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        result = run(small(tmp_path, name, updates=4))
    told = [str(w.message) for w in caught if "the run goes on" in str(w.message)]
    number = 1 if name == "tensorboard" else 2
    assert len(told) == 1 and told[0].startswith(f"{name} could not log update {number}: the ")
    assert len(result.metrics) == 4
    assert shown(name, store, tmp_path) == expected(tmp_path, name)


def test_a_logger_that_cannot_be_closed_is_a_warning(tmp_path, monkeypatch):
    put_in(monkeypatch, "trackio")
    monkeypatch.setattr(sys.modules["trackio"], "finish", None)
    with pytest.warns(RuntimeWarning, match="trackio could not be closed"):
        run(small(tmp_path, "trackio", updates=1))


def test_a_run_of_wandb_that_is_under_way_is_used_and_left_open(tmp_path, monkeypatch):
    store = put_in(monkeypatch, "wandb")
    wandb = sys.modules["wandb"]
    wandb.run = wandb.init(id=None)
    run(small(tmp_path, "wandb"))
    assert shown("wandb", store, tmp_path) == expected(tmp_path)
    assert len(store.inits) == 1 and store.ends == []
    wandb.run = wandb.init(id=None)  # another one, which has nothing yet
    run(small(tmp_path, "wandb", updates=3), resume=True)
    assert [row[0] for row in store.runs["run1"]] == [1, 2, 3]


def test_a_new_run_takes_no_note_from_the_folder(tmp_path, monkeypatch):
    store = put_in(monkeypatch, "wandb")
    (tmp_path / "loggers.json").write_text('{"wandb": {"id": "old", "last": 9}}')
    run(small(tmp_path, "wandb"))
    assert list(store.runs) == ["run0"] and shown("wandb", store, tmp_path) == expected(tmp_path)


@pytest.mark.parametrize("note", ["", "[]", '{"wandb": 3}', '{"wandb": {"id": "a"}}'])
def test_a_note_that_cannot_be_read_begins_anew(note, tmp_path, monkeypatch):
    put_in(monkeypatch, "wandb")
    run(small(tmp_path, "wandb", updates=1))
    (tmp_path / "loggers.json").write_text(note)
    again = put_in(monkeypatch, "wandb")
    run(small(tmp_path, "wandb"), resume=True)
    assert shown("wandb", again, tmp_path) == expected(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_logger_that_is_not_installed_is_named_before_any_work(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    config = replace(small(tmp_path / "run", name), model="no such model")
    with pytest.raises(ImportError) as error:
        run(config, tokenizer=make_tokenizer(), model=make_model())
    assert f"pip install 'em-kernels[{name}]'" in str(error.value)
    assert f"leave {name} out of log_to" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_logger_that_does_not_start_ends_the_run_before_its_first_update(tmp_path, monkeypatch):
    put_in(monkeypatch, "wandb")

    def init(**options):
        raise RuntimeError("api_key not configured\n(no-tty)")

    sys.modules["wandb"].init = init
    message = r"log_to: wandb does not start: api_key not configured \(no-tty\)"
    with pytest.raises(ValueError, match=message):
        run(small(tmp_path, "wandb"))
    assert not (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "changes, kind, message",
    [
        (dict(log_to="mlflow"), ValueError, r"log_to must be one of \('tensorboard', 'wandb', "),
        (dict(log_to=("wandb", 3)), ValueError, "log_to must be one of .*, got 3"),
        (dict(log_to=3), TypeError, "log_to must be one text or several, got 3"),
        (dict(log_to="tensorboard"), ValueError, "output must be a folder with log_to='tensor"),
    ],
)
def test_bad_names_of_loggers(changes, kind, message):
    with pytest.raises(kind, match=message):
        TrainConfig(**changes)


def test_only_numbers_are_logged():
    line = {"update": 3, "accuracy": None, "objective": "grpo", "stage": 1, "ok": True, "x": [1]}
    assert numbers({**line, "loss": float("inf")}) == {"stage": 1, "ok": 1, "loss": float("inf")}


def test_rewards_without_answers_are_logged_as_far_as_they_are_numbers(tmp_path, monkeypatch):
    store = put_in(monkeypatch, "trackio")
    options = dict(responses=4, group_size=2, max_new_tokens=4, updates=1)
    run_rl(rl_settings(output=tmp_path, log_to="trackio", **options))
    found = {row[1] for row in shown("trackio", store, tmp_path)}
    assert found >= {"stage", "reward_mean"} and "objective" not in found
