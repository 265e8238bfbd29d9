"""The tokens of an update, the micro-batches they are cut into, and what is computed from one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from em_kernels.backends.interface import TokenStats
from em_kernels.backends.truncation import find_border, is_outside
from em_kernels.lm.heads import Head
from em_kernels.lm.kept_sets import KeptSets
from em_kernels.lm.models import hidden_states
from em_kernels.lm.modes import eval_mode
from em_kernels.lm.rollout import Sampling
from em_kernels.objectives.eaft import eaft_weight
from em_kernels.ops.divergence import WeightedDivergence, linear_divergence, linear_divergence_loss
from em_kernels.ops.linear_softmax_stats import linear_softmax_stats
from em_kernels.ops.token_loss import TokenLoss, linear_token_loss
from em_kernels.ops.top_logprobs import TopLogprobs, linear_top_logprobs
from em_kernels.trainer.entropy_slopes import (
    KEPT_NEEDED,
    SHARPER,
    Slopes,
    divergence_slope,
    entropy_slopes,
    slopes_need,
)
from em_kernels.trainer.strategy import SingleProcessStrategy

OF_KEPT = ("logprob", "kept_mass")
LOGITS_BYTES = 64 << 20  # of float32 at a time, where kept sets are made of them
_UNKNOWN: Any = None


class Tokens(NamedTuple):
    """Answers and what is known of their tokens; all (B, T), T columns of prompt and answer.

    Position t holds the distribution that token t + 1 was drawn from; `loss_mask` marks those of
    generated tokens that count. `advantage` is the same along a row. The entropy and logprob
    weights are those of `linear_token_loss`, that of the divergence the `token_weight` of
    `linear_divergence_loss`; `ref_kl` is the KL from the reference or the label; `label_ids` and
    `label_logprob`, (B, T, k), are what is stored of the distributions that the answers were drawn
    from, `label_current` the log-probabilities of the same ids now; `selected` is what the
    objective chose of all tokens. `kept` are the sets that the sampler left where it truncates: log
    p, also of the reference, is of these alone, other statistics of the whole vocabulary.
    `rollout_weight` is what the loss of a token is multiplied by. What is not known yet is None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    position_ids: Tensor | None = None
    entropy_weight: Tensor | None = None
    logprob_weight: Tensor | None = None
    divergence_weight: Tensor | None = None
    ref_logprob: Tensor | None = None
    ref_kl: Tensor | None = None
    label_ids: Tensor | None = None
    label_logprob: Tensor | None = None
    label_current: Tensor | None = None
    kept: KeptSets | None = None
    rollout_weight: Tensor | None = None
    old_logprob: Tensor = _UNKNOWN
    advantage: Tensor = _UNKNOWN
    selected: Tensor = _UNKNOWN

    def at(self, rows, columns=slice(None)) -> Tokens:
        parts: list[Any] = [None if x is None else x[rows][:, columns] for x in self]
        return Tokens(*parts)


class MicroBatch(NamedTuple):
    """Some rows of the tokens of a step, and the columns of them that are not all padding."""

    rows: Tensor
    columns: slice
    tokens: Tokens

    def without_weight(self) -> MicroBatch:
        """The same tokens, none of which counts: loss and gradient are zero."""
        nothing = torch.zeros_like(self.tokens.loss_mask)
        return self._replace(tokens=self.tokens._replace(loss_mask=nothing))


class Read(NamedTuple):
    """What a step's loss reads of a micro-batch: its `token_stats`; `others`, by their names in
    `Tokens`; and how they go with the entropy, if asked."""

    stats: TokenStats
    others: dict[str, Tensor]
    slopes: Slopes


def micro_batches(tokens: Tokens, size: int, *, in_order: bool = False) -> Iterator[MicroBatch]:
    """`size` rows at a time: long answers first, unless they are to stay in order."""
    order = torch.arange(len(tokens.input_ids), device=tokens.input_ids.device)
    if not in_order:
        order = tokens.attention_mask.sum(1).argsort(descending=True, stable=True)
    for rows in order.split(size):
        used = tokens.attention_mask[rows].any(0).nonzero()[:, 0]
        columns = slice(int(used[0]), int(used[-1]) + 1)
        yield MicroBatch(rows, columns, tokens.at(rows, columns))


def token_loss(
    model, head: Head, part: Tokens, temperature: float, outputs: tuple[str, ...] = ("entropy",)
) -> TokenLoss:
    """sum_t entropy_weight_t H_t + logprob_weight_t log p(token t + 1), and detached statistics."""
    return _token_loss(_hidden(model, part), head, part, temperature, outputs)


def token_stats(
    model, head: Head, part: Tokens, temperature: float, outputs: tuple[str, ...]
) -> TokenStats:
    """The statistics of the tokens that count, (B, T) each, with gradient where there is one."""
    return _token_stats(_hidden(model, part), head, part, temperature, outputs)


def demonstration_loss(
    model,
    head: Head,
    part: Tokens,
    temperature: float,
    outputs: tuple[str, ...],
    k: int,
    alpha: float | None,
) -> tuple[TokenLoss, Tensor | None]:
    """`token_loss`, and with `alpha` the `eaft_weight` of every token, which its logprob weight is
    multiplied by: of the same hidden states, in a pass of their own over the head."""
    hidden, weight = _hidden(model, part), None
    if alpha is not None:
        top = _top(hidden, head, part, temperature, k)
        weight = eaft_weight(top.logprob, part.loss_mask, alpha=alpha)
        part = part._replace(logprob_weight=cast(Tensor, part.logprob_weight) * weight)
    return _token_loss(hidden, head, part, temperature, outputs), weight


def token_labels(model, head: Head, part: Tokens, temperature: float, k: int) -> TopLogprobs:
    """The k likeliest tokens at every place that counts, and their log-probabilities."""
    return _top(_hidden(model, part), head, part, temperature, k)


def kept_by_limits(
    model, head: Head, part: Tokens, temperature: float, limits: Sampling, min_p_first: bool
) -> KeptSets:
    """What the limits leave at the tokens that count, in their order, and each one that was drawn;
    at the temperature of the sampling."""
    rows, mask = _hidden(model, part), part.loss_mask
    drawn, most = part.input_ids.roll(-1, 1)[mask], max(1, LOGITS_BYTES // (4 * len(head.weight)))
    cut = (limits.top_k or math.inf, limits.top_p, limits.min_p)
    found = [KeptSets.of(rows.new_zeros(0, len(head.weight), dtype=torch.bool))]
    for hidden, ids in zip(rows[mask].split(most), drawn.split(most)):
        u, c = head.logits(hidden), 1 / limits.temperature
        truncation = torch.tensor(cut, dtype=torch.float64, device=u.device).expand(len(u), -1)
        kept = ~is_outside(u, find_border(u, truncation, min_p_first, c))
        found.append(KeptSets.of(kept.scatter_(1, ids[:, None], True)))
    return KeptSets.join(found)


def stats_and_others(
    model,
    head: Head,
    part: Tokens,
    temperature: float,
    outputs: tuple[str, ...],
    other: SingleProcessStrategy | None,
    kind: str | None,
    slopes: tuple[str, ...] = (),
) -> Read:
    """`token_stats`; and at every token what there is to compare with: the divergence from another
    model, exact, (B, T), if asked, and the log-probabilities of the stored ids, (B, T, k), which
    are read in the same pass as that of the written one.

    The other model reads the micro-batch here: in one pass over the answers it does so as often
    as for log-probabilities taken before, and no more than a micro-batch of its hidden states is
    kept.

    `slopes` are the outputs that the loss has the gradient of: of those, and of what there is to
    compare with, the slopes are read too, out of the same pass; of the entropy itself, of stored
    ids and of kept sets, in one product with the head more.
    """
    hidden, others = _hidden(model, part), {}
    read = partial(_token_stats, hidden.detach(), head, part)
    needed = slopes_need("entropy" in slopes) if slopes else ()
    if part.label_ids is None:
        every = tuple(dict.fromkeys((*outputs, *needed)))
        known = stats = _token_stats(hidden, head, part, temperature, every)
    else:
        stats, stored = _stats_and_stored(hidden, head, part, temperature, outputs)
        others["label_current"] = stored
        with torch.no_grad():
            known = read(temperature, needed) if slopes else stats
    found: Slopes = {}
    if slopes:
        cut = None
        with torch.no_grad():
            sharper = read(temperature / 2, SHARPER) if "entropy" in slopes else None
            if part.kept is not None:
                cut = _kept_stats(hidden.detach(), head, part, temperature, KEPT_NEEDED)
        labels = others.get("label_current")
        found = entropy_slopes(known, labels=labels, sharper=sharper, kept=cut)
    if other is not None and kind is not None:
        others["ref_kl"] = _with_other(linear_divergence, hidden, head, part, other, kind=kind)
        if slopes:
            found["ref_kl"] = _with_other(divergence_slope, hidden, head, part, other, kind=kind)
    return Read(stats, others, found)


def distillation_loss(
    model,
    head: Head,
    part: Tokens,
    temperature: float,
    outputs: tuple[str, ...],
    teacher: SingleProcessStrategy,
    **kind: Any,
) -> WeightedDivergence:
    """sum_t divergence_weight_t D_t + entropy_weight_t H_t, and detached D_t and statistics of the
    student and of the teacher, whose is the entropy."""
    hidden = _hidden(model, part)
    kind |= dict(token_weight=part.divergence_weight, other_outputs=("entropy",))
    call = partial(_with_other, linear_divergence_loss, hidden, head, part, teacher, **kind)
    if part.entropy_weight is None:
        return call(outputs=outputs)
    found, own = call(), _token_loss(hidden, head, part, temperature, outputs)
    return found._replace(loss=found.loss + own.loss, stats=own.stats)


def _top(hidden: Tensor, head: Head, part: Tokens, temperature: float, k: int) -> TopLogprobs:
    options: Any = dict(temperature=temperature, mask=part.loss_mask, **head.arguments)
    return linear_top_logprobs(hidden, head.weight, k, ignore_index=0, **options)


def _hidden(model, part: Tokens) -> Tensor:
    return hidden_states(model, part.input_ids, part.attention_mask, part.position_ids)


def _token_loss(hidden: Tensor, head: Head, part: Tokens, temperature, outputs) -> TokenLoss:
    weights = dict(entropy_weight=part.entropy_weight, logprob_weight=part.logprob_weight)
    return _of_tokens(linear_token_loss, hidden, head, part, temperature, outputs, **weights)


def _token_stats(hidden: Tensor, head: Head, part: Tokens, temperature, outputs) -> TokenStats:
    call = partial(_of_tokens, linear_softmax_stats, hidden, head, part, temperature)
    if part.kept is None:
        return call(outputs)
    whole = tuple(name for name in outputs if name not in OF_KEPT)
    of_kept = tuple(name for name in outputs if name in OF_KEPT)
    found = call(whole) if whole else TokenStats()
    if not of_kept:
        return found
    cut = _kept_stats(hidden, head, part, temperature, of_kept)
    return found._replace(**{name: getattr(cut, name) for name in of_kept})


def _kept_stats(hidden: Tensor, head: Head, part: Tokens, temperature, outputs) -> TokenStats:
    """Of the distributions over the kept sets."""
    kept = cast(KeptSets, part.kept).ids(hidden.device)
    return _of_tokens(linear_softmax_stats, hidden, head, part, temperature, outputs, kept=kept)


def _of_tokens(
    function, hidden: Tensor, head: Head, part: Tokens, temperature, outputs, target=None, **more
) -> Any:
    return function(
        hidden,
        head.weight,
        part.input_ids.roll(-1, 1) if target is None else target,
        outputs=outputs,
        temperature=temperature,
        mask=part.loss_mask,
        **more,
        **head.arguments,
    )


def _stats_and_stored(
    hidden: Tensor, head: Head, part: Tokens, temperature, outputs
) -> tuple[TokenStats, Tensor]:
    """`token_stats`, and the log-probabilities of the stored ids, behind the written one's."""
    ids = cast(Tensor, part.label_ids)
    target = torch.cat([part.input_ids.roll(-1, 1)[..., None], ids], -1)
    stats = _of_tokens(linear_softmax_stats, hidden, head, part, temperature, outputs, target)
    logprob = stats.logprob
    written, stored = (x.clone() for x in (logprob[..., 0], logprob[..., 1:]))  # FSDP2: no views
    return stats._replace(logprob=written), stored


def _with_other(
    function, hidden: Tensor, head: Head, part: Tokens, other: SingleProcessStrategy, **options
) -> Any:
    """A function of two pairs of hidden states and head, the second that of another model."""

    def compute(model, other_head: Head, part: Tokens, temperature: float) -> Any:
        with torch.no_grad(), eval_mode(model):
            other_hidden = _hidden(model, part)
        return function(
            hidden=hidden,
            other_hidden=other_hidden,
            mask=part.loss_mask,
            temperature=temperature,
            **head.beside(other_head),
            **options,
        )

    return other.compute(part, compute)
