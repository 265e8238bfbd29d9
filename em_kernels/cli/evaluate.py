"""The evaluator's commands: eval, compare, select, analyze, report."""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from em_kernels.analysis.report import save, write_report
from em_kernels.analysis.summary_tables import (
    comparison_table,
    counts_table,
    eval_tables,
    selection_table,
)
from em_kernels.cli.analyze import add_analyze
from em_kernels.cli.options import AddCommon, add_asking, asking, quiet_transformers
from em_kernels.evaluator.records import EvalError, read_settings, write_json
from em_kernels.evaluator.run import run_eval
from em_kernels.evaluator.select import SIGNALS, check_top, rank_prompts, write_prompts
from em_kernels.evaluator.summary import compare_folders, records_of
from em_kernels.lm.settings import not_negative
from em_kernels.lm.text import check_can_be_file


def add_commands(commands, add_common: AddCommon) -> None:
    """Add the parsers of all the commands here; `add_common` gives each what every command has."""
    _add_eval(commands, add_common)
    _add_compare(commands, add_common)
    _add_select(commands, add_common)
    add_analyze(commands, add_common)
    _add_report(commands, add_common)


def _add_eval(commands, add_common: AddCommon) -> None:
    parser = commands.add_parser(
        "eval",
        help="sampled and greedy accuracy",
        description="Accuracy of a model on problems with known answers, with 95 % bootstrap "
        "intervals over problems.",
    )
    parser.add_argument("--output", metavar="DIR", help="keep the answers here; goes on if stopped")
    parser.add_argument("--json", metavar="FILE", help="write the result and every answer here")
    add_asking(parser)
    add_common(parser, _eval)


def _eval(arguments: argparse.Namespace) -> int:
    quiet_transformers()
    if arguments.json:
        check_can_be_file(Path(arguments.json))
    if not arguments.output:
        arguments.go_on = ""
    with tempfile.TemporaryDirectory() as passing:
        output = arguments.output or f"{passing}/eval"
        config = asking(arguments, output=output)
        started = time.perf_counter()
        summary = run_eval(config, progress=not arguments.quiet)
        seconds = time.perf_counter() - started
        if arguments.json:
            found = records_of(output, read_settings(output))
            records = [asdict(record) for record in found]
            write_json(Path(arguments.json), {**summary, "records": records})
    for table in eval_tables(summary):
        print(table.text())
    print(f"{seconds:.1f} s")
    if arguments.output:
        print(f"report: {write_report(arguments.output).path}")
    return 0


def _add_compare(commands, add_common: AddCommon) -> None:
    parser = commands.add_parser(
        "compare",
        help="two evaluations, problem by problem",
        description="Is B better than A on the problems both were asked? Difference of accuracy "
        "with a 95 % bootstrap interval, and the p-value of a paired sign-flip test.",
    )
    parser.add_argument("a", metavar="A", help="folder of an evaluation")
    parser.add_argument("b", metavar="B", help="folder of another")
    parser.add_argument("--output", metavar="DIR", help="write compare.json and report.html here")
    add_common(parser, _compare)


def _compare(arguments: argparse.Namespace) -> int:
    rows = compare_folders(arguments.a, arguments.b)
    print(comparison_table(arguments.a, arguments.b, rows).text())
    if arguments.output:
        found = {"kind": "compare", "a": arguments.a, "b": arguments.b, "temperatures": rows}
        save(arguments.output, "compare", found)
        print(f"report: {write_report(arguments.output).path}")
    return 0


def _add_select(commands, add_common: AddCommon) -> None:
    parser = commands.add_parser(
        "select",
        help="prompts worth training on",
        description="Rank prompts by how much the model's answers to them vary, and write the "
        "first of them as JSON lines for `em-kernels train --prompts`.",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="the JSON lines to write")
    parser.add_argument(
        "--folder", metavar="DIR", help="of the answers (default: beside FILE); goes on if stopped"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="of the sampling (default 1)"
    )
    parser.add_argument(
        "--by", choices=list(SIGNALS), default="variance", help="what ranks (default variance)"
    )
    parser.add_argument("--top", type=int, help="how many to write (default: all)")
    parser.add_argument(
        "--unlabelled", action="store_true", help="the problems have no answers; not by variance"
    )
    add_asking(parser, without=["temperatures"], defaults={"samples": 8})
    add_common(parser, _select)


def _select(arguments: argparse.Namespace) -> int:
    if arguments.unlabelled and arguments.by == "variance":
        raise ValueError("--by variance needs answers; with --unlabelled rank by another signal")
    if arguments.temperature == 0:
        raise EvalError("--temperature must be above 0: greedy answers do not vary")
    not_negative("temperature", arguments.temperature)
    check_top(arguments.top)
    quiet_transformers()
    path = Path(arguments.output)
    check_can_be_file(path)
    config = asking(
        arguments,
        output=arguments.folder or path.with_name(f"{path.stem}-eval"),
        temperatures=(arguments.temperature,),
        labelled=not arguments.unlabelled,
    )
    summary = run_eval(config, progress=not arguments.quiet)
    everything = rank_prompts(config.output, arguments.by)
    rows = everything[: arguments.top]
    write_prompts(rows, path)
    found = {"kind": "selection", "by": arguments.by, "chosen": len(rows), "rows": everything}
    save(config.output, "selection", found)
    for table in (selection_table(rows, arguments.by), counts_table(summary)):
        print(table.text())
    print(f"{len(rows)} prompts: {path}")
    print(f"report: {write_report(config.output).path}")
    return 0


def _add_report(commands, add_common: AddCommon) -> None:
    parser = commands.add_parser(
        "report",
        help="report.html of a run, an evaluation or an analysis",
        description="Make report.html, one page that needs no other file, of what a folder holds.",
    )
    parser.add_argument("folder", metavar="DIR", help="of a run, an evaluation or an analysis")
    add_common(parser, _report)


def _report(arguments: argparse.Namespace) -> int:
    print(f"report: {write_report(arguments.folder).path}")
    return 0
