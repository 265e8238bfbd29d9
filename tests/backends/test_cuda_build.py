"""How the CUDA part is built, what its kernels use, and that without it everything goes on."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import cuda_build
from cuda_build import Architectures, CudaBuildError, parse_architectures
from em_kernels.backends import availability, choice
from em_kernels.cli import app

ROOT = Path(__file__).parents[2]
NVCC = """#!/bin/sh
# Stands in for nvcc: answers its questions, and writes what it is to write.
echo "$@" >> {log}
case "$*" in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
  --list-gpu-arch) printf 'compute_80\\ncompute_90\\n' ;;
  *--dryrun*) echo '#$ TOP={home}/bin/..' ;;
  *broken.cu*) echo 'broken.cu(3): error: expected a ";"'; exit 2 ;;
  *) while [ $# -gt 1 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done ;;
esac
"""


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A CUDA toolkit that only writes down what it is asked; returns how to read that."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    log, nvcc = tmp_path / "nvcc.log", home / "bin/nvcc"
    nvcc.write_text(NVCC.format(log=log, home=home))
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    for name in ("TORCH_CUDA_ARCH_LIST", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return lambda: [line for line in log.read_text().splitlines() if " -o " in line]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A source tree with one kernel and no C++."""
    sources = tmp_path / "project/csrc/cuda"
    sources.mkdir(parents=True)
    (sources / "kernels.h").write_text("\n")
    (sources / "rows.cu").write_text("\n")
    monkeypatch.setattr(cuda_build, "ROOT", tmp_path / "project")
    monkeypatch.setattr(cuda_build, "SOURCES", sources)
    monkeypatch.setattr(cuda_build, "OBJECTS", tmp_path / "project/build")
    return sources


@pytest.mark.parametrize(
    "text, machine, portable",
    (
        ("8.0;9.0;10.0+PTX", ("80", "90", "100"), ("100",)),
        ("8.0 9.0a", ("80", "90a"), ()),
        ("8.6, 12.0+PTX", ("86", "120"), ("120",)),
        ("7.5 8.0 9.0+PTX", ("80", "90"), ("90",)),
        ("Ampere;Hopper+PTX", ("80", "86", "90"), ("90",)),
        ("9.0;9.0+PTX", ("90",), ("90",)),
    ),
)
def test_architectures_in_the_syntax_of_torch(text, machine, portable):
    assert parse_architectures(text) == (machine, portable)


@pytest.mark.parametrize("text", ("sm_90", "9", "Fermi", "9.0+ptx", "7.5"))
def test_architectures_that_cannot_be(text):
    with pytest.raises(
        CudaBuildError, match=r"TORCH_CUDA_ARCH_LIST=.* (not understood|8.0 or newer)"
    ):
        parse_architectures(text)


def test_an_older_nvcc_leaves_out_what_it_does_not_know(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert str(Architectures.wanted({"80", "90", "100"})) == "sm_80 sm_90 sm_100 compute_100"
    assert str(Architectures.wanted({"75", "80", "90"})) == "sm_80 sm_90 compute_90"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert Architectures.wanted({"90"}).flags() == ["-gencode=arch=compute_90a,code=sm_90a"]
    with pytest.raises(CudaBuildError, match="knows none of 90a, and nothing newer than 80; inst"):
        Architectures.wanted({"75", "80"})


def test_an_architecture_asked_for_is_not_left_out_in_silence(monkeypatch, capsys):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    Architectures.wanted({"80", "90"})
    assert capsys.readouterr().err == ""  # nobody asked for 10.0
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0;12.0a+PTX")
    assert str(Architectures.wanted({"80", "90"})) == "sm_90"
    assert "does not know sm_120a, which is left out; it knows nothing newer than 90" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "name, value, said",
    (
        ("TORCH_CUDA_ARCH_LIST", "hopper!", "'hopper!' is not understood"),
        ("TORCH_CUDA_ARCH_LIST", "7.0 7.5", "names nothing of 8.0 or newer"),
        ("TORCH_CUDA_ARCH_LIST", "12.0", "nothing newer than 90; install a newer CUDA toolkit"),
        ("MAX_JOBS", "many", "MAX_JOBS must be a number of processes, got 'many'"),
        ("MAX_JOBS", "0", "MAX_JOBS must be a number of processes, got '0'"),
    ),
)
def test_what_the_environment_asks_for_in_vain_is_the_reason(
    name, value, said, toolkit, project, tmp_path, monkeypatch
):
    monkeypatch.setenv(name, value)
    with pytest.raises(CudaBuildError) as raised:
        cuda_build.build_module(tmp_path / "_cuda.so")
    assert said in str(raised.value)


def test_without_nvcc_the_reason_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(CudaBuildError, match=r"no nvcc in CUDA_HOME=.*; install the CUDA toolkit"):
        cuda_build.build_module(tmp_path / "_cuda.so")


def test_only_what_changed_is_compiled(toolkit, project, tmp_path, monkeypatch):
    target = tmp_path / "_cuda.so"

    def compiled():
        before = len(toolkit()) if (tmp_path / "nvcc.log").exists() else 0
        cuda_build.build_module(target)
        return [" -c " in line for line in toolkit()[before:]]

    assert compiled() == [True, False]  # compiled and linked
    assert target.read_text() == "made\n"
    assert compiled() == [False]
    later = (project / "kernels.h").stat().st_mtime + 10
    os.utime(project / "kernels.h", (later, later))
    os.utime(project / "rows.cu", (later, later))
    assert compiled() == [True, False]
    for result in cuda_build.OBJECTS.iterdir():
        os.utime(result, (later + 10, later + 10))
    assert compiled() == [False]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert compiled() == [True, False]
    assert "code=sm_80" in toolkit()[-2] and "code=sm_90" not in toolkit()[-2]


def test_a_compiler_error_is_the_reason(toolkit, project, tmp_path):
    (project / "broken.cu").write_text("\n")
    with pytest.raises(CudaBuildError, match=r"nvcc failed on csrc/cuda/broken.cu: .*expected a"):
        cuda_build.build_module(tmp_path / "_cuda.so")


def test_a_failing_cuda_build_takes_nothing_else_down(toolkit, tmp_path):
    """setup.py itself, on a small CPU part and a CUDA part that does not compile."""
    project = tmp_path / "package"
    for folder in ("em_kernels", "csrc/cpu", "csrc/cuda"):
        (project / folder).mkdir(parents=True)
    for name in ("setup.py", "cuda_build.py"):
        shutil.copy(ROOT / name, project)
    (project / "em_kernels/__init__.py").write_text("")
    module = '#include <Python.h>\nextern "C" PyObject* PyInit__C() { return nullptr; }\n'
    (project / "csrc/cpu/bindings.cpp").write_text(module)
    (project / "csrc/cuda/broken.cu").write_text("")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    stale, record = project / f"em_kernels/_cuda{suffix}", project / "em_kernels/_build.json"
    stale.write_text("of an older version")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING: installing without the CUDA kernels: " in done.stderr
    assert 'error: expected a ";"' in done.stderr
    assert "without the compiled CPU" not in done.stderr
    assert (project / f"em_kernels/_C{suffix}").exists() and not stale.exists()
    assert list(json.loads(record.read_text())) == ["em_kernels._cuda"]
    stale.write_text("of an older version")
    environment = {**os.environ, "EM_KERNELS_NO_EXTENSION": "1"}
    left = subprocess.run(command, cwd=project, capture_output=True, text=True, env=environment)
    assert left.returncode == 0 and left.stderr.count("EM_KERNELS_NO_EXTENSION=1") == 2
    assert not (project / f"em_kernels/_C{suffix}").exists() and not stale.exists()
    assert set(json.loads(record.read_text()).values()) == {"EM_KERNELS_NO_EXTENSION=1"}
    stale.write_text("of an older version")
    (project / f"em_kernels/_C{suffix}").write_text("of another torch, and newer than its sources")
    ninja = tmp_path / "broken/ninja"  # which would compile what it did not make itself
    ninja.parent.mkdir()
    ninja.write_text("#!/bin/sh\nexit 1\n")
    ninja.chmod(0o755)
    path = f"{ninja.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "EM_KERNELS_NO_CUDA": "1", "PATH": path}
    left = subprocess.run(command, cwd=project, capture_output=True, text=True, env=environment)
    assert left.returncode == 0 and left.stderr.count("installing without") == 1
    assert "without the CUDA kernels: EM_KERNELS_NO_CUDA=1" in left.stderr
    assert (project / f"em_kernels/_C{suffix}").read_bytes().startswith(b"\x7fELF")
    assert not stale.exists()
    assert json.loads(record.read_text()) == {"em_kernels._cuda": "EM_KERNELS_NO_CUDA=1"}


@pytest.mark.parametrize(
    "setting, cpu, cuda",
    [
        ("EM_KERNELS_NO_EXTENSION=1", "EM_KERNELS_NO_EXTENSION=1", "EM_KERNELS_NO_EXTENSION=1"),
        ("EM_KERNELS_NO_CUDA=1", "built without torch, as under pip's build", "EM_KERNELS_NO_CUDA"),
        ("CUDA_HOME=nowhere", "built without torch, as under pip's build", "no nvcc in CUDA_HOME"),
    ],
)
def test_a_wheel_holds_what_was_built_for_it_and_says_why_not(tmp_path, setting, cpu, cuda):
    """setup.py itself, where torch cannot be imported, in a tree that was built before."""
    for name in ("setup.py", "cuda_build.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("README.md", "em_kernels/__init__.py", "isolated/torch/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "isolated/torch/__init__.py").write_text('raise ImportError("No torch here")')
    suffix, command = sysconfig.get_config_var("EXT_SUFFIX"), [sys.executable, "setup.py"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "isolated")}
    environment |= dict([setting.split("=")])
    options = dict(cwd=tmp_path, env=environment, capture_output=True, text=True)
    first = subprocess.run([*command, "bdist_wheel"], **options)
    assert first.returncode == 0, first.stderr
    (lib,) = (tmp_path / "build").glob("lib*")
    for leftover in (f"_C{suffix}", f"_cuda{suffix}", "gone.py"):
        (lib / "em_kernels" / leftover).write_text("of an older version")
    done = subprocess.run([*command, "bdist_wheel"], **options)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        files = [name for name in packed.namelist() if name.startswith("em_kernels/")]
        reasons = json.loads(packed.read("em_kernels/_build.json"))
    assert sorted(files) == ["em_kernels/__init__.py", "em_kernels/_build.json"]
    assert reasons["em_kernels._C"].startswith(cpu) and reasons["em_kernels._cuda"].startswith(cuda)


@pytest.mark.parametrize("impl, module", [("cpu", "em_kernels._C"), ("cuda", "em_kernels._cuda")])
def test_a_part_that_was_left_out_says_why(impl, module, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(availability, "BUILD_RECORD", tmp_path / "_build.json")
    usual = choice.why_not(impl)
    assert "is missing" in usual and "; install " in usual
    for text in ("{}", "{bro", "[]", "null", '{"em_kernels.other": "no"}'):
        availability.BUILD_RECORD.write_text(text)
        assert choice.why_not(impl) == usual
    availability.BUILD_RECORD.write_text(json.dumps({module: "built without torch"}))
    assert app.main(["info"]) == 0
    said = "was left out of this build (built without torch); change that and reinstall with `pip"
    assert said in capsys.readouterr().out
