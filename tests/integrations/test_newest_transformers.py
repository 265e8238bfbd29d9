"""The integration with the newest transformers, which `make setup` puts beside the pinned one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

NEWEST = Path(sys.prefix) / "newest"
TESTS = Path(__file__).parents[1]
FILES = (
    "integrations/test_transformers.py",
    "integrations/test_transformers_losses.py",
    "lm/test_models.py",
    "integrations/test_patched_model.py",
    "integrations/test_added_losses.py",
)


def with_newest(*command: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(NEWEST), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *command],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(not NEWEST.is_dir(), reason=f"no {NEWEST}: `make setup` makes it")
def test_what_touches_transformers_passes_with_the_newest():
    pinned = (TESTS.parent / "constraints-newest.txt").read_text().split()[-1]
    shown = with_newest("-c", "import transformers; print(transformers.__version__)")
    version = shown.stdout.strip()
    assert f"transformers=={version}" == pinned
    files = [str(TESTS / name) for name in FILES]
    slow = "not process and not compile"
    result = with_newest("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", slow, *files)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
