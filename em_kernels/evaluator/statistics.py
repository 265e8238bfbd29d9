"""Estimators over judged answers: accuracies, intervals, comparisons, calibration, fits.

Everything takes and gives plain floats and sequences; one problem is one independent observation,
however many answers were drawn to it. NumPy and SciPy are imported where they are used: they come
with the extras, and what needs only a judge or `em-kernels info` goes without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from em_kernels.lm.judge.clusters import Clusters, majority
from em_kernels.lm.optional import require

if TYPE_CHECKING:
    from numpy import ndarray

RESAMPLES = 10_000
CONFIDENCE = 0.95
MOST_RESAMPLES, MOST_BINS = 10**8, 10**5


def require_scipy() -> ModuleType:
    """scipy.stats, or an ImportError that says how to get it."""
    return require("scipy.stats", "'em-kernels[eval]'")


def _check_whole(name: str, value: Any, least: int = 0, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if int(value) < least or (most is not None and int(value) > most):
        rule = f"{least} or more" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"{name} must be {rule}, got {value}")


def _column(name: str, values: Sequence[float] | ndarray, finite: bool = False) -> ndarray:
    """One number an observation, in float64."""
    import numpy as np

    try:
        found = np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise TypeError(f"{name} must be a sequence of numbers, got {error}") from None
    if found.ndim != 1 or (found.dtype.kind not in "fiub" and len(found)):
        got = f"{type(values).__name__} of {found.dtype} and shape {found.shape}"
        raise TypeError(f"{name} must be a sequence of numbers, got {got}")
    column = found.astype(np.float64)
    if finite and not np.isfinite(column).all():
        raise ValueError(f"{name} must be finite, got {column[~np.isfinite(column)][0]}")
    return column


def _truths(name: str, values: Sequence[bool] | ndarray) -> ndarray:
    """Whether each answer is right: 0 and 1 are that too."""
    column = _column(name, values)
    if not ((column == 0) | (column == 1)).all():
        raise ValueError(f"{name} must be true or false for each answer, got other numbers")
    return column.astype(bool)


def _check_resampling(resamples: int, seed: int) -> None:
    _check_whole("resamples", resamples, 1, MOST_RESAMPLES)
    _check_whole("seed", seed)


class Interval(NamedTuple):
    """A mean over problems and its two-sided confidence interval."""

    mean: float
    low: float
    high: float


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that one of k of the n answers is right, unbiased.

    Args:
        correct, samples: c right answers among n.
        k: in [1, n].

    Raises:
        TypeError, ValueError: no numbers; k or c out of range.

    Source: Chen et al., "Evaluating Large Language Models Trained on Code" (2021),
    arXiv:2107.03374.
    """
    for name, value in (("correct", correct), ("samples", samples), ("k", k)):
        _check_whole(name, value)
    if not 1 <= k <= samples:
        raise ValueError(f"k must be in [1, {samples}], the number of samples, got {k!r}")
    if not 0 <= correct <= samples:
        raise ValueError(f"correct must be in [0, {samples}], got {correct!r}")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_at_k(clusters: Clusters, correct: Sequence[bool], k: int) -> float:
    """Whether the commonest of the first k answers is right; of a tie, the one that came first.

    Args:
        clusters: which answers are the same, see `majority`; None is never elected.
        correct: whether each answer is right.
        k: in [1, number of answers].

    Raises:
        TypeError, ValueError: clusters that are no sequence; k out of range; more or fewer
            `correct` than answers.
    """
    if isinstance(clusters, str) or not isinstance(clusters, Sequence):
        raise TypeError(f"clusters must be a sequence, got {type(clusters).__name__}")
    _check_whole("k", k)
    truths = _truths("correct", correct)
    if len(truths) != len(clusters):
        raise ValueError(f"correct must have {len(clusters)} entries, got {len(truths)}")
    if not 1 <= k <= len(clusters):
        raise ValueError(f"k must be in [1, {len(clusters)}], the number of samples, got {k!r}")
    elected = majority(clusters[:k])
    pairs = zip(clusters[:k], truths)
    return float(any(right for c, right in pairs if c is not None and c == elected))


def bootstrap(
    values: Sequence[float] | ndarray,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean over problems with a percentile bootstrap interval; problems are drawn with replacement.

    Raises:
        TypeError, ValueError: no values, or no numbers; a confidence outside (0, 1).

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), percentile interval.
    """
    import numpy as np

    stats = require_scipy()
    x = _column("values", values)
    if not len(x):
        raise ValueError("values must have at least one value, got none")
    if isinstance(confidence, bool) or not isinstance(confidence, Real):
        raise TypeError(f"confidence must be a number, got {type(confidence).__name__}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence!r}")
    _check_resampling(resamples, seed)
    mean = float(x.mean())
    if not x.std() > 0:  # one value, or all of them equal, or NaN
        return Interval(mean, mean, mean)
    found = stats.bootstrap(
        (x,),
        np.mean,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        **_drawing(x, seed),
    )
    return Interval(mean, *map(float, found.confidence_interval))


def _drawing(x: ndarray, seed: int) -> dict[str, Any]:
    """How SciPy resamples x: about a million draws at once, so that memory does not grow."""
    import numpy as np

    batch = max(1, 1_000_000 // len(x))
    return {"vectorized": True, "batch": batch, "rng": np.random.default_rng(seed)}


class Comparison(NamedTuple):
    """Mean of b - a over the same problems, its interval, and a two-sided p-value."""

    difference: float
    low: float
    high: float
    p_value: float
    problems: int
    better: int
    worse: int


def compare(
    a: Sequence[float], b: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """Is b better than a on the problems both were asked? Paired, by flipping signs.

    Under the null hypothesis the sign of each problem's difference is as likely + as -; the p-value
    is the share of sign patterns whose mean is at least as far from 0: of all of them where there
    are at most `resamples`, else of random ones, the observed one included.

    Raises:
        TypeError, ValueError: no numbers; different numbers of problems, or none.

    Source: Fisher, The Design of Experiments (1935), randomisation test of paired differences;
    Phipson and Smyth (2010) for counting the observed pattern.
    """

    first, second = _column("a", a), _column("b", b)
    if len(first) != len(second) or not len(first):
        raise ValueError(
            f"a and b must be of the same problems, got {len(first)} and {len(second)}"
        )
    _check_resampling(resamples, seed)
    difference = second - first
    interval = bootstrap(difference, resamples=resamples, seed=seed)
    return Comparison(
        *interval,
        p_value=_sign_flip(difference, resamples, seed),
        problems=len(difference),
        better=int((difference > 0).sum()),
        worse=int((difference < 0).sum()),
    )


def _sign_flip(difference: ndarray, resamples: int, seed: int) -> float:
    import numpy as np

    x = difference[difference != 0]
    if not np.isfinite(x).all():
        return math.nan
    if len(x) < 2:  # both signs are as far from 0
        return 1.0
    found = require_scipy().permutation_test(
        (x,),
        lambda x, axis: np.abs(np.mean(x, axis=axis)),
        permutation_type="samples",
        alternative="greater",
        n_resamples=resamples,
        **_drawing(x, seed),
    )
    return float(found.pvalue)


class Calibration(NamedTuple):
    """How confidence goes with being right; `auroc` is None where all or none are right."""

    ece: float
    brier: float
    auroc: float | None
    bins: list[tuple[float, float, int]]  # mean confidence, accuracy, answers


def calibration(
    confidence: Sequence[float], correct: Sequence[bool], *, bins: int = 10
) -> Calibration:
    """ECE = sum_b n_b / n |accuracy_b - confidence_b| over equal-width bins, Brier, AUROC.

    Args:
        confidence: in [0, 1], one per answer.
        correct: whether the answer is right.
        bins: equal-width bins of [0, 1]; empty ones are left out of the result.

    Raises:
        TypeError, ValueError: no numbers, different lengths, no answers, or a confidence outside
            [0, 1].

    Source: Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning" (2015),
    ECE; Brier (1950); AUROC as the Mann-Whitney statistic, ties counting half.
    """
    import numpy as np

    p, y = _column("confidence", confidence), _truths("correct", correct).astype(np.float64)
    _check_whole("bins", bins, 1, MOST_BINS)
    if len(p) != len(y) or not len(p):
        raise ValueError(f"confidence and correct must be as many, got {len(p)} and {len(y)}")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("confidence must be in [0, 1]")
    which = np.minimum((p * bins).astype(int), bins - 1)
    found = [(p[which == b], y[which == b]) for b in range(bins)]
    rows = [(float(c.mean()), float(r.mean()), len(c)) for c, r in found if len(c)]
    ece = sum(n * abs(accuracy - mean) for mean, accuracy, n in rows) / len(p)
    return Calibration(ece, float(((p - y) ** 2).mean()), auroc(p, y), rows)


def auroc(score: Sequence[float] | ndarray, correct: Sequence[bool] | ndarray) -> float | None:
    """The chance that a right answer scores above a wrong one, ties half; None without both."""
    x, y = _column("score", score), _truths("correct", correct)
    if len(x) != len(y):
        raise ValueError(f"score and correct must be as many, got {len(x)} and {len(y)}")
    right, wrong = x[y], x[~y]
    if not len(right) or not len(wrong):
        return None
    above = require_scipy().mannwhitneyu(right, wrong, method="asymptotic").statistic
    return float(above / (len(right) * len(wrong)))


class EntropyFit(NamedTuple):
    """R = -a exp(H) + b; `ceiling` b - a is R at H = 0, `r2` the share of variance explained.

    `r2` is None of two points, which any line meets, and where R does not vary.
    """

    a: float
    b: float
    ceiling: float
    r2: float | None
    points: int


def fit_entropy_law(entropy: Sequence[float], performance: Sequence[float]) -> EntropyFit:
    """Least squares of R = -a exp(H) + b, linear in exp(H).

    Args:
        entropy: mean entropies H, nats.
        performance: R at each, e.g. accuracies.

    Raises:
        TypeError, ValueError: numbers that are not finite, different lengths, or fewer than two
            different entropies.

    Source: Cui et al., "The Entropy Mechanism of Reinforcement Learning for Reasoning Language
    Models" (2025), arXiv:2505.22617.
    """
    import numpy as np

    x = np.exp(_column("entropy", entropy, finite=True))
    y = _column("performance", performance, finite=True)
    if len(x) != len(y) or len(set(x.tolist())) < 2:
        raise ValueError(
            f"a fit needs as many entropies as performances, two of them different, got {len(x)} "
            f"entropies ({len(set(x.tolist()))} different) and {len(y)} performances"
        )
    fit = require_scipy().linregress(x, y)
    slope, b = float(fit.slope), float(fit.intercept)
    r2 = float(fit.rvalue**2) if len(x) > 2 and y.var() > 0 else None
    return EntropyFit(-slope, b, b + slope, r2, len(x))
