"""One read of texts through a model: a few numbers per token, on disk as it goes.

The file is JSON lines: first a head (which model, which texts, which temperatures), then one line
per text. A stopped read goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from em_kernels.analysis.texts import Text, Texts
from em_kernels.evaluator.asking import weights_digest
from em_kernels.lm.heads import Head, read_head
from em_kernels.lm.models import check_causal, hidden_states
from em_kernels.lm.modes import eval_mode
from em_kernels.lm.settings import positive
from em_kernels.lm.text import repair_lines
from em_kernels.ops.linear_softmax_stats import linear_softmax_stats

OUTPUTS = ("logprob", "entropy", "logit_mean", "logit_var", "logit_skew")
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


class TokenFile:
    """The numbers of a finished read, as a stream of `TokenStats`; `head` tells what was read."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with self.path.open(encoding="utf-8") as file:
            self.head: dict = json.loads(file.readline() or "{}")

    def __iter__(self) -> Iterator[TokenStats]:
        with self.path.open(encoding="utf-8") as file:
            next(file, None)
            for line in file:
                yield TokenStats(**json.loads(line))


def read_tokens(
    model,
    texts: Texts,
    path: str | Path,
    *,
    name: str,
    temperatures: Sequence[float] = (),
    progress: bool = True,
) -> TokenFile:
    """Put every text through the model once and write what `TokenStats` has per token.

    The backbone runs once over each text and one batch is in memory at a time. The statistics at
    T = 1 come from one pass over the vocabulary, the entropy at each other temperature from one
    more over the same hidden states.

    Args:
        model: a transformers causal language model.
        texts: what to read.
        path: of the file to write; one of the same weights and texts is gone on with, another
            one is replaced.
        name: of the model, for the reports.
        temperatures: above 0, for the entropy at each.
        progress: show a bar.

    Raises:
        ModelError: the model's logits are not those of a linear head on its hidden states.
        ValueError: a bad temperature, or texts of which none can be read.
    """
    for temperature in temperatures:
        positive("temperatures", temperature)
    head = read_head(model)
    described = {
        "model": name,
        "source": str(texts.source),
        "limit": texts.limit,
        "drawn_at": texts.drawn_at,
        "weights": weights_digest(model),
        "temperatures": [float(t) for t in temperatures],
    }
    path = Path(path)
    done = _begin(path, described, texts)
    with eval_mode(model):
        _read_all(model, head, texts, path, temperatures, done, progress)
    return TokenFile(path)


def _begin(path: Path, described: dict, texts: Texts) -> set[str]:
    """The keys of the texts that the file has already; begins it where it is none of these."""
    if path.is_file():
        repair_lines(path)
        file = TokenFile(path)
        done = {stats.key: stats.digest for stats in file} if file.head == described else {}
        if done and done.items() <= {text.key: text.digest for text in texts}.items():
            return set(done)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(described) + "\n", encoding="utf-8")
    return set()


def _read_all(model, head: Head, texts: Texts, path: Path, temperatures, done: set, progress: bool):
    from tqdm import tqdm

    read = len(done)
    with (
        tqdm(desc=path.stem, unit="text", initial=read, disable=not progress) as bar,
        path.open("a", encoding="utf-8") as file,
    ):
        for batch in _batches(text for text in texts if text.key not in done):
            if not read:
                check_causal(model, head, (batch[0].prompt + batch[0].answer)[:64])
            for stats in _read_batch(model, head, batch, temperatures):
                file.write(json.dumps(asdict(stats)) + "\n")
            file.flush()
            read += len(batch)
            bar.update(len(batch))
    if not read:
        raise ValueError(f"{texts.source}: no text can be read: {dict(texts.left_out)}")


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
    model, head: Head, batch: list[Text], temperatures: Sequence[float]
) -> list[TokenStats]:
    ids, attention, predicts = _padded(batch, model.device)
    hidden = hidden_states(model, ids, attention)[predicts]
    target = ids.roll(-1, 1)[predicts]
    stats = linear_softmax_stats(hidden, head.weight, target, outputs=OUTPUTS, **head.arguments)
    columns = [getattr(stats, name) for name in OUTPUTS]
    columns += [_entropy(hidden, head, temperature) for temperature in temperatures]
    sizes = predicts.sum(1).tolist()
    parts = zip(*(column.float().cpu().split(sizes) for column in columns))
    tokens = target.cpu().split(sizes)
    return [_stats(text, ids, part) for text, ids, part in zip(batch, tokens, parts)]


def _entropy(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    options = dict(outputs=("entropy",), temperature=temperature, **head.arguments)
    return linear_softmax_stats(hidden, head.weight, **options).entropy


def _padded(batch: list[Text], device) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention, which positions predict a token of an answer), all (B, T)."""
    rows = [torch.tensor(text.prompt + text.answer, device=device) for text in batch]
    ids = pad_sequence(rows, batch_first=True)
    ends = torch.tensor([len(row) for row in rows], device=device)[:, None]
    starts = torch.tensor([max(len(text.prompt) - 1, 0) for text in batch], device=device)[:, None]
    at = torch.arange(ids.shape[1], device=device)
    return ids, at < ends, (at >= starts) & (at < ends - 1)


def _stats(text: Text, ids: Tensor, columns: tuple[Tensor, ...]) -> TokenStats:
    """Seven digits are what float32 has; fewer make a smaller file."""
    rounded = [[float(f"{value:.7g}") for value in column.tolist()] for column in columns]
    named = dict(zip(OUTPUTS, rounded))
    return TokenStats(
        text.key, text.digest, ids.tolist(), entropy_at=rounded[len(OUTPUTS) :], **named
    )
