r"""Where the final answer of a response stands: in a box, after GSM8K's mark, or at its end."""

from __future__ import annotations

import re
from collections.abc import Iterator

from em_kernels.lm.judge.expressions import braces, is_expression, last_expression

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_UNBRACED = re.compile(r"(?=\S*[\d\\])[^\s${}]+(?:\{[^{}]*\})*")
_MARK = re.compile(r"(?<!#)####(?!#)[ \t]*((?:(?!####)[^\n]){0,2000})")
_STYLE = re.compile(
    r"\\(?:text|math|bf|rm|it|displaystyle|quad|qquad|square|Box|ldots|dots|cdots|left|right"
    r"|hspace|phantom|underline|boxed|fbox)[a-z]*(?![A-Za-z])|\\[ ,;:!]"
)
_MEANING = re.compile(r"[^\s{}$?.…_:;,~*`\\]|\\[A-Za-z{]")
_ANSWER_HEADING = re.compile(
    r"[\W_]{0,9}(?:the\s+)?(?:final\s+)?(?:answer|result)\b(?:\s+is\b)?[\s:*_]*", re.IGNORECASE
)
_HEADING = re.compile(
    r"[\W_]{0,9}(?:step|part|case|solution|explanation|conclusion)\b|\d+[.)]\s+\S", re.IGNORECASE
)
_NUMBERED = re.compile(r"(?im)^#{1,6}[ \t]*[*_]{0,3}(?:step|part|case)\b.*$")


def final_answer(text: str | None) -> str | None:
    r"""The marked answer, else the last number or expression of the text, else None.

    What follows the last </think> counts before what precedes it. An expression is whole: 3/4,
    1 1/2, -5, 2^{10}, \sqrt{2}, 3:4; of an equation that names or works out a value, x = 5 or
    3 + 4 = 7, it is the value.
    """
    for part in _parts(text):
        for find in (_marked, _last):
            found = find(part)
            if found is not None:
                return found
    return None


def marked_answer(text: str | None) -> str | None:
    r"""What the last \boxed{...} with something in it holds, else what the last #### marks.

    #### is GSM8K's mark where an answer follows it (#### 72, #### **14**, #### Final Answer with
    the answer below); before other text, as in "#### Step 1: add", it is a Markdown heading.
    """
    return next((found for found in map(_marked, _parts(text)) if found is not None), None)


def has_meaning(text: str) -> bool:
    r"""Whether anything is said: not in "", \text{ }, ? or \ldots."""
    return _MEANING.search(_STYLE.sub("", text)) is not None


def _parts(text: str | None) -> list[str]:
    """What follows the last </think>, then what precedes it; the text if there is no such tag."""
    if not isinstance(text, str | None):
        raise TypeError(f"text must be a text or None, got {type(text).__name__}")
    thought, tag, said = (text or "").rpartition("</think>")
    return [said, thought] if tag else [said]


def _marked(text: str) -> str | None:
    filled = [content for content in _boxes(text) if has_meaning(content)]
    if filled:
        return filled[-1]
    marks = reversed(list(_MARK.finditer(text))[-20:])
    found = (_after_mark(m[1].strip(), text[m.end() : m.end() + 2000].strip()) for m in marks)
    return next((answer for answer in found if answer is not None), None)


def _boxes(text: str) -> Iterator[str]:
    """The contents of the outermost boxes that are closed, in the order of the text."""
    closes, end = braces(text), 0
    for box in _BOX.finditer(text):
        begin = box.end()
        if box.start() < end or (text[begin : begin + 1] == "{" and begin not in closes):
            continue
        if begin in closes:
            end = closes[begin]
            yield _unwrapped(text[begin + 1 : end])
        elif bare := _UNBRACED.match(text, begin):
            yield bare[0].rstrip(".,;:")


def _unwrapped(content: str) -> str:
    """Without boxes in the box."""
    inner = _BOX.sub("", content).strip()
    boxed = inner != content.strip() and braces(inner).get(0) == len(inner) - 1
    return inner[1:-1].strip() if boxed else inner


def _after_mark(line: str, below: str) -> str | None:
    """The answer that a mark with `line` behind it, and `below` under it, marks."""
    named = _ANSWER_HEADING.match(line)
    if named or not line:
        named_here = line[named.end() :].strip() if named else ""
        line = named_here or below.partition("\n")[0].strip()
        return (last_expression(line) or line or None) if named else _alone(line)
    if _HEADING.match(line):
        return None
    # A heading has something below it.
    return _alone(line) or (None if below or not has_meaning(line) else line)


def _alone(line: str) -> str | None:
    return line if is_expression(line) else None


def _last(text: str) -> str | None:
    """The last expression, headings aside; of a box without an end, if only its end is missing."""
    text = _NUMBERED.sub("", text)
    closes = braces(text)
    begins = [box.end() for box in _BOX.finditer(text) if text[box.end() : box.end() + 1] == "{"]
    opened = [begin for begin in begins if begin not in closes]
    if not opened:
        return last_expression(text)
    inside = text[opened[-1] + 1 :].partition("\n")[0]
    found = last_expression(inside) if inside.count("{") == inside.count("}") else None
    return found or last_expression(text[: opened[-1]])
