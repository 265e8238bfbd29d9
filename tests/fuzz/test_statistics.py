"""The evaluator's estimators on anything hypothesis thinks of, against plain formulas."""

from __future__ import annotations

import math
from fractions import Fraction

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given

pytest.importorskip("scipy")
from em_kernels.evaluator.statistics import (
    auroc,
    bootstrap,
    calibration,
    compare,
    fit_entropy_law,
    majority_at_k,
    pass_at_k,
)
from fuzz.budget import examples

SHARES = st.integers(0, 16).map(lambda n: n / 16)
PAIRS = st.lists(st.tuples(SHARES, SHARES), min_size=1, max_size=12)
JUDGED = st.lists(st.tuples(SHARES, st.booleans()), min_size=1, max_size=30)


@examples(60)
@given(st.integers(1, 40), st.data())
def test_pass_at_k_is_the_product_of_drawing_wrong_ones(samples, data):
    correct, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    wrong = Fraction(1)
    for i in range(k):
        wrong *= Fraction(max(samples - correct - i, 0), samples - i)
    found = pass_at_k(correct, samples, k)
    assert math.isclose(found, float(1 - wrong), abs_tol=1e-12)
    if k < samples:
        assert pass_at_k(correct, samples, k + 1) >= found - 1e-15


@examples(60)
@given(st.lists(st.tuples(st.sampled_from((None, 0, 1, 2)), st.booleans()), min_size=1, max_size=9))
def test_a_majority_is_one_of_the_commonest(answers):
    clusters, correct = zip(*answers)
    counts = {c: clusters.count(c) for c in clusters if c is not None}
    right = {c for c, good in answers if good and c is not None}
    most = {c for c in counts if counts[c] == max(counts.values())}
    found = majority_at_k(clusters, correct, len(clusters))
    assert found in (0.0, 1.0)
    assert not (most and most <= right) or found == 1
    assert most & right or found == 0


@examples(15)
@given(st.lists(SHARES, min_size=1, max_size=12), st.integers(0, 3))
def test_an_interval_lies_among_its_values(values, seed):
    found = bootstrap(values, resamples=50, seed=seed)
    assert found == bootstrap(values, resamples=50, seed=seed)
    assert min(values) - 1e-12 <= found.low <= found.high <= max(values) + 1e-12
    assert math.isclose(found.mean, math.fsum(values) / len(values), abs_tol=1e-12)


@examples(15)
@given(PAIRS)
def test_a_comparison_the_other_way_round_is_its_negative(pairs):
    a, b = zip(*pairs)
    there, back = (compare(*sides, resamples=64) for sides in ((a, b), (b, a)))
    assert math.isclose(there.difference, -back.difference, abs_tol=1e-12)
    assert (there.better, there.worse) == (back.worse, back.better)
    assert 0 < there.p_value <= 1 and math.isclose(there.p_value, back.p_value, abs_tol=0.2)


@examples(40)
@given(JUDGED, st.integers(1, 12))
def test_calibration_is_that_of_its_formulas(judged, bins):
    p, y = zip(*judged)
    found = calibration(p, y, bins=bins)
    groups: dict[int, list] = {}
    for one, right in judged:
        groups.setdefault(min(int(one * bins), bins - 1), []).append((one, right))
    ece = sum(abs(sum(r for _, r in g) - math.fsum(c for c, _ in g)) for g in groups.values())
    assert math.isclose(found.ece, ece / len(p), abs_tol=1e-9)
    brier = math.fsum((c - r) ** 2 for c, r in judged) / len(p)
    assert math.isclose(found.brier, brier, abs_tol=1e-9)
    assert sum(n for _, _, n in found.bins) == len(p)


@examples(40)
@given(JUDGED)
def test_auroc_counts_pairs(judged):
    right, wrong = ([x for x, good in judged if good is which] for which in (True, False))
    scores, correct = zip(*judged)
    found = auroc(scores, correct)
    if not right or not wrong:
        assert found is None
        return
    wins = sum((a > b) + (a == b) / 2 for a in right for b in wrong)
    assert math.isclose(found, wins / (len(right) * len(wrong)), abs_tol=1e-12)
    assert math.isclose(auroc([x**3 for x in scores], correct), found, abs_tol=1e-12)
    assert math.isclose(auroc([-x for x in scores], correct), 1 - found, abs_tol=1e-12)


@examples(40)
@given(st.lists(st.integers(0, 24), min_size=2, max_size=9), SHARES, SHARES)
def test_points_on_the_law_are_found_on_it(steps, a, b):
    entropy = [step / 8 for step in steps]
    assume(len(set(entropy)) > 1)
    fit = fit_entropy_law(entropy, [b - a * math.exp(h) for h in entropy])
    assert math.isclose(fit.a, a, abs_tol=1e-7) and math.isclose(fit.b, b, abs_tol=1e-6)
    assert math.isclose(fit.ceiling, b - a, abs_tol=1e-6) and fit.points == len(steps)
