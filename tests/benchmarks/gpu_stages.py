"""Stages, rows and reports made up for the tests of the GPU command."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from benchmarks import gpu
from benchmarks.gpu import Stage

LOG = """\
[gw1] [  3%] PASSED tests/test_a.py::test_one[float32-a b]
[gw0] [  3%] FAILED tests/test_a.py::test_two
tests/test_a.py::test_three
[gw0] [ 10%] SKIPPED tests/test_b.py::test_four
[gw0] [ 10%] PASSED tests/test_b.py::test_five
=== short test summary info ===
SKIPPED [1] tests/test_b.py:7: needs trl
FAILED tests/test_a.py::test_two - AssertionError: 3 PASSED
"""
REFUSED = "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Sorry."


@pytest.fixture
def stages(monkeypatch):
    """Replace the stages of the command."""
    return lambda *made: monkeypatch.setattr(gpu, "STAGES", made)


@pytest.fixture
def time_is_over(monkeypatch, tmp_path_factory):
    """A file: the stage that makes it has used up its time. Any other takes one second, however
    long it does."""
    file, now = tmp_path_factory.mktemp("clock") / "over", [0.0]

    class Process(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is None:
                return super().wait()
            while self.poll() is None and not file.exists():
                time.sleep(0.01)
            if not file.exists():
                now[0] += 1
                return self.returncode
            file.unlink()
            now[0] += timeout
            raise subprocess.TimeoutExpired(self.args, timeout)

    for module, changes in (
        (time, {"monotonic": lambda: now[0]}),
        (subprocess, {"Popen": Process}),
    ):
        changed = SimpleNamespace(**{**vars(module), **changes})
        monkeypatch.setattr(gpu, module.__name__, changed)
    return file


def stage(name, code="print('done')", seconds=120.0, **options):
    options = {"log": f"{name}.log", "needs_gpu": False, **options}
    return Stage(name, seconds, [sys.executable, "-c", code], **options)


def in_shell(made, script):
    """The stage with a script of the shell in place of Python."""
    return made._replace(command=["sh", "-c", script])


def row(**changes):
    base = dict(op="softmax_stats forward", n=8, v=50, d=0, dtype="bfloat16", seconds=0.01)
    base |= dict(implementation="em_kernels", faster_than={}, times_floor=1.1, error=1e-3)
    base |= dict(gigabytes_per_second=900.0, of_copy_bandwidth=0.93, gigaflops=0.0)
    base |= dict(peak_bytes=10, extra_bytes=1 << 30, failure=None)
    return {**base, **changes}


def saved(folder):
    (path,) = folder.glob("gpu-*.json")
    return json.loads(path.read_text())["stages"]
