"""Where a GPU is, every file of tests is collected, and GPU backends are given tensors of the GPU.

Proved without one: tests/pretended_gpu.py says how.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def pretend(*files, cwd=TESTS.parent):
    """(what pytest said, the faults it found)"""
    command = [sys.executable, "-m", "pytest", "-p", "pretended_gpu", "--assert=plain"]
    command += ["-q", "-p", "no:cacheprovider", "-p", "no:randomly", *map(str, files)]
    variables = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CI")}
    path = [str(TESTS.parent), str(TESTS), *filter(None, [variables.get("PYTHONPATH")])]
    variables["PYTHONPATH"] = os.pathsep.join(path)
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)
    assert done.returncode in (0, 5), done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout, re.findall(r"^FAULT (.*)$", done.stdout, re.M)


def test_with_a_gpu_every_file_is_collected_and_none_gives_it_a_tensor_of_the_cpu():
    said, faults = pretend("tests")
    assert not faults, faults
    files = len([*TESTS.rglob("test_*.py")])
    assert f"\n{files} files were looked at\n" in said
    (served,) = re.findall(r"^(\d+) tests gave tensors to a GPU backend$", said, re.M)
    assert int(served) > 100


FAULTY = """
import pytest
import torch
from em_kernels import entropy_loss, softmax_stats

both = pytest.mark.parametrize("impl", ("cuda", "triton", "reference"))

@both
def test_right(impl, device):
    x = torch.randn(4, 50, device=device)
    y = x[1:].to("cuda") if impl == "cuda" else x[1:]
    assert softmax_stats(y, impl=impl).entropy.sum().item() == 3

@both
def test_on_the_cpu(impl):
    assert entropy_loss(torch.randn(4, 50), impl=impl) > 0

@both
def test_after_a_comparison(impl, device):
    x = torch.randn(4, 50, device=device)
    assert torch.equal(x, x) and x.max().item() > 100
    softmax_stats(torch.randn(4, 50), torch.zeros(4).long(), impl=impl)

@both
def test_of_two_devices(impl, device):
    x = torch.randn(4, 50, device=device)
    assert softmax_stats(x, impl=impl).entropy + torch.ones(4) is None

@both
def test_of_an_upstream(impl, device):
    x = torch.randn(4, 50, device=device).requires_grad_()
    torch.autograd.grad(softmax_stats(x, impl=impl).entropy, x, torch.ones(4))
"""


def test_the_pretence_finds_what_it_looks_for(tmp_path):
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "test_faulty.py").write_text(FAULTY)
    said, faults = pretend("test_faulty.py", cwd=tmp_path)
    found = {
        (name, impl) for name, impl in re.findall(r"::test_(\w+)\[(\w+)\]:", "\n".join(faults))
    }
    names = ("on_the_cpu", "after_a_comparison", "of_two_devices", "of_an_upstream")
    assert found == {(name, impl) for name in names for impl in ("cuda", "triton")}, said


def test_a_file_that_cannot_be_collected_is_an_error(tmp_path):
    (tmp_path / "test_broken.py").write_text(
        "import torch\nx = 1 / (not torch.cuda.is_available())"
    )
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        pretend("test_broken.py", cwd=tmp_path)
