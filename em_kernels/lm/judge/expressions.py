r"""Expressions in a text: where a number or formula begins and ends. What they mean is not read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

# Not the superscripts, subscripts and fractions, which are \w but no digits to re; nor what is
# written without spaces, so that numbers stand beside it: Chinese, Japanese, Korean, Thai.
_OTHERS = r"\u0e00-\u0e7f\u1100-\u11ff\u2e80-\ud7ff\uf900-\uffef"
_LETTER = rf"[^\W\d_\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u215f{_OTHERS}]"
UNITS = (
    "[mshgdlLCFKWVJN]|[kcdmn]m|[km]g|[mcd][lL]|ms|kmh|lbs?|oz|ft|in|yd|mi|hrs?|min|sec|mph|kph|rpm|k?cal"
    "|[kMG]?Hz|[kM]?Pa|k[JWV]|mA|[kM]?eV|mol|rad|deg|pts|sq|cu|ha|[ap]m|[AP]M|cc|[KMGT]B|USD|EUR|GBP"
)
"""Units of one to three letters, as a pattern: 5m is read as five metres; 5x is an expression."""
_TOKEN = re.compile(
    r"""
    (?P<number>
        (?:\d+\.\d*(?:\\(?:overline|bar|dot)\{?\d+\}?|\(\d+\))
        |\d+(?:(?:[.,:/]|\{,\}|\\[,!;]|[\u2009\u202f])\d+)*
        |(?<!\w)\.\d+)
        (?:[eE][-+\u2212]?\d+(?!\d|LETTER))?)
    |(?P<nothing>\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])|\\?[$\u20ac\u00a3\u00a5])
    |(?P<gap>\\(?:begin|end|item|quad|qquad|boxed|fbox|approx|implies|therefore|Rightarrow|rightarrow)
        (?![A-Za-z])
        |\\[()\[\]]|LETTER+\d(?:\d|LETTER|_)*(?:\.\d+)*|['\u2019]LETTER+|</?[A-Za-z]+>)
    |(?P<operator>\\(?:cdot|times|div|pm|mp|leq?|geq?|neq?|lt|gt|in|cup|cap|to)(?![A-Za-z])
        |\*\*|[-+*/^_=<>:\u2212\u2013\u00b1\u00d7\u00b7\u22c5\u00f7\u2264\u2265\u2260\u2044])
    |(?P<root>[\u221a\u221b]+)
    |(?P<suffix>\\?%|[\u00b0\u00b2\u00b3\u00b9\u2070-\u207f])
    |(?P<command>\\(?:[dt]?frac|sqrt|binom)\d+|\\[A-Za-z]+)
    |(?P<symbol>[\u221e\u2205\u00bc-\u00be\u2150-\u215f]
        |(?<=\d)(?!(?:UNITS|st|nd|rd|th|and|or|to|pi)(?!LETTER))[a-z]{2,3}(?!LETTER))
    |(?P<word>LETTER{2,}\^\{?-?\d+\}?|LETTER+)
    |(?P<open>\\?\{|[(\[])
    |(?P<close>\\?\}|[)\]])
    |(?P<comma>[,;|!])
    |(?P<space>(?:\s|\\[ ,;!~])+)
    |(?P<other>.)
    """.replace("UNITS", UNITS).replace("LETTER", _LETTER),
    re.VERBOSE | re.DOTALL,
)
_JOINS = re.compile(rf"\d|{_LETTER}")
_NAMES = frozenset(
    [
        "pi",
        "sqrt",
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "ln",
        "exp",
        "arcsin",
        "arccos",
        "arctan",
        "oo",
    ]
)
_UNITS = frozenset("mshgdlLCFKWVJN")  # 5m is read as five metres; 5x is an expression
_SIGNS = frozenset(("-", "+", "\u2212", "\u2013", "\u00b1", r"\pm", r"\mp"))
_SPAN = re.compile(
    r"\$\$([^$]{1,1000})\$\$|(?<![\\$])\$((?:[^$\n\\]|\\.){1,1000}?)\$(?!\d)"
    r"|\\\((.{1,1000}?)\\\)|\\\[(.{1,1000}?)\\\]",
    re.DOTALL,
)
_BETWEEN = re.compile(r"\s*(?:,|,?\s*(?:and|or))\s*")
_VALUE = re.compile(
    r"[\d\u03c0\u221e\u2205\u00bc-\u00be\u2150-\u215f]|\\(?:pi|infty|emptyset|varnothing)\b"
)
_FORMULA = re.compile(r"[\w})]\s*(?:[-+*/^]|\\cdot|\\times)\s*[\\\w({]")
_GROUPS = re.compile(r"\\[A-Za-z]+(?:\s*\{[^{}]*\})?")
_ARITHMETIC = re.compile(r"\\(?:[dt]?frac|sqrt|times|cdot|div|left|right|binom)(?![A-Za-z])")
_NAME = re.compile(r"\\?[^\W\d_]+(?:_(?:\w|\{[^{}]*\})|'|\([^()=]*\))*")
_LEADS_TO = re.compile(r"\\(?:approx|implies|therefore|[Rr]ightarrow)(?![A-Za-z])|[\u2248\u21d2]")
_LONGEST = 20_000
_UNIT = re.compile(r"(?:[mshgdlLCFKWVJN](?:\^\{?-?\d\}?|[\u00b2\u00b3])?[/*\u00b7]?)+")  # m/s^2


def last_expression(text: str) -> str | None:
    r"""The last number, or expression with a number in it, of a text; None if there is none.

    An expression between $ signs, \( \) or \[ \] may be one of letters alone, x + y. Several of
    them in a row, with commas, "and" or "or" between, are one list. Only the end of a long text,
    20,000 characters, is looked at.
    """
    text = text[-_LONGEST:]
    end = len(text)
    for start, stop, content in reversed(_spans(text)):
        found = _last_plain(text[stop:end])
        if found is None and (_VALUE.search(content) or _FORMULA.search(content)):
            found = _value(content)
        if found is not None:
            return found
        end = start
    return _last_plain(text[:end])


def is_expression(text: str) -> bool:
    """Whether there are numbers or formulas in the text, and no words besides."""
    rest, runs = text, list(_runs(text))
    for start, end in reversed(runs):
        rest = rest[:start] + rest[end:]
    return bool(runs) and not any(c.isalpha() for c in rest)


def braces(text: str) -> dict[int, int]:
    """Where each brace that is closed opens -> where it closes."""
    opened: list[int] = []
    closes: dict[int, int] = {}
    for brace in re.finditer(r"\\.|[{}]", text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            closes[opened.pop()] = brace.start()
    return closes


def _spans(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of the formulas between delimiters; a dollar may be money."""
    spans: list[tuple[int, int, str]] = []
    found = _SPAN.search(text)
    while found:
        content = next(group for group in found.groups() if group is not None)
        if not _is_formula(content):
            found = _SPAN.search(text, found.start() + 1)
            continue
        start, stop = found.span()
        if spans and _BETWEEN.fullmatch(text[spans[-1][1] : start]):
            start, content = spans[-1][0], f"{spans[-1][2]}, {content.strip()}"
            spans.pop()
        spans.append((start, stop, content.strip()))
        found = _SPAN.search(text, stop)
    return spans


def _is_formula(content: str) -> bool:
    words = re.findall(r"[^\W\d_]{3,}", _GROUPS.sub("", content))
    even = content[0].isspace() == content[-1].isspace()
    return even and bool(content.strip()) and not set(words) - _NAMES


def _last_plain(text: str) -> str | None:
    for line in reversed(text.splitlines()):
        runs = [line[start:end] for start, end in _runs(line)]
        values = (run for run in reversed(runs) if _VALUE.search(run) and not _UNIT.fullmatch(run))
        found = next(values, None)
        if found is not None:
            return _value(found)
    return None


def _value(run: str) -> str:
    """Of x = 5 and of 3 + 4 = 7 the right side; of 2x + y = 5, and of several equations, all."""
    run = _LEADS_TO.split(run)[-1].strip()
    *left, right = re.split(r"(?<![<>!\\])=", run)
    plain = _ARITHMETIC.sub("", left[-1]) if left else ""
    named = _NAME.fullmatch(plain.strip()) or not any(c.isalpha() for c in plain)
    single = right.count("{") == right.count("}") and not set(",;") & set(_outside(run))
    return right.strip() if left and right.strip() and single and (named or len(left) > 1) else run


def _outside(run: str) -> str:
    """What of a run is outside brackets, with the commas between digits left out."""
    run = re.sub(r"(?<=\d),(?=\d{3})|\\[,;]", "", run)
    return re.sub(r"[(\[{][^()\[\]{}]*[)\]}]", "", run)


class _Token(NamedTuple):
    kind: str
    text: str
    start: int
    end: int


def _runs(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of the longest stretches that are one expression, in one line of plain text."""
    line = _Line(text)
    at = 0
    while at < len(line.tokens):
        before = text[: line.tokens[at].start][-1:]
        signed = line.tokens[at].text in _SIGNS and not _JOINS.match(before)
        first = line.skip(at + 1) if signed and line.tokens[at].text[0] == "\\" else at + signed
        end = line.atom(first)
        if end is None:
            at += 1
            continue
        begun, joined = first, line.joined(first, end)
        while joined is not None:
            begun, end = joined
            joined = line.joined(begun, end)
        yield line.tokens[at].start, line.tokens[end - 1].end
        at = end


class _Line:
    """The tokens of a line, and how far an expression goes in them; positions are token numbers."""

    def __init__(self, text: str):
        found = ((t.lastgroup or "", t[0], t.start(), t.end()) for t in _TOKEN.finditer(text))
        self.tokens = [_Token(*token) for token in found if token[0] != "nothing"]
        self.tokens.append(_Token("end", "", len(text), len(text)))
        self.closes: dict[int, int] = {}
        opened: list[int] = []
        for number, token in enumerate(self.tokens):
            if token.kind == "open":
                opened.append(number)
            elif token.kind == "close" and opened:
                self.closes[opened.pop()] = number
        # How many tokens up to each one are no part of a formula.
        self.prose = list(accumulate(map(self._is_prose, self.tokens), initial=0))

    def atom(self, at: int) -> int | None:
        """The end of the number, symbol, command or bracket at `at`, with what hangs on it: percent
        and degree signs, powers and indices."""
        end = self._bare(at)
        while end is not None:
            token = self.tokens[end]
            if token.kind == "suffix":
                end += 1
            elif token.text in ("^", "_"):
                script = self._script(end + 1)
                if script is None:
                    return end
                end = script
            else:
                return end
        return None

    def _bare(self, at: int) -> int | None:
        at += self.tokens[at].kind == "root"
        token, end = self.tokens[at], at + 1
        if token.kind == "open":
            close = self.closes.get(at)
            return None if close is None or self.prose[close] > self.prose[at] else close + 1
        if token.kind == "command":
            while self.tokens[end].text in ("{", "["):
                if end not in self.closes:
                    return None
                end = self.closes[end] + 1
            return end
        return end if token.kind in ("number", "symbol") or self._is_name(token) else None

    def _script(self, at: int) -> int | None:
        if self.tokens[at].text == "{":
            return self.closes[at] + 1 if at in self.closes else None
        return self._bare(at + (self.tokens[at].text in _SIGNS))

    def _is_prose(self, token: _Token) -> bool:
        return token.kind in ("gap", "other") or (token.kind == "word" and not self._is_name(token))

    @staticmethod
    def _is_name(token: _Token) -> bool:
        return token.kind == "word" and (len(token.text) == 1 or token.text in _NAMES)

    def joined(self, begun: int, end: int) -> tuple[int, int] | None:
        """(start, end) of the atom that goes on with the expression whose last atom is given."""
        at = self.skip(end)
        if self.tokens[at].kind == "operator":
            return self._operand(at, spaced=at > end)
        after = self.atom(at)
        joins = self._side_by_side if at == end else self._apart
        return (at, after) if after is not None and joins(begun, end, at) else None

    def _operand(self, at: int, spaced: bool) -> tuple[int, int] | None:
        """A binary operator has spaces on both sides or on neither; "5 -3" are two numbers."""
        operator = self.tokens[at].text
        then = self.skip(at + 1)
        if operator != "=" and operator[0] != "\\" and spaced != (then > at + 1):
            return None
        then += self.tokens[then].text in _SIGNS
        after = self.atom(then)
        return None if after is None else (then, after)

    def skip(self, at: int) -> int:
        return at + (self.tokens[at].kind == "space")

    def _side_by_side(self, begun: int, end: int, at: int) -> bool:
        last, new = self.tokens[end - 1], self.tokens[at]
        unit = last.kind == "number" and new.kind == "word" and new.text in _UNITS
        return not unit and (last.kind, new.kind) != ("number", "number")

    def _apart(self, begun: int, end: int, at: int) -> bool:
        """1 1/2, 2 \\sqrt{3}, \\sin x: what belongs together in spite of the space between."""
        first, new = self.tokens[begun], self.tokens[at]
        whole = first.kind == "number" and end == begun + 1 and first.text.isdigit()
        if whole and (new.kind == "symbol" or re.fullmatch(r"\d+/\d+", new.text)):
            return True
        named = new.kind in ("command", "root") or new.text in _NAMES
        known = first.kind == "command" or first.text in _NAMES
        return known or (named and first.kind != "word")  # "a \\pi" is an article before it
