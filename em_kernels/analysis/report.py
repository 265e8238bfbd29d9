"""report.html of a folder: a training run, an evaluation, or what an analysis wrote.

A folder holds NAME.json for each thing that was found; the report has a section for each and writes
its plots beside it as NAME.png.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from em_kernels.analysis import sections
from em_kernels.analysis.page import Section, page
from em_kernels.evaluator.records import SETTINGS, EvalError, write_json
from em_kernels.evaluator.summary import summarise
from em_kernels.lm.data import read_json_object
from em_kernels.lm.text import check_folder, one_line, write_text
from em_kernels.trainer.checkpoint import CONFIG_FILE

REPORT = "report.html"
FOUND: dict[str, Callable[[dict], Section]] = {
    "compare": sections.comparison,
    "selection": sections.selection,
    "run": sections.run_curve,
    "law": sections.law,
    "drift": sections.drift,
    "shift": sections.shift,
    "forks": sections.forks,
    "temperature": sections.temperature,
}
"""NAME of NAME.json -> what makes its section, in the order of the report."""


def save(folder: str | Path, name: str, result: dict) -> None:
    """Write `result` as NAME.json, where `write_report` finds it; `name` is a key of `FOUND`."""
    write_json(Path(folder) / f"{name}.json", result)


class Report(NamedTuple):
    """Where it is, and its sections by name."""

    path: Path
    sections: dict[str, Section]


def write_report(folder: str | Path) -> Report:
    """Write report.html, and the plots as PNG, of what the folder holds.

    Raises:
        EvalError: the folder holds nothing to report.
    """
    check_folder(folder, EvalError)
    folder = Path(folder)
    found = dict(_sections(folder))
    if not found:
        raise EvalError(f"{folder} holds no run, no evaluation and no analysis")
    for name, section in found.items():
        _write_plots(folder, name, section)
    write_text(folder / REPORT, page(_title(folder), list(found.values())))
    return Report(folder / REPORT, found)


def _title(folder: Path) -> str:
    kinds = {CONFIG_FILE: "Training run", SETTINGS: "Evaluation"}
    kind = next((kind for file, kind in kinds.items() if (folder / file).is_file()), "Analysis")
    return f"{kind}: {folder.resolve().name}"


def _sections(folder: Path) -> Iterator[tuple[str, Section]]:
    """(name, section) of all there is."""
    if (folder / SETTINGS).is_file():
        summary = summarise(folder)
        yield "summary", sections.evaluation(summary)
    for name, section in FOUND.items():
        path = folder / f"{name}.json"
        if path.is_file():
            yield name, _section(path, section)
    if (folder / CONFIG_FILE).is_file():
        yield "metrics", sections.metrics(folder)
    if (folder / SETTINGS).is_file():
        yield "examples", sections.examples(folder)


def _section(path: Path, section: Callable[[dict], Section]) -> Section:
    """Of what an analysis has written.

    Raises:
        EvalError: the file is not as an analysis writes it.
    """
    try:
        return section(read_json_object(path))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {one_line(error, 120)}"
        raise EvalError(
            f"{path} is not as em-kernels writes it ({reason}): remove it, or make it anew"
        ) from error


def _write_plots(folder: Path, name: str, section: Section) -> None:
    for i, figure in enumerate(section.figures):
        suffix = f"-{i + 1}" if i else ""
        (folder / f"{name}{suffix}.png").write_bytes(figure.png)
