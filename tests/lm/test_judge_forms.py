"""The judge on written forms, one pair a line: what a rule of ours must not make wrong or right."""

import pytest

from em_kernels.lm.judge.answers import final_answer
from em_kernels.lm.judge.judges import exact, math_verify
from em_kernels.lm.judge.written import MAX_LENGTH, read

EQUAL = [  # by number or text
    ("7\\,", "7"),
    ("7\\ ", "7"),
    ("7\\quad", "7"),
    ("3/4 cups", "0.75"),
    ("\\frac{3}{4} hours", "3/4"),
    ("1.5 \\times 10^{3} m/s", "1500"),
    ("6.02 \\times 10 ^ {23}", "602" + "0" * 21),
    ("3 \\times {10}^{4}", "30000"),
    ("12.8 \\mathrm{~m} / \\mathrm{s}", "12.8"),
    ("5km", "5"),
    ("5 км", "5"),
    ("5元", "5"),
    ("12平方米", "12"),
    ("5 mètres", "5"),
    ("\\text{\\$}18.90", "18.9"),
    ("5\u00a2", "5"),
    ("\\color{red}{5}", "5"),
    ("\\bigl(3,4\\bigr)", "(3,4)"),
    ("\\large 5", "5"),
    ("5\\tag{1}", "5"),
    ("3:45 PM", "3:45 \\text{ PM}"),
    ("\\text{May } 5", "May 5"),
    ("\\text{Evelyn.}", "Evelyn"),
    ("101_{2}", "101_2"),
    ("(101)_2", "101_2"),
    ("\\{ \\}", "\\emptyset"),
    ("\\langle 1, 2 \\rangle", "(1,2)"),
    ("\\text{Answer: } (3, 4)", "(3,4)"),
    ("\\boxed{\\{1, 2\\}}", "\\{1,2\\}"),
]
EQUAL_BY_MATH_VERIFY = [
    ("\\log_{2} 3", "\\log_2 3"),
    ("\\log_2 8", "3"),
    ("ln 2", "\\ln 2"),
    ("sin(x)", "\\sin x"),
    ("\\frac\\pi3", "\\frac{\\pi}{3}"),
    ("\\sqrt[3]4", "\\sqrt[3]{4}"),
    ("{10 \\choose 3}", "120"),
    ("3 + 4 i", "3+4i"),
    ("3+4\\cdot i", "3+4i"),
    ("z = 3+4i", "3+4i"),
    ("e^{i\\pi}", "-1"),
    ("4\\mathbf{j}+3\\mathbf{i}", "3\\mathbf{i}+4\\mathbf{j}"),
    ("0 < x \\le 1", "(0, 1]"),
    ("x > 5", "(5, \\infty)"),
    ("x \\in \\{1,-2\\}", "1, -2"),
    ("2\\pi \\text{ rad}", "2\\pi"),
    ("8\\sqrt{3} cm", "8\\sqrt{3}"),
    ("4\u03c0 cm\u00b2", "4\\pi"),
]
UNEQUAL = [
    ("2xy", "2"),
    ("-2ab", "-2"),
    ("6ab", "6"),
    ("2 ab", "2"),
    ("3xyz", "3"),
    ("10rs", "10rs^2"),
    ("\\frac{1}{2}bh", "1/2"),
    ("0.5ab", "0.5"),
    ("\\pi d", "\\pi"),
    ("10-7", "7"),
    ("3-5", "5"),
    ("101_2", "101_3"),
    ("2516_{7}", "2516_8"),
    ("3\\mathbf{i}-4\\mathbf{j}", "3\\mathbf{i}+4\\mathbf{j}"),
    ("3-4i", "3 + 4 i"),
    ("\\text{May } 5", "\\text{June } 5"),
    ("\\text{May } 5", "5"),
    ("2024-05-03", "2024-03-05"),
    ("x > 5", "[5, \\infty)"),
    ("x > 5", "5"),
]
PLACED = [
    ("The sum is 10-7.", "10-7"),
    ("so it is 5-3", "5-3"),
    ("The area is 2xy.", "2xy"),
    ("He came 3rd of 5km", "5"),
    ("\u7b54\u6848\u662f7\u3002", "7"),
    ("\u7b54\u6848\u662f-5\u3002", "-5"),
    ("\u7b54\u6848\u662f3/4\u3002", "3/4"),
    ("\u5171\u670912\u4e2a", "12"),
    ("\ub2f5\uc740 1.5\uc785\ub2c8\ub2e4", "1.5"),
    ("So it's \\frac{1}{2}.", "\\frac{1}{2}"),
    ("It has a \\frac{1}{2} chance", "\\frac{1}{2}"),
    ("\\boxed{\\boxed{5\\text{ cm}}}", "5\\text{ cm}"),
]


def boxed(text):
    return f"\\boxed{{{text}}}"


@pytest.mark.parametrize("given, right", EQUAL)
def test_the_same_number_or_text(given, right):
    assert exact(boxed(given), right) and exact(boxed(right), given)


@pytest.mark.parametrize("given, right", EQUAL_BY_MATH_VERIFY)
def test_the_same_value(given, right, patient_judge):
    pytest.importorskip("math_verify")
    assert math_verify(boxed(given), right) and math_verify(boxed(right), given)


@pytest.mark.parametrize("given, right", UNEQUAL)
def test_a_part_or_a_neighbour_is_not_the_same(given, right):
    pytest.importorskip("math_verify")
    for a, b in ((given, right), (right, given)):
        assert not exact(boxed(a), b) and not math_verify(boxed(a), b)


@pytest.mark.parametrize("text, answer", PLACED)
def test_the_place(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    "part", ["min ", "cups ", "apples", "\u0447\u0430\u0441 ", "\u7c73 ", "m/", "cm.", "\\text{m}/"]
)
@pytest.mark.timeout(600)  # a choice at each word would take for ever
def test_many_units_are_read_in_little_time(part):
    read(("5 " + part * MAX_LENGTH)[: MAX_LENGTH - 1] + "!")
