"""The one GPU command, with stages made up for the test; none of it needs a GPU."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gpu_stages import row, saved, stage

from benchmarks import common, gpu, gpu_logs, gpu_report, gpu_smoke, gpu_tests, gpu_truth
from benchmarks.__main__ import main as bench
from benchmarks.common import Case, Sizes, measure, table
from benchmarks.gpu_logs import (
    read_build,
    read_cases,
    read_rows,
    read_sanitizer,
    read_tests,
)
from benchmarks.gpu_report import markdown


@pytest.fixture
def stages(monkeypatch):
    """Replace the stages of the command."""
    return lambda *made: monkeypatch.setattr(gpu, "STAGES", made)


def test_a_failing_stage_keeps_what_is_before_and_after_it(stages, tmp_path, capsys):
    lines = [json.dumps(row()), json.dumps(row(implementation="eager", seconds=0.05))]
    stages(
        stage("first", f"print({chr(10).join(lines)!r})", read=read_rows),
        stage("second", "import sys; print('the reason'); sys.exit(3)"),
        stage("third", "import os; os.abort()"),
        stage("fourth"),
    )
    assert gpu.main(["--out", str(tmp_path)]) == 1
    results = {result["stage"]: result for result in saved(tmp_path)}
    statuses = [result["status"] for result in results.values()]
    assert statuses == ["passed", "failed", "failed", "passed"]
    assert results["first"]["rows"] == [row(), row(implementation="eager", seconds=0.05)]
    assert results["second"]["note"] == "exit code 3" and results["third"]["note"]
    assert "the reason" in (tmp_path / "second.log").read_text()
    markdown = next(tmp_path.glob("*.md")).read_text()
    assert "| second | failed | 0 s | exit code 3 |" in markdown
    assert "| em_kernels | 10.00 |" in markdown and "| eager | 50.00 |" in markdown
    assert "second | failed" in capsys.readouterr().out


def test_all_stages_passed_is_exit_code_0(stages, tmp_path):
    stages(stage("one"), stage("two"))
    assert gpu.main(["--out", str(tmp_path)]) == 0
    assert gpu.main(["--out", str(tmp_path), "--only", "two"]) == 0
    assert [result["stage"] for result in saved(tmp_path)] == ["one", "two"]


def test_the_deadline_stops_and_skips_and_says_so(stages, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.5)
    slow = "import time; print('began', flush=True); time.sleep(60)"
    stages(stage("quick"), stage("endless", slow, seconds=600), stage("late"))
    start = time.monotonic()
    assert gpu.main(["--out", str(tmp_path), "--seconds", "2.5"]) == 1
    assert time.monotonic() - start < 20
    quick, endless, late = saved(tmp_path)
    assert quick["status"] == "passed"
    assert endless["status"] == "failed"
    assert endless["note"].startswith("stopped after 2 s; had 2 of its 600 s")
    assert "began" in (tmp_path / "endless.log").read_text()
    assert (late["status"], late["note"]) == ("skipped", "no time was left")


def test_a_stage_is_stopped_at_its_own_limit_with_all_it_started(stages, tmp_path):
    file = tmp_path / "written"
    child = f"import time; time.sleep(3); open({str(file)!r}, 'w')"
    parent = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"print({json.dumps(row())!r}, flush=True)\ntime.sleep(60)"
    )
    stages(stage("bench", parent, seconds=1.5, read=read_rows), stage("next"))
    gpu.main(["--out", str(tmp_path)])
    stopped, after = saved(tmp_path)
    assert stopped["status"] == "failed" and stopped["rows"] == [row()]
    assert after["status"] == "passed"
    time.sleep(3)
    assert not file.exists()


def test_the_report_is_written_after_every_stage(tmp_path):
    seen = []
    look = stage(
        "look",
        f"import os; print(os.listdir({str(tmp_path)!r}))",
        read=lambda text: seen.append(text) or {},
    )
    gpu.run_all([stage("before"), look], tmp_path, 60)
    (text,) = seen
    assert "gpu-none-" in text and ".json" in text and ".md" in text


def test_stages_that_share_a_log_read_their_own_part(tmp_path):
    texts = []
    made = [
        stage(
            name, f"print({name!r})", log="shared.log", read=lambda text: texts.append(text) or {}
        )
        for name in ("one", "two")
    ]
    gpu.run_all(made, tmp_path, 60)
    assert [text.strip() for text in texts] == ["one", "two"]
    assert (tmp_path / "shared.log").read_text().split() == ["one", "two"]


def test_a_log_that_cannot_be_read_fails_its_stage_only(tmp_path):
    broken = stage("broken", "print('no json')", read=gpu_logs.read_environment)
    first, second = gpu.run_all([broken, stage("next")], tmp_path, 60)
    assert first["status"] == "failed" and "its log cannot be read" in first["note"]
    assert second["status"] == "passed"


def test_a_program_that_is_not_installed_fails_its_stage_only(tmp_path):
    missing = stage("sanitizer")._replace(command=["no-such-sanitizer", "python"])
    first, second = gpu.run_all([missing, stage("next")], tmp_path, 60)
    assert (first["status"], first["note"]) == ("failed", "exit code 127")
    assert (tmp_path / "sanitizer.log").read_text() == "no-such-sanitizer: not found\n"
    assert second["status"] == "passed"


def test_a_tool_that_is_not_installed_is_excused_and_said(stages, tmp_path):
    missing = stage("racecheck", optional=True)._replace(command=["/no/such/sanitizer", "x"])
    stages(missing, stage("next"))
    assert gpu.main(["--out", str(tmp_path)]) == 0
    first, second = saved(tmp_path)
    assert (first["status"], second["status"]) == ("unavailable", "passed")
    assert first["note"] == "/no/such/sanitizer is not installed"


def test_a_tool_that_refuses_the_gpu_is_excused_and_said(stages, tmp_path):
    code = f"print({REFUSED!r}); raise SystemExit(1)"
    stages(stage("racecheck", code, read=read_sanitizer))
    assert gpu.main(["--out", str(tmp_path)]) == 0
    (result,) = saved(tmp_path)
    assert (result["status"], result["note"]) == ("unavailable", "Device not supported. Sorry.")


def test_a_long_log_keeps_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOG_BYTES", 1000)
    gpu.run_all([stage("long", "print('x' * 5000); print('the end')")], tmp_path, 60)
    log = (tmp_path / "long.log").read_text()
    assert len(log) < 1100 and log.rstrip().endswith("the end")


def test_without_a_gpu_its_stages_are_skipped(stages, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "gpu_memory", lambda: 0)
    stages(stage("build"), stage("measure", needs_gpu=True))
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert [result["note"] for result in saved(tmp_path)] == ["", "no GPU is visible"]


def test_without_a_gpu_nothing_is_built_for_one():
    assert [made.name for made in gpu.STAGES if not made.needs_gpu] == ["environment"]


def test_the_report_says_why_no_gpu_is_visible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = gpu_logs.read_environment(json.dumps(gpu_report.machine()))
    assert found["problem"] == f"no GPU is visible: torch {torch.__version__} is built without CUDA"
    for impl in ("triton", "cuda"):
        assert found["problem"] == gpu_truth.unusable(impl)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", refuse)
    found = gpu_logs.read_environment(json.dumps(gpu_report.machine()))
    assert found["problem"] == "no GPU is visible: RuntimeError: Found no NVIDIA driver"


def refuse():
    raise RuntimeError("Found no NVIDIA driver\nand so on")


def test_a_python_without_torch_is_told_how_to_take_another():
    code = (
        "import runpy, sys\n"
        "sys.modules['torch'] = None\n"
        "runpy.run_module('benchmarks.gpu', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=gpu.ROOT, capture_output=True, text=True
    )
    said = "has no torch: make gpu GPU_PYTHON=... takes another Python\n"
    assert done.returncode == 1 and done.stderr == f"{sys.executable} {said}"


def test_a_backend_that_cannot_be_used_is_one_failure_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(gpu_smoke, "unusable", lambda impl: "it was left out of this build")
    assert gpu_smoke.command(["cuda"]) == 1
    said = capsys.readouterr().out
    found = gpu_logs.read_smoke(said)
    assert found["problem"] == "cuda cannot be used: it was left out of this build"
    assert gpu_logs.cases_done(said) is None  # it is not begun again


def test_benchmarks_of_a_device_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        bench(["token_loss", "--device", "cuda"])
    assert ended.value.code == 2
    assert "--device cuda needs a GPU, and none is visible" in capsys.readouterr().err


@pytest.mark.parametrize("given", (("--device", "gpu"), ("--n", "0"), ("--threads", "-1")))
def test_benchmarks_that_cannot_be(given, capsys):
    with pytest.raises(SystemExit) as ended:
        bench(["token_loss", *given])
    name, value = given
    assert ended.value.code == 2
    assert re.search(f"{name} must be .*, got {value}\n", capsys.readouterr().err)


def test_stages_see_a_gpu_and_this_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.gpu_wheels, "UNPACKED", tmp_path / "not made")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    variables = gpu.environment()
    assert "TRITON_INTERPRET" not in variables
    assert variables["PYTHONPATH"].split(":") == [str(gpu.ROOT), "/elsewhere"]


def test_cuda_is_compiled_for_the_gpu_that_is_there(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(gpu, "gpu_capability", lambda: "9.0")
    assert gpu.environment()["TORCH_CUDA_ARCH_LIST"] == "9.0"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
    assert gpu.environment()["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0"


def test_tests_of_what_is_not_installed_are_left_out_and_the_report_says_so(monkeypatch):
    monkeypatch.setattr(gpu_report, "version_of", {"transformers": "4.57.1"}.get)
    command = gpu_tests.command("tests")
    assert "--ignore=tests/trainer" in command and command[-1] == "tests"
    found = gpu_tests.read(LOG)
    assert found["left_out"]["cli"] == "needs transformers 5, found 4.57.1"
    result = {"stage": "tests", "status": "passed", "seconds": 1.0, "note": "", **found}
    assert "- cli is left out: needs transformers 5" in markdown([result], "2026-01-01")
    monkeypatch.setattr(gpu_report, "version_of", lambda package: "9.1")
    assert gpu_tests.left_out_tests() == {}


def test_at_most_eight_small_files():
    logs = {made.log for made in gpu.STAGES}
    assert len(logs) + len((".json", ".md")) <= 8
    assert gpu.SECONDS < 540 and len(set(gpu.names())) == len(gpu.STAGES)


def test_a_backend_that_is_built_is_measured_within_one_call():
    """The limits are for the worst; what is before the benchmarks must not take all there is."""
    before = gpu.STAGES[: gpu.names().index("logits-peers")]
    assert sum(made.seconds for made in before) < gpu.SECONDS


def calls():
    """The stages of each of the calls that the command's help names."""
    found = re.findall(r'^    STAGES="(.*)"$', gpu.__doc__, re.M)
    return [gpu.chosen(call.split()) for call in found]


def test_three_calls_do_it_all_each_within_its_time():
    assert len(calls()) == 3
    assert {made.name for call in calls() for made in call} == set(gpu.names())
    for call in calls():
        assert sum(made.seconds for made in call) <= gpu.SECONDS, [made.name for made in call]
        assert [made.name for made in call][:2] == ["environment", "build"]
        assert len({made.log for made in call}) + len((".json", ".md")) <= 8


def test_a_group_brings_its_stages_and_what_they_need():
    names = [made.name for made in gpu.chosen(["smoke", "cases", "bench-triton"])]
    needed = ["environment", "build", "smoke-triton", "smoke-cuda", "logits-triton"]
    needed += ["hidden-triton", "build-cases", "cases", "hidden-3584-triton"]
    assert names == needed
    assert [made.name for made in gpu.chosen(["environment"])] == ["environment"]
    every = {name for group in gpu.GROUPS for name in gpu.members(group)}
    assert every <= set(gpu.names()) and not gpu.GROUPS.keys() & set(gpu.names())


def test_help_names_every_stage_and_group(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--help"])
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in (*gpu.names(), *gpu.GROUPS))
    with pytest.raises(SystemExit):
        gpu.main(["--only", "bench-tritn"])
    assert "invalid choice: 'bench-tritn'" in capsys.readouterr().err


def test_each_backend_has_a_process_of_its_own():
    for made in gpu.STAGES:
        if made.log == "benchmarks.log":
            only = made.command[made.command.index("--only") + 1 : made.command.index("--device")]
            backend = made.name.rpartition("-")[2]
            ours = [name for name in only if name.startswith("em_kernels")]
            assert ours == ([] if backend == "peers" else [f"em_kernels {backend}"])
            assert "--rows" in made.command


def test_make_hands_the_stages_over():
    make = shutil.which("make")
    if make is None:
        pytest.skip("there is no make")
    command = [make, "-n", "gpu", "STAGES=smoke cases bench-triton", "GPU_PYTHON=py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=gpu.ROOT)
    said = 'py -m benchmarks.gpu --out "gpu-output" --only smoke cases bench-triton'
    assert said in done.stdout, done.stderr
    command = [make, "-n", "gpu-wheels", "PYTHON=py", "ARGS=--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=gpu.ROOT)
    said = "py -m benchmarks.gpu_wheels --python 3.12 --mib 64 --help"
    assert said in done.stdout, done.stderr


def test_files_of_tests_are_chosen_by_what_they_take(tmp_path):
    assert all((gpu.ROOT / file).exists() for file in gpu_tests.GPU_TESTS)
    chosen = {Path(file).stem.removeprefix("test_") for file in gpu_tests.GPU_TESTS}
    assert {"softmax_stats", "scale", "second_derivatives", "covariance", "peers"} <= chosen
    assert {*gpu_tests.ALSO} <= chosen and not {*gpu_tests.CPU_ONLY} & chosen
    assert not {"trainer", "judge", "evaluator"} & chosen
    (tmp_path / "test_new.py").write_text("from helpers import FAST_IMPLS\n")
    (tmp_path / "test_given.py").write_text("def test_one(\n    rows, device\n):\n    pass\n")
    (tmp_path / "test_other.py").write_text("def test_two(rows):\n    device = 1\n")
    assert gpu_tests.gpu_tests(tmp_path) == ["tests/test_given.py", "tests/test_new.py"]


# What ends a process


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


def test_a_case_that_ends_its_process_costs_itself_only(tmp_path):
    made = stage("cases", CASES_PROGRAM, read=read_cases, goes_on=True)
    (result,) = gpu.run_all([made], tmp_path, 60)
    assert result["status"] == "failed" and result["cases"] == 6
    failed = ["number 1: ended by SIGSEGV", "three: an illegal memory access was encountered"]
    assert result["failed_cases"] == failed
    assert result["note"] == "ended by SIGSEGV; 2 of 6 cases failed"


def test_a_program_that_cannot_begin_is_not_begun_for_ever(tmp_path):
    made = stage("cases", "import sys; sys.exit(7)", read=read_cases, goes_on=True)
    (result,) = gpu.run_all([made], tmp_path, 60)
    assert result["status"] == "failed" and len(result["failed_cases"]) == gpu.MOST_ENDS


def test_a_hang_a_signal_and_a_lost_device_cost_their_own_stages_only(stages, tmp_path):
    good = json.dumps(row())
    hang = f"print({good!r}, flush=True)\nimport time; time.sleep(60)"
    signalled = f"print({good!r}, flush=True)\nimport os; os.kill(os.getpid(), 11)"
    lost = json.dumps(row(implementation="em_kernels cuda", seconds=None, failure="CUDA error"))
    sticky = f"print({good!r}); print({lost!r}); raise RuntimeError('CUDA error')"
    made = [
        ("hang", hang),
        ("signal", signalled),
        ("sticky", sticky),
        ("after", f"print({good!r})"),
    ]
    limits = {"hang": 1.5}
    stages(*(stage(n, c, seconds=limits.get(n, 20.0), read=read_rows) for n, c in made))
    assert gpu.main(["--out", str(tmp_path)]) == 1
    results = {result["stage"]: result for result in saved(tmp_path)}
    assert all(row() in result["rows"] for result in results.values())
    assert results["hang"]["note"].startswith("stopped after 2 s")
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


# Reading logs

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


PROFILE = """==PROF== Connected to process 411 (/usr/bin/python3.12)
==PROF== Profiling "stream_statistics" - 0: 0%....50%....100% - 5 passes
a line of the program
==PROF== Disconnected from process 411
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",\
"Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
""".replace("\\\n", "")


def profile_lines(kernel, number, **values):
    names = {column: name for name, (column, _) in gpu_logs.METRICS.items()}
    about = f'"{number}","411","python3.12","127.0.0.1","{kernel}","1","7","(256, 1, 1)"'
    return "".join(
        f'{about},"(2048, 1, 1)","0","9.0","Command line profiler metrics","{names[c]}","%","{v}"\n'
        for c, v in values.items()
    )


def test_peers_that_are_absent_are_in_the_report():
    text = "trl-1.16.0-py3-none-any.whl is unpacked\nverl is left out: it is not installed\n"
    found = gpu_logs.read_peers(text)
    assert found["unpacked"] == ["trl-1.16.0-py3-none-any.whl"] and "problem" not in found
    result = {"stage": "peers", "status": "passed", "seconds": 1.0, "note": "", **found}
    assert "- verl is left out: it is not installed" in markdown([result], "2026-01-01")


def test_a_profile_is_a_table_of_kernels():
    first = {"ms": "1,234,567", "DRAM %": "91.25", "issue %": "40.5", "occupancy %": "74.9"}
    text = PROFILE + profile_lines("stream_statistics<1, 2>(Problem)", 0, **first, registers="40")
    text += profile_lines("resident_loss", 1, ms="250000", registers="64")
    found = gpu_logs.read_profile(text)
    assert "problem" not in found and len(found["profile"]) == 2
    result = {"stage": "profile-cuda", "status": "passed", "seconds": 9.0, "note": "", **found}
    said = markdown([result], "2026-01-01")
    assert "| cuda | stream_statistics<1, 2> | 1.23 | 91.2 | 40.5 | 74.9 | 40 |" in said
    assert "| cuda | resident_loss | 0.25 | - | - | - | 64 |" in said
    assert gpu_logs.read_profile(PROFILE)["problem"] == "no kernel was profiled"
    refused = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access counters"
    assert gpu_logs.read_profile(refused)["refused"].startswith("ERR_NVGPUCTRPERM")


def test_failures_of_one_test_are_one_line():
    lines = [f"FAILED tests/test_a.py::test_two[{i}] - x" for i in range(3)]
    others = ["FAILED tests/test_a.py::test_other - y"]
    found = read_tests("\n".join([LOG.splitlines()[0], *lines, *others]))["failures"]
    assert found == [f"{lines[0]} (and 2 more)", *others]


def test_what_the_smoke_checks_found_is_kept():
    text = (
        "ok     triton certain rows, T=0.7: H 1e-7\nFAILED triton graph: no\n2 checks, 1 failed\n"
    )
    found = gpu_logs.read_smoke(text)
    assert found["problem"] == "1 of 2 checks failed" and len(found["said"]) == 2
    assert "problem" not in gpu_logs.read_smoke("ok     cuda x: 1\n1 checks, 0 failed\n")


def test_tests_are_counted_even_if_pytest_was_stopped():
    found = read_tests(LOG)
    assert found["counts"] == {"FAILED": 1, "PASSED": 2, "SKIPPED": 1}
    assert found["failures"] == ["FAILED tests/test_a.py::test_two - AssertionError: 3 PASSED"]
    assert found["skipped_because"] == ["SKIPPED [1] tests/test_b.py:7: needs trl"]
    assert read_tests(LOG[:150])["counts"] == {"FAILED": 1, "PASSED": 1}
    alone = "tests/test_a.py::test_one PASSED   [ 50%]\ntests/test_a.py::test_two FAILED [100%]\n"
    assert read_tests(alone)["counts"] == {"FAILED": 1, "PASSED": 1}
    assert read_tests("ModuleNotFoundError: No module named 'pytest'")["problem"]


def test_a_real_pytest_log_is_understood(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    tests = "def test_good(): pass\n\ndef test_bad(): assert 0\n"
    (tmp_path / "tests/test_small.py").write_text(tests)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q\n")  # as in this repository
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_tests.os, "cpu_count", lambda: 1)
    made = stage("tests", read=read_tests)._replace(command=gpu_tests.command("tests"))
    (result,) = gpu.run_all([made], tmp_path / "out", 60)
    assert result["note"] == "exit code 1"
    assert result["counts"] == {"FAILED": 1, "PASSED": 1}
    assert result["failures"][0].startswith("FAILED tests/test_small.py::test_bad")


def test_a_build_without_the_compiled_part_is_a_problem():
    assert read_build("building 'em_kernels._C' extension\n") == {}
    warning = "em_kernels: WARNING: installing without the compiled CPU kernels: no compiler"
    assert read_build(f"running build_ext\n{warning}\n")["problem"].endswith("no compiler")

    other = warning.replace("compiled CPU", "CUDA").replace("compiler", "nvcc")
    assert read_build(f"{warning}\n{other}\n")["problem"].count("installing without") == 2


CASES = """\
ok     stats-bfloat16-plain: error 1.2e-07
FAILED loss-float32-cluster: error 0.3, at most 1e-5
"""
REFUSED = "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Sorry."


def test_cases_are_counted_and_must_come_to_an_end():
    good = CASES.splitlines()[0]
    assert read_cases(f"{good}\n1 cases, 0 failed\n") == {"cases": 1, "failed_cases": []}
    assert read_cases(f"{good}\n")["problem"] == "the cases did not come to an end"
    found = read_cases(f"{CASES}2 cases, 1 failed\n")
    assert found["problem"] == "1 of 2 cases failed"
    assert found["failed_cases"] == ["loss-float32-cluster: error 0.3, at most 1e-5"]


def test_a_sanitizer_must_have_run_the_cases_and_found_nothing():
    good = CASES.splitlines()[0] + "\n1 cases, 0 failed\n"
    clean = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert read_sanitizer(good + clean)["summary"].startswith("0 hazards")
    assert read_sanitizer(clean)["problem"] == "the cases did not come to an end"
    assert read_sanitizer(good)["problem"] == "compute-sanitizer gave no summary"
    assert read_sanitizer(f"{good}========= ERROR SUMMARY: 2 errors\n")["problem"] == "2 errors"
    hazard = clean.replace("0 hazards displayed (0", "1 hazard displayed (1")
    assert read_sanitizer(good + hazard)["problem"].startswith("1 hazard ")


def test_rows_are_read_up_to_where_the_stage_was_stopped():
    text = f"| a | table |\n{json.dumps(row())}\n{json.dumps(row(n=9))[:-20]}"
    assert read_rows(text)["rows"] == [row()]
    text = f"{json.dumps(row())}\nverl is left out: No module named 'verl'\n"
    assert read_rows(text)["left_out"] == {"verl": "No module named 'verl'"}
    assert read_rows("Traceback")["problem"] == "nothing was measured"


def test_of_the_rows_of_one_implementation_the_last_counts():
    early, late = row(samples=1, seconds=0.02), row(samples=9)
    text = "\n".join(map(json.dumps, [early, row(implementation="TRL", samples=1), late]))
    assert read_rows(text)["rows"] == [late, row(implementation="TRL", samples=1)]


def test_a_floor_alone_is_no_measurement_and_a_wrong_result_is_said():
    floor = row(implementation="copy of the logits", error=None)
    assert read_rows(json.dumps(floor))["problem"] == "nothing was measured"
    wrong = row(implementation="em_kernels cuda", seconds=None, failure="wrong")
    text = "\n".join(map(json.dumps, [floor, wrong]))
    assert read_rows(text)["problem"] == "em_kernels cuda: wrong"
    peer = row(implementation="Liger", seconds=None, failure="out of memory")
    assert "problem" not in read_rows("\n".join(map(json.dumps, [row(), peer])))


# Benchmarks that fail on a GPU


def test_what_runs_out_of_memory_or_fails_gets_a_row_and_the_rest_is_timed():
    x = torch.randn(4, 50)

    def too_big():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    def broken():
        raise NotImplementedError("not | on\nthis GPU")

    right = {"sum": x.sum(-1)}
    case = Case(
        name="sum",
        sizes=Sizes(4, 50, 0),
        dtype=torch.float32,
        device="cpu",
        contenders={"TRL": too_big, "Liger": broken, "eager": lambda: right},
        floor=("copy", x.clone),
        truth={"sum": (torch.arange(4), x.double().sum(-1))},
        left_out={},
        bytes_moved=x.numel() * 4,
    )
    rows = measure(case, repeats=3)
    by_name = {found["implementation"]: found for found in rows}
    assert by_name["TRL"]["failure"] == "out of memory"
    assert by_name["Liger"]["failure"] == "NotImplementedError: not / on this GPU"
    assert by_name["eager"]["seconds"] > 0 and by_name["eager"]["failure"] is None
    assert "| TRL | out of memory |" in table(rows)


def test_implementations_are_picked_by_name():
    arguments = ["token_loss", "--quick", "--n", "4", "--v", "50", "--dtype", "float32"]
    names = {found["implementation"] for found in bench([*arguments, "--only", "em_kernels"])}
    assert names == {"copy of the logits", "em_kernels", "em_kernels inplace, with a copy"}


def test_every_gpu_backend_that_is_there_has_a_row(monkeypatch):
    there = {"reference": "available", "cpu": "available", "triton": "available", "cuda": "no"}
    monkeypatch.setattr(common, "backends", lambda: there)
    assert common.our_impls("cpu") == {"em_kernels": "auto"}
    assert common.our_impls("cuda") == {"em_kernels triton": "triton"}
    there["cuda"] = "available"
    names = {"em_kernels triton": "triton", "em_kernels cuda": "cuda"}
    assert common.our_impls("cuda") == names
    there.update(triton="no", cuda="no")
    assert common.our_impls("cuda") == {"em_kernels": "auto"}


def test_the_environment_stage_reports_this_machine(tmp_path):
    """The stage itself; it fails where there is no GPU, and tells of the machine all the same."""
    (made,) = (s for s in gpu.STAGES if s.name == "environment")
    (result,) = gpu.run_all([made], tmp_path, 60)
    assert result["machine"]["packages"]["torch"]
    assert result["machine"]["python"] in markdown([result], "2026-01-01")
    assert (result["status"] == "passed") == ("gpu" in result["machine"]), result["note"]
