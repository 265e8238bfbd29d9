"""Rows of benchmarks as tables, and in files that are there while they are measured."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.common import PEERS, Case, facts_of
from benchmarks.markdown import table_rows

HEADER = (
    "implementation",
    "ms",
    *(f"x {peer}" for peer in PEERS),
    "/ floor",
    "GB/s",
    "of copy",
    "GFLOP/s",
    "peak MB",
    "extra MB",
    "error",
)


def cells(row: dict) -> list[str]:
    if row["seconds"] is None:
        time_cells = [row["failure"]] + ["-"] * (len(PEERS) + 4)
    else:
        ratios = [row["faster_than"].get(peer) for peer in PEERS]
        share, gflops = row["of_copy_bandwidth"], row["gigaflops"]
        time_cells = [
            f"{row['seconds'] * 1e3:.2f}",
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            f"{row['times_floor']:.2f}" if row["times_floor"] else "-",
            f"{row['gigabytes_per_second']:.1f}",
            f"{share:.0%}" if share else "-",
            f"{gflops:.0f}" if gflops else "-",
        ]
    memory = [row["peak_bytes"], row["extra_bytes"]]
    return [
        row["implementation"],
        *time_cells,
        *("-" if size is None else f"{size / 1e6:.0f}" for size in memory),
        "-" if row["error"] is None else f"{row['error']:.1e}",
    ]


def newest(rows: list[dict]) -> list[dict]:
    """Of the rows of one implementation in one table, the last: it has the most samples."""
    return [*{(title(row), row["implementation"]): row for row in rows}.values()]


def title(row: dict) -> str:
    size = " ".join(f"{key.upper()}={row[key]}" for key in "nvd" if row[key])
    return f"{row['op']}, {row['dtype']}, {size}"


def table(rows: list[dict]) -> str:
    lines = [HEADER, ("---",) + ("---:",) * (len(HEADER) - 1), *map(cells, rows)]
    return table_rows(lines)


def print_table(case: Case, rows: list[dict]) -> None:
    print(f"\n{title(rows[0])}\n{table(rows)}")
    for name, reason in case.left_out.items():
        print(f"{name} is left out: {reason}")


LEGEND = """\
"x peer" is the peer's time over this one's: above 1 is faster than the peer. "/ floor" is this
time over that of the first line, which is a copy of the logits or the bare matrix products. GB/s
and GFLOP/s count what the computation has to move and multiply, whatever an implementation does;
"of copy" is that GB/s over the copy's, which reads and writes.
"extra MB" is the peak less gradients and their float32 accumulators. "error" is
||out - truth|| / ||truth|| against float64, on a sample of rows; "wrong" is not timed.
"""


def summary(rows: list[dict]) -> str:
    """Markdown: our fastest row of every table beside the fastest peer and the floor."""
    lines = ["| table | ms | x best peer | / floor |", "| --- | ---: | ---: | ---: |"]
    for name in dict.fromkeys(map(title, rows)):
        here = [row for row in rows if title(row) == name and row["seconds"]]
        ours = [row for row in here if row["implementation"].startswith("em_kernels")]
        if not ours:
            continue
        best = min(ours, key=lambda row: row["seconds"])
        times, peer = min(((x, peer) for peer, x in best["faster_than"].items()), default=("", ""))
        against = f"{times:.2f} ({peer})" if peer else "-"
        over = f"{best['times_floor']:.2f}" if best["times_floor"] else "-"
        lines.append(f"| {name} | {best['seconds'] * 1e3:.1f} | {against} | {over} |")
    return "\n".join(lines)


def rows_to_resume(folder: str, facts: dict) -> tuple[dict, list[dict]]:
    """(facts, rows) of the newest run in `folder` with this device, threads and versions."""
    saved = [json.loads(path.read_text()) for path in Path(folder).glob("*-20*.json")]
    alike = [x for x in saved if all(x.get(k) == facts[k] for k in facts if k != "date")]
    if not alike:
        return facts, []
    last = max(alike, key=lambda run: run["date"])
    return {key: last[key] for key in facts}, last["rows"]


def save(rows: list[dict], folder: str, facts: dict) -> list[Path]:
    """Write <device>-<date>.json and .md; `facts` is what `environment` said at the beginning."""
    stem = f"{facts['device']}-{facts['date'][:10]}".lower().replace(" ", "-").replace("/", "-")
    directory = Path(folder)
    directory.mkdir(parents=True, exist_ok=True)
    by_table: dict[str, list[dict]] = {}
    for row in rows:
        by_table.setdefault(title(row), []).append(row)
    parts = [f"# Benchmarks\n\n{', '.join(f'{k} {v}' for k, v in facts.items())}\n\n{LEGEND}"]
    parts += [f"## {name}\n\n{table(group)}\n" for name, group in by_table.items()]
    paths = [directory / f"{stem}.json", directory / f"{stem}.md"]
    paths[0].write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    paths[1].write_text("\n".join(parts))
    return paths


def is_measured(case: Case, rows: list[dict]) -> bool:
    """Whether all that the table should have went through all its rounds."""
    done = {(title(row), row["implementation"]) for row in rows if row.get("done")}
    at = title(facts_of(case))
    return all((at, name) in done for name in (case.floor[0], *case.contenders))
