"""Whatever is wrong with a backend: `backends()` says it, "auto" goes on, asking by name raises it.

Each fault is made by patching what the choice looks at; a GPU is pretended by its device alone.
"""

import importlib
import shutil
import sys
import sysconfig
from types import SimpleNamespace

import pytest
import torch

import em_kernels
from em_kernels import cli
from em_kernels.backends import availability, choice
from em_kernels.backends.reference import Reference

GPU = torch.device("cuda", 0)
MODULES = {
    "cpu": "em_kernels._C",
    "triton": "em_kernels.backends.triton.backend",
    "cuda": "em_kernels._cuda",
}


class Pretended(Reference):
    name = "triton"


def raising(error):
    def function(*args, **kwargs):
        raise error

    return function


@pytest.fixture(autouse=True)
def _nothing_remembered():
    forget()
    yield
    forget()


def forget():
    for remembered in (choice.backend, choice.serving, choice._loaded):
        remembered.cache_clear()


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """As if every part were there and good, and the GPU too."""
    cuda = SimpleNamespace(architectures="sm_90", nvcc="13.0", why_no_driver=lambda: "")
    triton = SimpleNamespace(interpreted=False, Triton=Pretended)
    monkeypatch.setitem(sys.modules, "em_kernels._cuda", cuda)
    monkeypatch.setattr(em_kernels, "_cuda", cuda, raising=False)
    monkeypatch.setitem(sys.modules, "em_kernels.backends.triton.backend", triton)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(availability, "BUILD_RECORD", tmp_path / "none.json")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_path", lambda *args: str(tmp_path))
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    assert choice.why_not("triton", GPU) is None and choice.why_not("cuda", GPU) is None
    return SimpleNamespace(cuda=cuda, triton=triton, headers=tmp_path / "Python.h")


def importing(monkeypatch, module, error):
    """Make the import of one module raise."""
    load = importlib.import_module

    def raise_or_load(name):
        if name == module:
            raise error
        return load(name)

    monkeypatch.setattr(importlib, "import_module", raise_or_load)


def refused(impl, said, device):
    """The reason, after checking that it is told, raised, and gone around."""
    reason = em_kernels.backends()[impl]
    assert said in reason, reason
    assert "\n" not in reason
    with pytest.raises(ValueError) as raised:
        choice.backend(impl, device)
    assert said in str(raised.value) and f"impl={impl!r} cannot be used" in str(raised.value)
    return reason


IMPORTS = (
    ImportError("libcudart.so.13: cannot open shared object file"),
    ImportError("_cuda.so: undefined symbol: _ZN3c104cuda"),
    OSError("libcudart.so.13: cannot open shared object file"),
    RuntimeError("module compiled against ABI version 0x1\nmore of it"),
    AttributeError("module 'triton.language' has no attribute 'constexpr'"),
    SystemError("initialization of _cuda raised unreported exception"),
    ModuleNotFoundError("No module named 'setuptools'", name="setuptools"),
)


@pytest.mark.parametrize("error", IMPORTS, ids=lambda error: str(error).split()[0])
@pytest.mark.parametrize("impl", ("cpu", "triton", "cuda"))
def test_a_part_that_cannot_be_imported(impl, error, on_a_gpu, monkeypatch):
    importing(monkeypatch, MODULES[impl], error)
    device = torch.device("cpu") if impl == "cpu" else GPU
    reason = refused(impl, f"{type(error).__name__}: {str(error).splitlines()[0]}", device)
    assert "is missing" not in reason and "pip install" in reason
    others = ("triton", "cuda") if impl == "cpu" else {"triton", "cuda"} - {impl}
    assert all(em_kernels.backends()[name] == "available" for name in others)
    assert choice.backend("auto", device) is not None


def test_both_gpu_backends_broken_leave_the_reference(on_a_gpu, monkeypatch):
    monkeypatch.setattr(importlib, "import_module", raising(OSError("x")))
    assert choice.backend("auto", GPU) is choice.REFERENCE
    assert choice.backend("auto", torch.device("cpu")) is choice.REFERENCE


def test_torch_that_cannot_look_for_a_gpu(on_a_gpu, monkeypatch, capsys):
    error = RuntimeError("CUDA unknown error: this may be due to an incorrectly set up environment")
    monkeypatch.setattr(torch.cuda, "is_available", raising(error))
    monkeypatch.setattr(torch.cuda, "device_count", raising(error))
    refused("cuda", "CUDA unknown error", GPU)
    assert "CUDA unknown error" in em_kernels.backends()["triton"]
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out.count("CUDA unknown error") == 3  # two backends, the GPU
    assert choice.backend("auto", torch.device("cpu")) is not None


def test_a_driver_that_torch_finds_too_old(on_a_gpu, monkeypatch):
    said = "The NVIDIA driver on your system is too old (found version 11040). Please update"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", raising(RuntimeError(said)))
    refused("cuda", said, GPU)
    assert said in em_kernels.backends()["triton"]


def test_a_torch_without_cuda_is_told(on_a_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    said = f": torch {torch.__version__} is built without CUDA"
    refused("cuda", f"no NVIDIA GPU is visible to torch{said}", GPU)
    assert f"no GPU is visible{said} (TRITON" in em_kernels.backends()["triton"]


@pytest.mark.parametrize("asked", ("get_device_capability", "why_no_driver"))
def test_a_gpu_that_does_not_answer(asked, on_a_gpu, monkeypatch):
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    owner = on_a_gpu.cuda if asked == "why_no_driver" else torch.cuda
    monkeypatch.setattr(owner, asked, raising(error))
    refused("cuda", "illegal memory access", GPU)
    for call in (("rows",), ("loss", True)):
        assert choice.backend("auto", GPU, *call).name == "triton"
    assert em_kernels.backends()["triton"] == "available"


def test_an_older_build_is_refused_rather_than_asked_in_vain(on_a_gpu):
    del on_a_gpu.cuda.why_no_driver
    assert "or reinstall" in refused("cuda", "why_no_driver", GPU)


def test_architectures_that_the_device_cannot_run(on_a_gpu, monkeypatch):
    on_a_gpu.cuda.architectures = "sm_80 sm_86"
    assert "TORCH_CUDA_ARCH_LIST=9.0" in refused("cuda", "it is built for sm_80 sm_86", GPU)
    assert choice.backend("auto", GPU, "loss", True).name == "triton"


@pytest.mark.parametrize(
    "fault, said",
    (
        ("no compiler", "install gcc or clang, or set CC"),
        ("CC", "there is no CC='/opt/gone/gcc'; unset CC"),
        ("headers", "needs Python.h"),
    ),
)
def test_triton_that_cannot_build_its_launcher(fault, said, on_a_gpu, monkeypatch):
    if fault == "headers":
        on_a_gpu.headers.unlink()
    else:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    if fault == "CC":
        monkeypatch.setenv("CC", "/opt/gone/gcc")
    refused("triton", said, GPU)
    assert choice.backend("auto", GPU).name == "cuda"
    forget()
    on_a_gpu.triton.interpreted = True
    assert choice.why_not("triton", GPU) is None
