"""The embedded model: a tiny language model for arithmetic word problems, and the problems.

It lets one-shot entropy minimisation be run and measured in a minute without any download.
"""

from __future__ import annotations

from pathlib import Path

from em_kernels.tiny_math.problems import Problem, make_problems, write_problems

# The one unlabelled prompt of one-shot EM: of three dev problems whose sampled answers vary a lot,
# the one EM gains most with on dev problems.
PROMPT = (
    "Finn has 65 apples. Finn sells 26. Finn doubles the number. How many apples does Finn have?"
)

# Settings of one-shot EM chosen on dev problems; loss and sampling share the temperature.
EM_LEARNING_RATE = 2e-4
EM_TEMPERATURE = 1.0

_FOLDERS = {"diffuse": "tiny-math", "habits": "tiny-math-habits"}

# Longest answer in tokens; solutions take about half of it.
MAX_NEW_TOKENS = 64

# Control: no problem at all, and in words the model has only as bytes.
OUTSIDE_PROMPT = "Name the colours of the rainbow in order."

__all__ = [
    "EM_LEARNING_RATE",
    "EM_TEMPERATURE",
    "MAX_NEW_TOKENS",
    "OUTSIDE_PROMPT",
    "PROMPT",
    "Problem",
    "make_problems",
    "model_path",
    "write_problems",
]


def model_path(name: str = "diffuse") -> Path:
    """Folder of a shipped model, as `from_pretrained` and `em-kernels train --model` take it.

    Args:
        name: "diffuse", whose likeliest answer is usually right; or "habits", whose likeliest
            answer is wrong to nearly half of the problems, by habit.

    Raises:
        ValueError: there is no such model.
    """
    if name not in _FOLDERS:
        raise ValueError(f"name must be one of {', '.join(_FOLDERS)}, received {name!r}")
    return Path(__file__).resolve().parent.parent / "assets" / _FOLDERS[name]
