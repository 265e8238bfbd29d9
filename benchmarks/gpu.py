"""Everything that needs a GPU in one command: build, tests, benchmarks, and one report of them all.

    make gpu                    or: python -m benchmarks.gpu --out gpu-output
    make gpu STAGES="environment build smoke-triton"

Where a command may not run for long, four calls do it all, the most valuable first:

    STAGES="environment build smoke-triton smoke-cuda logits-triton logits-cuda logits-peers"
    STAGES="build hidden-triton hidden-cuda hidden-peers build-cases cases memcheck racecheck"
    STAGES="build synccheck hidden-3584-triton hidden-3584-cuda memory-triton memory-cuda"
    STAGES="build profile-triton profile-cuda tests-cuda tests"

Nothing is downloaded and nothing installed; CUDA is compiled for the GPU that is there, unless
TORCH_CUDA_ARCH_LIST says otherwise. Each stage is a process of its own with a time limit and a log;
the report is written anew after every stage, so that what was found is kept whatever happens later.
The exit code is 0 if every stage did what it should; one whose tool is not there is excused.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from benchmarks import gpu_report

ROOT = Path(__file__).parent.parent
SECONDS = 525.0  # for all stages together; with starting and reporting, under nine minutes
LEAST_SECONDS = 5.0  # with less time left than this a stage is not begun
LOG_BYTES = 4 << 20  # of a stage's log are kept
BIG_MEMORY = 64 << 30  # a GPU with as much also runs the tests of more than 2^31 logits
# Tests of the trainer, not of a kernel: left out where a package or its version is missing.
NEEDED = {
    ("matplotlib", 3): ("test_demo.py",),
    ("transformers", 5): (
        *("test_cli.py", "test_demo.py", "test_evaluator.py"),
        *("test_tiny_math.py", "test_trainer*.py"),
    ),
}


class Stage(NamedTuple):
    """One command, and how what it prints becomes a result."""

    name: str
    seconds: float  # its time limit, shortened where less is left of the whole
    command: list[str]
    log: str  # file in the output folder; stages that share one append to it
    read: Callable[[str], dict] = lambda text: {}  # "problem": a failure; "refused": unavailable
    needs_gpu: bool = True
    optional: bool = False  # unavailable, not failed, where its program is not installed


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def left_out_tests() -> dict[str, str]:
    """Test file -> the package it needs and this machine lacks."""
    reasons = {}
    for (package, least), files in NEEDED.items():
        found = gpu_report.version_of(package)
        if found is None or int(found.split(".")[0]) < least:
            reasons.update(dict.fromkeys(files, f"needs {package} {least}, found {found}"))
    return reasons


def read_tests(text: str) -> dict:
    return {**gpu_report.read_tests(text), "left_out": left_out_tests()}


def pytest_command(*which: str) -> list[str]:
    command = python("-m", "pytest", "-vv", "-rfEs", "--tb=short", "-p", "no:cacheprovider")
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", "60", "--timeout-method", "thread"]  # signals do not end a wait
    command += [f"--ignore-glob=tests/{name}" for name in left_out_tests()]
    return [*command, *which]


def bench(name: str, seconds: float, *arguments: str) -> Stage:
    command = python("-m", "benchmarks", *arguments, "--device", "cuda", "--rows")
    return Stage(name, seconds, command, "benchmarks.log", gpu_report.read_rows)


def smoke(impl: str, seconds: float) -> Stage:
    command = python("-m", "benchmarks.gpu_smoke", impl)
    return Stage(f"smoke-{impl}", seconds, command, "smoke.log", gpu_report.read_smoke)


def profile(impl: str, seconds: float) -> Stage:
    """What Nsight Compute says of the kernels; some machines do not let it look."""
    program = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    command = [program, "--clock-control", "none", "--set", "full", "--page", "details"]
    command += [
        "-k",
        "regex:statistics|gradient|loss",
        *python("-m", "benchmarks.gpu_kernels", impl),
    ]
    return Stage(f"profile-{impl}", seconds, command, "cases.log", optional=True)


def sanitizer(tool: str, seconds: float) -> Stage:
    """The small cases under one tool of compute-sanitizer."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = [program, "--tool", tool, "--error-exitcode", "1", str(CASES)]
    return Stage(tool, seconds, command, "cases.log", gpu_report.read_sanitizer, optional=True)


CASES = ROOT / "build/cuda/cases"
LOGITS = ("softmax_stats", "token_loss", "--n", "8192", "--v", "151936", "--dtype", "bfloat16")
HIDDEN = ("linear_entropy_loss", "linear_softmax_stats", "--n", "8192", "--dtype", "bfloat16")
MEMORY = ("linear_entropy_loss", "--n", "32768", "--dtype", "bfloat16")
SHAPE_A = ("--d", "4096", "--v", "131072")  # Liger's published one
SHAPE_B = ("--d", "3584", "--v", "152064")  # the head of Qwen2.5-7B
TRITON, CUDA = ("--only", "em_kernels triton"), ("--only", "em_kernels cuda")
PEERS = ("--only", "eager", "TRL", "Liger", "verl", "torch.compile")
GPU_TESTS = [
    f"tests/test_{name}.py"
    for name in (
        *("softmax_stats", "token_loss", "linear_softmax_stats", "linear_token_loss"),
        *("edge_rules", "properties", "chunks", "chunk_memory", "cut", "scale", "filter_eps"),
        *("triton", "triton_launch", "triton_linear", "triton_narrow"),
        *("covariance", "inference", "compile", "bad_input", "peers", "integrations_peers"),
    )
]
# A CUDA kernel can end a process for good: the tests of the other backends are in another one.
OF_CUDA = ("-k", "cuda", *GPU_TESTS)
NOT_OF_CUDA = ("-k", "not cuda", *GPU_TESTS)

REPORT = python("-m", "benchmarks.gpu_report")
BUILD = python("setup.py", "build_ext", "--inplace", "--parallel", "2")
BUILD_CASES = python("cuda_build.py", "cases")
STAGES = (
    Stage("environment", 30, REPORT, "build.log", gpu_report.read_environment, False),
    Stage("build", 150, BUILD, "build.log", gpu_report.read_build, False),
    smoke("triton", 90),
    smoke("cuda", 60),
    bench("logits-triton", 60, *LOGITS, *TRITON),
    bench("logits-cuda", 60, *LOGITS, *CUDA),
    bench("logits-peers", 120, *LOGITS, *PEERS),
    bench("hidden-triton", 60, *HIDDEN, *SHAPE_A, *TRITON),
    bench("hidden-cuda", 60, *HIDDEN, *SHAPE_A, *CUDA),
    bench("hidden-peers", 120, *HIDDEN, *SHAPE_A, *PEERS),
    Stage("build-cases", 60, BUILD_CASES, "build.log", needs_gpu=False),
    Stage("cases", 20, [str(CASES)], "cases.log", gpu_report.read_cases),
    sanitizer("memcheck", 60),
    sanitizer("racecheck", 60),
    sanitizer("synccheck", 60),
    bench("hidden-3584-triton", 60, *HIDDEN, *SHAPE_B, *TRITON),
    bench("hidden-3584-cuda", 60, *HIDDEN, *SHAPE_B, *CUDA),
    bench("memory-triton", 40, *MEMORY, *SHAPE_A, *TRITON),
    bench("memory-cuda", 40, *MEMORY, *SHAPE_A, *CUDA),
    profile("triton", 60),
    profile("cuda", 60),
    Stage("tests-cuda", 150, pytest_command(*OF_CUDA), "tests.log", read_tests),
    Stage("tests", 300, pytest_command(*NOT_OF_CUDA), "tests.log", read_tests),
)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    chosen = [stage for stage in STAGES if stage.name in (options.only or names())]
    results = run_all(chosen, options.out, options.seconds)
    paths = gpu_report.save(results, options.out)
    print("saved", *paths)
    return 0 if all(result["status"] in ("passed", "unavailable") for result in results) else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("gpu-output"), help="folder of the report")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all stages together")
    parser.add_argument("--only", nargs="+", metavar="STAGE", choices=names(), help=str(names()))
    return parser.parse_args(arguments)


def names() -> list[str]:
    return [stage.name for stage in STAGES]


def run_all(stages: list[Stage], folder: Path, seconds: float) -> list[dict]:
    """One result per stage, each {stage, status, seconds, note, **what `read` found}."""
    end = time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    for log in {stage.log for stage in stages}:
        (folder / log).unlink(missing_ok=True)
    results: list[dict] = []
    for stage in stages:
        left = end - time.monotonic()
        result = without_running(stage, left) or run(stage, folder / stage.log, left)
        results.append({"stage": stage.name, **result})
        print(gpu_report.stage_line(results[-1]), flush=True)
        gpu_report.save(results, folder)
    return results


def without_running(stage: Stage, left: float) -> dict | None:
    """The result of a stage that cannot be run."""
    program, status, reason = stage.command[0], "skipped", None
    if left < LEAST_SECONDS:
        reason = "no time was left"
    elif stage.needs_gpu and not gpu_memory():
        reason = "no GPU is visible"
    elif stage.optional and shutil.which(program) is None:
        status, reason = "unavailable", f"{program} is not installed"
    return reason and {"status": status, "seconds": 0.0, "note": reason}


def run(stage: Stage, log: Path, left: float) -> dict:
    """Run one stage for as long as it may, and read what it printed, even if it was stopped."""
    limit, start = min(stage.seconds, left), time.monotonic()
    begin = log.stat().st_size if log.exists() else 0
    with log.open("ab") as output:
        code = wait(stage.command, output, limit)
    text = log.read_bytes()[begin:].decode(errors="replace")
    shorten(log)
    notes = [f"had {limit:.0f} of its {stage.seconds:.0f} s"] if limit < stage.seconds else []
    if code is None:
        notes.insert(0, f"stopped after {limit:.0f} s")
    elif code:
        notes.insert(0, f"exit code {code}")
    found = understand(stage, text)
    notes += [found["problem"]] if "problem" in found else []
    status = "failed" if code != 0 or "problem" in found else "passed"
    if "refused" in found:
        status, notes = "unavailable", [found["refused"]]
    seconds = round(time.monotonic() - start, 1)
    return {"status": status, "seconds": seconds, "note": "; ".join(notes), **found}


def understand(stage: Stage, text: str) -> dict:
    try:
        return stage.read(text)
    except Exception as reason:  # a log cut short anywhere must not cost the other stages
        return {"problem": f"its log cannot be read: {type(reason).__name__}: {reason}"}


def wait(command: list[str], output, limit: float) -> int | None:
    """The exit code, or None where the command and all it started had to be stopped."""
    if shutil.which(command[0]) is None:
        output.write(f"{command[0]}: not found\n".encode())
        return 127
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def environment() -> dict[str, str]:
    """Of the stages: this repository first, GPU kernels on the GPU, no backend left out."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [str(ROOT), *filter(None, [variables.get("PYTHONPATH")])]
    variables.update(PYTHONPATH=os.pathsep.join(path), PYTHONUNBUFFERED="1", CI="true")
    native = gpu_capability()
    if native:
        variables.setdefault("TORCH_CUDA_ARCH_LIST", native)
    if gpu_memory() >= BIG_MEMORY:
        variables["EM_KERNELS_BIG_TESTS"] = "1"
    return variables


def gpu_memory() -> int:
    """Bytes on the first GPU; 0 without one."""
    return asked_gpu()[0]


def gpu_capability() -> str | None:
    """Of the first GPU, such as "9.0"; None without one."""
    return asked_gpu()[1]


@cache
def asked_gpu() -> tuple[int, str | None]:
    """Memory and capability, as a process of its own finds them: this one must outlive the GPU."""
    code = (
        "import torch\n"
        "if torch.cuda.is_available():\n"
        "    gpu = torch.cuda.get_device_properties(0)\n"
        "    print(gpu.total_memory, f'{gpu.major}.{gpu.minor}')"
    )
    try:
        done = subprocess.run(python("-c", code), capture_output=True, text=True, timeout=60)
        memory, capability = done.stdout.split()
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0, None
    return int(memory), capability


def shorten(log: Path) -> None:
    """Keep the end of a log, where the summary and the error are."""
    content = log.read_bytes()
    if len(content) > LOG_BYTES:
        log.write_bytes(b"[the beginning is left out]\n" + content[-LOG_BYTES:])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a stage is not left behind
    sys.exit(main())
