"""How the Triton kernels are launched, and what they compile to for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend needs triton")
import triton
import triton_offline
from triton_rows import DEVICE, DTYPES, NAMES, grad, plan_small_steps, stats, upstream

from em_kernels import triton as backend
from em_kernels._spec import OUTPUTS, RowSpec, Saved, Upstream
from em_kernels.triton import kernels, launch


@pytest.fixture
def small_plan(monkeypatch):
    monkeypatch.setattr(launch, "plan", plan_small_steps)


def test_no_rows():
    logits = torch.empty(1, 0, 5, device=DEVICE)
    spec = RowSpec(valid_vocab=5)
    assert [tuple(r.shape) for r in backend.stats(logits, spec, ("entropy",))] == [(0,)] * 4
    backend.grad(logits, spec, Saved(*[logits.new_empty(0)] * 3), Upstream(), logits)


def test_rows_beyond_two_to_the_31_elements(small_plan):
    """Row 1 starts 2^31 elements in; memory that is not touched is not used."""
    try:
        storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError:
        pytest.skip("needs 4.3 GB of address space")
    logits = storage.as_strided((2, 1, 128), (2**31, 128, 1))
    logits.copy_(torch.randn(2, 1, 128))
    spec = RowSpec(target=torch.tensor([3, 4], device=DEVICE), valid_vocab=128)
    want, up = stats(logits.clone(), spec), upstream(logits)
    got = dict(zip(NAMES, backend.stats(logits, spec, OUTPUTS)))
    assert all(torch.equal(got[name], want[name]) for name in NAMES)
    dense = grad(logits.clone(), spec, up)
    assert torch.equal(grad(logits, spec, up, out=logits), dense)


class Recorder:
    """Stands in for a kernel and keeps what it would be launched with."""

    def __getitem__(self, grid):
        self.grid = grid
        return lambda *args, **kwargs: setattr(self, "arguments", kwargs)


def test_launch_of_many_rows(monkeypatch):
    """One program per row of a grid in x, whose limit is 2^31 - 1."""
    recorder = Recorder()
    monkeypatch.setattr(kernels, "statistics", recorder)
    logits = torch.empty(1, 1, 1).expand(1, 200_000, 4)
    backend.stats(logits, RowSpec(valid_vocab=4), ())
    assert recorder.grid == (200_000,)


def test_views():
    """One stride where one will do, so that no kernel is compiled for a number of rows."""
    x = torch.empty(4, 5, 8)
    many = 2**31 - 1
    assert launch.View.of(x) == (many, 0, 8)
    assert launch.View.of(x[:1]) == (many, 0, 8)
    assert launch.View.of(x[:, :1]) == (many, 0, 40)
    assert launch.View.of(x[:, :-1]) == (4, 40, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plan(dtype):
    for vocab in (1, 2, 31, 33, 1000, 32000, 50257, 128256, 151936, 262144):
        for capped in (False, True):
            block, slices, num_warps = launch.plan(vocab, dtype, capped)
            assert block & (block - 1) == 0 and num_warps & (num_warps - 1) == 0
            assert block * dtype.itemsize == num_warps * 32 * 16
            assert 1 <= num_warps <= 8 and slices in (2, 4)
            assert num_warps == 1 or block < 2 * vocab


@pytest.fixture(scope="module")
def offline_report():
    """Compiled in a process of its own: here `triton.jit` may have made interpreted functions."""
    if not triton_offline.CUOBJDUMP.exists():
        pytest.skip(f"this triton has no cuobjdump at {triton_offline.CUOBJDUMP}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    command = [sys.executable, triton_offline.__file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("arch", [f"sm_{arch}" for arch in triton_offline.ARCHITECTURES])
def test_compiled_kernels(offline_report, arch):
    """No spills anywhere, no more registers than on record, no slow instruction in a loop."""
    record = json.loads(triton_offline.TABLE.read_text())
    table = record["registers, stack bytes"][arch]
    assert offline_report[arch].keys() == table.keys()
    for name, found in offline_report[arch].items():
        assert found["stack"] == 0, f"{name} spills {found['stack']} bytes"
        assert found["wide_loads"], f"{name} has no 16-byte loads"
        assert found["loop_exponentials"] > 0 or name == "scale" or "float64" in name
        assert not found["slow_in_loops"], f"{name}: {found['slow_in_loops']}"
        limit = table[name][0] if triton.__version__ == record["triton"] else 128
        assert found["registers"] <= limit, f"{name}: if meant, run triton_offline.py --write"


@pytest.mark.parametrize("arch", [f"sm_{arch}" for arch in triton_offline.ARCHITECTURES])
def test_only_narrowing_kernels_wait_between_loads_and_stores(offline_report, arch):
    for name, found in offline_report[arch].items():
        if name.startswith(("grad", "loss")):
            writes = "LBS" if "narrow" in name else "LS"
            assert found["accesses"][-3:] == [writes, writes, "S"], name
