"""Sampling answers with transformers' generate, and the masks of what was generated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from em_kernels.lm.heads import causal_lm
from em_kernels.lm.kept_sets import KeptSets
from em_kernels.lm.models import require_transformers
from em_kernels.lm.modes import eval_mode
from em_kernels.lm.ranks import Ranks
from em_kernels.ops.softmax_stats import softmax_stats

NO_TOKEN = -1  # beside an answer, until padding takes its place, which may be an end token's id


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; temperature 0 takes the likeliest token each time."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 2048
    min_p: float = 0.0

    @property
    def truncates(self) -> bool:
        """Whether tokens are cut off before one is drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


class Rollout(NamedTuple):
    """B prompts and their sampled answers: [PAD ... prompt | answer ... PAD], T columns.

    All are (B, T). `response_mask` is 1 at the generated tokens, the end token included, whether
    or not PAD and the end token are the same id. `finished` (B,) tells which answers ended by
    themselves. `logprob`, float32, is at every generated token its log-probability under the
    distribution that it was drawn from, after repetition penalty, temperature and truncation, and 0
    elsewhere; None where the sampler does not say. At temperature 0 that distribution is of one
    token, and every log-probability 0. `kept` are the sets of ids that truncation left there, and
    that the distribution is of; None where nothing was cut off or the sampler does not say.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    finished: Tensor
    logprob: Tensor | None = None
    kept: KeptSets | None = None

    @property
    def prompt_width(self) -> int:
        """Columns before the first generated token, which is in the same column in every row.

        Answers may have no token; where none has one, all columns are prompt.
        """
        generated = self.response_mask.any(0)
        return int(generated.long().argmax()) if generated.any() else len(generated)

    def answers(self) -> list[Tensor]:
        """The generated tokens of each row, without padding."""
        return [ids[mask] for ids, mask in zip(self.input_ids, self.response_mask)]

    def to(self, device: torch.device) -> Rollout:
        """The sets stay where they are."""
        parts: list[Any] = [x.to(device) if isinstance(x, Tensor) else x for x in self]
        return Rollout(*parts)


class Drawn(NamedTuple):
    """The answers of a batch, (B, W) ids, and what they were drawn from, as in `Rollout`."""

    ids: Tensor
    logprob: Tensor
    kept: KeptSets | None = None


def end_tokens(model, tokenizer) -> list[int]:
    """The ids that end an answer: the checkpoint's generation settings, else the tokenizer's."""
    configured = model.generation_config.eos_token_id
    if configured is None:
        configured = tokenizer.eos_token_id
    if configured is None:
        return []
    return [configured] if isinstance(configured, int) else list(configured)


def cut_message(max_new_tokens: int, ends: Sequence[int], of: str) -> str:
    """Of answers none of which has an end."""
    why = f"raise max_new_tokens, or see whether the model ever writes an end (token {ends})"
    if not ends:
        why = "neither the model's generation settings nor its tokenizer name an end token"
    return (
        f"all answers {of} were cut, at max_new_tokens={max_new_tokens} or at the model's last "
        f"position, and none has an end: {why}"
    )


def pad_token(tokenizer, ends: Sequence[int]) -> int:
    """The tokenizer's PAD, else an end token, else 0: padding is masked, whatever it is."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return ends[0] if ends else 0


def room_for_answers(model, prompt_length: int, max_new_tokens: int) -> int:
    """`max_new_tokens`, or fewer where the model has no positions for so many."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return max_new_tokens
    if prompt_length >= positions:
        raise ValueError(
            f"prompt must be shorter than the model's {positions} positions, "
            f"got {prompt_length} tokens"
        )
    return min(max_new_tokens, positions - prompt_length)


@torch.no_grad()
def sample(
    model,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    batch: int,
    ranks: Ranks | None = None,
    *,
    seeds: Sequence[int] | None = None,
    keep_sets: bool = False,
) -> Rollout:
    """One answer to each prompt (token ids), `batch` at a time.

    An answer depends on its prompt and its seed, up to the rounding that a model's results have in
    another batch. So several ranks share the rows, and every one is given all the answers, which
    are those of one process.

    Args:
        seeds: one for each prompt; None takes them from torch's global random state.
        keep_sets: give `Rollout.kept` where something is cut off; see `KeptSets` for the memory.
    """
    ranks = ranks or Ranks()
    ends = end_tokens(model, tokenizer)
    filler = pad_token(tokenizer, ends)
    ids, mask = (part.to(model.device) for part in left_pad(prompts, filler))
    room = room_for_answers(model, ids.shape[1], sampling.max_new_tokens)
    settings = _generation_config(replace(sampling, max_new_tokens=room), ends, filler)
    if seeds is None:
        seeds = torch.randint(1 << 62, (len(prompts),)).tolist()

    def generate(rows: list[int]) -> Drawn:
        options: dict = dict(input_ids=ids[rows], attention_mask=mask[rows].long())
        draws = None
        if sampling.temperature > 0:
            own = [seeds[row] for row in rows]
            keep = keep_sets and sampling.truncates
            draws = SeededDraw(_warpers(sampling), own, ids.device, keep)
            options["logits_processor"] = [draws]
        answers = model.generate(generation_config=settings, **options)[:, ids.shape[1] :].cpu()
        if draws is None:
            return Drawn(answers, torch.zeros(answers.shape))
        return Drawn(answers, draws.logprob(), draws.kept())

    def draw(rows: list[int]) -> list[Drawn]:
        size = -(-batch // ranks.size)
        return [generate(rows[start : start + size]) for start in range(0, len(rows), size)]

    with eval_mode(model), _checkpoint_settings_put_aside(model):
        drawn = ranks.share(range(len(prompts)), draw)
    answers, logprob, kept = (list(parts) for parts in zip(*drawn))
    return join_answers(ids, mask, answers, ends, filler, logprob, kept)


class SeededDraw:
    """A logits processor that makes the likeliest token of a row the one that its seed draws.

    That is argmax_v p_v / e_v with e_v ~ Exp(1), which is how torch.multinomial draws one. The e of
    a row are made of its own seed; rounding of p seldom changes the token. It comes last, and
    applies `warpers` (temperature, top_k, top_p, min_p) itself.
    """

    def __init__(
        self, warpers: Callable, seeds: Sequence[int], device: torch.device, keep: bool = False
    ):
        self.warpers = warpers
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._logprob: list[Tensor] = []
        self._kept: list[KeptSets] | None = [] if keep else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = self.warpers(input_ids, scores)
        probability = scores.softmax(-1)
        noise = torch.empty_like(probability)
        for row, generator in zip(noise, self.generators):
            row.exponential_(generator=generator)
        drawn = probability / noise
        found = softmax_stats(scores, drawn.argmax(-1), outputs=("logprob",))
        self._logprob.append(found.logprob)
        if self._kept is not None:
            self._kept.append(KeptSets.of(scores > -torch.inf))
        return drawn

    def logprob(self) -> Tensor:
        """Of every token drawn so far, (B, W), what `Rollout.logprob` is; not of p but of the
        scores, so that it keeps its digits where p is nearly 1."""
        return torch.stack(self._logprob, 1).cpu()

    def kept(self) -> KeptSets | None:
        """At every token drawn so far, (B, W), what the warpers left."""
        if self._kept is None:
            return None
        step, rows = torch.arange(len(self._kept)), torch.arange(len(self.generators))
        return KeptSets.join(self._kept).take(step * len(rows) + rows[:, None])


def left_pad(prompts: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (B, longest prompt)."""
    width = max(map(len, prompts))
    ids = [[filler] * (width - len(p)) + list(p) for p in prompts]
    mask = [[False] * (width - len(p)) + [True] * len(p) for p in prompts]
    return torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.bool)


def answer_mask(answers: Tensor, ends: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(mask, finished): 1 up to and including each row's first end token; whether it has one."""
    is_end = torch.isin(answers, torch.tensor(list(ends), device=answers.device))
    before = is_end.long().cumsum(1) - is_end.long()
    return before == 0, is_end.any(1)


def aligned_mask(rollout: Rollout) -> Tensor:
    """1 at the positions whose distribution a generated token was drawn from: one to its left."""
    return pad(rollout.response_mask[:, 1:], (0, 1))


def official_masks(rollout: Rollout, filler: int) -> tuple[Tensor, Tensor]:
    """(attention mask, loss mask) of the published script; see `TrainConfig`, compat."""
    kept = rollout.input_ids != filler
    prompt_tokens = kept[:, : rollout.prompt_width].sum(1, keepdim=True)
    position = torch.arange(kept.shape[1], device=kept.device)
    return kept, kept & (position >= prompt_tokens)


def _generation_config(sampling: Sampling, ends: list[int], filler: int):
    """Of taking the likeliest token; what draws another comes as a processor of logits."""
    return require_transformers().GenerationConfig(
        do_sample=False,
        max_new_tokens=sampling.max_new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=ends or None,
        pad_token_id=filler,
        use_cache=True,
    )


def _warpers(sampling: Sampling):
    """The logits processors that generate samples with, in its order."""
    transformers = require_transformers()
    warpers = transformers.LogitsProcessorList()
    if sampling.temperature != 1:
        warpers.append(transformers.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        warpers.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(transformers.MinPLogitsWarper(sampling.min_p))
    return warpers


@contextmanager
def _checkpoint_settings_put_aside(model) -> Iterator[None]:
    """generate fills what a call leaves open from `model.generation_config`: keep it out.

    A PEFT model has it from the model inside, whose generate it calls, or besides that one.
    """
    holders = [causal_lm(model)]
    if model is not holders[0] and "generation_config" in vars(model):
        holders.append(model)
    kept = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = require_transformers().GenerationConfig()
    try:
        yield
    finally:
        for holder, settings in zip(holders, kept):
            holder.generation_config = settings


def join_answers(
    ids: Tensor,
    mask: Tensor,
    answers: list[Tensor],
    ends: list[int],
    filler: int,
    logprob: list[Tensor] | None = None,
    kept: list[KeptSets | None] | None = None,
) -> Rollout:
    """Left-padded prompts (B, T) and their answers, of different widths, some rows in each, with
    the log-probabilities and kept sets of their tokens in the same shapes.

    An answer may have width 0: what a request gives that was given up before its first token.
    """
    width = max(a.shape[1] for a in answers)

    def join(parts: list[Tensor], dtype: torch.dtype, value: int) -> Tensor:
        parts = [part.to(ids.device, dtype) for part in parts]
        return torch.cat([pad(part, (0, width - part.shape[1]), value=value) for part in parts])

    joined = join(answers, ids.dtype, NO_TOKEN)
    inside = joined != NO_TOKEN
    generated, finished = answer_mask(joined, ends)
    generated &= inside
    rollout = Rollout(
        torch.cat([ids, joined.where(inside, filler)], 1),
        torch.cat([mask, generated], 1),
        torch.cat([torch.zeros_like(mask), generated], 1),
        finished,
    )
    if logprob is not None:
        said = join(logprob, torch.float32, 0).where(generated, 0)
        rollout = rollout._replace(logprob=pad(said, (ids.shape[1], 0)))
    return rollout._replace(kept=_join_kept(kept or (), generated, ids.shape[1]))


def _join_kept(
    parts: Sequence[KeptSets | None], generated: Tensor, prompt_width: int
) -> KeptSets | None:
    """(B, T), of the generated tokens alone; None unless all parts have sets."""
    sets = [part for part in parts if part is not None]
    if not sets or len(sets) < len(parts):
        return None
    width = generated.shape[1]
    whole = KeptSets.join([part.pad(0, width - part.shape[1]) for part in sets])
    places = torch.arange(whole.length.numel()).view(whole.shape)
    return whole.take(places.where(generated.cpu(), -1)).pad(prompt_width, 0)
