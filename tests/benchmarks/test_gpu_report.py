"""The report of the GPU command: what its calls leave in it, its goals, and the docs' table."""

import json
import os
import time

import pytest
from gpu_stages import row, saved, stage

from benchmarks import gpu, gpu_logs, gpu_report
from benchmarks.gpu_logs import read_rows
from benchmarks.gpu_report import gpu_table, markdown, measured


@pytest.fixture
def stages(monkeypatch):
    """Replace the stages of the command."""
    return lambda *made: monkeypatch.setattr(gpu, "STAGES", made)


def facts(name="NVIDIA H200", power="700.00 W"):
    query = f"name, ...\n{name}, 580.159.04, 143771 MiB, {power}, 1980 MHz, 3201 MHz"
    packages, tools = {"torch": "2.11.0"}, {"nvidia-smi": query}
    gpu_facts = {"name": name, "capability": "9.0", "memory_bytes": 1 << 37}
    made = {"python": "3.12", "cuda": "13.0", "packages": packages, "tools": tools}
    return json.dumps({**made, "gpu": gpu_facts})


def on(*made, **device):
    """The stages on such a device."""
    code = f"print({facts(**device)!r})"
    return stage("environment", code, read=gpu_logs.read_environment), *made


def test_the_calls_of_a_day_share_a_report(stages, tmp_path, monkeypatch):
    """A stage's own last result, with its time and its device, in the order of the command."""
    times = iter(f"2026-02-03 10:{minute:02}:00" for minute in range(60))
    real = time.strftime

    def strftime(form, *at):
        if form == gpu.TIME and not at:
            return next(times)
        return real(form, *at) if at or form == gpu.TIME else "2026-02-03"

    monkeypatch.setattr(time, "strftime", strftime)
    slow, fast = row(seconds=0.02), row(seconds=0.01)
    other = row(implementation="TRL", seconds=0.03)

    def call(only, seconds, power):
        bench = stage("bench", f"print({json.dumps(seconds)!r})", read=read_rows)
        peers = stage("peers", f"print({json.dumps(other)!r})", read=read_rows)
        stages(*on(bench, peers, stage("tests"), power=power))
        gpu.main(["--out", str(tmp_path), "--only", *only])
        return {result["stage"]: result for result in saved(tmp_path)}

    first = call(["environment", "tests", "bench"], slow, "700.00 W")
    second = call(["environment", "peers"], fast, "650.00 W")
    assert [*second] == ["environment", "bench", "peers", "tests"]
    assert second["bench"] == first["bench"] and second["tests"] == first["tests"]
    third = call(["environment", "bench"], fast, "650.00 W")
    assert third["bench"]["rows"] == [fast] and third["peers"]["rows"] == [other]
    assert third["tests"] == first["tests"] and third["bench"]["when"] > third["peers"]["when"]
    said = next(tmp_path.glob("*.md")).read_text()
    assert "- On NVIDIA H200, driver 580.159.04, 700.00 W, torch 2.11.0: tests." in said
    at_650 = (
        "- On NVIDIA H200, driver 580.159.04, 650.00 W, torch 2.11.0: environment, bench, peers."
    )
    assert at_650 in said and f"| {third['peers']['when']} |" in said
    assert (
        "| em_kernels | 10.00 |" in said and "| TRL | 30.00 |" in said and "| 20.00 |" not in said
    )
    assert sorted(path.suffix for path in tmp_path.glob("gpu-*")) == [".json", ".md"]


def test_a_stage_that_was_not_begun_replaces_none_that_was(stages, tmp_path, monkeypatch):
    stages(stage("one"), stage("two", "raise SystemExit(2)"), stage("three"))
    gpu.main(["--out", str(tmp_path), "--only", "one", "two"])
    before = saved(tmp_path)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 1e9)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert saved(tmp_path)[:2] == before and saved(tmp_path)[2]["note"] == "no time was left"
    monkeypatch.undo()
    stages(stage("one", "raise SystemExit(3)"), stage("two"), stage("three"))
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert [result["status"] for result in saved(tmp_path)] == ["failed", "passed", "passed"]
    assert gpu.main(["--out", str(tmp_path), "--only", "two"]) == 0  # of this call alone


def test_another_gpu_or_a_file_that_cannot_be_read_costs_no_report(stages, tmp_path, capsys):
    stages(*on(stage("one")))
    gpu.main(["--out", str(tmp_path)])
    stages(*on(stage("two"), name="NVIDIA H100"))
    gpu.main(["--out", str(tmp_path)])
    found = {path.name[:15]: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    names = {k: [s["stage"] for s in v["stages"]] for k, v in found.items()}
    h200, h100 = ["environment", "one"], ["environment", "two"]
    assert names == {"gpu-nvidia-h200": h200, "gpu-nvidia-h100": h100}
    for path in tmp_path.glob("gpu-nvidia-h100*.json"):
        path.write_text('{"stages": [')
    capsys.readouterr()
    gpu.main(["--out", str(tmp_path), "--only", "environment"])
    assert "is written anew, it cannot be read" in capsys.readouterr().out
    path = next(tmp_path.glob("gpu-nvidia-h100*.json"))
    assert [s["stage"] for s in json.loads(path.read_text())["stages"]] == ["environment"]


def test_the_logs_of_a_day_are_kept_and_those_of_another_begun_anew(stages, tmp_path):
    stages(stage("one", log="all.log"), stage("two", "print('more')", log="all.log"))
    gpu.main(["--out", str(tmp_path), "--only", "one"])
    gpu.main(["--out", str(tmp_path), "--only", "two"])
    lines = (tmp_path / "all.log").read_text().split("\n")
    assert [line for line in lines if line][::2] == ["done", "more"]
    assert lines[2].startswith("--- a call of 2")
    two_days = time.time() - 2 * 86400
    os.utime(tmp_path / "all.log", (two_days, two_days))
    gpu.main(["--out", str(tmp_path), "--only", "two"])
    assert (tmp_path / "all.log").read_text() == "more\n"


# Goals


def test_goals_are_measured_on_their_own_rows():
    rows = [row(), row(implementation="TRL", seconds=0.02), row(implementation="eager", seconds=9)]
    assert measured(rows[0], gpu_report.COPY, rows) == 0.93
    assert measured(rows[0], gpu_report.PEERS, rows) == 2.0
    assert measured(rows[0], gpu_report.PEERS, [*rows[:1], row(n=9, implementation="TRL")]) is None
    assert measured(rows[0], gpu_report.MEMORY, rows) is None
    assert measured(row(n=32768), gpu_report.MEMORY, rows) == 1.0
    assert measured(row(seconds=None), gpu_report.COPY, rows) is None
    goals = gpu_report.goals_table(rows)
    assert "| softmax_stats forward: >= 0.9 of copy bandwidth | auto | 0.930 |" in goals
    assert goals.count("| met |") == 1 and "| missed |" not in goals
    assert "| missed |" in gpu_report.goals_table([row(of_copy_bandwidth=0.4)])
    assert "linear_softmax_stats backward: <= 1.15 x the bare products | - | not measured" in goals


def test_goals_tell_the_backends_apart_and_leave_no_failure_out():
    rows = [
        row(implementation="em_kernels triton", of_copy_bandwidth=0.95),
        row(implementation="em_kernels cuda", of_copy_bandwidth=0.85),
        row(implementation="em_kernels cuda inplace, with a copy"),
    ]
    goals = gpu_report.goals_table(rows)
    assert "| triton | 0.950 | bfloat16, N=8 V=50 | met |" in goals
    assert "| cuda | 0.850 | bfloat16, N=8 V=50 | missed |" in goals
    assert goals.count("N=8") == 2
    wrong = row(implementation="em_kernels cuda", seconds=None, failure="wrong")
    assert "| cuda | wrong | bfloat16, N=8 V=50 | missed |" in gpu_report.goals_table([wrong])


def test_what_peers_have_published_is_beside_what_was_measured():
    at = dict(n=8192, v=151936, d=0)
    rows = [
        row(**at, implementation="em_kernels triton", seconds=0.00061),
        row(**at, implementation="TRL", seconds=0.0011),
        row(**at, implementation="em_kernels cuda", seconds=None, failure="wrong"),
    ]
    said = markdown(
        [{"stage": "b", "status": "passed", "seconds": 1, "note": "", "rows": rows}], ""
    )
    assert "## Published by the peers, on an H100" in said
    first = "| softmax_stats forward, N=8192 V=151936 | TRL | 0.89 | 1.10 | 0.61 | - |"
    assert first in said.splitlines()
    assert "| Liger | 50.2 | - | - | - |" in said


# The table of the docs


def test_without_a_measurement_the_table_says_so(tmp_path):
    assert gpu_table(tmp_path) == gpu_report.NOT_MEASURED
    (tmp_path / "gpu-none.json").write_text('{"date": "2026-01-01", "stages": []}')
    assert gpu_table(tmp_path) == gpu_report.NOT_MEASURED


def write_result(folder, date, *rows, name="NVIDIA H200"):
    environment = {"stage": "environment", "status": "passed", "machine": {"gpu": {"name": name}}}
    memcheck = {"stage": "memcheck", "status": "unavailable"}
    stages = [environment, memcheck, {"stage": "bench", "status": "passed", "rows": [*rows]}]
    path = folder / f"gpu-nvidia-h200-{date}.json"
    path.write_text(json.dumps({"date": date, "stages": stages}))


def test_the_table_shows_the_newest_measurement_and_its_goals(tmp_path):
    write_result(tmp_path, "2026-01-01", row(of_copy_bandwidth=0.5))
    triton = row(implementation="em_kernels triton", seconds=0.002, times_floor=0.51)
    triton |= dict(of_copy_bandwidth=0.912)
    cuda = {**triton, "implementation": "em_kernels cuda", "of_copy_bandwidth": 0.85}
    failed = {**cuda, "op": "softmax_stats backward", "seconds": None, "failure": "wrong"}
    peers = row(implementation="TRL", seconds=0.022), row(implementation="eager", seconds=0.0145)
    write_result(tmp_path, "2026-02-01", triton, cuda, failed, *peers)
    lines = gpu_table(tmp_path).splitlines()
    assert lines[0].startswith("Measured on NVIDIA H200, 2026-02-01, bfloat16;")
    assert "`benchmarks/results/gpu-nvidia-h200-2026-02-01.md`" in lines[0]
    assert "did not pass: memcheck (unavailable)." in lines[0]
    at = "softmax_stats forward, N=8 V=50"
    assert f"| {at} | triton | 2.00 | 91% | 0.51 | 11.00 | - | 7.25 |" in lines
    assert "| softmax_stats backward, N=8 V=50 | cuda | wrong | - | - | - | - | - |" in lines
    goal = "softmax_stats forward: >= 0.9 of copy bandwidth"
    assert f"| {goal} | triton | 0.912 | bfloat16, N=8 V=50 | met |" in lines
    assert f"| {goal} | cuda | 0.850 | bfloat16, N=8 V=50 | missed |" in lines
    assert not any("0.5" in line and "auto" in line for line in lines)
