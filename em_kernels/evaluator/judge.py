"""Whether an answer in free text is the right one."""

from __future__ import annotations

import importlib.util
import re
import threading
from collections.abc import Callable
from fractions import Fraction

JUDGES = ("auto", "math-verify", "exact")
TIME_LIMIT_SECONDS = 3

_DIGITS = r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
_PLAIN = re.compile(_DIGITS)
_IN_TEXT = re.compile(rf"(?<![\w.]){_DIGITS}")
_FRACTION = re.compile(r"([-+]?\d+)\s*/\s*(\d+)|([-+]?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}")

Judge = Callable[[str, str], bool]
"""(response, right answer) -> whether the response's final answer is right."""


def make_judge(name: str = "auto") -> Judge:
    """The judge called `name`.

    - "exact": the final answers are the same number (1,234 = 1234.0, 1/2 = 0.5) or the same text
      but for case, spaces and LaTeX dressing;
    - "math-verify": right by "exact", or equal by the package math-verify, which also knows
      expressions, sets and intervals; an answer it fails on, or takes too long over, is wrong;
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
    given, right = final_answer(response), marked_answer(answer) or answer
    if given is None:
        return False
    numbers = _number(given), _number(right)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return _undressed(given) == _undressed(right)


def math_verify(response: str, answer: str) -> bool:
    """`exact`, or equal by math-verify within the time limit."""
    if exact(response, answer):
        return True
    given, right = marked_answer(response), marked_answer(answer) or answer
    if given is not None and _is_plain_number(given) and _is_plain_number(right):
        return False
    return _math_verify(response if given is None else f"\\boxed{{{given}}}", right)


def final_answer(text: str) -> str | None:
    """The marked answer, else the last number in the text, else None."""
    marked = marked_answer(text)
    if marked is not None:
        return marked
    numbers = _IN_TEXT.findall(text)
    return numbers[-1] if numbers else None


def marked_answer(text: str) -> str | None:
    r"""What the last \boxed{...} holds, else the line after the last ####, else None."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    _, mark, rest = text.rpartition("####")
    lines = rest.strip().splitlines()
    return lines[0].strip() if mark and lines else None


def _last_boxed(text: str) -> str | None:
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len(r"\boxed{")
    for end in range(begin, len(text)):
        if text[end] == "}" and depth == 0:
            return text[begin:end].strip()
        depth += {"{": 1, "}": -1}.get(text[end], 0)
    return None


def _number(text: str) -> Fraction | None:
    text = _bare(text)
    if _is_plain_number(text):
        return Fraction(text.replace(",", ""))
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    over, under = match[1] or match[3] + match[4], match[2] or match[5]
    return Fraction(int(over), int(under)) if int(under) else None


def _is_plain_number(text: str) -> bool:
    return _PLAIN.fullmatch(_bare(text)) is not None


def _bare(text: str) -> str:
    """Without dollar signs, outer spaces and a full stop at the end."""
    return text.replace(r"\$", "").replace("$", "").strip().rstrip(".").strip()


def _undressed(text: str) -> str:
    text = _TEXT.sub(r"\1", _bare(text)).replace(r"\left", "").replace(r"\right", "")
    return re.sub(r"\s|\\[ ,;!]", "", text).replace(r"\dfrac", r"\frac").lower()


def _math_verify(given: str, right: str) -> bool:
    from math_verify import parse, verify

    # Its time limit is a signal, which only the main thread can set.
    main = threading.current_thread() is threading.main_thread()
    limit = TIME_LIMIT_SECONDS if main else None
    try:
        gold = parse(f"\\boxed{{{right}}}", parsing_timeout=limit)
        target = parse(given, parsing_timeout=limit)
        return bool(verify(gold, target, timeout_seconds=limit))
    except Exception:
        return False
