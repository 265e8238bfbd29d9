"""A mask chooses tokens: any integer, a floating 0 or 1, and never a weight."""

import math

import pytest
import torch

import em_kernels as em
from em_kernels import objectives

SHAPE, VOCAB = (2, 3), 7
LOGITS = torch.linspace(-2, 2, 6 * VOCAB).mul(3).cos().view(*SHAPE, VOCAB)
HIDDEN = LOGITS[..., :4].clone()
HEAD = LOGITS.view(-1)[: VOCAB * 4].view(VOCAB, 4)
TARGET = torch.tensor([[1, 0, 5], [3, 2, 4]])
A, B = LOGITS[..., 0].clone(), LOGITS[..., 1].clone()
ROWS = (-A.abs(), -B.abs(), A + B)  # logprob, old_logprob, advantage
ONES = torch.ones(SHAPE, dtype=torch.bool)
LOSS = dict(entropy_weight=A, outputs=("entropy",))

CALLS = {
    "softmax_stats": lambda m: em.softmax_stats(LOGITS, TARGET, mask=m),
    "linear_softmax_stats": lambda m: em.linear_softmax_stats(HIDDEN, HEAD, TARGET, mask=m),
    "token_loss": lambda m: em.token_loss(LOGITS, mask=m, **LOSS),
    "linear_token_loss": lambda m: em.linear_token_loss(HIDDEN, HEAD, mask=m, **LOSS),
    "entropy_loss": lambda m: em.entropy_loss(LOGITS, m),
    "sequence_mean": lambda m: em.linear_entropy_loss(HIDDEN, HEAD, m, reduction="sequence_mean"),
    "EntropyLoss": lambda m: em.EntropyLoss(reduction="sum")(LOGITS, m),
    "LinearEntropyLoss": lambda m: em.LinearEntropyLoss(reduction=3.0)(HIDDEN, HEAD, m),
    "row_mask": lambda m: em.selective_log_softmax_and_entropy(LOGITS, TARGET, 0.9, m),
    "token_covariance": lambda m: em.token_covariance(A, B, m),
    "linear_token_covariance": lambda m: em.linear_token_covariance(HIDDEN, HEAD, TARGET, A, m),
    "clip_cov_mask": lambda m: em.clip_cov_mask(A, m, lower=-9, upper=9, ratio=1.0),
    "exclude": lambda m: em.clip_cov_mask(A, ONES, lower=-9, upper=9, ratio=1.0, exclude=m),
    "kl_cov_mask": lambda m: em.kl_cov_mask(A, m, ratio=0.5),
    "high_entropy_mask": lambda m: em.high_entropy_mask(A, m, ratio=0.5),
    "grpo_loss": lambda m: objectives.grpo_loss(*ROWS, m).loss,
    "grpo_plus_plus_loss": lambda m: objectives.grpo_plus_plus_loss(*ROWS, m, entropy=A).loss,
    "clip_cov_selection": lambda m: objectives.clip_cov_selection(
        *ROWS, m, ratio=1.0, lower=-9, upper=9
    ),
    "clip_cov_loss": lambda m: objectives.clip_cov_loss(*ROWS, m, ONES).loss,
    "selected": lambda m: objectives.clip_cov_loss(*ROWS, ONES, m).loss,
    "kl_cov_selection": lambda m: objectives.kl_cov_selection(*ROWS[::2], m, ratio=0.5),
    "kl_cov_loss": lambda m: objectives.kl_cov_loss(*ROWS, m, ONES).loss,
    "selected of kl_cov": lambda m: objectives.kl_cov_loss(*ROWS, ONES, m).loss,
    "high_entropy_loss": lambda m: objectives.high_entropy_loss(*ROWS, m, ONES).loss,
    "selected of high_entropy": lambda m: objectives.high_entropy_loss(*ROWS, ONES, m).loss,
    "entropy_bonus": lambda m: objectives.entropy_bonus(A, B, m, coef=0.1),
    "aggregate_loss": lambda m: objectives.aggregate_loss(A, m),
    "aggregation_weight": lambda m: objectives.aggregation_weight(m, mode="sequence_mean"),
    "aggregation_denominator": lambda m: objectives.aggregation_denominator(m),
    "token_mean_weights": lambda m: objectives.token_mean_weights(m),
    "sequence_mean_weights": lambda m: objectives.sequence_mean_weights(m),
    "micro_batch_mean_weights": lambda m: objectives.micro_batch_mean_weights(m, 1),
    "negative_entropy_reward": lambda m: objectives.negative_entropy_reward(A.abs(), m),
    "self_certainty_reward": lambda m: objectives.self_certainty_reward(A.abs(), m),
    "chosen_mask": lambda m: objectives.ppl_loss(*ROWS[:2], m, ONES, gamma=0.9)[0],
    "rejected_mask": lambda m: objectives.ppl_loss(*ROWS[:2], ONES, m, gamma=0.9)[0],
}
EACH_CALL = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
MASK = torch.tensor([[1, 0, 1], [1, 1, 0]])


def tensors(x):
    """Those of a result, in one list."""
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for part in x if part is not None for t in tensors(part)]


@EACH_CALL
def test_the_dtype_of_a_mask_does_not_matter(call):
    expected = tensors(call(MASK.bool()))
    floating = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    same = [MASK.to(dtype) for dtype in (torch.int64, torch.uint8, *floating)]
    for mask in (*same, 3 * MASK, -MASK, -0.0 * (1 - MASK) + MASK):  # also segments, and a -0
        for got, right in zip(tensors(call(mask)), expected, strict=True):
            assert torch.equal(got, right)


@EACH_CALL
@pytest.mark.parametrize("value", (0.5, 2.0, -1.0, 1e-3, math.nan, math.inf))
def test_a_weight_in_a_mask_is_refused(call, value):
    mask = MASK.float()
    mask[1, 1] = value
    message = rf"(mask|exclude|selected) must be bool, integer or .* weigh them .*got {value!r}"
    with pytest.raises(ValueError, match=message):
        call(mask)


def test_a_complex_weight_is_refused_too():
    with pytest.raises(ValueError, match="must be bool, integer or a floating 0 or 1"):
        em.entropy_loss(LOGITS, MASK * (0.5 + 0j))


@pytest.mark.parametrize("name", ("entropy_loss", "EntropyLoss", "sequence_mean"))
def test_a_loss_looks_at_a_mask_once(name):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as run:
        CALLS[name](MASK.float())
    assert [e.name for e in run.events()].count("em_kernels::zero_or_one") == 1


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_in_the_other_floating_dtypes(dtype):
    mask = MASK.to(dtype)
    mask[0, 0] = 0.25
    with pytest.raises(ValueError, match=r"mask must be .*got 0.25"):
        em.entropy_loss(LOGITS, mask)


def test_the_results_of_a_transform_and_of_a_compiled_function_too():
    good, bad = MASK.float(), MASK.float() / 2
    losses = torch.vmap(objectives.aggregate_loss)(A, good)
    assert torch.equal(
        losses, torch.stack([objectives.aggregate_loss(a, m) for a, m in zip(A, MASK)])
    )
    with pytest.raises(ValueError, match=r"mask must be .*got 0.5"):
        torch.vmap(objectives.aggregate_loss)(A, bad)
    compiled = torch.compile(em.entropy_loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(LOGITS, good), em.entropy_loss(LOGITS, MASK))
    with pytest.raises(ValueError, match=r"mask must be .*got 0.5"):
        compiled(LOGITS, bad)


def test_the_operator_is_one_that_torch_can_trace():
    torch.library.opcheck(torch.ops.em_kernels.zero_or_one.default, (MASK.float(), "mask"))
    assert objectives.aggregation_weight(MASK.float().to("meta")).shape == SHAPE


@pytest.mark.parametrize("ignored", (-100, -1, VOCAB, 1 << 40))
def test_an_id_outside_the_vocabulary_says_how_to_ignore_it(ignored):
    target = TARGET.clone()
    target[0, 1] = ignored
    mask = torch.ones(SHAPE)
    mask[0, 1] = 0
    for f, x in ((em.softmax_stats, (LOGITS,)), (em.linear_softmax_stats, (HIDDEN, HEAD))):
        with pytest.raises(
            ValueError, match=rf"target must be .*ignore_index.*mask.*got {ignored}"
        ):
            f(*x, target, ignore_index=-7)
        masked = f(*x, target, ignore_index=-7, mask=mask)
        given = f(*x, target, ignore_index=ignored)
        assert torch.equal(masked.logprob, given.logprob) and given.logprob[0, 1] == 0
        assert torch.equal(masked.entropy, given.entropy) and given.entropy[0, 1] == 0
