"""Which CUDA build serves which GPU, and what is said where none does."""

import shutil
import sys
import sysconfig
from types import SimpleNamespace

import pytest
import torch

from em_kernels.backends import choice, cuda
from em_kernels.cli import app


@pytest.mark.parametrize(
    "built, capability, runs",
    (
        ("sm_80 sm_90", (8, 0), True),
        ("sm_80 sm_90", (8, 9), True),
        ("sm_80 sm_90", (10, 0), False),
        ("sm_80 sm_90 compute_90", (10, 0), True),
        ("sm_86", (8, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100a compute_100a", (10, 3), False),
        ("sm_100f", (10, 3), True),
        ("compute_80", (7, 5), False),
        ("sm_100 compute_100", (12, 0), True),
    ),
)
def test_which_gpus_a_build_serves(built, capability, runs):
    assert cuda._runs_on(built, capability) is runs


class Built:
    architectures, nvcc = "sm_90 compute_90", "13.0.88"

    @staticmethod
    def why_no_driver():
        return ""


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As if the module were built for sm_90 and a GPU of the given capability were there."""

    def pretend(capability):
        choice.backend.cache_clear()
        monkeypatch.setitem(sys.modules, "em_kernels._cuda", Built)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    yield pretend
    choice.backend.cache_clear()


def test_why_the_cuda_kernels_cannot_serve(on_a_gpu, monkeypatch):
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    on_a_gpu((9, 0))
    assert choice.why_not("cuda", gpu) is None and choice.why_not("cuda") is None
    assert choice.why_not("cuda", cpu) == "its tensors must be on a GPU, not on cpu"
    on_a_gpu((8, 0))
    assert "reinstall with TORCH_CUDA_ARCH_LIST=8.0" in choice.why_not("cuda", gpu)
    on_a_gpu((7, 5))
    assert "compute capability 7.5; 8.0 is the least" in choice.why_not("cuda", gpu)
    on_a_gpu(None)
    assert choice.why_not("cuda") == "no NVIDIA GPU is visible to torch"
    monkeypatch.setitem(sys.modules, "em_kernels._cuda", None)
    assert "install the CUDA toolkit and reinstall with `pip" in choice.why_not("cuda")


def test_a_driver_older_than_the_runtime_is_told(on_a_gpu, monkeypatch):
    on_a_gpu((9, 0))
    said = "CUDA driver version is insufficient for CUDA runtime version"
    monkeypatch.setattr(Built, "why_no_driver", lambda: said)
    for device in (None, torch.device("cuda", 0)):
        reason = choice.why_not("cuda", device)
        assert said in reason and "update the driver" in reason
    monkeypatch.delitem(choice.OPTIONAL, "triton")
    assert choice.backend("auto", torch.device("cuda", 0)) is choice.REFERENCE
    with pytest.raises(ValueError, match="driver version is insufficient"):
        choice.backend("cuda", torch.device("cuda", 0))


def test_triton_without_a_c_compiler_is_told(on_a_gpu, tmp_path, monkeypatch):
    on_a_gpu((9, 0))
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda *names: str(tmp_path))
    pretended = SimpleNamespace(interpreted=False)
    monkeypatch.setitem(sys.modules, "em_kernels.backends.triton.backend", pretended)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    gpu = torch.device("cuda", 0)
    assert all("C compiler" in choice.why_not("triton", device) for device in (None, gpu))
    assert "its tensors must be on a GPU" in choice.why_not("triton", torch.device("cpu"))
    monkeypatch.setenv("CC", "tcc")
    monkeypatch.setattr(shutil, "which", {"tcc": "/opt/tcc"}.get)
    assert choice.why_not("triton", gpu) is None
    monkeypatch.delenv("CC")
    pretended.interpreted = True
    assert choice.why_not("triton", gpu) is None


def test_info_tells_of_the_build(monkeypatch):
    monkeypatch.setitem(sys.modules, "em_kernels._cuda", Built)
    said = "sm_90 compute_90, with thread-block clusters; built by nvcc 13.0.88"
    assert app._cuda() == said
    monkeypatch.setattr(Built, "architectures", "sm_80 sm_86")
    assert app._cuda().startswith("sm_80 sm_86, without thread-block clusters;")
    monkeypatch.setitem(sys.modules, "em_kernels._cuda", None)
    assert app._cuda() == "not built"
