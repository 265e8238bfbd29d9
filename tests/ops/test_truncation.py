"""Statistics of what a sampler left: textbook formulas in float64, and two libraries' own code."""

import itertools
import math

import pytest
import torch
from helpers import FAST_IMPLS, IMPLS, error, make_linear, random_logits

from em_kernels import (
    entropy_loss,
    linear_entropy_loss,
    linear_softmax_stats,
    linear_token_covariance,
    linear_token_loss,
    softmax_stats,
    token_loss,
)
from em_kernels.backends import support
from em_kernels.backends.interface import OUTPUTS

N, V = 9, 301
OUT = ("logprob", "entropy", "lse", "varentropy", "max_prob", "logit_mean", "kept_mass", "is_kept")
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
each_impl = pytest.mark.parametrize("impl", IMPLS)
fast_impl = pytest.mark.parametrize("impl", FAST_IMPLS)


def is_kept(z, top_k=None, top_p=None, min_p=None, sampler="transformers"):
    """Entry by entry, in float64, as the libraries' documentation has it; no ties at a border."""
    kept = torch.zeros(z.shape, dtype=torch.bool)
    for row, keep in zip(z.double(), kept):
        p = row.softmax(0)

        likely = torch.ones_like(keep) if min_p is None else p >= min_p * p.max()
        left = likely if sampler == "vllm" else torch.ones_like(keep)
        if top_k is not None and top_k < int(left.sum()):
            left = left & (row >= row[left].sort().values[-top_k])
        if top_p is not None:
            order = torch.where(left, p, 0).argsort(descending=True)
            share, total = 0.0, p[left].sum()
            for place in order.tolist():
                if left[place] and (share < top_p * total or share == 0):
                    keep[place] = True
                    share += p[place]
            left = keep.clone()
        keep[:] = left & likely
    return kept


def truth(x, target, kept, **transform):
    """Everything from the kept entries alone, differentiable."""
    z = x.double() / transform.get("temperature", 1.0)
    log_p = z.masked_fill(~kept, -math.inf).log_softmax(-1)
    p, safe = log_p.exp(), log_p.masked_fill(~kept, 0)
    entropy = -(p * safe).sum(-1)
    inside = kept.gather(-1, target[..., None])[..., 0]
    logprob = safe.gather(-1, target[..., None])[..., 0]
    count = kept.sum(-1)
    return {
        "logprob": torch.where(inside, logprob, -math.inf),
        "entropy": entropy,
        "lse": torch.where(kept, z, -math.inf).logsumexp(-1),
        "varentropy": (p * (safe + entropy[..., None]) ** 2).sum(-1),
        "max_prob": p.amax(-1),
        "logit_mean": torch.where(kept, z, 0).sum(-1) / count,
        "kept_mass": torch.where(kept, z.softmax(-1), 0).sum(-1),
        "is_kept": inside,
    }


def check(stats, want):
    for name, value in want.items():
        got = getattr(stats, name)
        if name == "is_kept":
            assert torch.equal(got.cpu(), value)
            continue
        assert torch.equal(got.isinf().cpu(), value.isinf()), name
        got, value = got[~got.isinf()], value[~value.isinf()]
        torch.testing.assert_close(got.double().cpu(), value, rtol=3e-6, atol=3e-6, msg=name)


def upstream_sum(values, weights):
    """sum of weights x differentiable outputs, logprob where it is finite."""
    logprob = torch.where(values["is_kept"], values["logprob"], 0)
    a, b, c = weights.unbind(0)
    return (a * logprob + b * values["entropy"] + c * values["lse"]).sum()


def targets(z, kept):
    """Of the first rows kept ones, then any."""
    last = kept.double().mul(torch.arange(z.shape[-1])).argmax(-1)
    return torch.where(torch.arange(len(z)) < 5, last, torch.randint(0, z.shape[-1], (len(z),)))


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


# What it goes together with


@fast_impl
def test_limits_of_each_token(impl, device):
    x = random_logits(3, 2, V, device=device)
    top_k = torch.tensor([[1, 5], [300, 10**6], [9, 2]], device=device)
    top_p = torch.tensor([[1.0, 0.5], [0.9, 0.3], [0.99, 1.0]], device=device)
    got = softmax_stats(x, outputs=("entropy", "kept_mass"), top_k=top_k, top_p=top_p, impl=impl)
    for i in range(3):
        for j in range(2):
            limits = dict(top_k=int(top_k[i, j]), top_p=float(top_p[i, j]))
            one = softmax_stats(x[i, j], outputs=("entropy", "kept_mass"), impl=impl, **limits)
            assert got.entropy[i, j] == one.entropy and got.kept_mass[i, j] == one.kept_mass


@fast_impl
def test_transforms_masks_and_a_padded_vocabulary(impl, device):
    x = random_logits(N, V, device=device)
    x[:, -11:] = math.nan
    x[2] = math.nan
    mask = torch.arange(N, device=device) != 2
    transform = dict(softcap=5.0, logit_scale=-1.3, temperature=torch.rand(N, device=device) + 0.5)
    options = dict(valid_vocab=V - 11, mask=mask, outputs=OUT, impl=impl)
    target = torch.randint(0, V - 11, (N,), device=device)
    got = softmax_stats(x, target, top_k=17, **transform, **options)
    z = 5 * torch.tanh(-1.3 * x[:, :-11].double() / 5) / transform["temperature"].double()[:, None]
    kept = is_kept(z.nan_to_num().cpu(), top_k=17)
    want = truth(z.nan_to_num().cpu(), target.cpu(), kept)
    rows = mask.cpu()
    picked = type(got)(*(v if v is None else v[mask] for v in got))
    check(picked, {name: value[rows] for name, value in want.items()})
    assert all(getattr(got, name)[2] == 0 for name in OUT)


@fast_impl
def test_rows_that_cannot_be_computed_and_no_rows(impl, device):
    x = random_logits(4, V, device=device)
    x[0, 3], x[1, 5], x[2] = math.nan, math.inf, -math.inf
    got = softmax_stats(x, outputs=("entropy", "kept_mass"), top_p=0.9, impl=impl)
    for row in (got.entropy, got.kept_mass):
        assert row.isnan().tolist() == [True, True, True, False]
    empty = softmax_stats(x[:0].requires_grad_(), outputs=("entropy",), top_k=3, impl=impl)
    empty.entropy.sum().backward()


@fast_impl
def test_without_limits_the_bits_are_those_of_before(impl, device):
    x = random_logits(N, V, device=device)
    target = torch.randint(0, V, (N,), device=device)
    plain = softmax_stats(x, target, outputs=OUT[:5], impl=impl)
    with_kept = softmax_stats(x, target, outputs=OUT, impl=impl)
    none = softmax_stats(x, target, outputs=OUT, top_k=V, top_p=1.0, min_p=0.0, impl=impl)
    for name in OUT[:5]:
        assert torch.equal(getattr(plain, name), getattr(with_kept, name))
        assert torch.equal(getattr(plain, name), getattr(none, name))
    assert with_kept.is_kept.all() and (with_kept.kept_mass == 1).all()
    assert (none.kept_mass == 1).all()


def test_losses_of_entropy_take_the_limits():
    hidden, weight = make_linear(N, vocab=V)
    logits = hidden @ weight.T
    want = softmax_stats(logits, outputs=("entropy",), top_p=0.6).entropy.mean()
    torch.testing.assert_close(entropy_loss(logits, top_p=0.6), want)
    torch.testing.assert_close(linear_entropy_loss(hidden, weight, top_p=0.6), want)


def test_covariance_leaves_out_what_has_no_logprob():
    hidden, weight = make_linear(N, vocab=V)
    kept = is_kept((hidden @ weight.T).detach(), top_k=4)
    target, advantage = targets(hidden @ weight.T, kept), torch.randn(N)
    inside = kept.gather(-1, target[:, None])[:, 0]
    got = linear_token_covariance(hidden, weight, target, advantage, top_k=4)
    want = linear_token_covariance(
        hidden[inside], weight, target[inside], advantage[inside], top_k=4
    )
    assert (got[~inside] == 0).all()
    torch.testing.assert_close(got[inside], want)


@pytest.mark.parametrize("linear", (False, True))
def test_compiled_without_a_break(linear):
    hidden, weight = make_linear(N, vocab=V)
    target = torch.randint(0, V, (N,))
    kept = (torch.arange(2 * N) % V, torch.arange(0, 2 * N + 1, 2))

    def step(hidden, weight, top_p, **options):
        args = (hidden, weight) if linear else (hidden @ weight.T,)
        function = linear_softmax_stats if linear else softmax_stats
        stats = function(*args, target, outputs=OUT, top_p=top_p, **options)
        return stats.entropy.sum() + torch.where(stats.is_kept, stats.logprob, 0).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for options in (dict(top_k=20), dict(top_k=20), dict(min_p=torch.rand(N))):
        for top_p in (0.9, 0.7, 0.5):
            got, want = (
                compiled(hidden, weight, top_p, **options),
                step(hidden, weight, top_p, **options),
            )
            torch.testing.assert_close(got, want)
            for a, b in zip(
                torch.autograd.grad(got, (hidden, weight)),
                torch.autograd.grad(want, (hidden, weight)),
            ):
                assert error(a, b) < 1e-5
    torch.testing.assert_close(
        compiled(hidden, weight, None, kept=kept), step(hidden, weight, None, kept=kept)
    )


@fast_impl
def test_the_logits_of_the_caller_are_as_they_were(impl, device, monkeypatch):
    monkeypatch.setitem(support.PIECE_BYTES, "cpu", 4 * V * 2)  # two rows at a time
    x = random_logits(3, 4, V, device=device).requires_grad_()
    before, view = x.detach().clone(), x[:, 1:]
    got = softmax_stats(view, outputs=("entropy",), top_k=5, impl=impl).entropy
    token_loss(view, entropy_weight=torch.ones(3, 3, device=device), top_k=5, impl=impl)
    got.sum().backward()
    assert torch.equal(x.detach(), before)
    rows = torch.stack(
        [softmax_stats(row, outputs=("entropy",), top_k=5, impl=impl).entropy for row in view[:, 1]]
    )
    assert torch.equal(got[:, 1], rows)


# Refused


KEPT = (torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 4]))
REFUSED = (
    (dict(top_k=0), ValueError, "top_k must be from 1 on.*got 0"),
    (dict(top_k=-1), ValueError, "top_k must be"),
    (dict(top_k=2.0), TypeError, "top_k must be an int"),
    (dict(top_k=True), TypeError, "top_k must be an int"),
    (dict(top_k=torch.tensor([1, 0, 2])), ValueError, "top_k must be from 1 on, got 0 at token 1"),
    (dict(top_k=torch.ones(3)), TypeError, "top_k must have an integer dtype"),
    (dict(top_k=torch.ones(2, dtype=torch.int64)), ValueError, "top_k must have the leading shape"),
    (dict(top_k=torch.ones(3, dtype=torch.cfloat)), TypeError, "top_k must have an integer dtype"),
    (dict(top_p=0.0), ValueError, "top_p must be in"),
    (dict(top_p=1.5), ValueError, "top_p must be in"),
    (dict(top_p=math.nan), ValueError, "top_p must be in"),
    (dict(top_p="0.5"), TypeError, "top_p must be a number"),
    (
        dict(top_p=torch.tensor([0.5, math.nan, 1.0])),
        ValueError,
        "top_p must .* got nan at token 1",
    ),
    (dict(top_p=torch.tensor([1, 1, 1])), TypeError, "top_p must have floating point"),
    (
        dict(top_p=torch.full((3,), 0.5, requires_grad=True)),
        ValueError,
        "top_p must not require grad",
    ),
    (dict(min_p=-0.1), ValueError, "min_p must be in"),
    (dict(min_p=1.1), ValueError, "min_p must be in"),
    (dict(sampler="sglang"), ValueError, "sampler must be one of"),
    (dict(kept=KEPT, top_p=0.5), ValueError, "kept .* leave out top_p"),
    (dict(kept=KEPT[0]), TypeError, r"kept must be \(ids, offsets\)"),
    (dict(kept=(KEPT[0].int(), KEPT[1])), TypeError, "kept: ids must be int64"),
    (dict(kept=(KEPT[0], KEPT[1].float())), TypeError, "kept: offsets must be int64"),
    (dict(kept=(KEPT[0], KEPT[1][:3])), ValueError, "kept: offsets must be one more than the 3"),
    (dict(kept=(KEPT[0], torch.tensor([0, 2, 1, 4]))), ValueError, "kept: .*not ascending"),
    (dict(kept=(KEPT[0], torch.tensor([0, 1, 2, 3]))), ValueError, "kept: offsets must ascend"),
    (dict(kept=(KEPT[0], torch.tensor([1, 2, 3, 4]))), ValueError, "kept: offsets must ascend"),
    (dict(kept=(KEPT[0], torch.tensor([0, 2, 2, 4]))), ValueError, "kept: .* none at token 1"),
    (dict(kept=(torch.tensor([0, 1, 2, 5]), KEPT[1])), ValueError, "kept: .*got 5 at token 2"),
    (dict(kept=(torch.tensor([-1, 1, 2, 3]), KEPT[1])), ValueError, "kept: .*got -1 at token 0"),
    (
        dict(kept=(torch.tensor([0, 1, 3, 3]), KEPT[1])),
        ValueError,
        "kept: .*got 3 again at token 2",
    ),
)


@pytest.mark.parametrize("options, kind, message", REFUSED, ids=lambda v: str(v)[:40])
def test_what_cannot_be_is_refused_by_name(options, kind, message):
    hidden, weight = torch.zeros(3, 2), torch.zeros(5, 2)
    for call in (softmax_stats, lambda x, **o: linear_softmax_stats(hidden, weight, **o)):
        with pytest.raises(kind, match=message):
            call(torch.zeros(3, 5), outputs=("entropy",), **options)


@pytest.mark.skipif("triton" not in IMPLS, reason="needs Triton")
@pytest.mark.parametrize("options", (dict(top_k=3), dict(kept=KEPT), dict(outputs=("kept_mass",))))
def test_the_fused_product_refuses(options):
    hidden, weight = torch.zeros(3, 2), torch.zeros(5, 2)
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be .*fuse_product"):
        linear_softmax_stats(hidden, weight, fuse_product=True, **options)


def test_any_number_from_v_on_keeps_all():
    x = random_logits(N, V)
    for top_k in (V, 1 << 63, 1 << 80):
        assert (softmax_stats(x, outputs=("kept_mass",), top_k=top_k).kept_mass == 1).all()


def test_every_output_is_there_with_limits():
    x, target = random_logits(N, V), torch.randint(0, V, (N,))
    stats = softmax_stats(x, target, outputs=OUTPUTS, top_k=4)
    assert all(value is not None for value in stats)
