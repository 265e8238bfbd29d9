"""Drift: how far a model's distributions moved from those of its base, token by token."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from em_kernels.analysis.forks import SHOWN_TEXTS, first_texts
from em_kernels.analysis.shift import check_same
from em_kernels.analysis.tokens import DIVERGENCES, TokenFile
from em_kernels.lm.settings import fraction

BINS, SHOWN, CONTEXT = 10, 20, 12
QUANTILES = (0.5, 0.9, 0.99, 1.0)
LEAST = 1e-9  # the histogram's, nats: below is what rounding leaves


def drift(before: TokenFile, after: TokenFile, tokenizer, *, ratio: float = 0.2) -> dict:
    """The divergence of the model after from the model before, its base, on the same texts.

    At every token, with p after and q before over the whole vocabulary: KL(p || q), KL(q || p) and
    Jensen-Shannon. Each is given as a mean, in quantiles (linear interpolation), and apart for the
    forks of the base, its tokens with H(q) at or above the (1 - ratio) quantile tau, and the
    others; and in bins of H(q) that hold as many tokens each, as far as equal entropies allow.

    Args:
        before: what `read_tokens` wrote of the base.
        after: the same of the other model, read with the base.
        tokenizer: to show the tokens.
        ratio: the share of tokens that are forks, in (0, 1].

    Returns:
        A dict: the measures, the bins, a histogram of both KLs, the tokens with the largest
        KL(p || q), and the texts that hold the first of these.

    Raises:
        ValueError: a bad ratio, files of other tokens, no base or no finite number.
    """
    fraction("ratio", ratio)
    check_same(before, after)
    if "base" not in after.head:
        raise ValueError(f"{after.path} was read without a base: no divergence is in it")
    read = _columns(before, after)
    fine = np.isfinite(read.values).all(0)
    if not fine.any():
        raise ValueError(f"{after.path} has no token with a finite divergence")
    entropy = read.values[0, fine]
    found = dict(zip(DIVERGENCES, read.values[2:, fine]))
    moved = _moved(read, fine, after, tokenizer)
    keys = list(dict.fromkeys(row["key"] for row in moved))[:SHOWN_TEXTS]
    texts = (stats for stats in after if stats.key in keys)
    tau = float(np.quantile(entropy, 1 - ratio))
    return {
        "kind": "drift",
        "models": [before.head["model"], after.head["model"]],
        "source": before.head["source"],
        "tokens": int(fine.sum()),
        "not_finite": int((~fine).sum()),
        "ratio": ratio,
        "tau": tau,
        "entropy": [float(entropy.mean()), float(read.values[1, fine].mean())],
        "measures": {name: _measure(d, entropy >= tau) for name, d in found.items()},
        "bins": _bins(entropy, found),
        "histogram": _histogram(found),
        "moved": moved,
        "texts": first_texts(texts, tokenizer, "kl_to_base"),
    }


class _Read(NamedTuple):
    """Of all tokens in a row: key and place of each; H before, H after and `DIVERGENCES`."""

    places: list[tuple[str, int]]
    values: np.ndarray


def _columns(before: TokenFile, after: TokenFile) -> _Read:
    entropies = {stats.key: stats.entropy for stats in before}
    places: list[tuple[str, int]] = []
    parts = [np.empty((2 + len(DIVERGENCES), 0))]
    for stats in after:
        own = [getattr(stats, name) for name in DIVERGENCES]
        parts.append(np.array([entropies[stats.key], stats.entropy, *own], dtype=np.float64))
        places += [(stats.key, i) for i in range(len(stats.ids))]
    return _Read(places, np.concatenate(parts, axis=1))


def _measure(values: np.ndarray, forks: np.ndarray) -> dict:
    """In nats; `at_forks` is the share of the sum."""
    total = values.sum()
    return {
        "mean": float(values.mean()),
        "quantiles": {f"{q:g}": float(np.quantile(values, q)) for q in QUANTILES},
        "forks": _mean(values[forks]),
        "elsewhere": _mean(values[~forks]),
        "at_forks": float(values[forks].sum() / total) if total > 0 else None,
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _bins(entropy: np.ndarray, found: dict[str, np.ndarray]) -> list[dict]:
    edges = np.unique(np.quantile(entropy, np.linspace(0, 1, BINS + 1)))
    which = np.searchsorted(edges[1:-1], entropy, side="right")
    rows = []
    for number in range(len(edges)):
        own = which == number
        if own.any():
            ends = {"low": entropy[own].min(), "high": entropy[own].max()}
            means = {"entropy": entropy[own].mean()}
            means |= {name: values[own].mean() for name, values in found.items()}
            row = {name: float(value) for name, value in (ends | means).items()}
            rows.append({"tokens": int(own.sum()), **row})
    return rows


def _histogram(found: dict[str, np.ndarray]) -> dict:
    """Tokens by the logarithm of their divergence; what is below `LEAST` is in the first bin."""
    both = {name: np.clip(found[name], LEAST, None) for name in ("kl_to_base", "kl_from_base")}
    most = max(values.max() for values in both.values())
    edges = np.geomspace(LEAST, max(most, 10 * LEAST) * 1.001, 41)
    counts = {name: np.histogram(values, edges)[0].tolist() for name, values in both.items()}
    return {"edges": edges.tolist(), "tokens": counts}


def _moved(read: _Read, fine: np.ndarray, after: TokenFile, tokenizer) -> list[dict]:
    """The tokens with the largest KL(p || q), with what stood before them."""
    first = np.argsort(np.where(fine, -read.values[2], np.inf), kind="stable")
    first = first[: min(SHOWN, int(fine.sum()))]
    keys = {read.places[i][0] for i in first.tolist()}
    ids = {stats.key: stats.ids for stats in after if stats.key in keys}
    return [_token(read.places[i], read.values[:, i], ids, tokenizer) for i in first.tolist()]


def _token(
    place: tuple[str, int], values: np.ndarray, ids: dict[str, list[int]], tokenizer
) -> dict:
    key, at = place
    names = ("entropy_before", "entropy_after", *DIVERGENCES)
    return {
        "key": key,
        "position": at,
        "token": tokenizer.decode([ids[key][at]]),
        "context": tokenizer.decode(ids[key][max(at - CONTEXT, 0) : at]),
        **{name: float(value) for name, value in zip(names, values)},
    }
