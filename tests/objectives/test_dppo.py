"""DPPO: divergences of whole distributions cut to classes, what is dropped, what is refused."""

import math

import pytest
import torch
from objectives_inputs import poison

from em_kernels import divergence, linear_softmax_stats, linear_top_logprobs
from em_kernels.objectives import dppo_loss
from em_kernels.objectives.dppo import DIVERGENCES, THRESHOLDS

B, T, V, K = 3, 6, 9, 4


def distributions(seed=0, shift=0.6):
    """(log p, log mu) (B, T, V), the sampled ids, the advantage (B, T), a mask; in float64."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, V, generator=g, dtype=torch.float64) * 1.5
    moved = logits + shift * torch.randn(B, T, V, generator=g, dtype=torch.float64)
    ids = torch.randint(V, (B, T), generator=g)
    advantage = torch.randn(B, T, generator=g, dtype=torch.float64)
    mask = torch.rand(B, T, generator=g) > 0.2
    return moved.log_softmax(-1).requires_grad_(), logits.log_softmax(-1), ids, advantage, mask


def at(logp, ids):
    return logp.gather(-1, ids[..., None])[..., 0]


def classes(logp, ids):
    """Probabilities of the listed ids and of all others."""
    listed = logp.exp().gather(-1, ids)
    others = torch.ones_like(logp).scatter(-1, ids, 0) * logp.exp()
    return torch.cat([listed, others.sum(-1, keepdim=True)], -1)


def expected_divergence(kind, p, mu, ids, sampled):
    """Of classes put together from all the probabilities."""
    if kind.startswith("binary"):
        ids = sampled[..., None]
    else:
        missing = ~(ids == sampled[..., None]).any(-1)
        ids = ids.clone()
        ids[..., -1] = torch.where(missing, sampled, ids[..., -1])
    mu, p = classes(mu, ids), classes(p, ids)
    if kind.endswith("tv"):
        return (mu - p).abs().sum(-1) / 2
    return (mu * (mu / p).log()).sum(-1)


def arguments(kind, p, mu, sampled):
    if kind.startswith("binary"):
        return {}
    old, ids = mu.topk(K)
    return dict(
        topk_logprob=p.gather(-1, ids), old_topk_logprob=old, topk_ids=ids, token_ids=sampled
    )


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_loss_and_gradient_are_those_of_the_formula(kind):
    p, mu, ids, a, mask = distributions()
    d = expected_divergence(kind, p.detach(), mu, mu.topk(K).indices, ids)
    if kind.startswith("binary") and kind.endswith("tv"):
        assert torch.allclose(d, (at(p, ids).exp() - at(mu, ids).exp()).abs())
    low, high = d.quantile(0.4).item(), d.quantile(0.6).item()
    logprob, old = at(p, ids), at(mu, ids)
    outside = torch.where(a > 0, (logprob > old) & (d > high), (logprob < old) & (d > low))
    rho = (logprob - old).exp().detach()
    expected = torch.where(outside | ~mask, 0, -rho.clamp(max=1.5) * a * logprob)
    options = dict(delta_low=low, delta_high=high, max_ratio=1.5, divergence=kind)
    found = dppo_loss(logprob, old, a, mask, **options, **arguments(kind, p, mu, ids))
    torch.testing.assert_close(found.loss, expected)
    ours, theirs = (
        torch.autograd.grad(x.sum(), p, retain_graph=True)[0] for x in (found.loss, expected)
    )
    torch.testing.assert_close(ours, theirs)
    assert 0 < found.metrics["clip_fraction"] == outside[mask].double().mean()
    torch.testing.assert_close(found.metrics["divergence"], d[mask].mean())


def test_classes_put_together_are_never_further_apart_than_the_vocabulary():
    """And as far where all ids are listed."""
    p, mu, ids, a, mask = distributions(1)
    whole = {
        "kl": divergence(mu.float(), p.detach().float(), kind="reverse_kl").double(),
        "tv": (p.detach().exp() - mu.exp()).abs().sum(-1) / 2,
    }
    logprob, old = at(p, ids), at(mu, ids)
    for kind in DIVERGENCES:
        found = {}
        for k in (1, K, V):
            top, listed = mu.topk(k)
            options = dict(
                topk_logprob=p.gather(-1, listed),
                old_topk_logprob=top,
                topk_ids=listed,
                token_ids=ids,
            )
            options = {} if kind.startswith("binary") else options
            loss = dppo_loss(logprob, old, a, mask, divergence=kind, **options)
            found[k] = loss.metrics["divergence"].item()
        most = whole[kind[-2:]][mask].mean().item()
        assert all(0 < value <= most * (1 + 1e-5) for value in found.values())
        assert kind.startswith("binary") or found[V] == pytest.approx(most, rel=1e-4)


def test_the_sampled_token_takes_the_place_of_the_last_where_it_is_not_listed():
    """As K = 1 then is the binary form."""
    p, mu, ids, a, mask = distributions(2)
    logprob, old = at(p, ids), at(mu, ids)
    for end in ("tv", "kl"):
        top, listed = mu.topk(1)
        options = dict(topk_logprob=p.gather(-1, listed), old_topk_logprob=top)
        known = dict(topk_ids=listed, token_ids=ids)
        kinds = dict(divergence=f"topk_{end}")
        with_ids = dppo_loss(logprob, old, a, mask, **kinds, **options, **known)
        without = dppo_loss(logprob, old, a, mask, **kinds, **options)
        binary = dppo_loss(logprob, old, a, mask, divergence=f"binary_{end}")
        torch.testing.assert_close(with_ids, binary)
        assert not torch.equal(without.metrics["divergence"], binary.metrics["divergence"])


def test_the_operators_of_k_ids_serve_it():
    """From hidden states and heads, without logits, through to the gradient of the weights."""
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(B, T, 5, generator=g), torch.randn(V, 5, generator=g)
    new = (weight + 0.1 * torch.randn(V, 5, generator=g)).requires_grad_()
    p, mu = (hidden @ new.T).log_softmax(-1), (hidden @ weight.T).log_softmax(-1)
    _, _, sampled, a, mask = distributions(3)
    stored = linear_top_logprobs(hidden, weight, K)
    target = torch.cat([sampled[..., None], stored.ids], -1)
    found = linear_softmax_stats(hidden, new, target, outputs=("logprob",)).logprob
    options = dict(divergence="topk_tv", delta_low=0.02, delta_high=0.02, token_ids=sampled)
    ours = dppo_loss(
        found[..., 0],
        at(mu, sampled),
        a.float(),
        mask,
        topk_logprob=found[..., 1:],
        old_topk_logprob=stored.logprob,
        topk_ids=stored.ids,
        **options,
    )
    old, ids = mu.topk(K)
    lists = dict(topk_logprob=p.gather(-1, ids), old_topk_logprob=old, topk_ids=ids)
    plain = dppo_loss(at(p, sampled), at(mu, sampled), a.float(), mask, **lists, **options)
    assert 0 < plain.metrics["clip_fraction"] < 1
    torch.testing.assert_close(ours.loss, plain.loss, rtol=1e-4, atol=1e-5)
    ours, plain = (torch.autograd.grad(x.loss.sum(), new)[0] for x in (ours, plain))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_neither_value_nor_gradient_crosses_the_mask(kind):
    p, mu, ids, a, mask = distributions()
    lists = arguments(kind, p.detach(), mu, ids)
    bad = {
        name: torch.where(
            mask.view(B, T, *[1] * (x.dim() - 2)), x, -1 if "id" in name else math.nan
        )
        for name, x in lists.items()
    }
    logprob, old = at(p, ids).detach().requires_grad_(), at(mu, ids)
    expected = dppo_loss(logprob, old, a, mask, divergence=kind, **lists)
    inputs = (poison(logprob, mask), poison(old, mask), poison(a, mask))
    found = dppo_loss(*inputs, mask, divergence=kind, **bad)
    torch.testing.assert_close(found, expected)
    found.loss.sum().backward()
    assert (inputs[0].grad[~mask] == 0).all() and inputs[0].grad.isfinite().all()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_certain_tokens_have_finite_divergences(kind):
    """From nothing to everything and back, p = 1 to the last bit, in float32."""
    old = torch.tensor([[-1e-9, 0.0, -60.0, -1e-9, 0.0]])
    logprob = torch.tensor([[-1e-9, 0.0, -1e-9, -60.0, -1.0]])
    lists = {}
    if kind.startswith("topk"):
        lists = dict(topk_logprob=logprob[..., None], old_topk_logprob=old[..., None])
    a, ones = torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0]]), torch.ones(1, 5)
    found = dppo_loss(logprob, old, a, ones, divergence=kind, **lists)
    assert found.loss.isfinite().all() and found.metrics["divergence"].isfinite()
    assert (found.loss[0, 2:] == 0).all() and found.metrics[
        "clip_fraction"
    ].item() == pytest.approx(0.6)


def test_thresholds_are_the_forms_own_unless_given():
    old = torch.tensor([[math.log(0.5)]])
    one = (torch.ones(1), torch.ones(1, 1))
    for moved, share in ((0.9, 0), (1.1, 1)):
        logprob = (old.exp() + moved * THRESHOLDS["binary_tv"]).log()
        assert dppo_loss(logprob, old, *one).metrics["clip_fraction"] == share
    logprob = torch.tensor([[math.log(0.7)]])  # KL 0.087, total variation 0.2
    kl = dppo_loss(logprob, old, *one, divergence="binary_kl")
    assert kl.metrics["clip_fraction"] == 1
    assert kl.metrics["divergence"].item() == pytest.approx(
        0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)
    )
    for low, high, share in ((0.0, 0.1, 0), (0.1, 0.0, 1)):
        found = dppo_loss(
            logprob, old, *one, divergence="binary_kl", delta_low=low, delta_high=high
        )
        assert found.metrics["clip_fraction"] == share


X, LIST = torch.zeros(2, 3), torch.zeros(2, 3, 4)
TOP = dict(divergence="topk_tv", topk_logprob=LIST, old_topk_logprob=LIST)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(divergence="kl"), ValueError, "divergence must be one of .*, got 'kl'"),
        (dict(delta_low=-0.1), ValueError, "delta_low must be at least 0"),
        (dict(delta_high=math.nan), ValueError, "delta_high must be at least 0"),
        (dict(max_ratio=0), ValueError, "max_ratio must be positive"),
        (dict(divergence="topk_kl"), ValueError, "topk_logprob must be given for 'topk_kl'"),
        ({**TOP, "old_topk_logprob": None}, ValueError, "old_topk_logprob must be given for 'to"),
        (dict(topk_logprob=LIST), ValueError, "topk_logprob is for 'topk_tv' and 'topk_kl', got"),
        ({**TOP, "topk_logprob": X}, ValueError, r"topk_logprob must have shape \(2, 3, K\)"),
        ({**TOP, "old_topk_logprob": LIST[..., 1:]}, ValueError, "old_topk_logprob must have shap"),
        ({**TOP, "topk_logprob": LIST.long()}, TypeError, "topk_logprob must be floating point"),
        ({**TOP, "topk_ids": LIST.long()}, ValueError, "token_ids must be given, topk_ids and tok"),
        ({**TOP, "token_ids": X.long()}, ValueError, "topk_ids must be given"),
        (
            {**TOP, "topk_ids": LIST[..., 1:].long(), "token_ids": X.long()},
            ValueError,
            r"topk_ids must be integer ids of shape \(2, 3, 4\), got torch.int64 of shape",
        ),
        (
            {**TOP, "topk_ids": LIST.long(), "token_ids": X},
            ValueError,
            r"token_ids must be integer ids of shape \(2, 3\), got torch.float32",
        ),
    ],
)
def test_bad_input_names_the_argument(options, error, message):
    with pytest.raises(error, match=message):
        dppo_loss(X, X, X, torch.ones(2, 3), **options)
