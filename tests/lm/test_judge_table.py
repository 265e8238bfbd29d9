"""The judge over a table made by rule: values x written forms x places, right and wrong pairs."""

import itertools
from collections import Counter
from fractions import Fraction

import pytest

from em_kernels.lm.judge.judges import make_judge

INTEGERS = [0, 1, 7, 14, 105, 1234, 56789, 1234567, -3, -12, -1500]
DECIMALS = ["0.5", "3.14", "-2.75", "12.8", "0.00001", "1234.5", "-0.125"]
FRACTIONS = [(1, 2), (3, 4), (-5, 3), (22, 7), (7, 12), (-1, 8)]
MIXED = [(1, 1, 2), (2, 3, 4), (10, 2, 3), (3, 1, 8)]
RECURRING = [("0", "", "3"), ("0", "1", "6"), ("2", "", "45")]
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
VULGAR = {(1, 2): "½", (3, 4): "¾", (2, 3): "⅔", (1, 8): "⅛"}


def grouped(digits: str, separator: str) -> str:
    whole, point, rest = digits.partition(".")
    return f"{int(whole):,}".replace(",", separator) + point + rest


def dressed(text: str) -> list[str]:
    """What may stand around any number without changing it."""
    forms = ["{}", "${}$", "\\({}\\)", "**{}**", "{}.", " {} ", "\\text{{The answer is }}{}"]
    return [form.format(text) for form in forms]


def digits_forms(text: str) -> list[str]:
    forms = [*dressed(text), text.replace("-", "\u2212"), text.replace("-", "\u2013")]
    forms += [f"x = {text}", f"{text}\\text{{ cm}}", f"{text} \\mathrm{{ kg}}", f"{text} apples"]
    forms += [f"\\mathbf{{{text}}}", f"{text}^\\circ", f"{text}°", f"\\${text}", f"€{text}"]
    large = len(text.lstrip("-").partition(".")[0]) > 3
    return forms + [grouped(text, s) for s in (",", "{,}", "\\,", "\u202f", ",\\!") if large]


def integer_forms(n: int) -> list[str]:
    forms = [*digits_forms(str(n)), f"{n}.0", f"{n}.00"]
    if n and n % 100 == 0:
        forms += [f"{n // 100}e2", f"{n // 100} \\times 10^{{2}}", f"{n // 100}×10²"]
    return [*forms, f"{2 * n}/2", f"\\frac{{{3 * n}}}{{3}}"]


def decimal_forms(text: str) -> list[str]:
    value = Fraction(text)
    mantissa, exponent = f"{float(text):e}".split("e")
    mantissa, exponent = mantissa.rstrip("0").rstrip("."), int(exponent)
    raised = str(exponent).translate(SUPERSCRIPTS)
    scientific = [f"{mantissa}e{exponent}", f"{mantissa}E{exponent:+03d}"]
    scientific += [f"{mantissa} \\times 10^{{{exponent}}}", f"{mantissa}\\cdot 10^{{{exponent}}}"]
    scientific += [f"{mantissa} × 10{raised}", f"{mantissa} x 10^{exponent}"]
    ratio = [f"\\frac{{{value.numerator}}}{{{value.denominator}}}"]
    return [*digits_forms(text), f"{text}0", *scientific, *ratio]


def fraction_forms(a: int, b: int) -> list[str]:
    sign, over = "-" if a < 0 else "", abs(a)
    latex = [f"{sign}\\{frac}{{{over}}}{{{b}}}" for frac in ("frac", "dfrac", "tfrac")]
    forms = [*latex, f"\\frac{{{a}}}{{{b}}}", f"{a}/{b}", f"{a} / {b}", f"{3 * a}/{3 * b}"]
    forms += [form for text in (f"{a}/{b}", latex[0]) for form in dressed(text)]
    forms += [f"\u2212{over}/{b}"] if sign else []
    forms += [f"\\frac{over}{b}"] if 0 < a < 10 and b < 10 else []
    return forms + ([sign + VULGAR[over, b]] if (over, b) in VULGAR else [])


def mixed_forms(whole: int, a: int, b: int) -> list[str]:
    forms = [f"{whole} {a}/{b}", f"{whole}\\frac{{{a}}}{{{b}}}", f"{whole} \\dfrac{{{a}}}{{{b}}}"]
    forms += [f"{whole}\\ {a}/{b}", f"{whole}\\tfrac{a}{b}", f"{whole * b + a}/{b}"]
    forms += [f"{whole}{VULGAR[a, b]}", f"{whole} {VULGAR[a, b]}"]
    return forms + [form for text in forms[:2] for form in dressed(text)]


def recurring_forms(whole: str, once: str, again: str) -> list[str]:
    over = int(whole + once + again) - int(whole + once)
    value = Fraction(over, 10 ** len(once) * (10 ** len(again) - 1))
    forms = [f"{whole}.{once}\\overline{{{again}}}", f"{whole}.{once}\\bar{{{again}}}"]
    return [*forms, f"{value.numerator}/{value.denominator}"]


EXPRESSIONS = [  # forms of the first are equal; none equals anything of the second
    (["\\sqrt{2}", "√2", "\\sqrt 2", "2^{1/2}"], ["2", "\\sqrt{3}", "-\\sqrt{2}", "4"]),
    (["2\\sqrt{3}", "2√3", "\\sqrt{12}", "2 \\sqrt{3}"], ["3", "2", "23", "\\sqrt{3}", "6"]),
    (["5^2", "5²", "25", "5^{2}"], ["52", "5", "2", "10"]),
    (["2^{10}", "2^10", "2¹⁰", "1024", "1,024"], ["10", "210", "20", "2"]),
    (["10^{-5}", "10⁻⁵", "1e-05", "1e-5", "0.00001"], ["-5", "10", "1e-06", "0.00002"]),
    (["10^{22}", "1e22", "1e+22", "1" + "0" * 22], ["22", "1022", "1" + "0" * 21, "10"]),
    (["2\\pi", "2π", "2 \\pi", "2*pi", "\\pi \\cdot 2"], ["2", "\\pi", "3\\pi", "-2\\pi"]),
    (["\\frac{\\pi}{2}", "π/2", "\\pi/2", "\\dfrac{\\pi}{2}"], ["2", "\\pi", "\\frac{1}{2}"]),
    (["\\frac{\\sqrt{3}}{2}", "√3/2", "\\dfrac{\\sqrt3}{2}"], ["2", "3", "\\frac{3}{2}"]),
    (["x+1", "1+x", "x + 1", "$x+1$"], ["1", "x", "x-1", "x+2", "x1"]),
    (["x^2+2x+1", "(x+1)^2", "x²+2x+1"], ["1", "x^2+1", "(x-1)^2", "2"]),
    (["2x", "2 \\cdot x", "x \\cdot 2"], ["2", "x", "x^2", "2y"]),
    (["(1,2)", "(1, 2)", "\\left(1, 2\\right)"], ["(2,1)", "2", "1", "12", "(1,3)"]),
    (["[1,2)", "[1, 2)", "\\left[1,2\\right)"], ["(1,2]", "[1,2]", "(1,2)", "2"]),
    (["\\{1,2\\}", "\\{2, 1\\}", "\\left\\{1,2\\right\\}"], ["\\{1\\}", "2", "\\{1,3\\}", "12"]),
    (["(-\\infty, 3)", "(-∞, 3)"], ["3", "(-\\infty, 3]", "(3, \\infty)"]),
    (["3:4", "3 : 4"], ["4", "3", "34", "4:3"]),
    (["3+4i", "4i+3", "3 + 4i"], ["4", "3", "3-4i", "7"]),
    (["50\\%", "50%", "50 percent"], ["5", "0.05", "5\\%", "60\\%", "500"]),
    (["\\text{Monday}", "Monday", "monday"], ["\\text{Sunday}", "Mon", "day"]),
    (["\\text{no solution}", "No solution"], ["solution", "0", "\\text{one solution}"]),
    (["\\infty", "∞"], ["-\\infty", "0", "8"]),
    (["\\emptyset", "∅", "\\varnothing"], ["0", "\\{0\\}", "\\{1\\}"]),
    (["5 million", "5,000,000", "\\$5 \\text{ million}"], ["5", "5000", "500000"]),
    (["\\pm 3", "±3"], ["3", "-3", "\\pm 2"]),
    (["2 3"], ["23", "5", "6", "3", "2"]),
]


def neighbours(value: Fraction, text: str) -> list[str]:
    """Other numbers that a careless reading of the text gives."""
    near = [value + 1, value - 1, -value, value * 10, value / 10, value * 2]
    parts = [part for part in text.replace("-", "").replace("/", ".").split(".") if part]
    joined = "".join(c for c in text if c.isdigit())
    other = [*(f"{n.numerator}/{n.denominator}" for n in near), *parts, joined]
    return [o for o in other if Fraction(o) != value]


def families():
    """(kind, text of the right answer, equal forms, unequal forms)."""
    for n in INTEGERS:
        yield "integer", str(n), integer_forms(n), neighbours(Fraction(n), str(n))
    for text in DECIMALS:
        yield "decimal", text, decimal_forms(text), neighbours(Fraction(text), text)
    for a, b in FRACTIONS:
        text = f"{a}/{b}"
        yield "fraction", text, fraction_forms(a, b), neighbours(Fraction(a, b), text)
    for whole, a, b in MIXED:
        wrong = [f"{whole}{a}/{b}", f"{whole * a}/{b}", f"{a}/{b}", str(whole), str(b)]
        yield "mixed", f"{whole * b + a}/{b}", mixed_forms(whole, a, b), wrong
    for parts in RECURRING:
        forms = recurring_forms(*parts)
        yield "recurring", forms[-1], forms, ["".join(parts), parts[2], f"0.{parts[2]}"]
    for number, (forms, wrong) in enumerate(EXPRESSIONS):
        yield f"expression {number}", forms[0], forms, wrong


PLACES = {
    "box": "Thus the answer is $\\boxed{{{}}}$.",
    "two boxes": "First \\boxed{{17}}, but then \\boxed{{{}}} and \\boxed{{}}.",
    "unbraced mark": "We get 3 and 4.\n#### {}",
    "heading": "## Step 1: add 2\n\n#### Final Answer\n{}",
    "sentence": "We add 17 and 4, so the answer is {}.",
    "math": "We add 17 and 4, so the answer is ${}$.",
    "thought": "<think>It is \\boxed{{17}}?</think>\nThe answer is \\boxed{{{}}}.",
}


def pairs():
    """(kind, place, response, right answer, whether it is right)."""
    places = itertools.cycle(PLACES)
    for kind, right, forms, wrong in families():
        for form in forms:
            yield kind, "box", PLACES["box"].format(form), right, True
            yield kind, "answer", f"\\boxed{{{right}}}", form, True
        for form, other in itertools.product(forms[:4], wrong):
            yield kind, "box", PLACES["box"].format(form), other, False
        for other in wrong:
            yield kind, "answer", f"\\boxed{{{other}}}", right, False
        for form in forms[:3]:
            for place in itertools.islice(places, 3):
                if is_placed(place, form):
                    response = PLACES[place].format(form)
                    yield kind, place, response, right, True
                    yield from ((kind, place, response, other, False) for other in wrong[:2])


def is_placed(place: str, form: str) -> bool:
    """Words and lists are no answers outside a mark; a formula's delimiters are not nested."""
    prose = any(word in form for word in ("olution", "onday", "illion", "2 3"))
    return not (place == "sentence" and (prose or "x" in form)) and not (
        place == "math" and (prose or "$" in form or "**" in form or "\\(" in form)
    )


def misjudged(judge, table) -> list[tuple]:
    return [pair for pair in table if judge(pair[2], pair[3]) is not pair[4]]


def test_exact_is_never_right_for_a_wrong_pair():
    wrong = [pair for pair in pairs() if not pair[4]]
    assert misjudged(make_judge("exact"), wrong) == []


def test_math_verify_misjudges_at_most_one_in_a_hundred(patient_judge):
    pytest.importorskip("math_verify")
    judge, table = make_judge("math-verify"), list(dict.fromkeys(pairs()))
    counts = Counter(pair[4] for pair in table)
    assert min(counts.values()) > 500 and len(table) > 1000, counts
    bad = misjudged(judge, table)
    assert len(bad) <= len(table) / 100, (len(table), bad)
    kinds = Counter(pair[0] for pair in bad) + Counter(pair[1] for pair in bad)
    assert max(kinds.values(), default=0) <= 3, bad
