"""Without triton and without the compiled part everything still works, and says what is missing."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import cuda_build
from em_kernels import backends

ROOT = Path(__file__).parents[2]

BLOCK = """
import sys
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec

def find_others(name, path=None, target=None):
    blocked = name.partition(".")[0] in {blocked} or name in {blocked}
    return None if blocked else find_spec(name, path, target)

PathFinder.find_spec = staticmethod(find_others)
"""

EVERYTHING = """
import torch
import em_kernels
from em_kernels import linear_entropy_loss, linear_softmax_stats, softmax_stats, token_loss

torch.manual_seed(0)
hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
target = torch.randint(0, 30, (5,))
logits = hidden @ weight.T
expected = torch.distributions.Categorical(logits=logits.double())
for stats in (softmax_stats(logits, target), linear_softmax_stats(hidden, weight, target)):
    assert (stats.entropy - expected.entropy()).abs().max() < 1e-5
    assert (stats.logprob - expected.log_prob(target)).abs().max() < 1e-5
for loss in (
    token_loss(logits, entropy_weight=torch.full((5,), 0.2)).loss,
    linear_entropy_loss(hidden, weight),
):
    assert abs(loss.item() - expected.entropy().mean().item()) < 1e-5
    (grad,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (exact,) = torch.autograd.grad(expected.entropy().mean(), hidden, retain_graph=True)
    assert (grad - exact).abs().max() < 1e-5
"""


def run(code, blocked):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = BLOCK.format(blocked=set(blocked)) + code
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "blocked",
    (
        ["triton"],
        ["em_kernels._C"],
        ["em_kernels._cuda"],
        ["triton", "em_kernels._cuda", "em_kernels._C", "numpy", "transformers", "trl"],
    ),
    ids=lambda names: "+".join(names),
)
def test_everything_works_without(blocked):
    finished = run(EVERYTHING, blocked)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize(
    "module, impl, remedy",
    (
        ("triton", "triton", "pip install triton"),
        ("em_kernels._C", "cpu", "install a C\\+\\+ compiler and reinstall"),
        ("em_kernels.backends.triton", "triton", "."),
        ("em_kernels._cuda", "cuda", "install the CUDA toolkit and reinstall"),
    ),
)
def test_a_missing_part_is_named_with_its_remedy(module, impl, remedy):
    code = f"""
import os, pathlib, re, torch, em_kernels
from em_kernels.backends import availability
# How this tree was built is another matter.
availability.BUILD_RECORD = pathlib.Path(os.devnull)
reason = em_kernels.backends()[{impl!r}]
assert reason != "available" and re.search({remedy!r}, reason), reason
try:
    em_kernels.softmax_stats(torch.zeros(2, 3), impl={impl!r})
except ValueError as error:
    assert reason in str(error), error
else:
    raise AssertionError("impl={impl} was served")
"""
    finished = run(code, [module])
    assert finished.returncode == 0, finished.stderr


def test_info_and_the_judge_need_torch_alone():
    code = """
from em_kernels.cli import main
from em_kernels.objectives import verified_reward

assert main(["info"]) == 0
assert verified_reward(["so #### 3"], ["3"]).tolist() == [1]
"""
    blocked = ["numpy", "transformers", "matplotlib", "tqdm", "triton", "datasets"]
    finished = run(code, blocked)
    assert finished.returncode == 0, finished.stderr


def test_importing_does_not_import_the_optional_parts():
    code = """
import em_kernels
heavy = {"triton", "transformers", "trl", "numpy.testing", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    finished = run(code, [])
    assert finished.returncode == 0, finished.stderr


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="only where CI=true")
@pytest.mark.parametrize("name", ("reference", "cpu", "triton"))
def test_in_ci_no_backend_is_silently_left_out(name):
    assert backends()[name] == "available"


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="only where CI=true")
def test_in_ci_the_cuda_kernels_are_built_where_nvcc_is():
    if os.environ.get("EM_KERNELS_NO_CUDA") == "1":
        pytest.skip("EM_KERNELS_NO_CUDA=1")
    try:
        cuda_build.Toolkit.find()
    except cuda_build.CudaBuildError as reason:
        pytest.skip(str(reason))
    import_module("em_kernels._cuda")
    assert not torch.cuda.is_available() or backends()["cuda"] == "available"
