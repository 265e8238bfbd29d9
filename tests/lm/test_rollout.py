"""Sampling and the masks of what was sampled."""

from __future__ import annotations

import pytest
import torch
from tiny_qwen2 import WORDS, make_bigram_model, make_model, make_tokenizer

from em_kernels.lm.chat import encode_prompt
from em_kernels.lm.random_state import seed_of
from em_kernels.lm.ranks import Ranks
from em_kernels.lm.rollout import (
    Drawn,
    SeededDraw,
    aligned_mask,
    answer_mask,
    join_answers,
    left_pad,
    official_masks,
)
from em_kernels.trainer import Rollout, Sampling, sample
from em_kernels.trainer.collect import join_rollouts

torch.set_num_threads(1)


def test_answer_mask_goes_up_to_the_first_end_token_whatever_follows():
    answers = torch.tensor([[5, 1, 1, 1], [1, 0, 0, 0], [5, 6, 7, 8], [5, 2, 0, 6]])
    mask, finished = answer_mask(answers, [1, 2])
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert finished.tolist() == [True, True, False, True]


def rollout_of(prompts: list[list[int]], answers: list[list[int]], filler: int) -> Rollout:
    """As `sample` gives it: prompts left-padded, answers right-padded."""
    left, right = max(map(len, prompts)), max(map(len, answers))
    rows, attended, generated = [], [], []
    for p, a in zip(prompts, answers):
        before, after = left - len(p), right - len(a)
        rows.append([filler] * before + p + a + [filler] * after)
        attended.append([0] * before + [1] * (len(p) + len(a)) + [0] * after)
        generated.append([0] * left + [1] * len(a) + [0] * after)
    masks = (torch.tensor(attended).bool(), torch.tensor(generated).bool())
    return Rollout(torch.tensor(rows), *masks, torch.ones(len(rows)).bool())


@pytest.mark.parametrize("filler", [0, 1], ids=["PAD", "PAD = EOS"])
def test_aligned_mask_is_one_left_of_every_generated_token(filler):
    rollout = rollout_of([[7, 8, 9], [7]], [[5, 1], [5, 6, 6, 1]], filler)
    assert rollout.prompt_width == 3
    expected = [[0, 0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0]]
    assert aligned_mask(rollout).int().tolist() == expected


def test_official_mask_is_unshifted_and_lets_left_padded_prompts_leak():
    rollout = rollout_of([[7, 8, 9], [7]], [[5, 1], [5, 6, 6, 1]], 0)
    attention, mask = official_masks(rollout, 0)
    assert attention.int().tolist() == [[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]]
    assert mask.int().tolist() == [[0, 0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("filler", [0, 1], ids=["PAD", "PAD = EOS"])
@pytest.mark.parametrize("empty", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_answers_without_a_token_have_length_zero(empty, filler):
    prompts, drawn = [[7, 8, 9], [7], [8, 9]], [[5, 1], [5, 6, 6, 1], [6, 6, 6]]
    drawn = [[] if row in empty else answer for row, answer in enumerate(drawn)]
    joined = join_answers(
        *left_pad(prompts, filler), [torch.tensor([a]) for a in drawn], [1], filler
    )
    assert joined.prompt_width == 3 and joined.input_ids.dtype == torch.int64
    assert [ids.tolist() for ids in joined.answers()] == drawn
    assert joined.finished.tolist() == [1 in answer for answer in drawn]
    assert joined.attention_mask.sum(1).tolist() == [len(p + a) for p, a in zip(prompts, drawn)]
    assert aligned_mask(joined).sum(1).tolist() == list(map(len, drawn))
    attention, mask = official_masks(joined, filler)
    assert (mask <= attention).all() and attention.shape == joined.input_ids.shape
    twice = join_rollouts([joined, rollout_of([[7] * 5], [[5, 1]], filler)], filler)
    assert twice.prompt_width == 5
    assert [ids.tolist() for ids in twice.answers()] == [*drawn, [5, 1]]


def test_official_mask_drops_the_end_token_where_pad_is_eos():
    rollout = rollout_of([[7, 8, 9]], [[5, 6, 1]], 1)
    assert official_masks(rollout, 1)[1].int().tolist() == [[0, 0, 0, 1, 1, 0]]


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_sample_masks_prompts_of_unequal_length_and_keeps_the_end_token(pad):
    model = make_bigram_model({"<assistant>": {"7": 1.0}, "7": {"7": 0.6, "<eos>": 0.4}})
    tokenizer = make_tokenizer(pad)
    prompts = [encode_prompt(tokenizer, text) for text in ("1 2 3 4", "1")] * 16
    torch.manual_seed(0)
    rollout = sample(model, tokenizer, prompts, Sampling(max_new_tokens=9), batch=8)
    seven, end = WORDS.index("7"), WORDS.index("<eos>")
    lengths = set()
    for i, answer in enumerate(rollout.answers()):
        tail = [end] if rollout.finished[i] else [seven]
        assert answer.tolist() == [seven] * (len(answer) - 1) + tail
        lengths.add(len(answer))
    assert len(lengths) > 2
    shown = [ids[m].tolist() for ids, m in zip(rollout.input_ids, rollout.attention_mask)]
    assert shown == [p + a.tolist() for p, a in zip(prompts, rollout.answers())]


def test_sampling_ignores_the_checkpoints_generation_settings():
    model = make_bigram_model({"<assistant>": {str(i): 0.1 for i in range(10)}})
    model.generation_config.update(top_k=1, do_sample=False, min_new_tokens=5, temperature=0.01)
    kept = model.generation_config
    prompts = [encode_prompt(make_tokenizer(), "1")] * 200
    torch.manual_seed(0)
    rollout = sample(model, make_tokenizer(), prompts, Sampling(max_new_tokens=4), batch=200)
    firsts = {answer[0].item() for answer in rollout.answers()}
    assert len(firsts) == 10
    assert {len(answer) for answer in rollout.answers()} == {2}
    assert model.generation_config is kept


def test_no_token_is_cut_off_by_rank_unless_asked():
    model = make_model(vocab_size=200)
    torch.nn.init.normal_(model.lm_head.weight, std=1e-3)
    torch.manual_seed(0)

    def distinct(**kwargs) -> int:
        drawn = sample(
            model, make_tokenizer(), [[5]] * 2000, Sampling(max_new_tokens=1, **kwargs), 500
        )
        return len({answer[0].item() for answer in drawn.answers()})

    assert distinct() == 200
    assert distinct(top_k=7) == 7


def test_sampling_temperature_and_nucleus_shape_what_is_drawn():
    model = make_bigram_model({"<assistant>": {"7": 0.8, "8": 0.2}})
    prompts = [encode_prompt(make_tokenizer(), "1")] * 2000
    seven = WORDS.index("7")

    def share(**kwargs) -> float:
        torch.manual_seed(0)
        drawn = sample(model, make_tokenizer(), prompts, Sampling(max_new_tokens=2, **kwargs), 2000)
        return sum(a[0].item() == seven for a in drawn.answers()) / len(prompts)

    assert share() == pytest.approx(0.8, abs=0.04)
    assert share(temperature=0.5) == pytest.approx(0.64 / 0.68, abs=0.03)
    assert share(top_p=0.7) == 1.0
    assert share(temperature=0) == 1.0


def test_repetition_penalty_reaches_the_prompt():
    model = make_bigram_model({"<assistant>": {"7": 0.6, "8": 0.4}})
    prompts = [encode_prompt(make_tokenizer(), "7")]
    sampling = Sampling(temperature=0, max_new_tokens=1, repetition_penalty=5.0)
    assert sample(model, make_tokenizer(), prompts, sampling, 1).answers()[0] == WORDS.index("8")


def test_answers_are_cut_to_the_models_positions():
    model = make_bigram_model({"<assistant>": {"7": 1.0}, "7": {"7": 1.0}})
    prompts = [encode_prompt(make_tokenizer(), "1")]
    rollout = sample(model, make_tokenizer(), prompts, Sampling(max_new_tokens=500), batch=1)
    assert rollout.input_ids.shape[1] == 64
    assert not rollout.finished.any()
    with pytest.raises(ValueError, match="64 positions, got 70 tokens"):
        sample(model, make_tokenizer(), [[5] * 70], Sampling(), batch=1)


class OneOf(Ranks):
    """One of several ranks, whose answers are kept for whoever joins them."""

    def __init__(self, rank: int, size: int, shares: list):
        super().__init__(rank, size, torch.device("cpu"))
        self.shares = shares

    def gather(self, make) -> list:
        self.shares.append(make())
        missing = 5 - sum(len(part.ids) for share in self.shares for part in share)
        return [*self.shares, [Drawn(torch.zeros(missing, 1).long(), torch.zeros(missing, 1))]]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_together_draw_the_answers_of_one(size):
    """Row by row its own numbers: neither the batch nor the number of ranks has a part in them."""
    model, tokenizer = make_model(), make_tokenizer()
    prompts = [encode_prompt(tokenizer, text) for text in ("1 2 3 4", "1", "5 6", "7 8 9", "2")]
    sampling = Sampling(max_new_tokens=12, top_p=0.95, repetition_penalty=1.1)
    options = dict(seeds=[seed_of(3, 1, row) for row in range(5)])
    whole = sample(model, tokenizer, prompts, sampling, 5, **options)
    shares: list = []
    for rank in range(size):
        ranks = OneOf(rank, size, shares)
        joined = sample(model, tokenizer, prompts, sampling, 4, ranks, **options)
    rows = [sum(len(part.ids) for part in share) for share in shares]
    assert rows == [len(part) for part in torch.arange(5).tensor_split(size)]
    for ours, theirs in zip(joined._replace(logprob=None), whole._replace(logprob=None)):
        assert ours is theirs is None or torch.equal(ours, theirs)
    torch.testing.assert_close(joined.logprob, whole.logprob)  # the batch is another


def test_an_answer_is_its_seeds_whatever_it_is_drawn_with():
    model, tokenizer = make_model(), make_tokenizer()
    prompt, sampling = encode_prompt(tokenizer, "1 2"), Sampling(max_new_tokens=12)
    seeds = [seed_of(0, row) for row in range(6)]
    drawn = sample(model, tokenizer, [prompt] * 6, sampling, 6, seeds=seeds).answers()
    alone = sample(model, tokenizer, [prompt] * 6, sampling, 1, seeds=seeds[::-1]).answers()
    assert [a.tolist() for a in drawn] == [a.tolist() for a in alone[::-1]]
    assert len({tuple(a.tolist()) for a in drawn}) == 6
    torch.manual_seed(1)
    first = sample(model, tokenizer, [prompt] * 2, sampling, 2).answers()
    torch.manual_seed(1)
    again = sample(model, tokenizer, [prompt] * 2, sampling, 2).answers()
    assert [a.tolist() for a in first] == [a.tolist() for a in again]
    assert first[0].tolist() != first[1].tolist()


def test_tokens_are_drawn_by_their_probability_and_never_without():
    rows = 4000
    logits = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf, 2.0, -torch.inf]).expand(rows, 6)
    draw = SeededDraw(lambda ids, scores: scores / 2, range(rows), logits.device)
    drawn = [draw(None, logits).argmax(-1) for _ in range(3)]
    expected = (logits[0] / 2).softmax(-1)
    for tokens in drawn:
        share = tokens.bincount(minlength=6) / rows
        assert share[expected == 0].sum() == 0
        assert (share - expected).abs().max() < 3 * (0.25 / rows) ** 0.5  # standard errors
    assert not torch.equal(drawn[0], drawn[1])


def test_rounding_seldom_changes_what_is_drawn():
    """Of many unlikely tokens too: probabilities that differ by 1e-3 draw the same."""
    scores = torch.randn(300, 5000, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(300, 5000, generator=torch.Generator().manual_seed(1))
    seeds, device = range(300), torch.device("cpu")
    first, second = (
        SeededDraw(lambda ids, scores: scores, seeds, device)(None, x).argmax(-1)
        for x in (scores, scores + 1e-3 * noise)
    )
    assert (first != second).sum() <= 3
