"""Logits shift: how training moves the distribution of logits over the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from em_kernels.analysis.tokens import TokenFile, TokenStats

BINS = 40


def logits_shift(before: TokenFile, after: TokenFile | None = None) -> dict:
    """Moments of the logits of each model on the same texts, and after - before.

    Per token, mean, population variance and skewness E[(z - mean)^3] / var^1.5 of the logits z over
    the full vocabulary (every row of the head, rows that the tokenizer does not use included), then
    the mean of each over tokens. `pooled` are the same moments over all logits of all tokens at
    once. Entropy minimisation is reported to make the skewness rise, reinforcement learning to make
    it fall.

    `compat` repeats the pooled skewness, the reading of "skewness of the vocabulary logits" that
    is closest to a histogram of them all; the definition in the published script could not be
    verified.

    Raises:
        ValueError: the two files are not of the same tokens.

    Source: Gao et al., "One-shot Entropy Minimization" (2025), the analysis of logits.
    """
    models = [_moments(before)]
    if after is not None:
        models.append(_moments(after))
        check_same(before, after)
    edges = np.histogram_bin_edges(np.concatenate([m["skews"] for m in models]), BINS)
    histograms = [np.histogram(m.pop("skews"), edges)[0].tolist() for m in models]
    names = ("mean", "variance", "skewness", "compat")
    change = {name: models[-1][name] - models[0][name] for name in names}
    return {
        "kind": "shift",
        "source": before.head["source"],
        "models": models,
        "change": change if after is not None else None,
        "histogram": {"edges": edges.tolist(), "tokens": histograms},
    }


def _moments(file: TokenFile) -> dict:
    moments = _columns(file)
    fine = np.isfinite(moments).all(axis=0)
    mean, variance, skewness = moments[:, fine]
    if not len(mean):
        raise ValueError(f"{file.path} has no token with finite moments of its logits")
    pooled = pooled_moments(mean, variance, skewness)
    return {
        "model": file.head["model"],
        "tokens": len(mean),
        "not_finite": int((~fine).sum()),
        "mean": float(mean.mean()),
        "variance": float(variance.mean()),
        "skewness": float(skewness.mean()),
        "pooled": dict(zip(("mean", "variance", "skewness"), pooled)),
        "compat": pooled[2],
        "skews": skewness,
    }


def pooled_moments(
    mean: np.ndarray, variance: np.ndarray, skewness: np.ndarray
) -> tuple[float, float, float]:
    """Mean, population variance and skewness of the union of groups of the same size.

        M = mean_i m_i     V = mean_i [v_i + (m_i - M)^2]
        S = mean_i [s_i v_i^1.5 + 3 v_i (m_i - M) + (m_i - M)^3] / V^1.5     (0 where V = 0)

    Args:
        mean, variance, skewness: of each group, float64 (N,).
    """
    centre = mean.mean()
    d = mean - centre
    total = (variance + d**2).mean()
    third = (skewness * variance**1.5 + 3 * variance * d + d**3).mean()
    return float(centre), float(total), float(third / total**1.5) if total > 0 else 0.0


def _columns(file: Iterable[TokenStats]) -> np.ndarray:
    """(3, tokens), float64: all that is kept in memory."""
    parts = [np.array([s.logit_mean, s.logit_var, s.logit_skew], dtype=np.float64) for s in file]
    return np.concatenate([np.empty((3, 0)), *parts], axis=1)


def check_same(before: TokenFile, after: TokenFile) -> None:
    """Both files are of the same tokens."""
    first, second = ({s.key: s.ids for s in file} for file in (before, after))
    if first != second:
        raise ValueError(
            f"{before.path} and {after.path} must be of the same tokens: {len(first)} and "
            f"{len(second)} texts, {sum(first[k] == second.get(k) for k in first)} of them the same"
        )
