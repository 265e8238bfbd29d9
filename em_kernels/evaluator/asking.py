"""Putting problems to a model, a batch at a time, and judging what it says."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from em_kernels.evaluator.records import Answer, Key, Record
from em_kernels.lm.adapters import adapter_settings, is_adapted
from em_kernels.lm.fingerprint import digest
from em_kernels.lm.heads import Head
from em_kernels.lm.judge.judges import Judge, final_answer
from em_kernels.lm.models import hidden_states
from em_kernels.lm.modes import eval_mode
from em_kernels.lm.problems import Problem
from em_kernels.lm.progress import Progress
from em_kernels.lm.random_state import seed_of
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

    model: Any
    tokenizer: Any
    judge: Judge
    head: Head | None = None

    def ask(
        self,
        prompts: Sequence[Sequence[int]],
        rights: Sequence[Any],
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> list[Answer]:
        """One answer to each prompt (token ids), judged against `rights`, in one batch."""
        if not prompts:
            return []
        rollout = sample(self.model, self.tokenizer, prompts, sampling, len(prompts), seeds=seeds)
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


class Plan(NamedTuple):
    """How every problem is asked: `samples` times at each temperature above 0, once at 0."""

    temperatures: Sequence[float]
    samples: int
    top_p: float
    max_new_tokens: int
    batch_size: int

    def times(self, temperature: float) -> int:
        return self.samples if temperature > 0 else 1

    def answers(self, problems: int) -> int:
        """How many there will be."""
        return problems * sum(map(self.times, self.temperatures))

    def batches(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[Key]]:
        """The keys of the answers of each batch.

        Problems of similar length go together.
        """
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for temperature in self.temperatures:
            keys = [(i, temperature, s) for i in order for s in range(self.times(temperature))]
            for start in range(0, len(keys), self.batch_size):
                yield keys[start : start + self.batch_size]


def ask_all(
    asked: Asked,
    plan: Plan,
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    seed: int,
    *,
    done: Collection[Key] = (),
    too_long: Collection[int] = (),
    progress: bool = True,
) -> Iterator[list[Record]]:
    """Ask and judge whatever is not `done` yet; yields the records of one batch after another.

    Args:
        asked, plan: whom, and how.
        problems, prompts: what, and the token ids that put it to the model.
        seed: with its key, of every answer.
        done: keys of the records that are there already.
        too_long: numbers of the problems that are not asked: `NOT_ASKED` is their answer.
        progress: show a bar on a terminal, else lines.
    """
    done = frozenset(done)
    total = plan.answers(len(prompts))
    with Progress("eval", "answer", total, len(done), show=progress) as bar:
        for keys in plan.batches(prompts):
            if done.issuperset(keys):
                continue
            askable = [key for key in keys if key[0] not in too_long]
            rights = [problems[i].answer for i, *_ in askable]
            seeds = [seed_of(seed, i, round(t * 1e6), s) for i, t, s in askable]
            sampling = Sampling(keys[0][1], plan.top_p, max_new_tokens=plan.max_new_tokens)
            found = iter(asked.ask([prompts[i] for i, *_ in askable], rights, sampling, seeds))
            records = [Record(*k, NOT_ASKED if k[0] in too_long else next(found)) for k in keys]
            new = [record for record in records if record.key not in done]
            yield new
            bar.advance(len(new))


@torch.no_grad()
def sequence_signals(model, head: Head, rollout: Rollout) -> list[tuple[float, float]]:
    """(mean entropy in nats, sum of log-probabilities) of each answer's tokens, at T = 1."""
    rows = max(1, _SIGNAL_TOKENS // rollout.input_ids.shape[1])
    tensors = rollout.input_ids, rollout.attention_mask, aligned_mask(rollout)
    found: list[tuple[float, float]] = []
    with eval_mode(model):
        for ids, attention, mask in zip(*(tensor.split(rows) for tensor in tensors)):
            hidden, targets = hidden_states(model, ids, attention), ids.roll(-1, 1)
            options = {"mask": mask, **head.arguments}
            stats = linear_softmax_stats(hidden, head.weight, targets, **options)
            entropy = stats.entropy.sum(1) / mask.sum(1).clamp(min=1)
            found += zip(entropy.tolist(), stats.logprob.sum(1).tolist())
    return found
