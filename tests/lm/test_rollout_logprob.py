"""The log-probabilities that answers were drawn with."""

from __future__ import annotations

import pytest
import torch
import transformers
from kept_cases import dense
from tiny_qwen2 import make_bigram_model, make_model, make_tokenizer

from em_kernels.lm.chat import encode_prompt
from em_kernels.lm.kept_sets import KeptSets
from em_kernels.lm.rollout import NO_TOKEN, SeededDraw, join_answers, left_pad
from em_kernels.trainer import Rollout, Sampling, sample
from em_kernels.trainer.collect import join_rollouts

torch.set_num_threads(1)

SETTINGS = {
    "as it is": {},
    "temperature": dict(temperature=0.7),
    "top_k": dict(top_k=5),
    "top_p": dict(top_p=0.6),
    "min_p": dict(min_p=0.4),
    "penalty": dict(repetition_penalty=1.3),
    "all": dict(temperature=1.3, top_k=20, top_p=0.9, min_p=0.1, repetition_penalty=1.2),
}


def processors(sampling: Sampling) -> list:
    """transformers' own, in the order of its generate."""
    found: list = []
    if sampling.repetition_penalty != 1:
        found.append(transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    found.append(transformers.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        found.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(transformers.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        found.append(transformers.MinPLogitsWarper(sampling.min_p))
    return found


@torch.no_grad()
def truth(model, rollout: Rollout, sampling: Sampling) -> torch.Tensor:
    """(B, T, V), the logarithm of what was drawn from, token by token from logits in float64."""
    model, ids = model.double(), rollout.input_ids
    position = (rollout.attention_mask.long().cumsum(1) - 1).clamp(min=0)
    mask = rollout.attention_mask.long()
    logits = model(input_ids=ids, attention_mask=mask, position_ids=position).logits
    found = torch.full(logits.shape, -torch.inf, dtype=torch.float64)
    for t in range(rollout.prompt_width, ids.shape[1]):
        scores = logits[:, t - 1]
        for processor in processors(sampling):
            scores = processor(ids[:, :t], scores)
        found[:, t] = scores.log_softmax(-1)
    return found.masked_fill(~rollout.response_mask[..., None], -torch.inf)


@pytest.mark.parametrize("name", SETTINGS)
def test_logprob_is_that_of_the_distribution_drawn_from(name):
    model, tokenizer = make_model(), make_tokenizer()
    prompts = [encode_prompt(tokenizer, text) for text in ("1 2 3 4", "1", "5 6")] * 2
    sampling = Sampling(**SETTINGS[name], max_new_tokens=8)
    rollout = sample(model, tokenizer, prompts, sampling, 3, seeds=range(6), keep_sets=True)
    assert rollout.logprob.dtype == torch.float32
    assert (rollout.logprob[~rollout.response_mask] == 0).all()
    whole, mask = truth(model, rollout, sampling), rollout.response_mask
    expected = whole.gather(-1, rollout.input_ids[..., None])[..., 0]
    assert (expected[mask] < -1e-3).any()
    torch.testing.assert_close(rollout.logprob[mask].double(), expected[mask], rtol=1e-5, atol=1e-5)
    if not sampling.truncates:
        assert rollout.kept is None
        return
    kept = dense(rollout.kept)
    assert kept.any(-1).equal(mask) and not kept[mask].all(-1).any()
    assert (kept == whole.isfinite()).float().mean() > 0.999  # but for ties of rounding
    assert sample(model.float(), tokenizer, prompts[:1], sampling, 1).kept is None


def test_min_p_cuts_what_is_drawn():
    model = make_bigram_model({"<assistant>": {"7": 0.8, "8": 0.2}})
    prompts = [encode_prompt(make_tokenizer(), "1")] * 50

    def distinct(min_p: float) -> int:
        sampling = Sampling(max_new_tokens=1, min_p=min_p)
        drawn = sample(model, make_tokenizer(), prompts, sampling, 50, seeds=range(50))
        return len({answer[0].item() for answer in drawn.answers()})

    assert (distinct(0.2), distinct(0.3)) == (2, 1)


def test_the_likeliest_token_is_certain_at_temperature_0():
    model = make_bigram_model({"<assistant>": {"7": 0.6, "8": 0.4}})
    prompts = [encode_prompt(make_tokenizer(), "1")]
    rollout = sample(model, make_tokenizer(), prompts, Sampling(temperature=0, max_new_tokens=2), 1)
    assert rollout.response_mask.any()
    assert torch.equal(rollout.logprob, torch.zeros(rollout.input_ids.shape))


def test_what_is_drawn_is_drawn_as_before_and_a_near_certain_token_keeps_its_digits():
    scores = torch.tensor([[25.0, 0.0, 1.0], [0.0, 0.5, 1.0]])
    draw = SeededDraw(lambda ids, scores: scores, (3, 4), scores.device)
    noise = torch.stack(
        [torch.empty(3).exponential_(generator=torch.Generator().manual_seed(s)) for s in (3, 4)]
    )
    drawn = draw(None, scores)
    assert torch.equal(drawn, scores.softmax(-1) / noise)
    expected = scores.double().log_softmax(-1).gather(1, drawn.argmax(-1)[:, None])
    assert expected[0] > -1e-10 and draw.logprob()[0] < 0
    torch.testing.assert_close(draw.logprob().double(), expected, rtol=1e-5, atol=0)


def test_answers_of_different_widths_are_joined_with_their_logprob():
    ids, mask = left_pad([[7, 8, 9], [7]], 0)
    answers = [torch.tensor([[5, 1, NO_TOKEN]]), torch.tensor([[5]])]
    logprob = [torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-3.0]])]
    joined = join_answers(ids, mask, answers, [1], 0, logprob)
    assert joined.logprob.tolist() == [[0, 0, 0, -1, -2, 0], [0, 0, 0, -3, 0, 0]]
    unknown = join_answers(ids, mask, answers, [1], 0)
    assert unknown.logprob is None and unknown.to(torch.device("cpu")).logprob is None
    narrow = join_answers(
        *left_pad([[7] * 5], 0), [torch.tensor([[6]])], [1], 0, [-torch.ones(1, 1)]
    )
    kept = torch.eye(10).bool()[[5, 1, 0]], torch.eye(10).bool()[[5]]
    sets = [KeptSets.of(own).take(torch.arange(len(own))[None]) for own in kept]
    cut = join_answers(ids, mask, answers, [1], 0, logprob, sets)
    assert dense(cut.kept).int().argmax(-1).mul(cut.response_mask).tolist() == [
        [0, 0, 0, 5, 1, 0],
        [0, 0, 0, 5, 0, 0],
    ]
    assert dense(cut.kept).any(-1).equal(cut.response_mask)
    assert join_answers(ids, mask, answers, [1], 0, logprob, [None, sets[1]]).kept is None
    assert join_rollouts([cut, joined], 0).kept is None
    wider = join_rollouts([cut, cut._replace(input_ids=cut.input_ids + 1)], 0)
    assert dense(wider.kept)[2:].equal(dense(cut.kept)) and dense(wider.kept)[:2].equal(
        dense(cut.kept)
    )
    both = join_rollouts([joined, narrow], 0)
    assert both.logprob[both.response_mask].tolist() == [-1, -2, -3, -1]
    assert both.logprob[~both.response_mask].eq(0).all()
    assert join_rollouts([joined, unknown], 0).logprob is None
