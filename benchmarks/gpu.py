"""Everything that needs a GPU in one command: build, tests, benchmarks, and one report of them all.

    make gpu                    or: python -m benchmarks.gpu --out gpu-output
    make gpu STAGES="smoke cases bench-triton"

Where a command may not run for long, three calls do it all, the most valuable first; in each the
limits of its stages, with those they need, add up to no more than SECONDS:

    STAGES="smoke cases sanitizers memory"
    STAGES="bench"
    STAGES="tests profile"

The calls of one day share the report and the logs in their folder, OUT=... is another: a stage
that is run again takes the place of its own result, and each says when and on what it was run.
--help lists the stages with their limits, and the groups that stand for several.
Nothing is downloaded and nothing installed; the wheels that `make gpu-wheels` made are unpacked.
CUDA is compiled for the GPU that is there, unless TORCH_CUDA_ARCH_LIST says otherwise. Each stage
is a process of its own with a time limit and a log; the report is written anew after every stage,
and a benchmark's row is in its log when it is measured, so that what was found is kept whatever
happens later. The exit code is 0 if every stage did what it should; one whose tool is not there is
excused.
"""

from __future__ import annotations

import argparse
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

try:
    from benchmarks import gpu_logs, gpu_report, gpu_tests, gpu_wheels
except ModuleNotFoundError as missing:
    if missing.name != "torch":
        raise
    sys.exit(f"{sys.executable} has no torch: make gpu GPU_PYTHON=... takes another Python")

ROOT = Path(__file__).parent.parent
SECONDS = 525.0  # for all stages together; with starting and reporting, under nine minutes
LEAST_SECONDS = 5.0  # with less time left than this a stage is not begun
MOST_ENDS = 5  # so often a stage that goes on is begun
LOG_BYTES = 4 << 20  # of a stage's log are kept
TIME = "%Y-%m-%d %H:%M:%S"
BIG_MEMORY = 64 << 30  # a GPU with as much also runs the tests of more than 2^31 logits


class Stage(NamedTuple):
    """One command, and how what it prints becomes a result."""

    name: str
    seconds: float  # its time limit, shortened where less is left of the whole
    command: list[str]
    log: str  # file in the output folder; stages that share one append to it
    read: Callable[[str], dict] = lambda text: {}  # "problem": a failure; "refused": unavailable
    needs_gpu: bool = True
    optional: bool = False  # unavailable, not failed, where its program is not installed
    needs: tuple[str, ...] = ()  # stages that run before it in every call
    goes_on: bool = False  # takes --from N, and is begun again behind what ended it


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


BUILT, BUILT_CASES = ("environment", "build"), ("environment", "build-cases")
WITH_PEERS = ("environment", "build", "peers")


def bench(name: str, seconds: float, *arguments: str) -> Stage:
    command = python("-m", "benchmarks", *arguments, "--device", "cuda", "--rows")
    needs = WITH_PEERS if name.endswith("peers") else BUILT
    return Stage(name, seconds, command, "benchmarks.log", gpu_logs.read_rows, needs=needs)


def smoke(impl: str, seconds: float) -> Stage:
    command = python("-m", "benchmarks.gpu_smoke", impl)
    read, options = gpu_logs.read_smoke, dict(needs=BUILT, goes_on=True)
    return Stage(f"smoke-{impl}", seconds, command, "smoke.log", read, **options)


def profile(impl: str, seconds: float) -> Stage:
    """What Nsight Compute says of the hot kernels; some machines do not let it look."""
    program = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    command = [program, "--clock-control", "none", "--csv", "--print-units", "base"]
    command += ["--metrics", ",".join(gpu_logs.METRICS), "-k", "regex:statistics|gradient|loss"]
    command += python("-m", "benchmarks.gpu_kernels", impl)
    read, options = gpu_logs.read_profile, dict(optional=True, needs=BUILT)
    return Stage(f"profile-{impl}", seconds, command, "profile.log", read, **options)


def tests(name: str, seconds: float, which: tuple[str, ...]) -> Stage:
    command, read = gpu_tests.command(*which), gpu_tests.read
    return Stage(name, seconds, command, "tests.log", read, needs=WITH_PEERS)


def cases(name: str, seconds: float, *tool: str, read=gpu_logs.read_cases) -> Stage:
    options = dict(optional=bool(tool), needs=BUILT_CASES, goes_on=True)
    return Stage(name, seconds, [*tool, str(CASES)], "cases.log", read, **options)


def sanitizer(tool: str, seconds: float) -> Stage:
    """The small cases under one tool of compute-sanitizer."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = (program, "--tool", tool, "--error-exitcode", "1")
    return cases(tool, seconds, *command, read=gpu_logs.read_sanitizer)


CASES = ROOT / "build/cuda/cases"
LOGITS = ("softmax_stats", "token_loss", "--n", "8192", "--v", "151936", "--dtype", "bfloat16")
HIDDEN = ("linear_entropy_loss", "linear_softmax_stats", "--n", "8192", "--dtype", "bfloat16")
MEMORY = ("linear_entropy_loss", "--n", "32768", "--dtype", "bfloat16")
SHAPE_A = ("--d", "4096", "--v", "131072")  # Liger's published one
SHAPE_B = ("--d", "3584", "--v", "152064")  # the head of Qwen2.5-7B
TRITON, CUDA = ("--only", "em_kernels triton"), ("--only", "em_kernels cuda")
PEERS = ("--only", "eager", "TRL", "Liger", "verl", "torch.compile")
REPORT = python("-m", "benchmarks.gpu_report")
BUILD = python("setup.py", "build_ext", "--inplace", "--parallel", "2")
BUILD_CASES = python("cuda_build.py", "cases")
UNPACK = python("-m", "benchmarks.gpu_wheels", "--unpack", str(gpu_wheels.UNPACKED))
# Limits are about twice what an H200 took: 29 s to build, 47 and 7 to smoke, 14 to 50 a benchmark.
STAGES = (
    Stage("environment", 20, REPORT, "build.log", gpu_logs.read_environment, needs_gpu=False),
    Stage("build", 90, BUILD, "build.log", gpu_logs.read_build, needs=("environment",)),
    Stage("peers", 20, UNPACK, "build.log", gpu_logs.read_peers, needs=("environment",)),
    smoke("triton", 90),
    smoke("cuda", 60),
    bench("logits-triton", 40, *LOGITS, *TRITON),
    bench("logits-cuda", 40, *LOGITS, *CUDA),
    bench("logits-peers", 65, *LOGITS, *PEERS),
    bench("hidden-triton", 40, *HIDDEN, *SHAPE_A, *TRITON),
    bench("hidden-cuda", 45, *HIDDEN, *SHAPE_A, *CUDA),
    bench("hidden-peers", 75, *HIDDEN, *SHAPE_A, *PEERS),
    Stage("build-cases", 45, BUILD_CASES, "build.log", needs=("environment",)),
    cases("cases", 20),
    sanitizer("memcheck", 30),
    sanitizer("racecheck", 30),
    sanitizer("synccheck", 30),
    bench("hidden-3584-triton", 40, *HIDDEN, *SHAPE_B, *TRITON),
    bench("hidden-3584-cuda", 45, *HIDDEN, *SHAPE_B, *CUDA),
    bench("memory-triton", 40, *MEMORY, *SHAPE_A, *TRITON),
    bench("memory-cuda", 45, *MEMORY, *SHAPE_A, *CUDA),
    profile("triton", 45),
    profile("cuda", 40),
    tests("tests-cuda", 90, gpu_tests.OF_CUDA),
    tests("tests-others", 220, gpu_tests.NOT_OF_CUDA),
)
# Names that stand for several stages.
GROUPS = {
    "smoke": ("smoke-triton", "smoke-cuda"),
    "sanitizers": ("memcheck", "racecheck", "synccheck"),
    "bench-triton": ("logits-triton", "hidden-triton", "hidden-3584-triton"),
    "bench-cuda": ("logits-cuda", "hidden-cuda", "hidden-3584-cuda"),
    "bench-peers": ("logits-peers", "hidden-peers"),
    "bench": ("bench-triton", "bench-cuda", "bench-peers"),
    "memory": ("memory-triton", "memory-cuda"),
    "profile": ("profile-triton", "profile-cuda"),
    "tests": ("tests-cuda", "tests-others"),
}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    results = run_all(chosen(options.only or names()), options.out, options.seconds)
    print("saved", *gpu_report.save(results, options.out, names()))
    return 0 if all(result["status"] in ("passed", "unavailable") for result in results) else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description="Build, test and measure on the GPU of this machine.",
        epilog=listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-output"), help="folder of the report")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="for all stages together (%(default)s)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="STAGE",
        choices=[*names(), *GROUPS],
        help="stages or groups of them, with what they need; all by default",
    )
    return parser.parse_args(arguments)


def listing() -> str:
    """The stages in their order, with their limits, and the groups."""
    stages = [f"  {made.name:20} {made.seconds:4.0f} s" for made in STAGES]
    groups = [f"  {name:20} {' '.join(members)}" for name, members in GROUPS.items()]
    return "\n".join(["stages:", *stages, "", "groups:", *groups])


def names() -> list[str]:
    return [stage.name for stage in STAGES]


def chosen(asked: list[str]) -> list[Stage]:
    """The stages and those of the groups, with all that they need, in the order of STAGES."""
    wanted = {name for each in asked for name in members(each)}
    wanted |= {need for made in STAGES if made.name in wanted for need in made.needs}
    return [made for made in STAGES if made.name in wanted]


def members(name: str) -> list[str]:
    """The stages that a name stands for."""
    if name in names() or name not in GROUPS:
        return [name]
    return [each for part in GROUPS[name] for each in members(part)]


def run_all(stages: list[Stage], folder: Path, seconds: float) -> list[dict]:
    """One result per stage, each {stage, status, seconds, note, **what `read` found}, and where it
    was begun also {when, device}."""
    end = time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    for log in {stage.log for stage in stages}:
        begin_log(folder / log)
    results: list[dict] = []
    for stage in stages:
        left, begun = end - time.monotonic(), time.strftime(TIME)
        result = {"stage": stage.name}
        results.append(result)
        if found := without_running(stage, left):
            result.update(found)
        else:
            result.update(when=begun, **run(stage, folder / stage.log, left))
            result["device"] = gpu_report.device_of(results)
        print(gpu_report.stage_line(result), flush=True)
        gpu_report.save(results, folder, names())
    return results


def begin_log(log: Path) -> None:
    """Behind what the other calls of the day have left in it; anew on another day."""
    if not log.exists():
        return
    before, now = time.localtime(log.stat().st_mtime), time.strftime(TIME)
    if time.strftime(TIME, before).split()[0] != now.split()[0]:
        log.unlink()
        return
    with log.open("a") as output:
        print(f"\n--- a call of {now} ---", file=output)


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
    code = attempt(stage, log, limit)
    text = log.read_bytes()[begin:].decode(errors="replace")
    shorten(log)
    notes = [f"had {limit:.0f} of its {stage.seconds:.0f} s"] if limit < stage.seconds else []
    if code is None:
        notes.insert(0, f"stopped after {limit:.0f} s")
    elif code:
        notes.insert(0, how_it_ended(code))
    found = understand(stage, text)
    notes += [found["problem"]] if "problem" in found else []
    status = "failed" if code != 0 or "problem" in found else "passed"
    if "refused" in found:
        status, notes = "unavailable", [found["refused"]]
    seconds = round(time.monotonic() - start, 1)
    return {"status": status, "seconds": seconds, "note": "; ".join(notes), **found}


def how_it_ended(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"


def attempt(stage: Stage, log: Path, limit: float) -> int | None:
    """The exit code, None if it was stopped. A stage that goes on is begun again behind the case
    that ended its process, by a crash or by a device that is lost, as often as MOST_ENDS."""
    end, first, code = time.monotonic() + limit, 0, 0
    for _ in range(MOST_ENDS if stage.goes_on else 1):
        begin = log.stat().st_size if log.exists() else 0
        command = [*stage.command, *(["--from", str(first)] if first else [])]
        with log.open("ab") as output:
            ended = wait(command, output, end - time.monotonic())
        if ended is None:
            return None
        code = code or ended
        text = log.read_bytes()[begin:].decode(errors="replace")
        done = gpu_logs.cases_done(text)
        if not stage.goes_on or ended in (0, 127) or done is None:
            break
        first += done
        if not gpu_logs.says_lost(text):
            with log.open("a") as output:
                print(f"FAILED number {first}: {how_it_ended(ended)}", file=output)
            first += 1
    return code


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
    if gpu_wheels.UNPACKED.is_dir():
        path.append(str(gpu_wheels.UNPACKED))
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
