"""The cases that `make gpu` runs, on the emulated kernels."""

import os
import subprocess

import pytest
from cuda_emulator.load import COMPILER, built, compile_cpp

import cuda_build
from cuda_build import CudaBuildError


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
