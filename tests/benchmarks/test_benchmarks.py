"""The benchmarks run, save what they measured, and refuse to time what is wrong."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import common, token_loss
from benchmarks.__main__ import OPERATORS, main
from benchmarks.common import LEAST_REPEATS, Case, Sizes, measure, peak_memory, time_once
from benchmarks.gpu_logs import read_rows
from benchmarks.report import HEADER, newest, table

ROOT = Path(__file__).parents[2]

QUICK = ["--quick", "--n", "12", "--v", "501", "--d", "16"]


def make_case(**contenders):
    x = torch.randn(4, 50)
    return Case(
        name="sum",
        sizes=Sizes(4, 50, 0),
        dtype=torch.float32,
        device="cpu",
        contenders=contenders or {"eager": lambda: {"sum": x.sum(-1)}},
        floor=("copy", x.clone),
        truth={"sum": (torch.arange(4), x.double().sum(-1))},
        left_out={},
        bytes_moved=x.numel() * 4,
    )


@pytest.mark.parametrize("operator", OPERATORS)
def test_quick_run_measures_every_implementation(operator, tmp_path, capsys):
    rows = main([operator, *QUICK, "--dtype", "float32", "bfloat16", "--out", str(tmp_path)])
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert {"em_kernels", "eager"} <= {row["implementation"] for row in rows}
    for row in rows:
        assert row["seconds"] > 0 and row["times_floor"] > 0, row
        assert (row["error"] is None) == (row["times_floor"] == 1), row
    saved = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert saved["rows"] == rows and saved["torch"] == torch.__version__
    markdown = next(tmp_path.glob("*.md")).read_text()
    assert markdown.count("| em_kernels |") == len({(r["op"], r["dtype"]) for r in rows})
    assert "torch.compile is left out: --quick" in capsys.readouterr().out


@pytest.mark.parametrize("fault", (1.002, float("nan")))
def test_what_is_wrong_is_not_timed(fault):
    calls = []
    case = make_case()
    right = case.contenders["eager"]

    def wrong():
        calls.append(1)
        return {"sum": right()["sum"] * fault}

    rows = measure(case._replace(contenders={"eager": right, "wrong one": wrong}), repeats=3)
    by_name = {row["implementation"]: row for row in rows}
    assert len(calls) == 1
    assert by_name["wrong one"]["seconds"] is None
    assert by_name["wrong one"]["error"] > 1e-3
    assert by_name["eager"]["seconds"] > 0 and by_name["eager"]["faster_than"] == {"eager": 1.0}
    lines = table(rows).splitlines()
    assert "| wrong |" in lines[-1] and lines[-1].count("|") == len(HEADER) + 1


def test_peak_memory_sees_what_is_freed_again():
    def allocate():
        torch.ones(30_000_000)

    peak = peak_memory(allocate, "cpu")
    if peak is None:
        pytest.skip("no resettable peak in /proc/self/status here")
    assert 110e6 < peak < 180e6


@pytest.fixture
def passes(monkeypatch):
    """Lets seconds pass: no others do."""
    now = [0.0]
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return lambda seconds: now.append(now.pop() + seconds)


def test_time_is_in_seconds(passes):
    calls = []
    assert time_once(lambda: calls.append(passes(2.5)), "cpu") == 2.5
    assert len(calls) == 1


def test_a_slow_run_is_spared_the_later_rounds(passes):
    case = make_case()
    right = case.contenders["eager"]
    runs = {"slow": lambda: passes(2.0) or right(), "quick": lambda: passes(0.25) or right()}
    case = case._replace(contenders=runs, floor=("copy", lambda: passes(0.5)))
    rows = measure(case, repeats=9)
    found = [(row["implementation"], row["seconds"], row["samples"]) for row in rows]
    assert found == [("copy", 0.5, 9), ("slow", 2.0, LEAST_REPEATS), ("quick", 0.25, 9)]


def test_unknown_operator_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["softmax_stat"])
    assert "got softmax_stat" in capsys.readouterr().err


# Rows are there when they are measured


def test_a_row_is_saved_before_the_next_implementation_runs(tmp_path):
    case, seen, before = make_case(), [], []
    right = case.contenders["eager"]

    def second():
        before.append([(row["implementation"], row["samples"], row["error"]) for row in seen])
        return right()

    rows = measure(
        case._replace(contenders={"first": right, "second": second}), 3, found=seen.append
    )
    (floor, first), *_ = before
    assert floor == ("copy", 1, None) and first[:2] == ("first", 1) and first[2] < 1e-6
    assert [row["samples"] for row in rows] == [3, 3, 3]
    assert newest(seen) == rows and len(seen) == 6


def test_what_fails_in_a_later_round_fails_alone(monkeypatch):
    monkeypatch.setattr(common, "SECONDS", math.inf)  # all rounds, however long they take
    case, calls = make_case(), []
    right = case.contenders["eager"]

    def tires():
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("launch failed")
        return right()

    rows = measure(case._replace(contenders={"tires": tires, "steady": right}), repeats=5)
    by_name = {row["implementation"]: row for row in rows}
    assert by_name["tires"]["failure"] == "RuntimeError: launch failed"
    assert by_name["tires"]["seconds"] is None
    assert by_name["steady"]["samples"] == 5 and by_name["steady"]["failure"] is None


@pytest.mark.parametrize("call", (1, 2, 4))
def test_what_costs_the_device_keeps_the_rows_before_it(call, monkeypatch):
    """A sticky error: whatever runs after it raises the same."""
    case, calls, ran = make_case(), [], []
    right = case.contenders["eager"]

    def breaks():
        calls.append(1)
        if len(calls) == call:
            monkeypatch.setattr(common, "is_lost", lambda device: True)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return right()

    def after():
        ran.append(1)
        return right()

    runs = {"first": right, "breaks": breaks, "after": after}
    rows = measure(case._replace(contenders=runs), repeats=5)
    by_name = {row["implementation"]: row for row in rows}
    assert by_name["first"]["seconds"] > 0 and by_name["first"]["failure"] is None
    assert "illegal memory access" in by_name["breaks"]["failure"]
    if call == 4:  # in a later round: what was timed until then stands
        assert by_name["after"]["seconds"] > 0 and by_name["after"]["samples"] == 2
    else:
        assert not ran and by_name["after"]["failure"] == "not run: breaks cost the device"
    table(rows)


def test_a_floor_that_fails_leaves_times():
    def broken():
        raise torch.OutOfMemoryError("CUDA out of memory")

    rows = measure(make_case()._replace(floor=("copy", broken)), repeats=2)
    assert rows[0]["failure"] == "out of memory" and rows[1]["seconds"] > 0
    assert rows[1]["times_floor"] is None and rows[1]["of_copy_bandwidth"] is None
    assert "| out of memory |" in table(rows)


DIES = """
import os, signal, sys
import benchmarks.token_loss as operator
from benchmarks.__main__ import main

make = operator.our_steps

def dying(logits, device):
    steps = make(logits, device)
    steps["em_kernels inplace, with a copy"] = lambda: os.kill(os.getpid(), signal.SIGKILL)
    return steps

operator.our_steps, operator.peers = dying, lambda **options: ({}, {})
small = ["token_loss", "--quick", "--n", "4", "--v", "50", "--dtype", "float32", "--rows"]
main(small + sys.argv[1:])
"""


def test_a_process_that_is_killed_has_printed_and_saved_what_it_measured(tmp_path):
    command = [sys.executable, "-c", DIES, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL, done.stderr
    printed = read_rows(done.stdout)["rows"]
    assert [row["implementation"] for row in printed] == ["copy of the logits", "em_kernels"]
    assert printed[1]["seconds"] > 0 and printed[1]["error"] < 1e-3
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["rows"] == printed


def test_what_was_asked_for_and_is_nowhere_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(token_loss, "peers", lambda **options: ({}, {"TRL": "is not installed"}))
    small = ["token_loss", "--quick", "--n", "4", "--v", "50", "--dtype", "float32"]
    main([*small, "--out", str(tmp_path), "--only", "em_kernels triton", "eagr"])
    said = capsys.readouterr().out
    assert "em_kernels triton is left out: " in said and "eagr is left out: no table has it" in said
    assert "TRL is left out" not in said
    assert read_rows(said)["left_out"].keys() == {"em_kernels triton", "eagr"}
