"""How the CUDA part is built, what its kernels use, and that without it everything goes on."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import SimpleNamespace

import cuda_offline
import pytest
import torch
from cuda_emulator.load import COMPILER, built, compile_cpp

import cuda_build
from cuda_build import Architectures, CudaBuildError, parse_architectures
from em_kernels.backends import availability, choice, cuda
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
    environment = {**os.environ, "EM_KERNELS_NO_CUDA": "1"}
    left = subprocess.run(command, cwd=project, capture_output=True, text=True, env=environment)
    assert left.returncode == 0 and left.stderr.count("installing without") == 1
    assert "without the CUDA kernels: EM_KERNELS_NO_CUDA=1" in left.stderr
    assert (project / f"em_kernels/_C{suffix}").exists() and not stale.exists()
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


# The choice of a backend


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


# What the kernels use


@pytest.fixture(scope="module")
def module():
    found = cuda_offline.module_file()
    if found is None:
        pytest.skip("em_kernels._cuda is not built")
    if cuda_offline.cuobjdump() is None and os.environ.get("CI") != "true":
        pytest.skip("there is no cuobjdump: it comes with nvcc and with triton")
    return found


@pytest.fixture(scope="module")
def kernels(module):
    return cuda_offline.report(module)


@pytest.fixture(scope="module")
def table():
    return json.loads(cuda_offline.TABLE.read_text())


def is_plain(name):
    return name.startswith("resident_loss") or name.endswith("true>")


def test_every_kernel_is_in_the_table_and_in_the_build(kernels, table):
    recorded = table["registers, stack, local, shared"]
    compared = recorded.keys() & kernels.keys()
    built = importlib.import_module("em_kernels._cuda").architectures
    assert compared or not {"sm_80", "sm_90", "sm_100"} & set(built.split())
    for arch in compared:
        assert kernels[arch].keys() == recorded[arch].keys(), arch


def test_kernels_use_no_more_than_is_recorded(kernels, table):
    """Another nvcc may take other registers; the launch bounds keep those in check."""
    if importlib.import_module("em_kernels._cuda").nvcc != table["nvcc"]:
        pytest.skip(f"the table is of nvcc {table['nvcc']}")
    for title, columns in cuda_offline.TABLES.items():
        for arch, recorded in table[title].items():
            for name, most in recorded.items() if arch in kernels else ():
                used = [kernels[arch][name][column] for column in columns]
                message = f"{arch} {name} uses {used}: if meant, run tests/cuda_offline.py --write"
                assert all(a <= b for a, b in zip(used, most, strict=True)), message


def test_a_row_that_is_not_aligned_costs_few_instructions_more(kernels):
    """And no load or store of single numbers: two wide loads a vector, of which a chunk has four.

    The eight numbers that the first vector of a row of 16 bits is made of are loaded one by one,
    in the same loop and by one thread.
    """
    for arch, each in kernels.items():
        for name, aligned in each.items():
            if "Aligned" not in name:
                continue
            unaligned = each[name.replace("Aligned", "Unaligned")]
            assert unaligned["loop_instructions"] <= 1.26 * aligned["loop_instructions"], name
            assert unaligned["loop_stores"] == aligned["loop_stores"], (arch, name)
            assert unaligned["loop_loads"] <= 2 * aligned["loop_loads"] + 8, (arch, name)


def test_no_plain_kernel_spills(kernels):
    plain = [
        (arch, name, k) for arch in kernels for name, k in kernels[arch].items() if is_plain(name)
    ]
    assert plain
    for arch, name, kernel in plain:
        assert kernel["stack"] == kernel["local"] == 0, (arch, name)


def test_kernels_read_and_write_16_bytes_at_a_time(kernels):
    for arch, each in kernels.items():
        for name, kernel in each.items():
            if name.startswith("stream_"):
                assert kernel["wide_loads"] >= 4, (arch, name)
            if name.startswith("stream_gradient"):
                assert kernel["wide_stores"] >= 4, (arch, name)


def test_what_no_other_thread_reads_takes_no_place_in_l1(kernels):
    """The logits of whole chunks of aligned rows; of others, neighbours share 16 bytes."""
    for arch, each in kernels.items():
        for name, kernel in each.items():
            passes = name.startswith("stream_") and "Unaligned" not in name
            assert kernel["passing_loads"] >= 4 * passes, (arch, name)
            assert passes or kernel["passing_loads"] == 0, (arch, name)


def test_the_gradient_reads_the_logits_last(module):
    """L2 gives them up first; those of statistics it may keep until the gradient reads them."""
    loads = cuda_offline.last_loads(module)
    if not loads:
        pytest.skip("this build holds no PTX")
    for name, count in loads.items():
        last = name.startswith("stream_gradient") and "Unaligned" not in name
        assert count >= 4 * last and (last or count == 0), name


def test_the_loss_brings_a_row_into_shared_memory_by_bulk_copies(kernels):
    for arch, each in kernels.items():
        resident = [kernel for name, kernel in each.items() if name.startswith("resident_loss")]
        assert len(resident) == 3
        for kernel in resident if int(arch[3:].rstrip("af")) >= 90 else ():
            assert kernel["bulk_copies"] and kernel["cluster_barriers"]
            assert kernel["copies_with_a_policy"] == kernel["bulk_copies"]  # read once
            assert kernel["wide_shared_loads"] >= 4 and kernel["wide_stores"] >= 4


def test_one_thread_of_a_block_waits_for_memory_before_the_blocks_meet(kernels):
    """One fence of the device, and no kernel of one that does not meet has one."""
    for arch, each in kernels.items():
        for name, kernel in each.items():
            of_blocks = name.startswith(("resident_loss", "stream_statistics"))
            meets = of_blocks and int(arch[3:].rstrip("af")) >= 90
            assert kernel["fences"] == meets, (arch, name)


def test_where_a_row_begins_is_computed_in_64_bits(module):
    products = cuda_offline.wide_products(module)
    if not products:
        pytest.skip("this build holds no PTX")
    for name, count in products.items():
        views = 1 if name.startswith("stream_statistics") else 2
        assert count >= 3 * views, f"{name}: {count} products of 64 bits"


# The cases that `make gpu` runs


def test_the_cases_compile_against_cuda():
    try:
        command = cuda_build.Plan.make().command(cuda_build.CASES)
    except CudaBuildError as reason:
        pytest.skip(str(reason))
    done = subprocess.run(
        [*command, "-fsyntax-only", str(cuda_build.CASES)], capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.fixture(scope="module")
def emulated_cases(tmp_path_factory):
    """The program of the cases on the emulated kernels."""
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    program = tmp_path_factory.mktemp("cases") / "cases"
    compile_cpp(program, "-x", "c++", cuda_build.CASES, "-x", "none", *built()[1])
    return program


def run_cases(program, *arguments, **settings):
    """What it returned, and the lines it wrote: one for each case, and a last one."""
    command, environment = [program, *map(str, arguments)], {**os.environ, **settings}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout.splitlines()


@pytest.fixture(scope="module")
def whole(emulated_cases):
    return run_cases(emulated_cases)


def test_the_cases_pass_on_the_emulated_kernels(whole):
    returned, lines = whole
    assert returned == 0, [line for line in lines if not line.startswith("ok")]
    assert all(line.startswith("ok ") for line in lines[:-1])
    assert lines[-1] == f"{len(lines) - 1} cases, 0 failed"
    for path in (
        "two-pass",
        "cluster1",
        "cluster2",
        "cluster4",
        "cluster8",
        "inplace",
        "apart",
        "to-float16",
    ):
        assert path in "".join(lines), path


def test_a_refused_launch_fails_its_case_alone(emulated_cases, whole):
    *cases, _ = whole[1]
    first = len(cases) - 12
    returned, lines = run_cases(emulated_cases, "--from", first, EM_REFUSED=str(first + 2))
    assert returned == 1 and lines[2].startswith("FAILED ") and "refused" in lines[2]
    cases[first + 2] = lines[2]
    assert lines == [*cases[first:], "12 cases, 1 failed"]


def test_after_a_lost_device_the_cases_end_and_another_process_goes_on(emulated_cases, whole):
    *cases, _ = whole[1]
    returned, lines = run_cases(emulated_cases, EM_LOST="4")
    assert returned == 1 and len(lines) == 6
    assert lines[:4] == cases[:4] and lines[4].startswith("FAILED ")
    assert lines[5] == "the device is lost; --from 5 goes on"
    rest = len(cases) - 12
    assert run_cases(emulated_cases, "--from", rest) == (0, [*cases[rest:], "12 cases, 0 failed"])
    assert run_cases(emulated_cases, "--form", 5)[0] == 2
    assert run_cases(emulated_cases, "--from", 100000) == (0, ["0 cases, 0 failed"])
