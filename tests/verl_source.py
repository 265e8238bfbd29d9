"""verl's own modules, where the package is installed, without the packages that it needs to run.

verl imports ray, tensordict and more; the formulas compared here need none of them. So its files
are loaded one by one, with stand-ins for what they import and these formulas do not use.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

STAND_INS = (
    "omegaconf",
    "tensordict",
    "verl",
    "verl.trainer",
    "verl.trainer.config",
    "verl.trainer.ppo",
    "verl.utils",
    "verl.utils.device",
    "verl.utils.import_utils",
    "verl.utils.kernel",
    "verl.utils.experimental",
    "verl.workers",
    "verl.workers.config",
)
SOURCES = (
    "verl.utils.torch_functional",
    "verl.utils.experimental.torch_functional",
    "verl.utils.kernel.linear_cross_entropy",
    "verl.trainer.ppo.core_algos",
)


class StandIn(ModuleType):
    """A module in which every name is there: a bare class, or a function that refuses to run."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {}) if name[0].isupper() else _refusing(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


def _refusing(name: str):
    def function(*args, **kwargs):
        raise NotImplementedError(f"{name} is a stand-in")

    return function


def _no_decorator(*args, **kwargs):
    return lambda function: function


def load(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """verl's modules by name, in `sys.modules` for the length of the test."""
    found = importlib.util.find_spec("verl")
    if found is None:
        pytest.skip("verl is not installed")
    root = Path(next(iter(found.submodule_search_locations))).parent
    for name in STAND_INS:
        module = StandIn(name)
        module.__path__ = []
        _install(module, monkeypatch)
    sys.modules["verl.utils.import_utils"].deprecated = _no_decorator
    return {name: _execute(root, name, monkeypatch) for name in SOURCES}


def _execute(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = root.joinpath(*name.split(".")).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    _install(module, monkeypatch)
    spec.loader.exec_module(module)
    return module


def _install(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module.__name__, module)
    parent, _, child = module.__name__.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
