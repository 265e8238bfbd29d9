"""Whether an answer in free text is the right one: what is equal, for every reward and vote."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache

from em_kernels.lm.judge import process
from em_kernels.lm.judge.answers import final_answer, has_meaning, marked_answer
from em_kernels.lm.judge.written import is_words, read

JUDGES = ("auto", "math-verify", "exact")
TIME_LIMIT_SECONDS = 3
"""Longest time for one comparison by math-verify, wherever it runs; then it is ended."""
_CLOSE = 1e-3  # relative; numbers further apart are no roundings of each other

Judge = Callable[[str, str], bool]
"""(response, right answer) -> whether the response's final answer is right."""


def make_judge(name: str = "auto") -> Judge:
    r"""The judge called `name`.

    - "exact": the final answers are the same number (1,234 = 1234.0, 1/2 = 0.5, 1 1/2 = 3/2,
      1e3 = 10^{3}) or the same text but for case and dressing (LaTeX layout, $, Markdown, units);
    - "math-verify": right by "exact", or equal by the package math-verify, which also knows
      expressions, sets and intervals. It runs in a process that is ended after
      `TIME_LIMIT_SECONDS`, in any thread; an answer that it fails on, or takes too long over, is
      wrong. So is one of more than 2,000 characters that is not the same text. Of its leniences
      these stay: 50\% is 0.5 and, being a whole number, 50 (12.5\% is 0.125 alone); a fraction or
      root equals its decimals if they agree to 6 places; x = 5 is 5, x > 5 is (5, oo); units are
      not compared; 101_2 is 101, where no other base is named;
    - "auto": "math-verify" where it is installed, else "exact".

    Raises:
        ValueError: an unknown name.
        ImportError: math-verify is asked for by name and missing.
    """
    if name not in JUDGES:
        raise ValueError(f"judge must be one of {JUDGES}, got {name!r}")
    installed = importlib.util.find_spec("math_verify") is not None
    if name == "exact" or (name == "auto" and not installed):
        return exact
    if not installed:
        raise ImportError("judge 'math-verify' needs it installed: `pip install math-verify`")
    return math_verify


def judge_name(judge: Judge) -> str:
    """The name of a judge of `make_judge`, "auto" resolved; of a function, its own."""
    return getattr(judge, "__name__", "function").replace("_", "-")


def exact(response: str, answer: str) -> bool:
    """The final answer of `response` is `answer`, by number or by text."""
    given, right = final_answer(response), _right(answer)
    return given is not None and _identical(given, right)


def math_verify(response: str, answer: str) -> bool:
    """`exact`, or equal by math-verify within the time limit."""
    given, right = final_answer(response), _right(answer)
    return given is not None and (_identical(given, right) or _equal(given, right))


def _right(answer: str) -> str:
    return marked_answer(answer) or answer


def _identical(given: str, right: str) -> bool:
    """The same number, or the same text."""
    a, b = read(given), read(right)
    if a.number is not None and b.number is not None:
        return a.number == b.number
    return a.text == b.text and has_meaning(b.text)


def _equal(given: str, right: str) -> bool:
    """Of what is not identical: by math-verify, if it can be more than nearly equal."""
    a, b = read(given), read(right)
    if not (a.legible and b.legible) or (is_words(a.text) and is_words(b.text)):
        return False
    if a.number is not None and b.number is not None:
        apart = abs(a.number - b.number) > _CLOSE * max(abs(a.number), abs(b.number))
        if a.decimal == b.decimal or apart:
            return False
    return _by_math_verify(a.latex, b.latex, TIME_LIMIT_SECONDS)


@lru_cache(maxsize=4096)
def _by_math_verify(given: str, right: str, seconds: float) -> bool:
    return process.equal(given, right, seconds)
