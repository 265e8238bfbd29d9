"""The embedded model: a tiny language model for arithmetic word problems, and the problems.

It lets one-shot entropy minimisation be run and measured in a minute without any download.
"""

from __future__ import annotations

from pathlib import Path

from em_kernels.tiny_math.problems import Problem, make_problems, write_problems

# The one unlabelled prompt of one-shot EM: a dev problem whose sampled answers vary about most.
PROMPT = (
    "Iris has 29 pens. Iris doubles the number. Iris eats 29. Iris finds 46 more. "
    "How many pens does Iris have?"
)

# Control: no problem at all, and in words the model has only as bytes.
OUTSIDE_PROMPT = "Name the colours of the rainbow in order."

__all__ = ["OUTSIDE_PROMPT", "PROMPT", "Problem", "make_problems", "model_path", "write_problems"]


def model_path() -> Path:
    """Folder of the shipped model, as `from_pretrained` and `em-kernels train --model` take it."""
    return Path(__file__).resolve().parent.parent / "assets" / "tiny-math"
