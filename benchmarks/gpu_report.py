"""What `benchmarks.gpu` reads out of its stages' logs, and the JSON and Markdown it makes of it.

python -m benchmarks.gpu_report     the machine as JSON: GPU, driver, versions, peers
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.common import LEGEND, table, title

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
# A line of `pytest -v`, of one process or of several.
OUTCOME = re.compile(
    r"^\[gw\d+\] \[ *\d+%\] (?P<first>[A-Z]+) (?P<test>tests/.*?) *$"
    r"|^(?P<alone>tests/.*?) (?P<last>[A-Z]+)(?: \(.*\))? +\[ *\d+%\]$",
    re.M,
)
MOST_FAILURES, LONGEST_LINE = 40, 300


def main() -> None:
    facts = machine()
    print(json.dumps(facts, indent=1))
    sys.exit("gpu" not in facts)


def machine() -> dict:
    """The GPU and every version that a time depends on."""
    import torch

    facts = {
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "packages": {name: version_of(name) for name in PACKAGES},
        "tools": {name: said(command) for name, command in TOOLS.items()},
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        facts["gpu"] = {
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "memory_bytes": gpu.total_memory,
            "multiprocessors": gpu.multi_processor_count,
            "l2_bytes": gpu.L2_cache_size,
        }
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


def read_environment(text: str) -> dict:
    facts = json.loads(text[text.index("{") : text.rindex("}") + 1])
    return {"machine": facts} if "gpu" in facts else {"machine": facts, "problem": "no GPU"}


def read_build(text: str) -> dict:
    """setup.py ends well without the compiled part, and then says so."""
    left_out = re.search(r"WARNING: installing without.*", text)
    return {"problem": left_out[0]} if left_out else {}


def read_tests(text: str) -> dict:
    """The outcome of every test of `pytest -v`, finished or not, and why tests were skipped."""
    outcomes = {}
    for found in OUTCOME.finditer(text):
        outcomes[found["test"] or found["alone"]] = found["first"] or found["last"]
    counts = {name: [*outcomes.values()].count(name) for name in sorted(set(outcomes.values()))}
    failures = re.findall(r"^(?:FAILED|ERROR) tests/.*", text, re.M)
    result = {
        "counts": counts,
        "failures": [line[:LONGEST_LINE] for line in failures[:MOST_FAILURES]],
        "skipped_because": re.findall(r"^SKIPPED \[\d+\] .*", text, re.M),
    }
    return result if outcomes else {**result, "problem": "no test was run"}


def read_rows(text: str) -> dict:
    """The rows that `python -m benchmarks --rows` printed, up to where it was stopped."""
    rows = [json.loads(line) for line in text.splitlines() if re.match(r'\{"op": .*\}$', line)]
    left_out = dict(re.findall(r"^(\S+) is left out: (.*)$", text, re.M))
    found = {"rows": rows, "left_out": left_out}
    return found if rows else {**found, "problem": "nothing was measured"}


# The report


def save(results: list[dict], folder: Path) -> list[Path]:
    """Write gpu-<name>-<date>.json and .md of the results so far."""
    name = gpu_of(results).get("name", "none")
    date = time.strftime("%Y-%m-%d")
    stem = re.sub(r"[^a-z0-9.]+", "-", f"gpu-{name}-{date}".lower())
    paths = [folder / f"{stem}.json", folder / f"{stem}.md"]
    paths[0].write_text(json.dumps({"date": date, "stages": results}, indent=1) + "\n")
    paths[1].write_text(markdown(results, date))
    return paths


def gpu_of(results: list[dict]) -> dict:
    machines = [result["machine"] for result in results if "machine" in result]
    return machines[0].get("gpu", {}) if machines else {}


def stage_line(result: dict) -> str:
    words = (result["stage"], result["status"], f"{result['seconds']:.0f} s", result["note"])
    return " | ".join(words)


def markdown(results: list[dict], date: str) -> str:
    parts = [f"# {gpu_of(results).get('name', 'No GPU')}, {date}", versions(results)]
    lines = ["| stage | result | time | note |", "| --- | --- | ---: | --- |"]
    parts.append("\n".join(lines + [f"| {stage_line(result)} |" for result in results]))
    parts += [tests_part(result) for result in results if "counts" in result]
    left_out = {k: v for result in results for k, v in result.get("left_out", {}).items()}
    parts.append("\n".join(f"- {name} is left out: {why}" for name, why in left_out.items()))
    rows = [row for result in results for row in result.get("rows", [])]
    if rows:
        parts += ["## Goals", goals_table(rows), "## Benchmarks", LEGEND.strip()]
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


def tests_part(result: dict) -> str:
    counts = ", ".join(f"{number} {name.lower()}" for name, number in result["counts"].items())
    lines = [f"Tests: {counts or 'none'}.", *(f"- {line}" for line in result["failures"])]
    return "\n".join(lines)


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


def goals_table(rows: list[dict]) -> str:
    lines = ["| goal | measured | at | reached |", "| --- | ---: | --- | --- |"]
    for operator, dtype, measure, bound in GOALS:
        for row in rows:
            if (row["op"], row["dtype"], row["implementation"]) != (operator, dtype, "em_kernels"):
                continue
            value = measured(row, measure, rows)
            if value is not None:
                reached = value >= bound if measure in AT_LEAST else value <= bound
                sign = ">=" if measure in AT_LEAST else "<="
                goal = f"{operator}: {sign} {bound:g} {measure}"
                at = title(row).partition(", ")[2]
                lines.append(f"| {goal} | {value:.3f} | {at} | {'yes' if reached else 'no'} |")
    return "\n".join(lines)


def measured(row: dict, measure: str, rows: list[dict]) -> float | None:
    """None where the row says nothing about it."""
    if row["seconds"] is None:
        return None
    if measure == PEERS:
        others = [r for r in rows if title(r) == title(row) and r["seconds"] and is_peer(r)]
        return min(r["seconds"] for r in others) / row["seconds"] if others else None
    if measure == MEMORY:
        known = row["extra_bytes"] is not None and row["n"] >= 32768
        return row["extra_bytes"] / 2**30 if known else None
    return row["of_copy_bandwidth"] if measure == COPY else row["times_floor"]


def is_peer(row: dict) -> bool:
    """Another library's implementation: what is timed with an error, and is not ours or eager."""
    return row["error"] is not None and row["implementation"] in ("TRL", "Liger", "verl")


if __name__ == "__main__":
    main()
