"""What is packed: licence, types, the whole tree as source, and extras for all imports."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Whole frameworks that a user of their integration has, or that only run on a GPU.
HAD_ALREADY = {"verl", "vllm", "megatron"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A folder with the package as a wheel has it, and what a source distribution would hold."""
    folder = tmp_path_factory.mktemp("packed")
    commands = ["egg_info", "--egg-base", folder, "build_py", "--build-lib", folder / "lib"]
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *commands],
        cwd=ROOT,
        env={**os.environ, "EM_KERNELS_NO_EXTENSION": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_licence_is_apache_2():
    assert PROJECT["license"] == "Apache-2.0" and PROJECT["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
    assert "Copyright 2026 the em_kernels authors" in text


def test_a_wheel_has_the_types_and_the_embedded_model(packed):
    package = packed / "lib/em_kernels"
    assert (package / "py.typed").exists()
    assert list(package.glob("assets/tiny-math/*.safetensors"))
    assert (package / "assets" / "report.html.jinja").is_file()


def test_the_source_distribution_is_the_whole_tree(packed):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: there is no other list of the files")
    files = set((packed / "em_kernels.egg-info/SOURCES.txt").read_text().splitlines())
    there = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    assert there - files == set()
    assert [name for name in files if name.endswith((".so", ".pyc"))] == []


def requirements(extra: str) -> set[str]:
    """Names of the distributions of an extra, those of the extras in it included."""
    found = set()
    for requirement in EXTRAS[extra]:
        name, inner = re.match(r"([\w.-]+)(?:\[(.*?)\])?", requirement).groups()
        if name == PROJECT["name"]:
            found = found.union(*(requirements(each.strip()) for each in inner.split(",")))
        else:
            found.add(normal(name))
    return found


def normal(name: str) -> str:
    """As names of distributions are compared: typing_extensions is typing-extensions."""
    return name.lower().replace("_", "-")


def imported(path: Path) -> set[str]:
    """Top-level packages that the file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - HAD_ALREADY - {"em_kernels"}


@pytest.mark.parametrize("room", ("em_kernels", "examples", "tests", "benchmarks"))
def test_whatever_is_imported_is_in_an_extra(room):
    """torch is the one package that is required, with typing_extensions that it needs itself."""
    own = {path.stem for path in (ROOT / room).rglob("*")} | {"benchmarks", "cuda_build"}
    named = {"torch", "typing-extensions"}.union(*(requirements(extra) for extra in EXTRAS))
    distributions = packages_distributions()
    missing = {}
    for path in (ROOT / room).rglob("*.py"):
        for module in imported(path) - own:
            names = {normal(name) for name in distributions.get(module, [module])}
            if not names & named:
                missing.setdefault(module, []).append(path.name)
    assert missing == {}
