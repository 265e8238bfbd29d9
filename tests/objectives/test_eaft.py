"""EAFT: the weight of a token by the entropy of the likeliest, and the loss from hidden states."""

import math

import pytest
import torch
from helpers import FAST_IMPLS, error, truth
from objectives_inputs import poison

from em_kernels import linear_token_loss, top_logprobs
from em_kernels.objectives import aggregation_weight, eaft_loss, eaft_weight, linear_eaft_loss

LLAMA_FACTORY = 3.0  # what it divides by in place of ln 20


def case(dtype=torch.float64, vocab=50, seed=0):
    """(hidden, weight, target with tokens that do not count, mask of those that do)"""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 7, 12, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, 12, generator=g, dtype=torch.float64).to(dtype)
    target = torch.randint(vocab, (3, 7), generator=g)
    target[0, :3] = target[2, 5:] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), target, target != -100


def top_entropy(logits, k):
    """H of the softmax of the k largest logits."""
    log_p = logits.topk(k, -1).values.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def textbook(logits, target, mask, k=20, alpha=1.0):
    weight = (top_entropy(logits, k) / math.log(k)).detach() ** alpha
    logprob = truth(logits, target.clamp(min=0))["logprob"]
    return -(weight * logprob)[mask].sum() / mask.sum()


@pytest.mark.parametrize(("k", "alpha"), ((20, 1.0), (2, 0.5), (7, 3.0), (50, 1.0)))
def test_weight_is_the_formula(k, alpha):
    hidden, weight, _, mask = case()
    logits = (hidden @ weight.T).detach() * 0.3
    found = eaft_weight(top_logprobs(logits, k).logprob, mask, alpha=alpha)
    expected = (top_entropy(logits, k) / math.log(k)) ** alpha
    assert error(found, expected * mask) < 1e-12
    assert found.min() >= 0 and found.max() <= 1


def test_weight_at_its_ends():
    certain = torch.tensor([[0.0, -math.inf, -math.inf]])
    equal = torch.full((1, 3), -math.log(8.0))
    ones = torch.ones(1)
    assert eaft_weight(certain, ones).item() == 0.0
    assert eaft_weight(certain, ones, alpha=0.0).item() == 1.0
    assert eaft_weight(equal, ones).item() == pytest.approx(1.0)


def test_nan_outside_the_mask_does_not_cross_it():
    hidden, weight, _, mask = case()
    top = top_logprobs((hidden @ weight.T).detach(), 20).logprob
    found = eaft_weight(poison(top, mask[..., None]), mask)
    assert torch.equal(found, eaft_weight(top, mask))
    assert (found[~mask] == 0).all()


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize(("k", "alpha"), ((20, 1.0), (5, 2.0), (20, 0.0)))
def test_loss_and_gradients_are_the_textbook(impl, k, alpha):
    hidden, weight, target, mask = case()
    expected = textbook(hidden @ weight.T, target, mask, k, alpha)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    found = linear_eaft_loss(hidden, weight, target, k=k, alpha=alpha, impl=impl)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for ours, theirs in zip(torch.autograd.grad(found.loss, (hidden, weight)), wanted):
        assert error(ours, theirs) < 1e-11
    logits = (hidden @ weight.T).detach().requires_grad_()
    of_logits = eaft_loss(logits, target, k=k, alpha=alpha, impl=impl)
    assert of_logits.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.equal(of_logits.stats.entropy != 0, found.stats.entropy != 0)


def test_it_is_llama_factorys_up_to_its_divisor():
    hidden, weight, target, mask = case(torch.float32)
    logits = (hidden @ weight.T).detach()
    theirs = torch.nn.functional.cross_entropy(logits[mask], target[mask], reduction="none")
    theirs = (theirs * top_entropy(logits[mask], 20) / LLAMA_FACTORY).mean()
    ours = linear_eaft_loss(hidden, weight, target).loss * math.log(20) / LLAMA_FACTORY
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_without_the_exponent_it_is_cross_entropy():
    hidden, weight, target, mask = case()
    weights = -aggregation_weight(mask)
    plain = linear_token_loss(hidden, weight, target, logprob_weight=weights).loss
    assert torch.equal(linear_eaft_loss(hidden, weight, target, alpha=0.0).loss, plain)


def test_parts_of_a_batch_add_up_and_masks_leave_out():
    hidden, weight, target, mask = case()
    whole = linear_eaft_loss(hidden, weight, target).loss
    a = aggregation_weight(mask)
    parts = [linear_eaft_loss(hidden[i], weight, target[i], token_weight=a[i]) for i in range(3)]
    assert sum(p.loss for p in parts).item() == pytest.approx(whole.item(), rel=1e-12)
    fewer = torch.zeros_like(mask)
    fewer[1, 2:5] = True
    bad = poison(hidden, fewer[..., None]).requires_grad_()
    found = linear_eaft_loss(bad, weight, target, mask=fewer).loss
    assert found.item() == pytest.approx(
        textbook(hidden @ weight.T, target, fewer).item(), rel=1e-12
    )
    (gradient,) = torch.autograd.grad(found, bad)
    assert gradient.isfinite().all() and (gradient[~fewer] == 0).all()


def test_options_of_the_head_reach_both_passes():
    hidden, weight, target, mask = case()
    bias = torch.randn(50, dtype=torch.float64)
    options = dict(bias=bias, temperature=0.7, softcap=3.0, logit_scale=0.5, valid_vocab=41)
    target = target.clamp(max=40)
    z = torch.tanh((0.5 * (hidden @ weight.T) + bias) / 3.0) * 3.0 / 0.7
    expected = textbook(z[..., :41], target, mask)
    found = linear_eaft_loss(hidden, weight, target, **options, chunk_tokens=4).loss
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_low_rank_part_of_the_head_is_in_both_passes():
    hidden, weight, target, _ = case()
    a = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    b = torch.randn(50, 3, dtype=torch.float64, requires_grad=True)
    merged = linear_eaft_loss(hidden, weight + 0.5 * b @ a, target).loss
    found = linear_eaft_loss(hidden, weight, target, lora=(a, b, 0.5)).loss
    assert found.item() == pytest.approx(merged.item(), rel=1e-12)
    wanted = torch.autograd.grad(merged, (hidden, a, b))
    for ours, theirs in zip(torch.autograd.grad(found, (hidden, a, b)), wanted):
        assert error(ours, theirs) < 1e-11


def test_it_is_traced_in_one_graph():
    hidden, weight, target, _ = case()

    def loss(hidden, weight):
        return linear_eaft_loss(hidden, weight, target, k=5, alpha=0.5).loss

    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight)
    assert torch.equal(found, loss(hidden, weight))


@pytest.mark.parametrize(
    ("call", "raised", "message"),
    [
        (lambda h, w, t: eaft_weight(h[..., :1], t != -100), ValueError, "top_logprob must be"),
        (lambda h, w, t: eaft_weight(h, t != -100, alpha=-1), ValueError, "alpha must be at least"),
        (lambda h, w, t: linear_eaft_loss(h, w, t, k=51), ValueError, "k must be at most 50"),
        (lambda h, w, t: linear_eaft_loss(h, w, t, k=1), ValueError, "k must be 2 or more"),
        (lambda h, w, t: eaft_loss(h, t, k=2.0), TypeError, "k must be an int"),
        (lambda h, w, t: linear_eaft_loss(h, w, t, top_p=0.9), TypeError, "top_p"),
        (lambda h, w, t: linear_eaft_loss(h, w, None), TypeError, "target must be a tensor"),
        (
            lambda h, w, t: linear_eaft_loss(h, w, t, token_weight=torch.ones(2)),
            ValueError,
            "token_weight must have the leading shape",
        ),
    ],
)
def test_bad_input_names_the_argument(call, raised, message):
    hidden, weight, target, _ = case()
    with pytest.raises(raised, match=message):
        call(hidden, weight, target)
