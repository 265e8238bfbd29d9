"""Why a backend cannot serve: what its compiled part, torch and the device say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import torch

BUILD_RECORD = Path(__file__).parents[1] / "_build.json"  # module -> why it was left out


def first_line(error: Exception) -> str:
    """Of what it says, with its type."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


def load(part: str, module: str, remedy: str) -> ModuleType | str:
    """The compiled module, or why it is not there: what setup.py wrote down, else what importing
    it says. One that is there may be of another torch or Python, or miss a library of its own."""
    again = "reinstall with `pip install --no-build-isolation .`"
    try:
        return importlib.import_module(module)
    except Exception as error:
        reason = _left_out_because(module)
        if reason is not None:
            return f"{part} was left out of this build ({reason}); change that and {again}"
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            return f"{part} is missing ({error}); {remedy} and {again}"
        return f"{part} cannot be loaded ({first_line(error)}); {again}"


def _left_out_because(module: str) -> str | None:
    try:
        return dict(json.loads(BUILD_RECORD.read_text(encoding="utf-8"))).get(module)
    except (OSError, ValueError, TypeError):
        return None


def why_no_gpu() -> str | None:
    """None if torch sees a GPU, else what more there is to say of that, or ""."""
    try:
        if torch.cuda.is_available():
            return None
        if torch.backends.cuda.is_built():
            torch.cuda.init()  # raises, and so tells of a driver that is missing or too old
        elif torch.version.cuda is None:
            return f": torch {torch.__version__} is built without CUDA"
    except Exception as error:
        return f": {first_line(error)}"
    return ""
