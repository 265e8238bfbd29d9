"""Which tests `benchmarks.gpu` runs on a GPU, and how."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

from benchmarks import gpu_logs, gpu_report

# Tests of the trainer, not of a kernel: left out where a package or its version is missing.
NEEDED = {
    ("matplotlib", 3): ("tiny_math/test_demo.py",),
    ("transformers", 5): ("cli", "evaluator", "tiny_math", "trainer"),
}


TESTS = Path(__file__).parents[1] / "tests"
# A file is run if its tests take a backend or a device, or ask for a GPU; and these, which do not.
TAKES = re.compile(r"\b\w*IMPLS\b|\bdef \w+\([^)]*\b(?:impl|device)\b|cuda\.is_available")
ALSO = (
    "chunks",
    "chunk_memory",
    "chunking",
    "deferred_chunks",
    "inference",
    "triton",
    "triton_linear",
    "triton_narrow",
)
CPU_ONLY = (  # builds and emulators, pretended GPUs, processes over gloo
    *("choice", "choice_faults", "cpu_kernels", "cuda_build", "cuda_emulated", "gpu_command"),
    *("gpu_faults", "gpu_pretended", "gpu_report", "optional_parts", "reference", "vocab_parallel"),
)


def gpu_tests(folder: Path = TESTS) -> list[str]:
    """The files of tests that say something about a GPU."""
    also, left_out = ({f"test_{name}" for name in names} for names in (ALSO, CPU_ONLY))
    found = sorted(path for path in folder.rglob("test_*.py") if path.stem not in left_out)
    return [
        f"tests/{path.relative_to(folder).as_posix()}"
        for path in found
        if path.stem in also or TAKES.search(path.read_text(encoding="utf-8"))
    ]


GPU_TESTS = gpu_tests()
# A CUDA kernel can end a process for good: the tests of the other backends are in another one.
OF_CUDA = ("-k", "cuda", *GPU_TESTS)
NOT_OF_CUDA = ("-k", "not cuda", *GPU_TESTS)


def left_out_tests() -> dict[str, str]:
    """Test file -> the package it needs and this machine lacks."""
    reasons = {}
    for (package, least), files in NEEDED.items():
        found = gpu_report.version_of(package)
        if found is None or int(found.split(".")[0]) < least:
            reasons.update(dict.fromkeys(files, f"needs {package} {least}, found {found}"))
    return reasons


def read(text: str) -> dict:
    return {**gpu_logs.read_tests(text), "left_out": left_out_tests()}


def command(*which: str) -> list[str]:
    arguments = [sys.executable, "-m", "pytest", "-vv", "-rfEs", "--tb=short"]
    arguments += ["-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        arguments += ["-n", str(min(12, os.cpu_count() or 1))]
    if importlib.util.find_spec("pytest_timeout"):
        arguments += ["--timeout", "60", "--timeout-method", "thread"]  # signals do not end a wait
    arguments += [f"--ignore=tests/{name}" for name in left_out_tests()]
    return [*arguments, *which]
