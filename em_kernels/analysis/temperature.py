"""Entropy against temperature, from one read of the texts."""

from __future__ import annotations

import math

from em_kernels.analysis.tokens import TokenFile
from em_kernels.evaluator.statistics import bootstrap


def entropy_at_temperatures(file: TokenFile) -> dict:
    """Mean entropy of softmax(z / T) over the tokens of the texts, at each T that was read.

    The logits z are those of fixed texts, whatever temperature these were drawn at: what changes
    is only the temperature of the distribution, so this is no forecast of the entropy along texts
    drawn at T. The interval is a 95 % bootstrap over texts, each the mean over its tokens.

    Returns:
        A dict with, per temperature, the mean over tokens and over texts (nats), and the interval.

    Raises:
        ValueError: the file was read at no temperature, or has no finite entropy.
    """
    temperatures = file.head["temperatures"]
    if not temperatures:
        raise ValueError(f"{file.path} was read at no temperature but 1")
    totals, counts = [0.0] * len(temperatures), [0] * len(temperatures)
    means: list[list[float]] = [[] for _ in temperatures]
    for stats in file:
        for i, values in enumerate(stats.entropy_at):
            fine = [h for h in values if math.isfinite(h)]
            if fine:
                totals[i] += math.fsum(fine)
                counts[i] += len(fine)
                means[i].append(math.fsum(fine) / len(fine))
    if not all(counts):
        raise ValueError(f"{file.path} has no finite entropy at some temperature")
    rows = [
        {"temperature": t, "entropy": total / count, "tokens": count, "texts": len(m)}
        | {"over_texts": bootstrap(m)._asdict()}
        for t, total, count, m in zip(temperatures, totals, counts, means)
    ]
    head = {"kind": "temperature", "model": file.head["model"], "source": file.head["source"]}
    return {**head, "temperatures": sorted(rows, key=lambda row: row["temperature"])}
