"""Checking, timing, memory and tables for the benchmarks of one operator.

What is timed has first been checked against float64 truth on a sample of its results: an
implementation that is wrong gets the word "wrong" and its error in place of a time.
"""

from __future__ import annotations

import ctypes
import gc
import math
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels import backends

Results = dict[str, Tensor]

# ||out - truth|| / ||truth|| above which a result is called wrong. Eager PyTorch stays below: in
# bfloat16 from hidden states, where logits are rounded, its gradients are off by 5e-2.
LIMIT = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
SECONDS, REPEATS, LEAST_REPEATS = 4.0, 9, 3
# The GPU waits this long (2 ms) before it starts: launches are queued by then and not timed.
HEAD_START_CYCLES = 4_000_000
PEERS = ("eager", "TRL", "Liger", "torch.compile")


GPU_IMPLS = ("triton", "cuda")


def our_impls(device: str) -> dict[str, str]:
    """Name in the table -> impl: every GPU backend that there is on a GPU, "auto" elsewhere."""
    there = [impl for impl in GPU_IMPLS if device == "cuda" and backends()[impl] == "available"]
    return {f"em_kernels {impl}": impl for impl in there} or {"em_kernels": "auto"}


class Sizes(NamedTuple):
    n: int  # tokens
    v: int  # vocabulary
    d: int  # hidden size


class Case(NamedTuple):
    """One table: implementations of the same computation on the same inputs."""

    name: str
    sizes: Sizes
    dtype: torch.dtype
    device: str
    contenders: dict[str, Callable[[], Results]]
    floor: tuple[str, Callable[[], object]]  # what no implementation can be faster than
    truth: dict[str, tuple[Tensor, Tensor]]  # result name -> (indices, float64 values there)
    left_out: dict[str, str]  # implementation -> why it is not in the table
    bytes_moved: int  # the least that memory has to move
    flops: int = 0  # of the matrix products
    kept_bytes: int = 0  # gradients and their accumulators: not counted as extra memory
    floor_bytes: int = 0  # what the floor moves, where it is a copy


def measure(
    case: Case, repeats: int = REPEATS, found: Callable[[dict], object] = lambda row: None
) -> list[dict]:
    """One row for the floor and for each contender; times are medians of interleaved rounds.

    `found` gets each row when its contender has been checked and timed once, and all of them again
    after the last round: a run that is stopped, or takes the device with it, has had its rows until
    then. On a device that is lost nothing more is run.
    """
    rounds, errors = Rounds(case.device), {}

    def row(name: str) -> dict:
        return row_of(case, name, rounds, errors.get(name))

    def begin(name: str, run: Callable[[], Results]) -> None:
        errors[name] = error_of(case, run)
        if errors[name] <= LIMIT[case.dtype]:
            rounds.add(name, run)
        else:
            rounds.failures[name] = "wrong"

    floor_name, floor = case.floor
    rounds.attempt(floor_name, lambda: (floor(), rounds.add(floor_name, floor)))
    found(row(floor_name))
    for name, run in case.contenders.items():
        rounds.attempt(name, partial(begin, name, run))
        found(row(name))
    rounds.go_on(repeats)
    rows = [row(name) | {"done": True} for name in (floor_name, *case.contenders)]
    for each in rows:
        found(each)
    return rows


class Rounds:
    """Seconds and peak bytes of several runs, timed in turn so that noise hits all alike."""

    def __init__(self, device: str):
        self.device = device
        self.runs: dict[str, Callable[[], object]] = {}
        self.samples: dict[str, list[float]] = {}
        self.peaks: dict[str, int | None] = {}
        self.failures: dict[str, str] = {}
        self.lost_by: str | None = None

    def add(self, name: str, run: Callable[[], object]) -> None:
        """The first round of one: it also looks at the memory."""
        self.runs[name], self.samples[name] = run, []
        self.peaks[name] = peak_memory(lambda: self.time(name), self.device)

    def time(self, name: str) -> None:
        self.samples[name].append(time_once(self.runs[name], self.device))

    def attempt(self, name: str, step: Callable[[], object]) -> None:
        """What raises is a failure of `name` alone, unless it has cost the device."""
        if self.lost_by is not None:
            self.failures[name] = f"not run: {self.lost_by} cost the device"
            return
        try:
            step()
        except Exception as reason:
            self.failures[name] = what_failed(reason)
            if is_lost(self.device):
                self.lost_by = name

    def go_on(self, repeats: int) -> None:
        """The other rounds; a run that is slow is spared the later ones."""
        for repeat in range(1, repeats):
            for name in self.runs:
                enough = repeat >= LEAST_REPEATS and sum(self.samples[name]) > SECONDS
                if self.lost_by is None and name not in self.failures and not enough:
                    self.attempt(name, partial(self.time, name))

    def seconds(self, name: str) -> float | None:
        """The median so far; None of one that failed."""
        right = name not in self.failures and self.samples.get(name)
        return statistics.median(self.samples[name]) if right else None


def is_lost(device: str) -> bool:
    """Whether an error has left a GPU so that this process can do nothing more with it."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=device).item()
    except Exception as reason:
        return not isinstance(reason, torch.OutOfMemoryError)
    return False


def what_failed(reason: Exception) -> str:
    """One line for the table; memory a failed run still holds goes with its traceback."""
    reason.__traceback__ = None
    if isinstance(reason, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(reason).__name__}: {' '.join(str(reason).split())}"[:120].replace("|", "/")


def error_of(case: Case, run: Callable[[], Results]) -> float:
    """The largest relative error among the results; this call is the warm-up as well."""
    results = run()
    worst = 0.0
    for name, (index, expected) in case.truth.items():
        out = results[name].detach()
        out = (out if out.dim() == 0 else out[index]).double().to(expected.device)
        error = ((out - expected).norm() / expected.norm()).item()
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def time_all(
    runs: dict[str, Callable[[], object]], device: str, repeats: int
) -> tuple[dict[str, float], dict[str, int | None]]:
    """Median seconds and peak bytes of each."""
    rounds = Rounds(device)
    for name, run in runs.items():
        rounds.add(name, run)
    rounds.go_on(repeats)
    if rounds.failures:
        raise RuntimeError(f"failed while it was timed: {rounds.failures}")
    return {name: rounds.seconds(name) for name in runs}, rounds.peaks


def time_once(run: Callable[[], object], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_memory(run: Callable[[], object], device: str) -> int | None:
    """Bytes held at the peak of one call beyond those held before it; None if not to be had."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        if backends()["cpu"] == "available":
            import_module("em_kernels.backends.cpu").release_memory()  # what it kept counts as well
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
    except (OSError, AttributeError):
        return None
    before = resident("VmRSS")
    run()
    return max(0, resident("VmHWM") - before)


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def facts_of(case: Case) -> dict:
    """What the rows of a table have in common."""
    dtype = str(case.dtype).removeprefix("torch.")
    return {"op": case.name, **case.sizes._asdict(), "dtype": dtype}


def row_of(case: Case, name: str, rounds: Rounds, error: float | None) -> dict:
    seconds, floor = rounds.seconds(name), rounds.seconds(case.floor[0])
    peak, is_floor = rounds.peaks.get(name), name == case.floor[0]
    moved = case.floor_bytes if is_floor and case.floor_bytes else case.bytes_moved
    speed, times_floor = seconds and moved / seconds, seconds and floor and seconds / floor
    peers = {peer: rounds.seconds(peer) for peer in PEERS if seconds and not is_floor}
    return {
        **facts_of(case),
        "implementation": name,
        "seconds": seconds,
        "samples": len(rounds.samples.get(name, ())),
        "faster_than": {peer: time / seconds for peer, time in peers.items() if time},
        "times_floor": times_floor,
        "gigabytes_per_second": speed and speed / 1e9,
        "of_copy_bandwidth": times_floor
        and case.floor_bytes
        and moved / case.floor_bytes / times_floor,
        "gigaflops": seconds and case.flops / seconds / 1e9,
        "peak_bytes": peak,
        "extra_bytes": None if peak is None else max(0, peak - case.kept_bytes),
        "error": error,
        "failure": rounds.failures.get(name),
    }


def environment(device: str) -> dict:
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
