"""The tables of the README and of docs/, made from the files in benchmarks/results.

    make tables                          or: python -m benchmarks.tables        renews them
    python -m benchmarks.tables --check  says which are stale, with exit status 1

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`, NAME one of TABLES. What
a benchmark has written as Markdown is taken over as it is; of what it has written as JSON, a few
columns.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from benchmarks.accuracy import verdicts
from benchmarks.accuracy.rows import load
from benchmarks.gpu_report import gpu_table
from benchmarks.long_sequence_report import fits_table, memory_table
from benchmarks.markdown import table_rows
from benchmarks.science.claims import CLAIMS, claim_text, updates_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
REGION = re.compile(r"<!-- table: (\S+) -->\n(.*?)<!-- end of table -->\n", re.DOTALL)
PEERS = ("eager", "TRL", "Liger", "torch.compile")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if one is stale")
    check = parser.parse_args(arguments).check
    for path in pages():
        stale = stale_tables(path.read_text())
        if stale:
            print(f"{path.relative_to(ROOT)}: {', '.join(stale)}")
        if stale and check:
            print("stale: run `make tables`")
            return 1
        path.write_text(renewed(path.read_text()))
    return 0


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def renewed(text: str, results: Path = RESULTS) -> str:
    """`text` with every table in it made anew."""

    def table(found: re.Match[str]) -> str:
        head, end = f"<!-- table: {found[1]} -->\n", "<!-- end of table -->\n"
        return f"{head}\n{made(found[1], results)}\n\n{end}"

    if text.count("<!-- table: ") != len(REGION.findall(text)):
        raise ValueError("a table has no end: write `<!-- end of table -->` on a line after it")
    return REGION.sub(table, text)


def made(name: str, results: Path) -> str:
    if name not in TABLES:
        raise ValueError(f"there is no table {name!r}: name one of {', '.join(sorted(TABLES))}")
    return TABLES[name](results).strip("\n")


def stale_tables(text: str, results: Path = RESULTS) -> list[str]:
    """Names of the tables in `text` that are not what the results say."""
    pairs = zip(REGION.finditer(text), REGION.finditer(renewed(text, results)))
    return [old[1] for old, new in pairs if old[2] != new[2]]


def markdown_table(file: str, number: int, results: Path) -> str:
    """The table of that number, from 0, in a Markdown file of results."""
    return re.findall(r"(?:^\|.*\n)+", (results / file).read_text(), re.MULTILINE)[number]


def printed_block(file: str, results: Path) -> str:
    """The first indented block of a Markdown file: what a command printed."""
    block = re.search(r"(?:^    .*\n)+", (results / file).read_text(), re.MULTILINE)
    if block is None:
        raise ValueError(f"{file} must hold an indented block")
    return f"```text\n{textwrap.dedent(block[0])}```"


def newest_cpu(results: Path) -> tuple[dict, str]:
    """The newest result of `make bench` on a CPU, and its file without an ending."""
    saved = [(json.loads(path.read_text()), path.stem) for path in results.glob("*-20*.json")]
    return max((pair for pair in saved if "rows" in pair[0]), key=lambda pair: pair[0]["date"])


def machine(results: Path) -> str:
    facts, name = newest_cpu(results)
    return (
        f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}; "
        f"the whole result is `benchmarks/results/{name}.md`."
    )


def ours(results: Path, linear: bool) -> Iterable[tuple[dict, dict[str, dict]]]:
    """Our rows of the newest result in their order, each with those of all others in its table."""
    rows = newest_cpu(results)[0]["rows"]
    for row in rows:
        if row["op"].startswith("linear_") is not linear or not is_ours(row):
            continue
        at = (row["op"], row["dtype"])
        yield row, {r["implementation"]: r for r in rows if (r["op"], r["dtype"]) == at}


def is_ours(row: dict) -> bool:
    return row["implementation"].startswith(("em_kernels", "keep_logits="))


def speed_table(results: Path, linear: bool) -> str:
    """Time, times as fast as each peer, and over the floor; from hidden states memory too."""
    peers = PEERS if linear else ("eager", "TRL", "torch.compile")
    head = ["operator", "dtype", "ms", *(f"x {name}" for name in peers), "/ floor"]
    head += ["extra MB (eager, torch.compile)"] * linear
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for row, beside in ours(results, linear):
        way = row["implementation"].removeprefix("em_kernels").strip()
        operator = row["op"] + (f", {way}" if way else "")
        faster = [row["faster_than"].get(name) for name in peers]
        line = [operator, row["dtype"], f"{row['seconds'] * 1e3:.1f}"]
        line += [f"{times:.2f}" if times else "-" for times in faster]
        line.append(f"{row['times_floor']:.2f}")
        if linear:
            others = ", ".join(megabytes(beside.get(name)) for name in ("eager", "torch.compile"))
            line.append(f"{megabytes(row)} ({others})")
        lines.append(line)
    return table_rows(lines)


def megabytes(row: dict | None) -> str:
    return f"{row['extra_bytes'] / 1e6:.0f}" if row and row["extra_bytes"] is not None else "-"


def row_of(results: Path, op: str, dtype: str) -> tuple[dict, dict]:
    """Our row of an operator in the newest result, and that of eager PyTorch."""
    for row, beside in ours(results, op.startswith("linear_")):
        if (row["op"], row["dtype"]) == (op, dtype):
            return row, beside["eager"]
    raise ValueError(f"the newest result has no {op}, {dtype}")


def numbers(results: Path) -> str:
    """Four numbers for the README, each with where it is from."""
    logits, _ = row_of(results, "softmax_stats forward + backward", "float32")
    linear, eager = row_of(results, "linear_entropy_loss forward + backward", "float32")
    cpu = f"`benchmarks/results/{newest_cpu(results)[1]}.md`"
    lines = [
        ("", "em_kernels", "eager PyTorch", "measured in"),
        ("---", "---:", "---:", "---"),
        accuracy_number(results),
        (
            "logprob and entropy of logits, forward + backward, two CPU threads",
            f"{logits['seconds'] * 1e3:.0f} ms",
            f"{logits['seconds'] * logits['faster_than']['eager'] * 1e3:.0f} ms",
            cpu,
        ),
        *gpu_number(results),
        (
            "entropy loss from hidden states, memory beyond the gradients",
            f"{megabytes(linear)} MB",
            f"{megabytes(eager)} MB",
            cpu,
        ),
    ]
    return table_rows(lines)


def accuracy_number(results: Path) -> tuple[str, ...]:
    """The worst error of the gradient of H in float32 where H is 1e-10, over temperatures."""
    found = {"cpu": 0.0, "eager": 0.0}
    for row in load(results / "accuracy.csv"):
        column = verdicts.form_of(row.name)
        if column in found and (row.source, row.dtype, row.entropy) == ("logits", "float32", 1e-10):
            found[column] = max(found[column], row.errors["dH"][1])
    said = "relative error of the gradient of H at H = 1e-10, float32"
    return (said, *(f"{error:.0e}" for error in found.values()), "[accuracy](docs/accuracy.md)")


def accuracy_table(results: Path, make: Callable[[list], str]) -> str:
    return make(load(results / "accuracy.csv"))


def gpu_number(results: Path) -> list[tuple[str, ...]]:
    """Statistics of logits on the newest GPU: the best of our kernels beside eager PyTorch."""
    files = sorted(results.glob("gpu-*.json"))
    if not files:
        return []
    run = json.loads(files[-1].read_text())
    rows = [row for stage in run["stages"] for row in stage.get("rows", [])]
    op = "softmax_stats forward + backward"
    here = [r for r in rows if (r["op"], r["dtype"]) == (op, "bfloat16") and r["seconds"]]
    best = min(r["seconds"] for r in here if is_ours(r))
    eager = min(r["seconds"] for r in here if r["implementation"] == "eager")
    gpu = next(s["machine"]["gpu"]["name"] for s in run["stages"] if "gpu" in s.get("machine", {}))
    said = f"the same from 8192 rows in bfloat16, {gpu}, an earlier state of the kernels"
    file = f"`benchmarks/results/{files[-1].stem}.md`"
    return [(said, f"{best * 1e3:.2f} ms", f"{eager * 1e3:.1f} ms", file)]


def run_table(results: Path) -> str:
    """Every second checkpoint of a run of EM on the embedded model, and the law fitted to it."""
    run = json.loads((results / "evaluate.json").read_text())
    lines = [
        "| update | accuracy, T = 1 | greedy | entropy (nats) | tokens | ECE |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for point in run["points"]:
        shares = [point["accuracy"], point["greedy"]]
        spans = [f"{s['mean']:.3f} [{s['low']:.3f}, {s['high']:.3f}]" for s in shares]
        numbers = [f"{point['entropy']:.4f}", f"{point['response_length']:.1f}"]
        cells = [str(point["update"]), *spans, *numbers, f"{point['calibration']['ece']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[Path], str]] = {
    "numbers": numbers,
    "accuracy": partial(accuracy_table, make=partial(verdicts.error_table, below=True)),
    "accuracy-above": partial(accuracy_table, make=partial(verdicts.error_table, below=False)),
    "accuracy-verdicts": partial(accuracy_table, make=verdicts.claims),
    "demo": partial(printed_block, "fresh-clone.md"),
    "em-updates": updates_table,
    **{f"science-{name}": partial(claim_text, name) for name in CLAIMS},
    "rl-study": partial(markdown_table, "rl_study.md", 0),
    "rl-study-law": partial(markdown_table, "rl_study.md", 1),
    "rl-study-forecast": partial(markdown_table, "rl_study.md", 2),
    "rl-study-change": partial(markdown_table, "rl_study.md", 3),
    "run": run_table,
    "integrations": partial(markdown_table, "integrations.md", 0),
    "filter-eps": partial(markdown_table, "filter_eps.md", 0),
    "head-forward-kl": partial(markdown_table, "head.md", 0),
    "head-reverse-kl": partial(markdown_table, "head.md", 1),
    "head-truncated": partial(markdown_table, "head.md", 3),
    "head-ids": partial(markdown_table, "head.md", 6),
    "head-ids-hidden": partial(markdown_table, "head.md", 11),
    "operands-32000": partial(markdown_table, "operands.md", 0),
    "operands-151936": partial(markdown_table, "operands.md", 1),
    "matrix": partial(markdown_table, "matrix.md", 0),
    "installs": partial(markdown_table, "installs.md", 0),
    "cpu": machine,
    "cpu-logits": partial(speed_table, linear=False),
    "cpu-hidden": partial(speed_table, linear=True),
    "gpu": gpu_table,
    "long-sequence": memory_table,
    "long-sequence-fits": fits_table,
    "narrow": partial(markdown_table, "narrow.md", 0),
}


if __name__ == "__main__":
    sys.exit(main())
