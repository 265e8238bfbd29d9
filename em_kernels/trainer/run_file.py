"""run.yaml: the settings of a run, as a file that repeats it."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from em_kernels.lm.setting_files import settings_text
from em_kernels.lm.text import write_text
from em_kernels.trainer.config import TrainConfig

RUN_FILE = "run.yaml"
PACKAGES = ("em-kernels", "torch", "transformers")
UNNAMED = {
    "model": "a model that was passed; give --model its name",
    "teacher": "a teacher that was passed; give --teacher its name",
    "adapter": "the adapter that was trained; only train(config, model, tokenizer) takes one",
    "objective": "the objective that was passed; only train(..., objective=...) takes one",
}


def write_run_file(folder: Path, config: TrainConfig, passed: Iterable[str], ranks: int) -> None:
    """All settings but the folder itself; `passed` names what was given as an object.

    Every setting is in it, those with their defaults too, which may be others one day.
    """
    write_text(folder / RUN_FILE, settings_text(_settings(config), _notes(config, passed, ranks)))


def _settings(config: TrainConfig) -> dict:
    """As the command line takes them, where `objective: em` stands for a TrainConfig."""
    values = config.to_written()
    del values["output"]
    if values.get("objective") == "em" and values["schedule"] is None:
        values["schedule"] = values.pop("objective")
    return values


def _notes(config: TrainConfig, passed: Iterable[str], ranks: int) -> list[str]:
    versions = [f"{ranks} processes"] if ranks > 1 else []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # a source tree on the path
            continue
    repeats = f"em-kernels train --config {RUN_FILE} --output FOLDER"
    named = {name for name in ("model", "teacher") if getattr(config, name, None) is not None}
    unnamed = [UNNAMED[name] for name in passed if name not in named]
    if config.trust_remote_code:
        unnamed.append("--trust-remote-code, which the run was started with")
    return [f"{repeats}  ({', '.join(versions)})", *(f"Not in here: {what}." for what in unnamed)]
