"""Putting problems to a model, a batch at a time, and judging what it says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels.evaluator.records import Answer
from em_kernels.lm.adapters import adapter_settings, is_adapted
from em_kernels.lm.fingerprint import digest
from em_kernels.lm.heads import Head
from em_kernels.lm.judge.judges import Judge, final_answer
from em_kernels.lm.models import hidden_states
from em_kernels.lm.modes import eval_mode
from em_kernels.lm.rollout import Rollout, Sampling, aligned_mask, sample
from em_kernels.ops.linear_softmax_stats import linear_softmax_stats

SMALL_MODEL_PARAMETERS = 50_000_000
_SIGNAL_TOKENS = 16_384  # that go through the backbone at once


def default_batch_size(model) -> int:
    """As many answers at once as keep the cores busy without much memory."""
    if sum(p.numel() for p in model.parameters()) < SMALL_MODEL_PARAMETERS:
        return 256
    return 64 if model.device.type == "cuda" else 8


def longest_prompt(model) -> int | None:
    """The most tokens a prompt can have and leave room for one more; None is no limit."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if positions is None else positions - 1


def weights_digest(model) -> str:
    """Tells models of the same name apart, see `digest`; adapters by their settings too."""
    settings = json.dumps(adapter_settings(model)) if is_adapted(model) else ""
    return digest(model.named_parameters(), settings)


class Asked(NamedTuple):
    """Whom to ask, and how to judge. With a `head`, answers carry entropy and log-probability."""

    model: object
    tokenizer: object
    judge: Judge
    head: Head | None = None

    def ask(
        self, prompts: Sequence[Sequence[int]], rights: Sequence[str], sampling: Sampling
    ) -> list[Answer]:
        """One answer to each prompt (token ids), judged against `rights`, in one batch."""
        if not prompts:
            return []
        rollout = sample(self.model, self.tokenizer, prompts, sampling, len(prompts))
        tokens = [ids.tolist() for ids in rollout.answers()]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        answers = [
            Answer(
                text,
                len(ids),
                done,
                correct=bool(self.judge(text, right)),
                parsed=final_answer(text) is not None,
                ids=ids,
            )
            for text, ids, done, right in zip(texts, tokens, rollout.finished.tolist(), rights)
        ]
        if self.head is None:
            return answers
        signals = sequence_signals(self.model, self.head, rollout)
        return [replace(a, entropy=h, logprob=p) for a, (h, p) in zip(answers, signals)]


NOT_ASKED = Answer("", 0, False, False, False)
"""Stands for the answer to a prompt that is too long for the model: wrong, no tokens."""


@torch.no_grad()
def sequence_signals(model, head: Head, rollout: Rollout) -> list[tuple[float, float]]:
    """(mean entropy in nats, sum of log-probabilities) of each answer's tokens, at T = 1."""
    rows = max(1, _SIGNAL_TOKENS // rollout.input_ids.shape[1])
    parts = zip(
        rollout.input_ids.split(rows),
        rollout.attention_mask.split(rows),
        aligned_mask(rollout).split(rows),
    )
    with eval_mode(model):
        return [pair for part in parts for pair in _signals(model, head, *part)]


def _signals(model, head: Head, ids: Tensor, attention: Tensor, mask: Tensor):
    stats = linear_softmax_stats(
        hidden_states(model, ids, attention),
        head.weight,
        ids.roll(-1, 1),
        mask=mask,
        **head.arguments,
    )
    entropy = stats.entropy.sum(1) / mask.sum(1).clamp(min=1)
    return zip(entropy.tolist(), stats.logprob.sum(1).tolist())
