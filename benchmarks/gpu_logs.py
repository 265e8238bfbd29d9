"""What the stages of `benchmarks.gpu` found, read out of their logs, whole or cut short.

Each `read_...` gives what goes into the report; "problem" in it is a failure of the stage,
"refused" says that the machine does not let its tool look.
"""

from __future__ import annotations

import csv
import json
import re

from benchmarks.report import newest

# A line of `pytest -v`, of one process or of several.
OUTCOME = re.compile(
    r"^\[gw\d+\] \[ *\d+%\] (?P<first>[A-Z]+) (?P<test>tests/.*?) *$"
    r"|^(?P<alone>tests/.*?) (?P<last>[A-Z]+)(?: \(.*\))? +\[ *\d+%\]$",
    re.M,
)
MOST_FAILURES, LONGEST_LINE = 40, 300


def read_environment(text: str) -> dict:
    facts = json.loads(text[text.index("{") : text.rindex("}") + 1])
    problem = {} if "gpu" in facts else {"problem": facts.get("no_gpu", "no GPU is visible")}
    return {"machine": facts, **problem}


def read_build(text: str) -> dict:
    """setup.py ends well without the compiled parts, and then says so."""
    left_out = re.findall(r"WARNING: installing without.*", text)
    return {"problem": "; ".join(left_out)} if left_out else {}


def read_peers(text: str) -> dict:
    """What `benchmarks.gpu_wheels --unpack` put in its folder, and which peers are absent."""
    unpacked = re.findall(r"^(\S+\.whl) is unpacked$", text, re.M)
    return {"unpacked": unpacked, "left_out": read_left_out(text)}


def read_left_out(text: str) -> dict[str, str]:
    return dict(re.findall(r"^(\S.*?) is left out: (.*)$", text, re.M))


CASE = re.compile(r"^(?:ok|FAILED) +\S.*?: ", re.M)
PASSED_BY = re.compile(r"^skip +\S.*?: ", re.M)


def cases_done(text: str) -> int | None:
    """How many cases a process had behind it that ended before its last one, done or skipped; None
    if it came to its end."""
    ended = re.search(r"^\d+ (?:cases|checks), \d+ failed$", text, re.M)
    return None if ended else len(CASE.findall(text)) + len(PASSED_BY.findall(text))


def says_lost(text: str) -> bool:
    """Whether the last of them was said to have cost the device."""
    return re.search(r"^the device is lost; --from \d+ goes on$", text, re.M) is not None


def read_cases(text: str, what: str = "cases") -> dict:
    """The cases of tests/cuda_cases.cpp, a line each, and its last line, which counts them."""
    cases = CASE.findall(text)
    failed = re.findall(r"^FAILED +(.*)$", text, re.M)
    found = {"cases": len(cases), "failed_cases": failed[:MOST_FAILURES]}
    if failed:
        return {**found, "problem": f"{len(failed)} of {len(cases)} {what} failed"}
    ended = re.search(rf"^(\d+) {what}, 0 failed$", text, re.M)
    return found if ended and cases else {**found, "problem": f"the {what} did not come to an end"}


def read_smoke(text: str) -> dict:
    """The checks of benchmarks.gpu_smoke; what each found is kept."""
    found = {**read_cases(text, "checks")}
    found["said"] = re.findall(r"^(?:ok|FAILED|skip) .*$", text, re.M)
    unusable = re.search(r"^FAILED (\w+ cannot be used: .*)$", text, re.M)
    return {**found, "problem": unusable[1]} if unusable else found


def read_sanitizer(text: str) -> dict:
    """What one tool of compute-sanitizer says of the cases; some machines do not let it look."""
    refused = re.search(r"^=.*(Device not supported.*)$", text, re.M)
    if refused:
        return {"refused": refused[1]}
    found = read_cases(text)
    summary = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (.*)$", text, re.M)
    if not summary:
        return {**found, "problem": "compute-sanitizer gave no summary"}
    clean = re.match(r"0 (?:errors|hazards)\b", summary[-1])
    return {**found, "summary": summary[-1]} if clean else {**found, "problem": summary[-1]}


# What the profile shows of a kernel: Nsight Compute's name -> the column, and its factor.
METRICS = {
    "gpu__time_duration.sum": ("ms", 1e-6),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("DRAM %", 1),
    "smsp__issue_active.avg.pct_of_peak_sustained_active": ("issue %", 1),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("occupancy %", 1),
    "launch__registers_per_thread": ("registers", 1),
}


def read_profile(text: str) -> dict:
    """One line per kernel launched, of what `ncu --csv --metrics` printed between other things."""
    refused = re.search(r"ERR_NVGPUCTRPERM|^=.*(?:ERROR|Error).*not supported.*$", text, re.M)
    if refused:
        return {"refused": refused[0]}
    lines = [line for line in text.splitlines() if line.startswith('"')]
    kernels: dict[str, dict] = {}
    for row in csv.DictReader(lines):
        if row["Metric Name"] in METRICS:
            column, factor = METRICS[row["Metric Name"]]
            kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"].split("(")[0]})
            kernel[column] = float(row["Metric Value"].replace(",", "")) * factor
    found = {"profile": [*kernels.values()]}
    return found if kernels else {**found, "problem": "no kernel was profiled"}


def read_tests(text: str) -> dict:
    """The outcome of every test of `pytest -v`, finished or not, and why tests were skipped."""
    outcomes = {}
    for found in OUTCOME.finditer(text):
        outcomes[found["test"] or found["alone"]] = found["first"] or found["last"]
    counts = {name: [*outcomes.values()].count(name) for name in sorted(set(outcomes.values()))}
    failures = re.findall(r"^(?:FAILED|ERROR) tests/.*", text, re.M)
    result = {
        "counts": counts,
        "failures": grouped(failures)[:MOST_FAILURES],
        "skipped_because": re.findall(r"^SKIPPED \[\d+\] .*", text, re.M),
    }
    return result if outcomes else {**result, "problem": "no test was run"}


def grouped(failures: list[str]) -> list[str]:
    """The first failure of each test function, and how many more of its there are."""
    groups: dict[str, list[str]] = {}
    for line in failures:
        groups.setdefault(line.split("[")[0].split(" - ")[0], []).append(line[:LONGEST_LINE])
    more = [f" (and {len(lines) - 1} more)" if lines[1:] else "" for lines in groups.values()]
    return [lines[0] + rest for lines, rest in zip(groups.values(), more)]


def read_rows(text: str) -> dict:
    """The rows that `python -m benchmarks --rows` printed, up to where it was stopped."""
    lines = (line for line in text.splitlines() if re.match(r'\{"op": .*\}$', line))
    rows = newest([json.loads(line) for line in lines])
    found = {"rows": rows, "left_out": read_left_out(text)}
    ours = [row for row in rows if row["implementation"].startswith("em_kernels")]
    failed = [f"{row['implementation']}: {row['failure']}" for row in ours if row["failure"]]
    if failed:
        return {**found, "problem": "; ".join(dict.fromkeys(failed))}
    timed = any(row["error"] is not None for row in rows)  # a floor has none
    return found if timed else {**found, "problem": "nothing was measured"}
