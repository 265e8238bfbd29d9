"""How the CUDA kernels are loaded and launched, on a pretended GPU (cuda_launch.cpp), and what the
first call in a capture, other streams and other devices do, where there is a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_emulator.load import COMPILER

import cuda_build
from em_kernels import backends, softmax_stats, token_loss

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests/cuda_launch.cpp"


@pytest.fixture(scope="module")
def pretend(tmp_path_factory):
    """Capability of the GPU, that its code was written for, largest cluster -> what was done."""
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    try:
        headers = cuda_build.Toolkit.find().home / "include"
    except cuda_build.CudaBuildError as reason:
        pytest.skip(str(reason))
    program = tmp_path_factory.mktemp("launch") / "launch"
    sources = [PROGRAM, *(cuda_build.SOURCES / name for name in ("runtime.cpp", "plan.cpp"))]
    command = [COMPILER, "-std=c++17", "-O0", "-w", "-isystem", headers, *sources, "-o", program]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def run(capability=90, code=90, cluster=8):
        words = map(str, (program, capability, code, cluster))
        done = subprocess.run(list(words), capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    return run


def test_a_cluster_of_one_is_named_as_such(pretend):
    """The kernel asks for the size of its cluster and for its place in it."""
    short, long = pretend()["launches"]
    assert short["resident"] and short["cluster"] == short["named_cluster"] == 1
    assert long["resident"] and long["cluster"] == long["named_cluster"] == 4
    assert [each["blocks"] for each in (short, long)] == [3, 12]
    assert all(each["rows"] == 3 and each["slice"] > 0 for each in (short, long))


def test_blocks_that_share_the_statistics_of_a_row_are_a_cluster(pretend):
    few, many = pretend()["statistics"]
    assert few["named_cluster"] == few["cluster"] == 4 and few["blocks"] == 12
    assert many["named_cluster"] == 0 and many["cluster"] == 1 and many["blocks"] == 1000
    assert all(each["blocks"] == each["rows"] for each in pretend(80, 80)["statistics"])
    assert all(each["blocks"] == each["rows"] for each in pretend(cluster=2)["statistics"])


@pytest.mark.parametrize(("capability", "code"), ((90, 80), (100, 80), (90, 86), (80, 80)))
def test_code_that_was_written_for_less_is_not_launched_in_clusters(pretend, capability, code):
    """TORCH_CUDA_ARCH_LIST=8.0+PTX on a newer GPU: the driver makes its code of the PTX."""
    found = pretend(capability, code)
    assert found["capability"] == code and found["largest_cluster"] == 0
    for each in found["launches"]:
        assert not each["resident"] and each["named_cluster"] == 0


def test_code_that_was_written_for_more_than_a_cluster_needs(pretend):
    assert pretend(100, 90)["capability"] == pretend(90, 90)["capability"] == 90
    assert pretend(120, 100)["launches"][0]["resident"]


@pytest.mark.parametrize(("largest", "long"), ((8, 4), (4, 4), (2, 2), (1, 0), (0, 0)))
def test_a_cluster_that_cannot_run_is_not_launched(pretend, largest, long):
    """151936 numbers of 16 bits need two blocks; fewer in a cluster are less to wait for."""
    found = pretend(cluster=largest)
    assert found["largest_cluster"] == largest and found["error_left"] == 0
    short, row = found["launches"]
    assert short["resident"] == (largest > 0)
    assert row["named_cluster"] == long and row["resident"] == (long > 0)


def test_a_device_is_readied_once_and_also_in_a_capture(pretend):
    found = pretend()
    assert found["loaded"] == 3 and found["set"] == found["set_by_launches"] == 4
    assert found["unsafe"] == 0 and found["mode_restored"]


# Where there is a GPU

ON_A_GPU = pytest.mark.skipif(
    backends()["cuda"] != "available", reason="needs a GPU and the CUDA kernels"
)
FIRST_CALL = """
import torch
from em_kernels import token_loss
x = torch.linspace(-3, 3, 3 * 5000, device="cuda").view(3, 5000).requires_grad_()
w = torch.ones(3, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    loss = token_loss(x, entropy_weight=w, impl="cuda").loss
graph.replay()
torch.cuda.synchronize()
assert torch.equal(loss, token_loss(x, entropy_weight=w, impl="cuda").loss), loss
"""


def work(x, weights):
    leaf = x.detach().requires_grad_()
    result = token_loss(leaf, entropy_weight=weights, impl="cuda")
    stats = softmax_stats(leaf, impl="cuda")
    total = result.loss + (weights * stats.lse).sum()
    return result.loss.detach(), stats.entropy.detach(), torch.autograd.grad(total, leaf)[0]


def inputs(vocab, device):
    x = torch.randn(5, vocab, device=device).bfloat16()
    return x, torch.rand(5, device=device)


@ON_A_GPU
@pytest.mark.parametrize("vocab", (1000, 50257, 151_936))  # clusters of 1, 2 and 4
def test_a_graph_replays_the_call_on_other_numbers(vocab):
    x, weights = inputs(vocab, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work(x, weights)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work(x, weights)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(map(torch.equal, captured, work(x, weights)))


@ON_A_GPU
def test_the_first_call_of_a_process_may_be_captured():
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


@ON_A_GPU
@pytest.mark.parametrize("vocab", (1000, 151_936))
def test_the_stream_of_the_caller_is_the_stream_of_the_kernels(vocab):
    x, weights = inputs(vocab, "cuda")
    expected, streams = work(x, weights), [torch.cuda.Stream() for _ in range(2)]
    results = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # the logits are not there for some 10 ms
            results.append(work(x * 1, weights))
    torch.cuda.synchronize()
    assert all(all(map(torch.equal, each, expected)) for each in results)


@ON_A_GPU
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current_one():
    x, weights = inputs(151_936, "cuda:0")
    expected = work(x, weights)
    found = work(x.to("cuda:1"), weights.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(y.device.index == 1 for y in found)
    assert all(map(torch.equal, [y.to("cuda:0") for y in found], expected))
