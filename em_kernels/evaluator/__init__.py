"""Accuracy of a model on problems with known answers, and what goes with it."""

from em_kernels.evaluator.accuracy import EvalResult, ProblemRecord, evaluate, read_problems
from em_kernels.evaluator.records import Answer, EvalError, Record, Records
from em_kernels.evaluator.run import EvalConfig, run_eval
from em_kernels.evaluator.select import rank_prompts
from em_kernels.evaluator.summary import compare_folders, summarise
from em_kernels.lm.judge.judges import Judge, final_answer, make_judge
from em_kernels.lm.lock import InUseError
from em_kernels.lm.problems import PRESETS, Problem, Source, find_source, load_problems

__all__ = [
    "PRESETS",
    "Answer",
    "EvalConfig",
    "EvalError",
    "EvalResult",
    "InUseError",
    "Judge",
    "Problem",
    "ProblemRecord",
    "Record",
    "Records",
    "Source",
    "compare_folders",
    "evaluate",
    "final_answer",
    "find_source",
    "load_problems",
    "make_judge",
    "rank_prompts",
    "read_problems",
    "run_eval",
    "summarise",
    "write_report",
]


def __getattr__(name: str):
    """`write_report` is of a room above this one: found when it is asked for."""
    if name == "write_report":
        from em_kernels.analysis.report import write_report

        return write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
