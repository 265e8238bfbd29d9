"""What ends a process or costs the GPU costs its own stage, case or test only."""

import json
import os
import shutil
import subprocess
import sys

import torch
from gpu_stages import in_shell, row, saved, stage

from benchmarks import gpu, gpu_logs, gpu_smoke
from benchmarks.gpu_logs import (
    read_cases,
    read_rows,
    read_tests,
)

CASES_PROGRAM = """
import os, signal, sys

first = int(sys.argv[sys.argv.index("--from") + 1]) if "--from" in sys.argv else 0
for number in range(first, 6):
    if number == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 3:
        print("FAILED three: an illegal memory access was encountered")
        print("the device is lost; --from 4 goes on")
        sys.exit(1)
    print(f"ok     number{number}: 0.1 of what is allowed", flush=True)
print(f"{6 - first} cases, 0 failed")
"""

pytest_plugins = ("gpu_stages",)  # its fixtures `stages` and `time_is_over`


def test_a_case_that_ends_its_process_costs_itself_only(tmp_path):
    made = stage("cases", CASES_PROGRAM, read=read_cases, goes_on=True)
    (result,) = gpu.run_all([made], tmp_path, 600)
    assert result["status"] == "failed" and result["cases"] == 6
    failed = ["number 1: ended by SIGSEGV", "three: an illegal memory access was encountered"]
    assert result["failed_cases"] == failed
    assert result["note"] == "ended by SIGSEGV; 2 of 6 cases failed"


def test_a_program_that_cannot_begin_is_not_begun_for_ever(tmp_path):
    made = stage("cases", "import sys; sys.exit(7)", read=read_cases, goes_on=True)
    (result,) = gpu.run_all([made], tmp_path, 600)
    assert result["status"] == "failed" and len(result["failed_cases"]) == gpu.MOST_ENDS


def test_a_hang_a_signal_and_a_lost_device_cost_their_own_stages_only(
    stages, tmp_path, time_is_over
):
    good = json.dumps(row())
    signalled = f"print({good!r}, flush=True)\nimport os; os.kill(os.getpid(), 11)"
    lost = json.dumps(row(implementation="em_kernels cuda", seconds=None, failure="CUDA error"))
    sticky = f"print({good!r}); print({lost!r}); raise RuntimeError('CUDA error')"
    made = [
        ("signal", signalled),
        ("sticky", sticky),
        ("after", f"print({good!r})"),
    ]
    script = f"echo '{good}'; touch '{time_is_over}'; exec sleep 600"
    hang = in_shell(stage("hang", seconds=7, read=read_rows), script)
    stages(hang, *(stage(name, code, read=read_rows) for name, code in made))
    assert gpu.main(["--out", str(tmp_path)]) == 1
    results = {result["stage"]: result for result in saved(tmp_path)}
    assert all(row() in result["rows"] for result in results.values())
    assert results["hang"]["note"] == "stopped after 7 s"
    assert results["signal"]["note"] == "ended by SIGSEGV"
    assert results["sticky"]["note"] == "exit code 1; em_kernels cuda: CUDA error"
    statuses = [result["status"] for result in results.values()]
    assert statuses == ["failed", "failed", "failed", "passed"]


LOSES = """
import pytest
import torch

@pytest.fixture(autouse=True)
def pretend(monkeypatch):
    yield

def test_before():
    pass

def test_loses():
    torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    torch.cuda.synchronize = synchronize
    raise RuntimeError("the first to notice")

def test_after():
    pass
"""


def test_a_test_that_costs_the_gpu_ends_its_worker(tmp_path):
    """In the process that is left nothing more is run; the failure itself is in the log."""
    (tmp_path / "tests").mkdir()
    shutil.copy(gpu.ROOT / "tests/conftest.py", tmp_path / "tests")
    (tmp_path / "tests/test_lost.py").write_text(LOSES)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests"]
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    variables = {**own, "PYTHONPATH": str(gpu.ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert "has cost this process the GPU" in done.stdout
    assert read_tests(done.stdout)["counts"] == {"FAILED": 1, "PASSED": 1}
    assert "the first to notice" in done.stdout


def test_a_smoke_check_that_costs_the_device_says_where_to_go_on(monkeypatch, capsys):
    def lost(impl):
        raise RuntimeError("CUDA error: unspecified launch failure")

    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    checks = {"one": lambda impl: (True, "1e-7"), "two": lost, "three": lambda impl: (True, "0")}
    monkeypatch.setattr(gpu_smoke, "CHECKS", checks)
    monkeypatch.setattr(gpu_smoke, "is_lost", lambda device: True)
    assert gpu_smoke.main("cuda") == 1
    said = capsys.readouterr().out
    assert said.endswith("the device is lost; --from 2 goes on\n") and "three" not in said
    assert gpu_smoke.main("cuda", 2) == 0
    assert capsys.readouterr().out == "ok     cuda three: 0\n1 checks, 0 failed\n"
    monkeypatch.setattr(gpu_smoke, "is_lost", lambda device: False)
    assert gpu_smoke.main("cuda") == 1
    assert capsys.readouterr().out.endswith("3 checks, 1 failed\n")


def test_what_is_the_same_for_every_backend_is_checked_with_triton_alone(monkeypatch, capsys):
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    fused = "linear_softmax_stats fused"
    assert fused in gpu_smoke.TRITON_ALONE and gpu_smoke.TRITON_ALONE.keys() < {*gpu_smoke.CHECKS}
    checks = {fused: lambda impl: (True, "1e-7"), "other": lambda impl: (True, "0")}
    monkeypatch.setattr(gpu_smoke, "CHECKS", checks)
    assert gpu_smoke.main("triton") == 0
    both = f"ok     triton {fused}: 1e-7\nok     triton other: 0\n2 checks, 0 failed\n"
    assert capsys.readouterr().out == both
    assert gpu_smoke.main("cuda") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"skip   cuda {fused}: ") and "checked with triton\n" in said
    assert said.endswith("ok     cuda other: 0\n1 checks, 0 failed\n")
    found = gpu_logs.read_smoke(said)
    assert "problem" not in found and found["cases"] == 1 and len(found["said"]) == 2
    begun = said.replace("1 checks, 0 failed\n", "")
    assert gpu_logs.cases_done(begun) == 2  # it is where --from goes on
