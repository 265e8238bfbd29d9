"""The benchmarks run, save what they measured, and refuse to time what is wrong."""

import json

import pytest
import torch

from benchmarks.__main__ import OPERATORS, main
from benchmarks.common import HEADER, Case, Sizes, measure, peak_memory, table, time_once

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


def test_time_is_in_seconds():
    waited = []
    assert time_once(lambda: waited.append(torch.randn(10**6).sort()), "cpu") < 5
    assert len(waited) == 1


def test_unknown_operator_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["softmax_stat"])
    assert "got softmax_stat" in capsys.readouterr().err
