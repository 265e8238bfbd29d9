"""One read of texts through a model: a few numbers per token, on disk as it goes.

The file is JSON lines: first a head (which model, which texts, which temperatures), then one line
per text. A stopped read goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from em_kernels.analysis.texts import Text, Texts
from em_kernels.evaluator.asking import weights_digest
from em_kernels.lm.data import read_jsonl
from em_kernels.lm.heads import Head, read_head
from em_kernels.lm.lock import held
from em_kernels.lm.models import check_causal, hidden_states
from em_kernels.lm.modes import eval_mode
from em_kernels.lm.progress import Progress
from em_kernels.lm.settings import positive
from em_kernels.lm.text import repair_lines
from em_kernels.ops.divergence import linear_divergence
from em_kernels.ops.linear_softmax_stats import linear_softmax_stats

OUTPUTS = ("logprob", "entropy", "logit_mean", "logit_var", "logit_skew")
DIVERGENCES = {"kl_to_base": "reverse_kl", "kl_from_base": "forward_kl", "js_to_base": "js"}
BATCH_TOKENS = 16_384  # that go through the backbone at once, padding included


@dataclass(frozen=True)
class TokenStats:
    """Of one text: lists with a number for each of its tokens, under the model at T = 1.

    Args:
        key, digest: which text of the source; of its tokens and its prompt's.
        ids: the tokens.
        logprob, entropy: nats.
        logit_mean, logit_var, logit_skew: population moments of the logits over the vocabulary.
        entropy_at: for each of the head's temperatures, the entropies at it.
        kl_to_base, kl_from_base, js_to_base: with p the distribution of the model and q that of
            another one, its base, KL(p || q), KL(q || p) and the Jensen-Shannon divergence
            (beta = 0.5), nats; empty where there is no base.
    """

    key: str
    digest: str
    ids: list[int]
    logprob: list[float]
    entropy: list[float]
    logit_mean: list[float]
    logit_var: list[float]
    logit_skew: list[float]
    entropy_at: list[list[float]]
    kl_to_base: list[float] = field(default_factory=list)
    kl_from_base: list[float] = field(default_factory=list)
    js_to_base: list[float] = field(default_factory=list)


class Base(NamedTuple):
    """The model that another one came from, and its name in the reports."""

    model: Any
    name: str


class TokenFile:
    """The numbers of a finished read, as a stream of `TokenStats`; `head` tells what was read."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.head: dict = next((row for _, row in read_jsonl(self.path)), {})

    def __iter__(self) -> Iterator[TokenStats]:
        for number, row in islice(read_jsonl(self.path), 1, None):
            try:
                yield TokenStats(**row)
            except TypeError:
                raise ValueError(f"{self.path}, line {number}: not as it was written") from None


def read_tokens(
    model,
    texts: Texts,
    path: str | Path,
    *,
    name: str,
    temperatures: Sequence[float] = (),
    base: Base | None = None,
    progress: bool = True,
) -> TokenFile:
    """Put every text through the model once and write what `TokenStats` has per token.

    The backbone runs once over each text and one batch is in memory at a time. The statistics at
    T = 1 come from one pass over the vocabulary, the entropy at each other temperature from one
    more over the same hidden states. With a base, its backbone runs over each batch too, both
    models being in memory, and each divergence is one more pass over both heads, exact.

    Args:
        model: a transformers causal language model.
        texts: what to read.
        path: of the file to write; one of the same weights and texts is gone on with, another
            one is replaced.
        name: of the model, for the reports.
        temperatures: above 0, for the entropy at each.
        base: of the same vocabulary, for the divergences.
        progress: show a bar.

    Raises:
        ModelError: the model's logits are not those of a linear head on its hidden states.
        ValueError: a bad temperature, or texts of which none can be read.
    """
    for temperature in temperatures:
        positive("temperatures", temperature)
    head = read_head(model)
    described: dict[str, Any] = {
        "model": name,
        "source": str(texts.source),
        "limit": texts.limit,
        "drawn_at": texts.drawn_at,
        "weights": weights_digest(model),
        "temperatures": [float(t) for t in temperatures],
    }
    if base is not None:
        described["base"] = {"model": base.name, "weights": weights_digest(base.model)}
    path = Path(path)
    with (
        held(path.parent, "a reading of tokens", f".{path.stem}.lock"),
        eval_mode(model),
        nullcontext() if base is None else eval_mode(base.model),
    ):
        done = _begin(path, described, texts)
        _read_all(model, head, texts, path, (temperatures, base), done, progress)
    return TokenFile(path)


def _begin(path: Path, described: dict, texts: Texts) -> set[str]:
    """The keys of the texts that the file has already; begins it where it is none of these."""
    if path.is_file():
        repair_lines(path)
        try:
            file = TokenFile(path)
            done = {stats.key: stats.digest for stats in file} if file.head == described else {}
        except ValueError:
            done = {}  # not as it was written: it is made anew
        if done and done.items() <= {text.key: text.digest for text in texts}.items():
            return set(done)
    path.write_text(json.dumps(described) + "\n", encoding="utf-8")
    return set()


def _read_all(model, head: Head, texts: Texts, path: Path, more: tuple, done: set, progress: bool):
    read = len(done)
    with (
        Progress(path.stem, "text", done=read, show=progress) as bar,
        path.open("a", encoding="utf-8") as file,
    ):
        for batch in _batches(text for text in texts if text.key not in done):
            if not read:
                check_causal(model, head, (batch[0].prompt + batch[0].answer)[:64])
            for stats in _read_batch(model, head, batch, *more):
                file.write(json.dumps(asdict(stats)) + "\n")
            file.flush()
            read += len(batch)
            bar.advance(len(batch))
    if not read:
        raise ValueError(f"{texts.source}: no text can be read, {texts.why_none}")


def _batches(texts: Iterator[Text]) -> Iterator[list[Text]]:
    """As many texts as stay within `BATCH_TOKENS` when padded; one at least."""
    batch: list[Text] = []
    longest = 0
    for text in texts:
        longest = max(longest, len(text.prompt) + len(text.answer))
        if batch and longest * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch, longest = [], len(text.prompt) + len(text.answer)
        batch.append(text)
    if batch:
        yield batch


@torch.no_grad()
def _read_batch(
    model, head: Head, batch: list[Text], temperatures: Sequence[float], base: Base | None
) -> list[TokenStats]:
    ids, attention, predicts = _padded(batch, model.device)
    hidden = hidden_states(model, ids, attention)[predicts]
    target = ids.roll(-1, 1)[predicts]
    stats = linear_softmax_stats(hidden, head.weight, target, outputs=OUTPUTS, **head.arguments)
    columns = {name: getattr(stats, name) for name in OUTPUTS}
    if base is not None:
        base_hidden = hidden_states(base.model, ids, attention)[predicts]
        columns |= _divergences(hidden, head, base_hidden, read_head(base.model))
    at = [_entropy(hidden, head, temperature) for temperature in temperatures]
    sizes, parts = predicts.sum(1).tolist(), [*columns.values(), *at]
    texts = zip(*(_rounded(part, sizes) for part in parts))
    tokens = target.cpu().split(sizes)
    return [
        TokenStats(
            text.key,
            text.digest,
            own.tolist(),
            **dict(zip(columns, values)),
            entropy_at=list(values[len(columns) :]),
        )
        for text, own, values in zip(batch, tokens, texts)
    ]


def _entropy(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    options = dict(outputs=("entropy",), temperature=temperature, **head.arguments)
    return linear_softmax_stats(hidden, head.weight, **options).entropy


def _divergences(hidden: Tensor, head: Head, base_hidden: Tensor, base: Head) -> dict[str, Tensor]:
    pair = dict(hidden=hidden, other_hidden=base_hidden, **head.beside(base))
    return {name: linear_divergence(**pair, kind=kind) for name, kind in DIVERGENCES.items()}


def _rounded(column: Tensor, sizes: list[int]) -> list[list[float]]:
    """Of each text its numbers. Seven digits are what float32 has; fewer make a smaller file."""
    numbers = [float(f"{value:.7g}") for value in column.float().tolist()]
    ends = [0, *accumulate(sizes)]
    return [numbers[start:end] for start, end in pairwise(ends)]


def _padded(batch: list[Text], device) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention, which positions predict a token of an answer), all (B, T)."""
    rows = [torch.tensor(text.prompt + text.answer, device=device) for text in batch]
    ids = pad_sequence(rows, batch_first=True)
    ends = torch.tensor([len(row) for row in rows], device=device)[:, None]
    starts = torch.tensor([max(len(text.prompt) - 1, 0) for text in batch], device=device)[:, None]
    at = torch.arange(ids.shape[1], device=device)
    return ids, at < ends, (at >= starts) & (at < ends - 1)
