"""Regret, policy labels and the preference loss, by hand and against what they reduce to."""

import math

import pytest
import torch
from objectives_inputs import poison
from torch.nn.functional import logsigmoid

from em_kernels.objectives import (
    label_kl,
    linear_label_kl,
    logprob_at,
    ppl_loss,
    pseudo_label_kl,
    segment_regret,
    token_regret,
    topk_label_kl,
)

WIDE = torch.float64


def pair(seed=0, kl=True):
    """Arguments of ppl_loss for 3 pairs of segments of up to 5 and 4 tokens, holes included."""
    g = torch.Generator().manual_seed(seed)
    logprobs = [-3 * torch.rand(3, t, generator=g, dtype=WIDE) for t in (5, 4)]
    kls = [torch.rand(3, t, generator=g, dtype=WIDE) for t in (5, 4)]
    masks = [torch.rand(3, t, generator=g) > 0.25 for t in (5, 4)]
    labels = dict(chosen_kl=kls[0], rejected_kl=kls[1]) if kl else {}
    return [x.requires_grad_() for x in logprobs], masks, labels


def test_regret_by_hand():
    logprob, kl = torch.tensor([-1.0, -9.0, -2.0]), torch.tensor([0.3, 9.0, 0.4])
    mask = torch.tensor([1, 0, 1])
    options = dict(gamma=0.5, alpha=2.0)
    # 2 (1 + 0.5 x 0.4) = 2.4 and 2 x 2 = 4; 2.4 + 0.5 x 4 = 4.4.
    torch.testing.assert_close(
        token_regret(logprob, kl, mask, **options), torch.tensor([2.4, 0, 4])
    )
    torch.testing.assert_close(segment_regret(logprob, kl, mask, **options).item(), 4.4)
    halved = segment_regret(logprob, kl, mask, length_normalize=True, **options)
    torch.testing.assert_close(halved.item(), 2.2)


@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_segment_regret_is_the_discounted_sum_of_token_regret(gamma):
    (logprob, _), (mask, _), labels = pair()
    kl = labels["chosen_kl"]
    tokens = token_regret(logprob, kl, mask, gamma=gamma, alpha=1.3)
    position = mask.cumsum(-1) - 1
    expected = (gamma**position * tokens).sum(-1)
    torch.testing.assert_close(segment_regret(logprob, kl, mask, gamma=gamma, alpha=1.3), expected)


def test_loss_by_hand():
    chosen, rejected = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-3.0]])
    loss, metrics = ppl_loss(
        chosen,
        rejected,
        torch.ones(1, 2),
        torch.ones(1, 1),
        chosen_kl=torch.tensor([[0.3, 0.4]]),
        rejected_kl=torch.tensor([[7.0]]),
        gamma=0.5,
    )
    # R+ = 1 + 0.5 (2 + 0.4) = 2.2, R- = 3: the KL of a segment's first token never enters.
    torch.testing.assert_close(loss.item(), math.log1p(math.exp(-0.8)))
    assert metrics["margin"].item() == pytest.approx(0.8)
    assert metrics["contrastive_kl"].item() == pytest.approx(0.2) and metrics["accuracy"] == 1


@pytest.mark.parametrize("length_normalize", [False, True])
def test_loss_is_minus_log_sigmoid_of_minus_the_regret_difference(length_normalize):
    logprobs, masks, labels = pair()
    options = dict(gamma=0.9, alpha=0.7, length_normalize=length_normalize)
    chosen, rejected = (
        segment_regret(logprob, kl, mask, **options)
        for logprob, kl, mask in zip(logprobs, labels.values(), masks)
    )
    found = ppl_loss(*logprobs, *masks, **labels, **options).loss
    torch.testing.assert_close(found, -logsigmoid(-(chosen - rejected)))


def test_without_labels_it_is_dpo_like():
    (chosen, rejected), masks, _ = pair()
    gap = (chosen * masks[0]).sum(-1) - (rejected * masks[1]).sum(-1)
    loss, metrics = ppl_loss(chosen, rejected, *masks, gamma=1.0, alpha=0.1)
    torch.testing.assert_close(loss, -logsigmoid(0.1 * gap))
    assert metrics["contrastive_kl"] == 0

    # With log-ratios to a reference in the place of log-probabilities it is DPO, beta = alpha.
    refs = [x.detach() - 0.5 * torch.rand_like(x) for x in (chosen, rejected)]
    ratios = [x - ref for x, ref in zip((chosen, rejected), refs)]
    gap = sum(s * (r * m).sum(-1) for s, r, m in zip((1, -1), ratios, masks))
    found = ppl_loss(*ratios, *masks, gamma=1.0, alpha=0.1).loss
    torch.testing.assert_close(found, -logsigmoid(0.1 * gap))


def test_zero_labels_are_no_labels():
    logprobs, masks, labels = pair()
    zero = {name: torch.zeros_like(kl) for name, kl in labels.items()}
    found = ppl_loss(*logprobs, *masks, **zero, gamma=0.9).loss
    assert torch.equal(found, ppl_loss(*logprobs, *masks, gamma=0.9).loss)


def test_gradcheck():
    logprobs, masks, labels = pair()
    kls = [kl.requires_grad_() for kl in labels.values()]

    def loss(chosen, rejected, chosen_kl, rejected_kl):
        labels = dict(chosen_kl=chosen_kl, rejected_kl=rejected_kl)
        return ppl_loss(chosen, rejected, *masks, **labels, gamma=0.9).loss

    assert torch.autograd.gradcheck(loss, (*logprobs, *kls))
    assert torch.autograd.gradcheck(
        lambda x: token_regret(x, pseudo_label_kl(x), masks[0], gamma=0.9), logprobs[0]
    )


def test_pseudo_labels_weigh_later_tokens_more():
    logprob, mask = torch.tensor([-1.0, -2.0, -3.0]), torch.ones(3)
    kl = pseudo_label_kl(logprob)
    assert kl.tolist() == [1.0, 2.0, 3.0]
    # sum_t (1 + t)(-logprob_t) = 1 + 2 x 2 + 3 x 3.
    assert segment_regret(logprob, kl, mask, gamma=1.0) == 14


def test_label_kl_by_hand():
    p, pi = torch.tensor([0.25, 0.75]).log(), torch.tensor([0.5, 0.5]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    torch.testing.assert_close(label_kl(p, pi).item(), expected)
    certain = torch.tensor([0.0, -math.inf])
    torch.testing.assert_close(label_kl(p, certain), pseudo_label_kl(p[0]))
    assert label_kl(p, p) == 0


def test_label_kl_with_impossible_tokens():
    logits = torch.tensor([0.0, 1.0, -math.inf], requires_grad=True)
    p, pi = logits.log_softmax(-1), torch.tensor([0.0, 0.0, -math.inf]).log_softmax(-1)
    kl = label_kl(p, pi)
    kl.backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - pi.exp())
    assert label_kl(torch.tensor([0.0, -math.inf]), torch.tensor([0.5, 0.5]).log()) == math.inf


def test_the_kl_of_two_heads_is_that_of_their_log_probabilities():
    """Of policies of other sizes, with heads of their own; no gradient to the label."""
    hidden, weight, bias = (torch.randn(*s, dtype=WIDE) for s in ((2, 5, 4), (11, 4), (11,)))
    label_hidden, label_weight = torch.randn(2, 5, 6, dtype=WIDE), torch.randn(11, 6, dtype=WIDE)
    everything = [hidden, weight, label_hidden, label_weight, bias]
    for x in everything:
        x.requires_grad_()
    logits = 3 * torch.tanh((label_hidden @ label_weight.T + bias) / 3) / 0.7
    p, pi = ((hidden @ weight.T) / 0.7).log_softmax(-1), logits.log_softmax(-1)
    expected = label_kl(p, pi)
    options = dict(temperature=0.7, other_bias=bias, other_softcap=3.0)
    found = linear_label_kl(*everything[:4], **options)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found.square().sum(), everything, allow_unused=True)
    assert gradients[2:] == (None, None, None)
    wanted = torch.autograd.grad(expected.square().sum(), (hidden, weight))
    for one, other in zip(gradients, wanted):
        torch.testing.assert_close(one, other)


def test_topk_is_the_kl_of_the_merged_distribution():
    p, pi = (torch.randn(4, 9, dtype=WIDE).log_softmax(-1) for _ in range(2))
    top = pi.topk(3).indices
    found = topk_label_kl(p.gather(-1, top), pi.gather(-1, top))

    def merge(x):
        listed = x.gather(-1, top)
        return torch.cat([listed, (1 - listed.exp().sum(-1, keepdim=True)).log()], -1)

    torch.testing.assert_close(found, label_kl(merge(p), merge(pi)))
    assert (found <= label_kl(p, pi)).all() and (found >= 0).all()
    every = torch.arange(9).expand(4, 9)
    torch.testing.assert_close(
        topk_label_kl(p.gather(-1, every), pi.gather(-1, every)), label_kl(p, pi)
    )


@pytest.mark.parametrize("pi", [[0.0, -math.inf], [math.log(0.5), math.log(0.5)]])
@pytest.mark.parametrize("p", [[0.0, -200.0], [math.log(0.5), math.log(0.5)]])
def test_topk_is_finite_where_nothing_is_left(p, pi):
    logprob = torch.tensor(p, requires_grad=True)
    kl = topk_label_kl(logprob, torch.tensor(pi))
    kl.backward()
    assert kl.isfinite() and logprob.grad.isfinite().all()


def test_label_gradients():
    logits = torch.randn(2, 6, dtype=WIDE, requires_grad=True)
    pi = torch.randn(2, 6, dtype=WIDE).log_softmax(-1)
    index = pi.topk(3).indices
    assert torch.autograd.gradcheck(lambda x: label_kl(x.log_softmax(-1), pi), logits)
    assert torch.autograd.gradcheck(
        lambda x: topk_label_kl(logprob_at(x, index), pi.gather(-1, index)), logits
    )
    label_kl(logits.log_softmax(-1), pi).sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - pi.exp())


def test_logprob_at():
    logits, index = torch.randn(2, 3, 7), torch.randint(7, (2, 3, 4))
    expected = (logits / 0.7).log_softmax(-1).gather(-1, index)
    torch.testing.assert_close(logprob_at(logits, index, temperature=0.7), expected)


def test_masked_nan_and_empty_segments():
    logprobs, masks, labels = pair()
    masks[0][1], masks[1][2] = False, False
    clean = ppl_loss(*logprobs, *masks, **labels, gamma=0.9)
    bad = [poison(x, m) for x, m in zip(logprobs, masks)]
    kls = {name: poison(kl, m) for (name, kl), m in zip(labels.items(), masks)}
    loss, metrics = ppl_loss(*bad, *masks, **kls, gamma=0.9)
    assert torch.equal(loss, clean.loss) and metrics == clean.metrics and loss.isfinite().all()
    loss.sum().backward()
    assert all(x.grad.isfinite().all() for x in bad)
    assert token_regret(torch.ones(2, 0), None, torch.ones(2, 0), gamma=1.0).shape == (2, 0)
    nothing = torch.ones(0, 3)
    loss, metrics = ppl_loss(nothing, nothing, nothing, nothing, gamma=1.0)
    assert loss.shape == (0,) and metrics["accuracy"] == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: ppl_loss(x, x, x, x, gamma=1.0, chosen_kl=x), ValueError, "only chosen_kl"),
        (lambda x: ppl_loss(x, x, x, x, gamma=1.5), ValueError, r"gamma must be in \(0, 1\]"),
        (lambda x: ppl_loss(x, x[:1], x, x[:1], gamma=1), ValueError, "rejected_logprob"),
        (lambda x: segment_regret(x, None, x, gamma=1, alpha=0), ValueError, "alpha must be"),
        (lambda x: segment_regret(x, x[:1], x, gamma=1), ValueError, "kl must have shape"),
        (lambda x: token_regret(x, None, x[:1], gamma=1), ValueError, "mask must have shape"),
        (lambda x: label_kl(x, x[:1]), ValueError, "label_logprob must have shape"),
        (
            lambda x: linear_label_kl(x, x, x, x[:1]),
            ValueError,
            "other_weight must have the 2 rows",
        ),
        (lambda x: pseudo_label_kl([1.0]), TypeError, "logprob must be a tensor, got list"),
        (lambda x: logprob_at(x, x), ValueError, r"index must be int64 of shape \(2, k\)"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(2, 3))
