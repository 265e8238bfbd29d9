"""What others import stays where it is, and a module is called what it is."""

import importlib
import pkgutil
from types import ModuleType

import pytest

import em_kernels


def packages() -> list[str]:
    found = pkgutil.walk_packages(em_kernels.__path__, "em_kernels.")
    return ["em_kernels", *(module.name for module in found if module.ispkg)]


@pytest.mark.parametrize(
    "module, name",
    (
        *(("em_kernels", name) for name in em_kernels.__all__),
        ("em_kernels.cpu", "release_memory"),
        ("em_kernels.inference", "AdaptiveTemperature"),
        ("em_kernels.inference", "EntropyDescent"),
        ("em_kernels.reference", "stats"),
        ("em_kernels.reference", "grad"),
        ("em_kernels.reference", "loss"),
        ("em_kernels.objectives", "grpo_loss"),
    ),
)
def test_public_names_stay(module, name):
    if module == "em_kernels.cpu":
        pytest.importorskip("em_kernels._C")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("module", ("trainer", "evaluator", "objectives"))
def test_public_rooms_have_what_they_list(module):
    room = importlib.import_module(f"em_kernels.{module}")
    assert room.__all__ == sorted(room.__all__, key=lambda name: (not name.isupper(), name))
    assert all(getattr(room, name) is not None for name in room.__all__)


@pytest.mark.parametrize("package", packages())
def test_no_name_stands_for_a_module_and_for_something_in_it(package):
    """`import package.name as module` gives what the package calls so: only a module will do."""
    room = importlib.import_module(package)
    modules = {module.name for module in pkgutil.iter_modules(room.__path__)}
    taken = {
        name for name in modules & vars(room).keys() if not isinstance(vars(room)[name], ModuleType)
    }
    assert not taken


def test_backends_is_called_and_imported_from():
    import em_kernels.backends.choice as choice
    import em_kernels.backends.triton as triton

    assert em_kernels.backends() == choice.backends() and triton.__name__.endswith("triton")
    assert em_kernels.backends()["reference"] == "available"
