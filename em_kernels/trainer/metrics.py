"""What is written down of an update."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from em_kernels.ops.covariance import token_covariance
from em_kernels.trainer.batch import Tokens
from em_kernels.trainer.collect import Collected
from em_kernels.trainer.rewards import Scores

COVARIANCE_QUANTILES = (0.5, 0.9, 0.99, 0.999)


class Clock:
    """The seconds of an update, and how many of them went into sampling."""

    def __init__(self):
        self.started = self.between = time.perf_counter()

    def sampled(self) -> None:
        self.between = time.perf_counter()

    def metrics(self, tokens: int) -> dict[str, float]:
        ended = time.perf_counter()
        return {
            "tokens_per_second": tokens / (ended - self.started),
            "sample_seconds": self.between - self.started,
            "loss_seconds": ended - self.between,
        }


def mean_over_steps(steps: list[dict[str, float]]) -> dict[str, float]:
    """The mean over optimiser steps; without any, a loss of 0."""
    if not steps:
        return {"loss": 0.0, "grad_norm": 0.0}
    return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}


def mean_of(values: Tensor, mask: Tensor) -> float:
    return (values * mask).sum(dtype=torch.float64).item() / max(int(mask.sum()), 1)


def answer_metrics(found: Collected, scores: Scores, tokens: Tokens, before: dict) -> dict:
    """Metrics of the answers, before any step is taken."""
    mask, advantage = tokens.loss_mask, tokens.advantage
    cov = token_covariance(before["logprob"], advantage, mask)
    ordered = cov[mask].sort().values if mask.any() else cov.new_zeros(1)
    quantiles = {
        f"cov_p{100 * q:g}": ordered[int(q * (len(ordered) - 1))].item()
        for q in COVARIANCE_QUANTILES
    }
    return {
        "mean_entropy": mean_of(before["entropy"], mask),
        "logit_skew": mean_of(before["logit_skew"], mask),
        "reward_mean": scores.reward.mean().item(),
        "accuracy": found.right,
        "response_length": found.length,
        "response_tokens": round(found.length * found.drawn),
        "truncated": 1 - found.rollout.finished.float().mean().item(),
        "advantage_nonzero": (scores.advantage != 0).float().mean().item(),
        "cov_mean": mean_of(cov, mask),
        **quantiles,
    }
