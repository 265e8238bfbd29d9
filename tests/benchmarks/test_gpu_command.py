"""The one GPU command, with stages made up for the test; none of it needs a GPU."""

import json
import os
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_stages import LOG, REFUSED, in_shell, row, saved, stage

from benchmarks import gpu, gpu_logs, gpu_report, gpu_smoke, gpu_tests, gpu_truth
from benchmarks.__main__ import main as bench
from benchmarks.gpu_logs import (
    read_rows,
    read_sanitizer,
)
from benchmarks.gpu_report import markdown

pytest_plugins = ("gpu_stages",)  # its fixtures `stages` and `time_is_over`


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
    assert re.search(r"\| second \| failed \| \d+ s \| exit code 3 \|", markdown)
    assert "| em_kernels | 10.00 |" in markdown and "| eager | 50.00 |" in markdown
    assert "second | failed" in capsys.readouterr().out


def test_all_stages_passed_is_exit_code_0(stages, tmp_path):
    stages(stage("one"), stage("two"))
    assert gpu.main(["--out", str(tmp_path)]) == 0
    assert gpu.main(["--out", str(tmp_path), "--only", "two"]) == 0
    assert [result["stage"] for result in saved(tmp_path)] == ["one", "two"]


def test_the_deadline_stops_and_skips_and_says_so(stages, tmp_path, time_is_over):
    script = f"echo began; touch '{time_is_over}'; exec sleep 600"
    stages(stage("quick"), in_shell(stage("endless", seconds=600), script), stage("late"))
    assert gpu.main(["--out", str(tmp_path), "--seconds", "9"]) == 1
    quick, endless, late = saved(tmp_path)
    assert (quick["status"], quick["seconds"]) == ("passed", 1.0)
    assert (endless["status"], endless["seconds"]) == ("failed", 8.0)
    assert endless["note"] == "stopped after 8 s; had 8 of its 600 s"
    assert "began" in (tmp_path / "endless.log").read_text()
    assert (late["status"], late["note"]) == ("skipped", "no time was left")


def test_a_stage_is_stopped_at_its_own_limit_with_all_it_started(stages, tmp_path, time_is_over):
    held = tmp_path / "held"  # by the child as long as it lives
    os.mkfifo(held)
    reader = os.open(held, os.O_RDONLY | os.O_NONBLOCK)
    child = f"(touch '{time_is_over}'; exec sleep 600) > '{held}'"
    script = f"echo '{json.dumps(row())}'; {child} & exec sleep 600"
    stages(in_shell(stage("bench", seconds=7, read=read_rows), script), stage("next"))
    gpu.main(["--out", str(tmp_path)])
    stopped, after = saved(tmp_path)
    assert (stopped["status"], stopped["note"]) == ("failed", "stopped after 7 s")
    assert stopped["rows"] == [row()] and after["status"] == "passed"
    assert select.select([reader], [], [], 120)[0], "the child lives"
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_the_report_is_written_after_every_stage(tmp_path):
    seen = []
    look = stage(
        "look",
        f"import os; print(os.listdir({str(tmp_path)!r}))",
        read=lambda text: seen.append(text) or {},
    )
    gpu.run_all([stage("before"), look], tmp_path, 600)
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
    gpu.run_all(made, tmp_path, 600)
    assert [text.strip() for text in texts] == ["one", "two"]
    assert (tmp_path / "shared.log").read_text().split() == ["one", "two"]


def test_a_log_that_cannot_be_read_fails_its_stage_only(tmp_path):
    broken = stage("broken", "print('no json')", read=gpu_logs.read_environment)
    first, second = gpu.run_all([broken, stage("next")], tmp_path, 600)
    assert first["status"] == "failed" and "its log cannot be read" in first["note"]
    assert second["status"] == "passed"


def test_a_program_that_is_not_installed_fails_its_stage_only(tmp_path):
    missing = stage("sanitizer")._replace(command=["no-such-sanitizer", "python"])
    first, second = gpu.run_all([missing, stage("next")], tmp_path, 600)
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
    gpu.run_all([stage("long", "print('x' * 5000); print('the end')")], tmp_path, 600)
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
