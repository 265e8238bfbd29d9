r"""Written forms of an answer: brought to the LaTeX that math-verify reads, and read as a number.

No rule joins what a space keeps apart: 1 1/2 is a mixed number, 2 3 are two numbers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from em_kernels.lm.judge.expressions import UNITS

MAX_LENGTH = 2000
"""Characters of an answer that is read; a longer one is compared as text alone."""
_MAX_DIGITS, _MAX_EXPONENT = 1000, 400  # Python refuses int(text) beyond 4300 digits


class Reading(NamedTuple):
    """An answer as LaTeX; as text without its dressing; as a number, if it is a plain one.

    `decimal` tells 0.5 from 1/2. `legible` is False for what math-verify would misread: numbers
    side by side, which it adds, and what is too long.
    """

    latex: str
    text: str
    number: Fraction | None
    decimal: bool
    legible: bool


@lru_cache(maxsize=4096)
def read(answer: str) -> Reading:
    """The answer in the forms in which answers are compared; anything can be read."""
    if len(answer) > MAX_LENGTH:
        return Reading("", answer.strip(), None, False, False)
    latex = _to_latex(answer)
    text = _undressed(_replaced(latex, _LAYOUT))
    text = text if "\\" in text else text.casefold()
    return Reading(latex, text, _number(latex), "frac" not in latex, not _APART.search(latex))


def is_words(text: str) -> bool:
    r"""Words, to math-verify products of letters; one command, \Delta being \delta to it; a name or
    numeral with an index, 101_2 and 101_3 being 101 to it; a date, a difference to it."""
    return _PROSE.fullmatch(text) is not None


def _to_latex(text: str) -> str:
    text = _replaced(_undressed(text), _CHARACTERS)
    text = "".join(str(unicodedata.decimal(c, c)) for c in unicodedata.normalize("NFKC", text))
    return _undressed(_replaced(text, _FORMS))


def _undressed(text: str) -> str:
    """Without the spaces, delimiters, Markdown and full stop around it."""
    before = None
    while before != text:
        before, text = text, _END.sub("", text).lstrip()
        for opening, closing in _DRESSING:
            inner = text[len(opening) : len(text) - len(closing)]
            around = text.startswith(opening) and text.endswith(closing) and inner.strip()
            if around and opening not in inner and closing not in inner:
                text = inner
    return text


def _replaced(text: str, rules: _Rules) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text.strip()


def _number(latex: str) -> Fraction | None:
    match = _NUMBER.fullmatch(latex) if len(latex) <= _MAX_DIGITS else None
    if match is None:
        return None
    exponent = int(match["power"] or match["exponent"] or 0)
    if abs(exponent) > _MAX_EXPONENT or (match["under"] and not Fraction(match["under"])):
        return None
    value = Fraction(match["plain"] or ("0" if match["under"] else "1"))
    if match["under"]:
        value = int(match["whole"] or 0) + Fraction(match["over"]) / Fraction(match["under"])
    return (-value if match["sign"] == "-" else value) * Fraction(10) ** exponent


def _digits(match: re.Match) -> str:
    return re.sub(r"\D", "", match[0])


def _normal(match: re.Match) -> str:
    return unicodedata.normalize("NFKC", match[0]).replace("\u2212", "-")


def _braced(argument: str) -> str:
    return argument if argument[0] == "{" else f"{{{argument}}}"


def _power_of_ten(match: re.Match) -> str:
    return f"{'10' * (match[0][0] == '{')}^{{{match[1] or match[2]}}}"


def _recurring(match: re.Match) -> str:
    """0.1(6) is (16 - 1) / 90."""
    whole, once, again = match[1] or "0", match[2], match[3] or match[4]
    over = int(whole + once + again) - int(whole + once)
    return rf"\frac{{{over}}}{{{'9' * len(again)}{'0' * len(once)}}}"


def _large(match: re.Match) -> str:
    return rf"{match[1]}\times 10^{{{_LARGE[match[2].lower()]}}}"


_Rules = tuple[tuple[re.Pattern[str], "str | Callable[[re.Match], str]"], ...]


def _compiled(*rules) -> _Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


_DRESSING = (
    ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("__", "__"),
    ("*", "*"), ("`", "`"), ("{", "}"), ('"', '"'), ("\u201c", "\u201d"),
)  # fmt: skip
_END = re.compile(r"(?:\\(?:[ ,;:!]|q?quad|\Z)|[.;,\s])+\Z")
_LARGE = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_DECIMAL = r"(?:\d+(?:\.\d+)?|\.\d+)"
_SPACE = r"(?:\s|(?<!\\)\\[ ,;:!]|~)"
_TEXT = r"\\(?:text|mbox|mathrm|mathbf|mathit|textbf|textit|textrm|bm|boldsymbol)"
# 5 apples, 5km, but not 2xy, a product, nor Greek letters. No word is read in two ways: there may
# be many.
_WORD, _SHORT = r"[^\W\d_\u0370-\u03ff]", r"[\u0400-\u04ff\u2e80-\ud7ff]"
_UNIT = (
    rf"(?!(?:or|and|mod|squared|cubed)\b)(?:(?:{UNITS})(?!{_WORD})|(?!(?:{UNITS})(?!{_WORD}))"
    rf"(?:(?<=\s)(?:{_WORD}{{3,}}|{_SHORT}{{1,2}}(?!{_WORD})|(?:of|at|to|on|by)\b)"
    rf"|(?<!\s)(?:{_WORD}{{4,}}|{_SHORT}{{1,3}}(?!{_WORD}))))(?:\^\{{?-?\d\}}?)?"
)
_UNITS = rf"{_UNIT}(?:[\s/.*-]+{_UNIT})*"
_QUOTIENT = r"\\frac\{\d+\}\{\d+\}"
_TIMES_POWER = r"\\(?:times|cdot)\s*10\^\{[-+]?\d+\}"
_SAYS = r"(?:(?:[:=]|\bis)\s*\}|\}\s*[:=])"
_NAMED = rf"{_TEXT}\{{(?:[^{{}}\d]{{2,}}|[mshgdlLCFKWVJN])\}}(?:\^\{{?-?\d\}}?)?"  # a unit in \text
_THOUSANDS = r"(?<![\d.,])\d{1,3}(?:%s\d{3})+(?!\d|,\d)"
_MONEY = r"\\?[$\u20ac\u00a2\u00a3\u00a5\u20b9]"
_SINGLE = r"(\d|[A-Za-z]|\\[A-Za-z]+|\{[^{}]*\})"  # an argument that needs no braces

_CHARACTERS = _compiled(
    (r"[\u2212\u2010-\u2015\ufe63]", "-"),
    (r"[\u00b2\u00b3\u00b9\u2070-\u207f]+", lambda m: f"^{{{_normal(m)}}}"),
    (r"[\u2080-\u208e]+", lambda m: f"_{{{_normal(m)}}}"),
    (
        r"[\u00bc-\u00be\u2150-\u215e\u2189]",
        lambda m: r"\frac{{{}}}{{{}}}".format(*_normal(m).split("\u2044")),
    ),
    (_THOUSANDS % "[\u2009\u202f\u00a0]", _digits),
)
_FORMS = _compiled(
    # Signs and names
    (r"\u00d7|\u2715|(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times "),
    (r"[\u00b7\u22c5\u2219]", r"\\cdot "),
    (r"[\u00f7\u2215\u2044]", "/"),
    (r"\u221a\s*(?:(\d+(?:\.\d+)?|[A-Za-z\u03c0])|\(([^()]*)\)|(?=\{))", r"\\sqrt{\1\2}"),
    (r"\\sqrt\{\}(?=\{)", r"\\sqrt"),
    (r"\u221b\s*\(?(\d+|[A-Za-z])\)?", r"\\sqrt[3]{\1}"),
    (r"\u03c0|(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
    (r"\u221e|(?<![A-Za-z\\])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty "),
    (r"\u2205|\\varnothing(?![A-Za-z])", r"\\emptyset "),
    (r"\u2264", r"\\le "),
    (r"\u2265", r"\\ge "),
    (r"\u2260", r"\\ne "),
    (r"\u00b1", r"\\pm "),
    (r"\u222a", r"\\cup "),
    (r"\\(?:[dtcs]|nice)frac(?![A-Za-z])", r"\\frac"),
    (rf"\\frac\s*{_SINGLE}\s*{_SINGLE}", lambda m: rf"\frac{_braced(m[1])}{_braced(m[2])}"),
    (r"(\\sqrt\[\d+\])\s*(\w)", r"\1{\2}"),
    (r"(?:\{|^)([^{}]+)\\choose(?![A-Za-z])([^{}]+)(?:\}|$)", r"\\binom{\1}{\2}"),
    (r"\\\{\s*\\\}", r"\\emptyset "),
    (r"(?<![A-Za-z\\])((?:arc)?(?:sin|cos|tan)|cot|csc|ln|log)(?![A-Za-z])", r"\\\1"),
    (r"\\(?:color|textcolor|tag|hspace)\{[^{}]*\}", ""),
    (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|[lL]arge|bf|rm|it)(?![A-Za-z])\s*", ""),
    (r"\\langle(?![A-Za-z])\s*", "("),
    (r"\s*\\rangle(?![A-Za-z])", ")"),
    (r"^\((\w+)\)_", r"\1_"),
    (r"(?<=[\w)])\*\*(?=[-\w(])", "^"),
    # Degrees, percent, money, digits in text, units
    (rf"{_SPACE}*(?:\u00b0\s*[CF]?(?![A-Za-z])|\^\s*\{{?\s*\\circ\s*\}}?|\\degree)", ""),
    (rf"{_SPACE}*(?:\\?%|{_TEXT}\{{\s*percent\s*\}}|percent(?![a-z]))", r"\\%"),
    (rf"{_TEXT}\{{\s*{_MONEY}\s*\}}|(?<=\d)\s*{_MONEY}", ""),
    (rf"(?:USD|EUR|GBP|(?:US|A)?{_MONEY})\s*(?=[-+.\d])", ""),
    (rf"{_TEXT}\{{\s*((?:{'|'.join(_LARGE)})[^{{}}]*)\}}", r" \1"),
    (rf"^{_TEXT}\s*\{{([^{{}}]*\d[^{{}}]*)\}}$", r"\1"),
    (rf"{_TEXT}\s*\{{\s*([-+\d.,/]+)\s*\}}", r" \1 "),
    (rf"^(.*?(?:[\d}})%]|\\pi)){_SPACE}*{_NAMED}(?:(?:{_SPACE}|[/.*]|\\cdot)*{_NAMED})*$", r"\1"),
    (rf"^{_TEXT}\{{[^{{}}]*[A-Za-z]{{2}}[^{{}}]*?{_SAYS}\s*(?=\S)", ""),
    (rf"{_TEXT}\{{([A-Za-z])\}}", r" \1"),
    (r"(?i)^(?:(?:the\s+)?(?:final\s+)?answer(?:\s+is)?|about|exactly)\b\s*[:=]?\s*", ""),
    (r"(?i)^approximately\b|^\\approx(?![a-z])|^\u2248", ""),
    # Digits
    (_THOUSANDS % r"(?:\{,\}|,?(?<!\\)\\[,!;:]|_|')", _digits),
    (r"(?s)^(?!.*\\\{)[^(\[]*$", lambda m: re.sub(_THOUSANDS % ",", _digits, m[0])),
    (r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{?(\d+)\}?|\((\d+)\))", _recurring),
    (
        rf"(?<![\w.])({_DECIMAL})[eE]([-+]?\d+)(?![\w.])",
        lambda m: rf"{m[1]}\times 10^{{{int(m[2])}}}",
    ),
    (
        r"(?:(?<=10)|\{10\})\s*\^\s*(?:\{\s*([-+]?\d+)\s*\}|([-+]?\d+)(?![\d.]))",
        _power_of_ten,
    ),
    (rf"(?i)^([-+]?[\d.]+)\s*({'|'.join(_LARGE)})s?(?:\s+[a-z]+)?$", _large),
    (rf"(?<![\w.,/^}}])(\d+){_SPACE}+(\d+)\s*/\s*(\d+)(?![\w.])", r"\1\\frac{\2}{\3}"),
    (rf"^([-+]?)\s*({_DECIMAL})\s*/\s*({_DECIMAL})(?=\s|$)", r"\1\\frac{\2}{\3}"),
    (rf"^([-+\d.:\s]*(?:\d|{_QUOTIENT}|{_TIMES_POWER}))\s*{_UNITS}$", r"\1"),
    (rf"^(.*(?:\}}|\\pi))\s+(?![A-Za-z](?![A-Za-z])){_UNITS}$", r"\1"),  # not \pi d
)
_LAYOUT = _compiled(
    (rf"{_TEXT}\{{([^{{}}]*)\}}", r"\1"),
    (rf"{_SPACE}+", " "),
    (r" ?([,;()\[\]{}|]) ?", r"\1"),
    (r" ([-+*/=<>^]) ", r"\1"),
    (r"^([-+]) ", r"\1"),
    (r"(\\[A-Za-z]+) (?![A-Za-z])", r"\1"),
    (r" (?=\\)", ""),
    (r"_\{(\w+)\}", r"_\1"),
)
_POWER = r"10\^\{(?P<%s>[-+]?\d{1,9})\}"
_NUMBER = re.compile(
    rf"(?P<sign>[-+])?\s*(?:{_POWER % 'power'}"
    rf"|(?P<whole>\d+)?{_SPACE}*\\frac\{{(?P<over>{_DECIMAL})\}}\{{(?P<under>{_DECIMAL})\}}"
    rf"|(?P<plain>{_DECIMAL})(?:\s*(?:\\times|\\cdot|\*)\s*{_POWER % 'exponent'})?)"
)
_APART = re.compile(rf"(?<![\d_]){_DECIMAL}{_SPACE}+\.?\d")
_PROSE = re.compile(r"[a-z]{3,}(?: [a-z]+)*|\\[a-z]+|\w+_\w+|\d{4}-\d\d-\d\d", re.IGNORECASE)
