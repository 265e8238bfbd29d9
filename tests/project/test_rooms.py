"""A room of the package imports what lies on lower floors, and nothing else."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "em_kernels"
FLOORS = (
    *("backends", "linear", "ops", "lm", "objectives", "trainer", "evaluator", "analysis"),
    *("integrations", "tiny_math", "cli"),
)
# The compiled parts, which have no room, and the version.
PARTS = {
    "backends/cpu.py": {"em_kernels._C"},
    "backends/cuda.py": {"em_kernels._cuda"},
    "cli/app.py": {"em_kernels"},
}
# A public name that is found when it is asked for.
LATE = {"evaluator/__init__.py": {"em_kernels.analysis.report"}}


def imports(text: str) -> Iterator[str]:
    """The modules of the package that a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if is_ours(name.name))
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "em_kernels.<relative>"
        elif isinstance(node, ast.ImportFrom) and is_ours(node.module):
            names = [f"{node.module}.{name.name}" for name in node.names]
            yield from names if node.module == "em_kernels" else [node.module]


def is_ours(module: str) -> bool:
    return module.split(".")[0] == "em_kernels"


def upward(file: str, text: str) -> list[str]:
    """What the source of `file`, by its path in the package, imports and should not."""
    allowed = PARTS.get(file, set()) | LATE.get(file, set())
    own = FLOORS.index(file.split("/")[0])
    return [
        module
        for module in imports(text)
        if module not in allowed and (module.split(".")[1:2] or [""])[0] not in FLOORS[: own + 1]
    ]


def sources() -> list[str]:
    paths = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    return sorted(path.as_posix() for path in paths if len(path.parts) > 1)


def test_every_folder_is_a_room():
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.glob("*/*.py")}
    assert folders == set(FLOORS)


@pytest.mark.parametrize("file", sources())
def test_a_room_imports_lower_floors_only(file):
    assert upward(file, (PACKAGE / file).read_text(encoding="utf-8")) == []


def test_what_is_allowed_is_there():
    for file, modules in (*PARTS.items(), *LATE.items()):
        assert modules <= set(imports((PACKAGE / file).read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "text, found",
    (
        ("from em_kernels.lm.heads import Head", []),
        ("from em_kernels.trainer import rl\nimport torch", []),
        ("from em_kernels.evaluator.run import run_eval", ["em_kernels.evaluator.run"]),
        ("def f():\n    import em_kernels.cli", ["em_kernels.cli"]),
        ("from em_kernels import softmax_stats", ["em_kernels.softmax_stats"]),
        ("from . import rl", ["em_kernels.<relative>"]),
    ),
)
def test_an_import_from_a_higher_floor_is_found(text, found):
    assert upward("trainer/new.py", text) == found
