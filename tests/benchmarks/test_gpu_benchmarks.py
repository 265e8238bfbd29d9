"""Benchmarks that fail on a GPU, and which implementations there are."""

import torch

from benchmarks import common, gpu
from benchmarks.__main__ import main as bench
from benchmarks.common import Case, Sizes, measure
from benchmarks.gpu_report import markdown
from benchmarks.report import table


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
    (result,) = gpu.run_all([made], tmp_path, 600)
    assert result["machine"]["packages"]["torch"]
    assert result["machine"]["python"] in markdown([result], "2026-01-01")
    assert (result["status"] == "passed") == ("gpu" in result["machine"]), result["note"]
