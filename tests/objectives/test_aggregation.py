"""The three reductions by hand, and their independence of how a batch is cut."""

import math

import pytest
import torch

from em_kernels import token_loss
from em_kernels.objectives import aggregate_loss, aggregation_denominator, aggregation_weight
from em_kernels.objectives.aggregation import AGGREGATIONS, CONSTANT

LOSS = torch.tensor([[1.0, 2.0, 3.0, math.nan], [10.0, math.nan, math.nan, math.inf], [9.0] * 4])
OPTIONS = {
    mode: {"mode": mode, **({"max_length": 6} if mode == CONSTANT else {})} for mode in AGGREGATIONS
}
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_mean", 16 / 4),
        ("sequence_mean", (6 / 3 + 10 / 1) / 2),
        ("sequence_mean_token_sum", (6 + 10) / 2),
        (CONSTANT, (6 + 10) / (2 * 6)),
    ],
)
def test_by_hand(mode, expected):
    assert aggregate_loss(LOSS, MASK, **OPTIONS[mode]).item() == pytest.approx(expected, rel=1e-6)
    denominator = aggregation_denominator(MASK, **OPTIONS[mode]).item()
    assert denominator == {"token_mean": 4, CONSTANT: 12}.get(mode, 2)
    doubled = aggregate_loss(LOSS, MASK, mode=mode, denominator=2.0 * denominator)
    assert doubled.item() == pytest.approx(expected / 2, rel=1e-6)


def test_constant_normaliser():
    total = aggregate_loss(LOSS, MASK, mode="sequence_mean_token_sum", denominator=3 * 4)
    torch.testing.assert_close(total.item(), 16 / 12, rtol=1e-6, atol=0)
    assert aggregate_loss(LOSS, MASK, mode=CONSTANT, max_length=6).item() == total.item()


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_micro_batches_with_one_denominator_add_up(mode):
    loss, mask = torch.randn(8, 5, dtype=torch.float64), torch.rand(8, 5) > 0.4
    whole = aggregate_loss(loss, mask, **OPTIONS[mode])
    denominator = aggregation_denominator(mask, **OPTIONS[mode])
    parts = [
        aggregate_loss(part, m, mode=mode, denominator=denominator)
        for part, m in zip(loss.split(3), mask.split(3))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-14, atol=0)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_no_token_is_zero_with_zero_gradient(mode):
    loss = torch.full((2, 3), math.nan, requires_grad=True)
    total = aggregate_loss(loss, torch.zeros(2, 3), **OPTIONS[mode])
    total.backward()
    assert total == 0 and (loss.grad == 0).all()
    assert aggregate_loss(torch.ones(0, 3), torch.ones(0, 3), **OPTIONS[mode]) == 0


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_gradient_is_the_weight(mode):
    loss = LOSS.double().requires_grad_()
    aggregate_loss(loss, MASK, **OPTIONS[mode]).backward()
    torch.testing.assert_close(loss.grad, aggregation_weight(MASK, **OPTIONS[mode]))
    clean = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: aggregate_loss(x, MASK, **OPTIONS[mode]), clean)


def test_weights_serve_token_loss():
    logits, target = torch.randn(3, 4, 7), torch.randint(7, (3, 4))
    weight = aggregation_weight(MASK, mode="sequence_mean").float()
    found = token_loss(logits, target, logprob_weight=-weight).loss
    nll = -logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found, aggregate_loss(nll, MASK, mode="sequence_mean"))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: aggregate_loss(x, x, mode="mean"), ValueError, "mode must be one of .*'mean'"),
        (lambda x: aggregate_loss(x, x[:1]), ValueError, r"mask must have shape \(2, 3\)"),
        (lambda x: aggregate_loss(x.long(), x), TypeError, "loss must be floating point"),
        (lambda x: aggregate_loss(x, x, denominator=0), ValueError, "denominator must be positive"),
        (lambda x: aggregate_loss(x, x, denominator=x), ValueError, "denominator must be a number"),
        (
            lambda x: aggregate_loss(x, x, mode=CONSTANT),
            ValueError,
            "max_length must be a pos.*None",
        ),
        (
            lambda x: aggregation_denominator(x, mode=CONSTANT),
            ValueError,
            "max_length must be a po",
        ),
        (
            lambda x: aggregation_weight(x, mode=CONSTANT, max_length=0),
            ValueError,
            "max_length must be a positive int with .*got 0",
        ),
        (
            lambda x: aggregate_loss(x, x, max_length=6),
            ValueError,
            "max_length is for .*, got 6 wi",
        ),
        (lambda x: aggregation_denominator([1]), TypeError, "mask must be a tensor, got list"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(2, 3))
