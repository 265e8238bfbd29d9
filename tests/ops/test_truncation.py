"""Statistics of what a sampler left: textbook formulas in float64, and two libraries' own code."""

import itertools
import math

import pytest
import torch
from helpers import error, make_linear, random_logits
from truncated_rows import OUT, N, V, check, each_impl, fast_impl, is_kept, targets, truth

from em_kernels import linear_softmax_stats, linear_token_loss, softmax_stats, token_loss

LIMITS = (
    dict(top_k=7),
    dict(top_k=1),
    dict(top_k=10**6),
    dict(top_p=0.8),
    dict(top_p=1e-9),
    dict(min_p=0.05),
    dict(min_p=1.0),
    dict(top_k=20, top_p=0.7, min_p=0.1),
    dict(top_k=20, top_p=0.95, min_p=0.3, sampler="vllm"),
)
each_limits = pytest.mark.parametrize(
    "limits", LIMITS, ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items())
)


def upstream_sum(values, weights):
    """sum of weights x differentiable outputs, logprob where it is finite."""
    logprob = torch.where(values["is_kept"], values["logprob"], 0)
    a, b, c = weights.unbind(0)
    return (a * logprob + b * values["entropy"] + c * values["lse"]).sum()


@each_impl
@each_limits
def test_statistics_and_gradient_of_what_is_left(impl, limits, device):
    x = random_logits(N, V, device=device).requires_grad_()
    kept = is_kept(x.detach().cpu() / 0.8, **limits)
    target = targets(x, kept).to(device)
    stats = softmax_stats(x, target, temperature=0.8, outputs=OUT, impl=impl, **limits)
    exact = x.detach().cpu().double().requires_grad_()
    want = truth(exact, target.cpu(), kept, temperature=0.8)
    check(stats, {name: value.detach() for name, value in want.items()})
    weights = torch.randn(3, N, dtype=torch.float64)
    ours = upstream_sum(stats._asdict(), weights.float().to(device))
    (got,) = torch.autograd.grad(ours, x)
    (true,) = torch.autograd.grad(upstream_sum(want, weights), exact)
    assert error(got, true) < 3e-6
    assert (got.cpu()[~kept] == 0).all()


@each_impl
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_from_hidden_states_in_chunks_it_is_that_of_the_logits(impl, dtype, device):
    hidden, weight = make_linear(2, 6, vocab=V, dtype=dtype, device=device)
    target = torch.randint(0, V, (2, 6), device=device)
    limits = dict(top_k=30, top_p=0.9, temperature=1.3, impl=impl, outputs=("entropy", *OUT[5:]))
    with torch.no_grad():
        logits = hidden @ weight.T
    want = softmax_stats(logits, target, **limits)
    for chunk in (None, 5):
        got = linear_softmax_stats(
            hidden, weight, target, chunk_tokens=chunk, logits_dtype=dtype, **limits
        )
        if dtype == torch.float32:  # elsewhere a product of other shape may have other bits
            torch.testing.assert_close(got.entropy, want.entropy, rtol=2e-5, atol=2e-5)
            assert torch.equal(got.is_kept, want.is_kept)
        grads = torch.autograd.grad(got.entropy.sum(), (hidden, weight))
        assert all(g.isfinite().all() and (g != 0).any() for g in grads)


@fast_impl
@pytest.mark.parametrize("keep", (0, None, 10**9))
@pytest.mark.parametrize("frozen", (False, True))
def test_gradient_from_hidden_states(impl, keep, frozen, device):
    """Of all ways: logits kept or multiplied again, frozen heads, blocks of the vocabulary."""
    hidden, weight = make_linear(40, vocab=V, device=device)
    weight.requires_grad_(not frozen)
    target = torch.randint(0, V, (40,), device=device)
    inputs = (hidden,) if frozen else (hidden, weight)
    limits = dict(top_p=0.7, min_p=0.02, sampler="vllm")
    logits = hidden @ weight.T
    values = softmax_stats(logits, target, outputs=OUT, **limits)._asdict()
    weights = torch.randn(3, 40, device=device)
    want = torch.autograd.grad(upstream_sum(values, weights), inputs)
    made = linear_softmax_stats(
        hidden, weight, target, outputs=OUT, impl=impl, keep_logits=keep, chunk_tokens=16, **limits
    )
    got = torch.autograd.grad(upstream_sum(made._asdict(), weights), inputs, retain_graph=True)
    again = torch.autograd.grad(upstream_sum(made._asdict(), weights), inputs)
    for a, b, c in zip(got, want, again):
        assert error(a, b) < 2e-5 and torch.equal(a, c)


@fast_impl
@pytest.mark.parametrize("linear", (False, True))
def test_losses_leave_out_targets_that_were_left_out(impl, linear, device):
    hidden, weight = make_linear(N, vocab=V, device=device)
    logits = (hidden @ weight.T).detach().requires_grad_()
    kept = is_kept(logits.detach().cpu(), top_k=5)
    target = targets(logits, kept).to(device)
    of_entropy, of_logprob = torch.randn(2, N, device=device)
    options = dict(entropy_weight=of_entropy, logprob_weight=of_logprob, outputs=OUT)
    given = (hidden, weight) if linear else (logits,)
    function = linear_token_loss if linear else token_loss
    loss, stats = function(*given, target, top_k=5, impl=impl, **options)
    inside = kept.gather(-1, target.cpu()[:, None])[:, 0].to(device)
    assert torch.equal(stats.is_kept, inside) and (stats.logprob[~inside] == -math.inf).all()
    want = softmax_stats((given[0] @ weight.T) if linear else logits, target, outputs=OUT, top_k=5)
    total = (of_entropy * want.entropy).sum() + (of_logprob * want.logprob)[inside].sum()
    torch.testing.assert_close(loss, total.detach(), rtol=2e-5, atol=2e-5)
    for a, b in zip(torch.autograd.grad(loss, given), torch.autograd.grad(total, given)):
        assert error(a, b) < 2e-5


def sets_of(kept):
    return kept.nonzero()[:, 1].contiguous(), torch.nn.functional.pad(
        kept.sum(-1).cumsum(0), (1, 0)
    )


@each_impl
def test_kept_sets_by_ids(impl, device):
    x = random_logits(3, 3, V, device=device).requires_grad_()
    flat = x.detach().view(N, V)
    kept = torch.rand(N, V) < torch.rand(N, 1)
    kept[torch.arange(N), torch.arange(N)] = True
    kept[3], kept[4] = True, torch.arange(V) == 7
    ids, offsets = (part.to(device) for part in sets_of(kept))
    mixed = torch.cat([ids[a:b].flip(0) for a, b in itertools.pairwise(offsets)])
    target = targets(flat, kept).view(3, 3).to(device)
    stats = softmax_stats(x, target, outputs=OUT, kept=(mixed, offsets), impl=impl)
    exact = flat.cpu().double().requires_grad_()
    want = truth(exact, target.view(-1).cpu(), kept)
    check(
        type(stats)(*(v if v is None else v.view(-1) for v in stats)),
        {name: value.detach() for name, value in want.items()},
    )
    (got,) = torch.autograd.grad(stats.entropy.sum(), x)
    (true,) = torch.autograd.grad(want["entropy"].sum(), exact)
    assert error(got.view(N, V), true) < 3e-6


@fast_impl
def test_a_kept_set_is_what_its_limits_kept(impl, device):
    """From hidden states, in chunks, some rows masked and their sets empty."""
    hidden, weight = make_linear(N, vocab=V, device=device)
    mask = torch.arange(N, device=device) % 4 != 1
    target = torch.randint(0, V, (N,), device=device)
    kept = is_kept((hidden @ weight.T).detach().cpu(), top_k=12) & mask.cpu()[:, None]
    ids, offsets = (part.to(device) for part in sets_of(kept))
    options = dict(outputs=OUT, mask=mask, impl=impl, chunk_tokens=4)
    ours = linear_softmax_stats(hidden, weight, target, kept=(ids, offsets), **options)
    want = linear_softmax_stats(hidden, weight, target, top_k=12, **options)
    for name in OUT:
        assert torch.equal(getattr(ours, name), getattr(want, name)), name
        assert not getattr(ours, name)[~mask].any()
    for a, b in zip(
        torch.autograd.grad(ours.entropy.sum(), (hidden, weight)),
        torch.autograd.grad(want.entropy.sum(), (hidden, weight)),
    ):
        assert torch.equal(a, b)


# The libraries' own code


def of_transformers(scores, top_k=None, top_p=None, min_p=None):
    processors = pytest.importorskip("transformers.generation.logits_process")
    warpers = [] if top_k is None else [processors.TopKLogitsWarper(top_k)]
    warpers += [] if top_p is None else [processors.TopPLogitsWarper(top_p)]
    warpers += [] if min_p is None else [processors.MinPLogitsWarper(min_p)]
    for warper in warpers:
        scores = warper(None, scores)
    return scores


def of_vllm(scores, top_k=None, top_p=None, min_p=None):
    sampler = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler")
    scores = scores.clone()
    if min_p is not None:  # MinPLogitsProcessor.apply
        p = scores.softmax(-1)
        scores[p < min_p * p.amax(-1, keepdim=True)] = -math.inf
    rows = len(scores)
    k = None if top_k is None else torch.full((rows,), top_k)
    p = None if top_p is None else torch.full((rows,), top_p)
    return sampler.apply_top_k_top_p_pytorch(scores, k, p)


SETS = [
    dict(top_k=k, top_p=p, min_p=m)
    for k in (None, 1, 5, 40)
    for p in (None, 0.3, 0.95)
    for m in (None, 0.02, 0.5)
    if (k, p, m) != (None, None, None)
]


@pytest.mark.parametrize("library", (of_transformers, of_vllm), ids=("transformers", "vllm"))
@fast_impl
def test_the_sets_are_those_of_the_libraries(library, impl, device):
    """Rows without ties, with many (of bfloat16 logits), and of probabilities that add up to p.

    Which of those that tie at the end of top_p are kept is left open by a sort that is not stable.
    vLLM rounds p to float32, which is more than 0.8: where 32 of 40 add up to that, it keeps 33.
    """
    exact = [dict(top_k=None, top_p=0.8, min_p=None)] if library is of_transformers else []
    many = random_logits(6, 97).bfloat16().float()
    known = torch.tensor([[0.3, 0.1, 0.1, 0.5], [0.15, 0.3, 0.3, 0.25]]).log()
    flat = torch.zeros(2, 40)
    for scores in (random_logits(12, 97), many, known, flat):
        for limits in [*SETS, *exact]:
            limits = {**limits, "top_k": min(limits["top_k"] or 10**6, scores.shape[-1])}
            want = library(scores, **limits)
            x = scores.to(device, copy=True).requires_grad_()
            name = "transformers" if library is of_transformers else "vllm"
            lse = softmax_stats(x, outputs=("lse",), sampler=name, impl=impl, **limits).lse
            (p,) = torch.autograd.grad(lse.sum(), x)
            got = torch.where(p.cpu() > 0, scores, -math.inf)
            assert torch.equal(got.sort().values, want.sort().values), limits
            if scores.unique().numel() == scores.numel():
                assert torch.equal(got, want), limits


# Derivatives


@fast_impl
def test_gradcheck_of_the_truncated_entropy(impl, device):
    x = random_logits(4, 23, dtype=torch.float64, device=device).requires_grad_()
    kept = is_kept(x.detach().cpu(), top_k=9, top_p=0.9)
    target = targets(x, kept).to(device)

    def values(x):
        stats = softmax_stats(
            x, target, outputs=OUT, top_k=9, top_p=0.9, softcap=9.0, temperature=0.7, impl=impl
        )
        return stats.entropy, torch.where(stats.is_kept, stats.logprob, 0), stats.lse

    assert torch.autograd.gradcheck(values, x)
    assert torch.autograd.gradgradcheck(values, x)


@fast_impl
def test_second_derivatives_of_losses(impl, device):
    hidden, weight = make_linear(4, dim=5, vocab=23, dtype=torch.float64, device=device)
    target = torch.randint(0, 23, (4,), device=device)
    one = torch.ones(4, dtype=torch.float64, device=device)

    def value(hidden, weight):
        limits = dict(top_k=6, impl=impl, outputs=())
        return linear_token_loss(
            hidden, weight, target, entropy_weight=one, logprob_weight=one, **limits
        ).loss

    assert torch.autograd.gradcheck(value, (hidden, weight))
    assert torch.autograd.gradgradcheck(value, (hidden, weight))
