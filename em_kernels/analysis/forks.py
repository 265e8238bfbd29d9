"""Forks: the tokens at which a model was most undecided."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from em_kernels.analysis.tokens import TokenFile, TokenStats
from em_kernels.lm.settings import fraction

SHOWN_TYPES, SHOWN_TEXTS, SHOWN_TOKENS = 30, 6, 400
BINS = 50


def forks(file: TokenFile, tokenizer, *, ratio: float = 0.2) -> dict:
    """The tokens with the largest entropies, by token type and in their texts.

    A token is a fork where its entropy H, of the distribution that it was drawn from, is at least
    tau, the (1 - ratio) quantile of H over all the tokens that were read (linear interpolation).

    Args:
        file: what `read_tokens` wrote.
        tokenizer: to show the tokens.
        ratio: the share of tokens that are forks, in (0, 1].

    Returns:
        A dict: tokens, mean and quantiles of H (nats), tau, the share of all entropy that the
        forks carry, the types that are forks most often, a histogram, and the first texts.

    Raises:
        ValueError: a bad ratio, or no finite entropy.

    Source: Wang et al., "Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective
    Reinforcement Learning for LLM Reasoning" (2025), arXiv:2506.01939.
    """
    fraction("ratio", ratio)
    read = [(np.array(s.ids, dtype=int), np.array(s.entropy, dtype=np.float32)) for s in file]
    ids, entropy = map(np.concatenate, zip((np.empty(0, int), np.empty(0, np.float32)), *read))
    finite = np.isfinite(entropy)
    ids, fine = ids[finite], entropy[finite].astype(np.float64)
    if not len(fine):
        raise ValueError(f"{file.path} has no token with a finite entropy")
    tau = float(np.quantile(fine, 1 - ratio))
    quantiles = {str(q): float(np.quantile(fine, q)) for q in (0.5, 0.8, 0.9, 0.99)}
    counts, edges = np.histogram(fine, BINS)
    return {
        "kind": "forks",
        "model": file.head["model"],
        "source": file.head["source"],
        "tokens": len(fine),
        "not_finite": len(entropy) - len(fine),
        "ratio": ratio,
        "tau": tau,
        "mean": float(fine.mean()),
        "quantiles": quantiles,
        "share_of_entropy": _share(fine, tau),
        "types": _types(ids, fine, tau, tokenizer),
        "histogram": {"edges": edges.tolist(), "tokens": counts.tolist()},
        "texts": first_texts(file, tokenizer, "entropy"),
    }


def _share(entropy: np.ndarray, tau: float) -> float | None:
    total = entropy.sum()
    return float(entropy[entropy >= tau].sum() / total) if total > 0 else None


def _types(ids: np.ndarray, entropy: np.ndarray, tau: float, tokenizer) -> list[dict]:
    """Each token type that is ever a fork: how often it came, was one, and its mean entropy."""
    types, which, counts = np.unique(ids, return_inverse=True, return_counts=True)
    forks, totals = np.bincount(which, entropy >= tau), np.bincount(which, entropy)
    first = np.lexsort((types, -forks))[:SHOWN_TYPES]
    rows = zip(*(column[first].tolist() for column in (types, counts, forks, totals / counts)))
    return [
        {"token": tokenizer.decode([token]), "id": token, "count": count, "forks": int(times)}
        | {"mean_entropy": mean}
        for token, count, times, mean in rows
        if times
    ]


def first_texts(file: Iterable[TokenStats], tokenizer, name: str) -> list[dict]:
    """The first texts, in pieces, with the numbers that `TokenStats` has as `name`."""
    texts: list[dict] = []
    for stats in file:
        if len(texts) == SHOWN_TEXTS:
            break
        pieces = [tokenizer.decode([token]) for token in stats.ids[:SHOWN_TOKENS]]
        values = [round(value, 5) for value in getattr(stats, name)[:SHOWN_TOKENS]]
        left = max(len(stats.ids) - SHOWN_TOKENS, 0)
        texts.append({"key": stats.key, "pieces": pieces, name: values, "not_shown": left})
    return texts
