"""Estimators over judged answers, against enumeration and hand-worked numbers."""

import itertools
import math

import numpy as np
import pytest

from em_kernels.evaluator.statistics import (
    auroc,
    bootstrap,
    calibration,
    cluster_entropy,
    compare,
    fit_entropy_law,
    majority_at_k,
    pass_at_k,
    vote_margin,
)


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize("correct", range(7))
def test_pass_at_k_is_the_mean_over_all_subsets(correct, k):
    answers = [True] * correct + [False] * (6 - correct)
    subsets = list(itertools.combinations(answers, k))
    assert math.isclose(pass_at_k(correct, 6, k), sum(map(any, subsets)) / len(subsets))


def test_majority():
    clusters = ["a", "b", "b", "c", "c", None, None, None]
    correct = [True, False, False, True, True, False, False, False]
    assert majority_at_k(clusters, correct, 1) == 1.0
    assert majority_at_k(clusters, correct, 2) == 0.5  # a tie of right and wrong
    assert majority_at_k(clusters, correct, 3) == 0.0
    assert majority_at_k(clusters, correct, 8) == 0.5  # no answer is not elected
    assert majority_at_k([None, None], [False, False], 2) == 0.0


def test_label_free_signals():
    assert vote_margin(["a", "a", "a", "b"]) == 0.5
    assert vote_margin(["a", "a"]) == 1.0
    assert vote_margin([None, None]) == 0.0
    assert cluster_entropy(["a", "a", "a"]) == 0.0
    assert math.isclose(cluster_entropy(["a", "a", "b", "b"]), math.log(2))
    assert math.isclose(cluster_entropy([None, None, "a"]), math.log(3))


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


def test_comparison_of_the_same_is_not_significant():
    assert compare([0.5, 1.0], [0.5, 1.0]).p_value == 1.0


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


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: pass_at_k(1, 4, 5), r"k must be in \[1, 4\]"),
        (lambda: pass_at_k(5, 4, 1), r"correct must be in \[0, 4\]"),
        (lambda: majority_at_k(["a"], [True], 2), "k must be in"),
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
