"""The JSON and Markdown that `benchmarks.gpu` makes of its stages' results, and the docs' table.

python -m benchmarks.gpu_report             the machine as JSON: GPU, driver, versions, peers
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.gpu_logs import METRICS
from benchmarks.markdown import table_rows
from benchmarks.report import LEGEND, table, title

PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "safetensors", "setuptools", "ninja"),
    *("pytest", "pytest-xdist", "pytest-timeout", "hypothesis"),
    *("trl", "liger-kernel", "verl", "flash-attn", "cut-cross-entropy"),
)
GPU_FIELDS = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory"
TOOLS = {
    "nvidia-smi": ["nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv"],
    "nvcc": ["nvcc", "--version"],
    "compiler": ["c++", "--version"],
}
NOT_MEASURED = "Not yet measured on a GPU.\n"


def main() -> None:
    facts = machine()
    print(json.dumps(facts, indent=1))
    sys.exit("gpu" not in facts)


def machine() -> dict:
    """The GPU and every version that a time depends on."""
    import torch

    from em_kernels.backends.availability import why_no_gpu

    facts = {
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "packages": {name: version_of(name) for name in PACKAGES},
        "tools": {name: said(command) for name, command in TOOLS.items()},
    }
    reason = why_no_gpu()
    if reason is None:
        gpu = torch.cuda.get_device_properties(0)
        facts["gpu"] = {
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "memory_bytes": gpu.total_memory,
            "multiprocessors": gpu.multi_processor_count,
            "l2_bytes": gpu.L2_cache_size,
        }
    else:
        facts["no_gpu"] = f"no GPU is visible{reason}"
    return facts


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def said(command: list[str]) -> str | None:
    """What a command prints; None where there is no such command."""
    if shutil.which(command[0]) is None:
        return None
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as reason:
        return str(reason)
    return finished.stdout.strip() or finished.stderr.strip()


# The report


def save(results: list[dict], folder: Path, order: Sequence[str] = ()) -> list[Path]:
    """Write gpu-<name>-<date>.json and .md of the results so far, together with what other calls
    have written there; the stages as in `order`."""
    name = gpu_of(results).get("name", "none")
    date = time.strftime("%Y-%m-%d")
    stem = re.sub(r"[^a-z0-9.]+", "-", f"gpu-{name}-{date}".lower())
    paths = [folder / f"{stem}.json", folder / f"{stem}.md"]
    stages = merged(saved_stages(paths[0]), results, order)
    write(paths[0], json.dumps({"date": date, "stages": stages}, indent=1) + "\n")
    write(paths[1], markdown(stages, date))
    return paths


def write(path: Path, text: str) -> None:
    """Whole or not at all: a call that is stopped leaves the file of before."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def saved_stages(path: Path) -> list[dict]:
    if not path.exists():
        return []
    try:
        return [*json.loads(path.read_text())["stages"]]
    except (OSError, ValueError, KeyError, TypeError) as reason:
        print(f"{path} is written anew, it cannot be read: {reason}", flush=True)
        return []


def merged(earlier: list[dict], results: list[dict], order: Sequence[str]) -> list[dict]:
    """The last result of every stage; one that was not begun does not replace one that was."""
    found = {result["stage"]: result for result in earlier}
    for result in results:
        if "when" in result or "when" not in found.get(result["stage"], {}):
            found[result["stage"]] = result
    places = {name: place for place, name in enumerate(order)}
    return sorted(found.values(), key=lambda result: places.get(result["stage"], len(places)))


def gpu_of(results: list[dict]) -> dict:
    machines = [result["machine"] for result in results if "machine" in result]
    return machines[0].get("gpu", {}) if machines else {}


def device_of(results: list[dict]) -> str | None:
    """The GPU that a call runs on, with what a time depends on; None where none was found."""
    machine = next((result["machine"] for result in results if "machine" in result), {})
    if "gpu" not in machine:
        return None
    query = (machine.get("tools", {}).get("nvidia-smi") or "").splitlines()
    said = dict(zip(GPU_FIELDS.split(","), query[1].split(", "))) if len(query) > 1 else {}
    torch = machine.get("packages", {}).get("torch")
    words = [f"driver {said['driver_version']}", said["power.limit"]] if len(said) > 3 else []
    return ", ".join([machine["gpu"]["name"], *words, *([f"torch {torch}"] if torch else [])])


def stage_line(result: dict) -> str:
    words = (result["stage"], result["status"], f"{result['seconds']:.0f} s", result["note"])
    return " | ".join(words)


def markdown(results: list[dict], date: str) -> str:
    parts = [f"# {gpu_of(results).get('name', 'No GPU')}, {date}", versions(results)]
    lines = ["| stage | result | time | note | begun |", "| --- | --- | ---: | --- | --- |"]
    lines += [f"| {stage_line(result)} | {result.get('when', '-')} |" for result in results]
    parts += ["\n".join(lines), devices(results)]
    parts += [tests_part(result) for result in results if "counts" in result]
    left_out = {k: v for result in results for k, v in result.get("left_out", {}).items()}
    parts.append("\n".join(f"- {name} is left out: {why}" for name, why in left_out.items()))
    rows = rows_of(results)
    if rows:
        parts += ["## Goals", goals_table(rows)]
        parts += ["## Published by the peers, on an H100", published_table(rows)]
        parts += ["## Benchmarks", LEGEND.strip()]
    if profiles := profile_table(results):
        parts += ["## Profile", profiles]
    for name in dict.fromkeys(map(title, rows)):
        parts += [f"### {name}", table([row for row in rows if title(row) == name])]
    return "\n\n".join(part for part in parts if part) + "\n"


def versions(results: list[dict]) -> str:
    machines = [result["machine"] for result in results if "machine" in result]
    if not machines:
        return ""
    facts = machines[0]
    packages = [f"{name} {number}" for name, number in facts["packages"].items() if number]
    missing = [name for name, number in facts["packages"].items() if not number]
    said = f"Python {facts['python']}, CUDA {facts['cuda']}, {', '.join(packages)}."
    return said + (f" Not installed: {', '.join(missing)}." if missing else "")


def devices(results: list[dict]) -> str:
    """Which stages were run on what, where it is known: a line a device."""
    on: dict[str, list[str]] = {}
    for result in results:
        if result.get("device"):
            on.setdefault(result["device"], []).append(result["stage"])
    return "\n".join(f"- On {device}: {', '.join(names)}." for device, names in on.items())


def tests_part(result: dict) -> str:
    counts = ", ".join(f"{number} {name.lower()}" for name, number in result["counts"].items())
    lines = [f"Tests: {counts or 'none'}.", *(f"- {line}" for line in result["failures"])]
    return "\n".join(lines)


def profile_table(results: list[dict]) -> str:
    """Of all profiles together, a line a kernel."""
    columns = [column for column, _ in METRICS.values()]
    lines = [("backend", "kernel", *columns), ("---", "---", *["---:"] * len(columns))]
    for result in results:
        for kernel in result.get("profile", []):
            numbers = [kernel.get(column) for column in columns]
            said = ["-" if x is None else f"{x:.3g}" for x in numbers]
            lines.append((result["stage"].removeprefix("profile-"), kernel["kernel"], *said))
    return table_rows(lines) if lines[2:] else ""


# What the kernels are to reach on an H200: operator, dtype, what it is measured by, bound. A goal
# from logits is a share of the copy's bandwidth, at least; one from hidden states is the time
# over that of the bare matrix products, at most; one over peers is against the fastest of them.
COPY, FLOOR, PEERS, MEMORY = "of copy bandwidth", "x the bare products", "x best peer", "GiB extra"
GOALS = (
    ("softmax_stats forward", "bfloat16", COPY, 0.90),
    ("softmax_stats backward", "bfloat16", COPY, 0.90),
    ("token_loss (entropy_loss) forward + backward", "bfloat16", COPY, 0.85),
    ("softmax_stats forward + backward", "bfloat16", PEERS, 1.3),
    ("linear_entropy_loss forward + backward", "bfloat16", FLOOR, 1.12),
    ("linear_softmax_stats forward", "bfloat16", FLOOR, 1.12),
    ("linear_softmax_stats backward", "bfloat16", FLOOR, 1.15),
    ("linear_entropy_loss forward + backward", "bfloat16", PEERS, 1.25),
    ("linear_entropy_loss forward + backward", "bfloat16", MEMORY, 1.25),
)
AT_LEAST = (COPY, PEERS)
MEMORY_TOKENS = 32768  # where the goal of memory is set


def goals_table(rows: list[dict]) -> str:
    lines = ["| goal | backend | measured | at | |", "| --- | --- | ---: | --- | --- |"]
    for goal in GOALS:
        found = list(filter(None, (goal_line(row, goal, rows) for row in rows)))
        lines += found or [f"| {goal_name(goal)} | - | not measured | - | - |"]
    return "\n".join(lines)


def goal_line(row: dict, goal: tuple, rows: list[dict]) -> str | None:
    """None where the row is of something else."""
    operator, dtype, measure, bound = goal
    if (row["op"], row["dtype"]) != (operator, dtype) or backend_of(row) is None:
        return None
    value = measured(row, measure, rows)
    if value is None and row["failure"] is None:
        return None
    reached = value is not None and (value >= bound if measure in AT_LEAST else value <= bound)
    said = row["failure"] if value is None else f"{value:.3f}"
    at = title(row).partition(", ")[2]
    words = (goal_name(goal), backend_of(row), said, at, "met" if reached else "missed")
    return f"| {' | '.join(words)} |"


def goal_name(goal: tuple) -> str:
    operator, _, measure, bound = goal
    return f"{operator}: {'>=' if measure in AT_LEAST else '<='} {bound:g} {measure}"


def backend_of(row: dict) -> str | None:
    """Of a row of this library's, timed without anything beside it; None for all others."""
    name, _, backend = row["implementation"].partition(" ")
    if name != "em_kernels" or " " in backend:
        return None
    return backend or "auto"


def measured(row: dict, measure: str, rows: list[dict]) -> float | None:
    """None where the row says nothing about it."""
    if row["seconds"] is None:
        return None
    if measure == PEERS:
        others = [r for r in rows if title(r) == title(row) and r["seconds"] and is_peer(r)]
        return min(r["seconds"] for r in others) / row["seconds"] if others else None
    if measure == MEMORY:
        known = row["extra_bytes"] is not None and row["n"] >= MEMORY_TOKENS
        return row["extra_bytes"] / 2**30 if known else None
    return row["of_copy_bandwidth"] if measure == COPY else row["times_floor"]


# What peers have published of themselves on an H100, bfloat16: operator, N, V, D -> milliseconds.
PUBLISHED = {
    ("TRL", "softmax_stats forward", 8192, 151936, 0): 0.89,
    ("Liger", "linear_softmax_stats forward", 8192, 131072, 4096): 12.3,
    ("Liger", "linear_softmax_stats backward", 8192, 131072, 4096): 37.9,
    ("Liger", "linear_softmax_stats forward + backward", 8192, 131072, 4096): 50.2,
}


def published_table(rows: list[dict]) -> str:
    """Beside each published time, those measured here of that peer and of this library."""
    head = ("operator", "peer", "published, ms", "it here, ms", "triton, ms", "cuda, ms")
    lines = [head, ("---", "---", *["---:"] * 4)]
    for (peer, op, n, v, d), published in PUBLISHED.items():
        same = [r for r in rows if (r["op"], r["n"], r["v"], r["d"]) == (op, n, v, d)]
        here = {r["implementation"]: r["seconds"] for r in same if r["dtype"] == "bfloat16"}
        times = [here.get(name) for name in (peer, "em_kernels triton", "em_kernels cuda")]
        said = [f"{time * 1e3:.2f}" if time else "-" for time in times]
        at = f"{op}, N={n} V={v}" + (f" D={d}" if d else "")
        lines.append((at, peer, f"{published:g}", *said))
    return table_rows(lines)


def is_peer(row: dict) -> bool:
    """Another library's implementation: what is timed with an error, and is not ours or eager."""
    return row["error"] is not None and row["implementation"] in ("TRL", "Liger", "verl")


# The table of the docs


def gpu_table(results: Path) -> str:
    """The newest of the results in `results`: what was timed, and the goals."""
    saved = [(json.loads(path.read_text()), path.name) for path in results.glob("gpu-*.json")]
    timed = [(run, name) for run, name in saved if rows_of(run["stages"])]
    if not timed:
        return NOT_MEASURED
    run, name = max(timed, key=lambda found: (found[0]["date"], found[1]))
    stages = run["stages"]
    gpu, report = gpu_of(stages).get("name", "an unknown GPU"), Path(name).with_suffix(".md")
    said = (
        f"Measured on {gpu}, {run['date']}, bfloat16; all of it in `benchmarks/results/{report}`."
    )
    not_passed = [f"{r['stage']} ({r['status']})" for r in stages if r["status"] != "passed"]
    said += f" Stages that did not pass: {', '.join(not_passed)}." if not_passed else ""
    said += " Goals are set for an H200."
    rows = rows_of(stages)
    return "\n\n".join([said, speed_table(rows), goals_table(rows)]) + "\n"


def rows_of(stages: list[dict]) -> list[dict]:
    return [row for stage in stages for row in stage.get("rows", [])]


def speed_table(rows: list[dict]) -> str:
    head = ("operator", "backend", "ms", "of copy", "/ floor", "x TRL", "x Liger", "x eager")
    lines = [head, ("---", "---", *["---:"] * 6)]
    for row in rows:
        if row["dtype"] == "bfloat16" and backend_of(row) is not None:
            at = title(row).replace(", bfloat16", "")
            lines.append((at, backend_of(row), *speeds(row, rows)))
    return table_rows(lines)


def speeds(row: dict, rows: list[dict]) -> list[str]:
    """Peers are timed in a process of their own."""
    if row["seconds"] is None:
        return [row["failure"], *["-"] * 5]
    share, beside = row["of_copy_bandwidth"], [r for r in rows if title(r) == title(row)]
    peers = {r["implementation"]: r["seconds"] / row["seconds"] for r in beside if r["seconds"]}
    return [
        f"{row['seconds'] * 1e3:.2f}",
        f"{share:.0%}" if share else "-",
        f"{row['times_floor']:.2f}",
        *(f"{peers[name]:.2f}" if name in peers else "-" for name in ("TRL", "Liger", "eager")),
    ]


if __name__ == "__main__":
    main()
