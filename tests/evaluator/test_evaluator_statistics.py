"""Estimators over judged answers, against enumeration and hand-worked numbers."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest

from em_kernels.evaluator.statistics import (
    auroc,
    bootstrap,
    calibration,
    compare,
    fit_entropy_law,
    majority_at_k,
    pass_at_k,
)


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize("correct", range(7))
def test_pass_at_k_is_the_mean_over_all_subsets(correct, k):
    answers = [True] * correct + [False] * (6 - correct)
    subsets = list(itertools.combinations(answers, k))
    assert math.isclose(pass_at_k(correct, 6, k), sum(map(any, subsets)) / len(subsets))


def test_majority():
    clusters = [0, 1, 1, 2, 2, None, None, None]
    correct = [True, False, False, True, True, False, False, False]
    assert majority_at_k(clusters, correct, 1) == 1.0
    assert majority_at_k(clusters, correct, 2) == 1.0  # of a tie the one that came first
    assert majority_at_k(clusters, correct, 3) == 0.0
    assert majority_at_k(clusters, correct, 8) == 0.0  # and no answer is not elected
    assert majority_at_k([None, None], [False, False], 2) == 0.0


def test_bootstrap_covers_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        interval = bootstrap(random.random(60) < 0.3, resamples=400, seed=seed)
        hits += interval.low <= 0.3 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_bootstrap_is_seeded_and_exact_for_constants():
    assert bootstrap([0.5] * 7) == (0.5, 0.5, 0.5)
    x = np.random.default_rng(1).random(30)
    assert bootstrap(x, seed=3) == bootstrap(x, seed=3) != bootstrap(x, seed=4)


def test_comparison_is_the_exact_sign_flip_test():
    a = [0.0, 0.25, 0.5, 0.5, 0.75, 0.0, 1.0, 0.25]
    b = [0.5, 0.75, 0.25, 1.0, 1.0, 0.25, 1.0, 1.0]
    differences = [y - x for x, y in zip(a, b) if y != x]
    flips = list(itertools.product([-1, 1], repeat=len(differences)))
    sums = [abs(sum(s * d for s, d in zip(signs, differences))) for signs in flips]
    exact = sum(total >= sum(differences) - 1e-9 for total in sums) / len(flips)
    found = compare(a, b, resamples=40_000)
    assert abs(found.p_value - exact) < 0.005
    assert math.isclose(found.difference, sum(differences) / 8)
    assert (found.better, found.worse, found.problems) == (6, 1, 8)
    assert found.low < found.difference < found.high


def test_few_differences_are_compared_by_all_their_sign_patterns():
    assert compare([0, 0, 0, 0.5], [1, 0, 1, 1]).p_value == 2 / 8
    assert compare([0] * 12, [1] * 12).p_value == 2 / 2**12
    many = compare([0] * 40, [1] * 40, resamples=999)
    assert many.p_value == 1 / 1000, "the observed pattern alone, of those drawn"


def test_comparison_of_the_same_is_not_significant():
    assert compare([0.5, 1.0], [0.5, 1.0]).p_value == 1.0
    assert compare([0.5, 0.0], [0.5, 1.0]).p_value == 1.0  # one difference, of either sign


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", ([0.25], [0.25] * 5, [0.0, 0.0], [1.0] * 300))
def test_values_without_spread_have_an_interval_without_width(values):
    assert bootstrap(values) == (values[0],) * 3
    same = compare(values, values)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)


@pytest.mark.filterwarnings("error")
def test_nan_stays_nan():
    assert all(math.isnan(x) for x in bootstrap([math.nan, 1.0]))
    assert math.isnan(compare([0.0, math.nan], [1.0, 0.0]).p_value)


def test_the_interval_is_that_of_resampled_means():
    x = np.random.default_rng(2).random(40)
    draws = x[np.random.default_rng(5).integers(0, 40, (2000, 40))].mean(1)
    expected = np.quantile(draws, [0.05, 0.95])
    found = bootstrap(x, confidence=0.9, resamples=2000, seed=5)
    assert (found.mean, found.low, found.high) == pytest.approx((x.mean(), *expected))


def test_memory_does_not_grow_with_the_resamples():
    peaks = []
    x = np.arange(20_000) % 7 / 7
    for resamples in (50, 50, 500):  # the first time SciPy is loaded
        tracemalloc.start()
        compare(np.zeros(len(x)), x, resamples=resamples)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.5 * peaks[1]


def test_p_values_are_uniform_under_the_null():
    random = np.random.default_rng(0)
    found = [compare(*random.random((2, 40)), resamples=200, seed=s).p_value for s in range(300)]
    assert 0.02 <= np.mean(np.array(found) <= 0.05) <= 0.09
    assert 0.4 <= np.mean(found) <= 0.6


def test_calibration_by_hand():
    found = calibration([0.05, 0.95, 0.95, 0.95, 0.95], [False, True, True, True, False])
    assert math.isclose(found.ece, (0.05 + 4 * 0.2) / 5)
    assert math.isclose(found.brier, (3 * 0.05**2 + 0.95**2 + 0.05**2) / 5)
    assert found.auroc == (3 * 1 + 3 * 0.5) / 6
    assert [(round(c, 9), a, n) for c, a, n in found.bins] == [(0.05, 0, 1), (0.95, 0.75, 4)]


def test_confidence_of_one_falls_into_the_last_bin():
    assert calibration([1.0, 0.0], [True, False]).ece == 0


def test_auroc_is_the_pairwise_count():
    random = np.random.default_rng(0)
    score, right = random.integers(0, 6, 50) / 5, random.random(50) < 0.4
    pairs = [(x > y) + 0.5 * (x == y) for x in score[right] for y in score[~right]]
    assert math.isclose(auroc(score, right), np.mean(pairs))
    assert auroc([0.1, 0.2], [True, True]) is None


def test_entropy_law_is_recovered():
    entropy = np.array([0.1, 0.3, 0.6, 1.0])
    found = fit_entropy_law(entropy, -0.2 * np.exp(entropy) + 0.9)
    assert np.allclose(found[:4], [0.2, 0.9, 0.7, 1.0]) and found.points == 4


def test_entropy_law_is_the_least_squares_fit():
    random = np.random.default_rng(0)
    entropy, performance = random.random(20), random.random(20)
    slope, intercept = np.polyfit(np.exp(entropy), performance, 1)
    found = fit_entropy_law(entropy, performance)
    assert np.allclose([found.a, found.b], [-slope, intercept])
    assert np.isclose(found.r2, np.corrcoef(np.exp(entropy), performance)[0, 1] ** 2)


def test_two_points_explain_no_variance():
    assert fit_entropy_law([0.1, 0.3], [0.7, 0.5]).r2 is None
    assert fit_entropy_law([0.1, 0.3, 0.6], [0.5, 0.5, 0.5]).r2 is None


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: pass_at_k(1, 4, 5), r"k must be in \[1, 4\]"),
        (lambda: pass_at_k(5, 4, 1), r"correct must be in \[0, 4\]"),
        (lambda: majority_at_k([0], [True], 2), "k must be in"),
        (lambda: bootstrap([]), "at least one value"),
        (lambda: bootstrap([1.0], confidence=1.0), "confidence must be in"),
        (lambda: compare([1.0], [1.0, 0.0]), "same problems"),
        (lambda: calibration([0.5], []), "as many"),
        (lambda: calibration([1.5], [True]), r"in \[0, 1\]"),
        (lambda: fit_entropy_law([0.5, 0.5], [0.1, 0.2]), "two of them different"),
    ],
)
def test_bad_input(call, text):
    with pytest.raises(ValueError, match=text):
        call()
