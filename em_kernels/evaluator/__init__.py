"""Accuracy of a model on problems with known answers."""

from em_kernels.evaluator.accuracy import (
    Answer,
    EvalResult,
    Problem,
    ProblemRecord,
    evaluate,
    read_problems,
)
from em_kernels.evaluator.judge import Judge, final_answer, make_judge

__all__ = [
    "Answer",
    "EvalResult",
    "Judge",
    "Problem",
    "ProblemRecord",
    "evaluate",
    "final_answer",
    "make_judge",
    "read_problems",
]
