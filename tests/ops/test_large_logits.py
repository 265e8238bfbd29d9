"""Finite logits of any size: their softmax is plain, though z = logit_scale x / T is no float."""

import math

import pytest
import torch
from helpers import FAST_IMPLS, IMPLS, error, gradient, truth
from torch import Tensor

import em_kernels
from em_kernels.backends.interface import OUTPUTS

INF, V = math.inf, 7
EACH_IMPL = pytest.mark.parametrize("impl", IMPLS)
FAST = pytest.mark.parametrize("impl", FAST_IMPLS)
HOT = {
    "temperature": dict(temperature=0.5),
    "no power of two": dict(temperature=0.7),
    "temperature of rows": dict(temperature=torch.tensor([0.5, 0.7, 0.1, 0.9, 1.0])),
    "scale": dict(logit_scale=2.0),
    "negative scale": dict(logit_scale=-2.0),
    "both": dict(logit_scale=-3.0, temperature=0.7),
    "softcap": dict(softcap=5.0, temperature=0.3),
}
EACH_HOT = pytest.mark.parametrize("options", HOT.values(), ids=HOT)


def hot_rows(device, sign: float = 1.0) -> Tensor:
    """Rows whose best entries are two or more, or one alone; z of all is beyond float32."""
    x = torch.full((5, V), 3e38)
    x[1, 1:] = 1.0
    x[2, 2:5], x[2, 5:] = -3e38, 3e38 * (1 - 1e-6)
    x[3, :4] = torch.tensor([3e38, 3e38, 2e38, 1.5e38])
    x[4] = torch.linspace(-3, 3, V)
    return (sign * x).to(device)


def placed(options: dict, device) -> dict:
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}


def rounded(want: Tensor) -> Tensor:
    """As float32 has it: infinite where it has none."""
    return want.detach().to(torch.float32).double()


@EACH_IMPL
@EACH_HOT
def test_statistics_and_gradients(impl, device, options):
    sign = math.copysign(1.0, options.get("logit_scale", 1.0))
    x, options = hot_rows(device, sign).requires_grad_(), placed(options, device)
    target = torch.tensor([3, 0, 1, 2, 6], device=device)
    names = tuple(n for n in OUTPUTS if not n.startswith("logit_") and n != "is_kept")
    stats = em_kernels.softmax_stats(x, target, outputs=names, impl=impl, **options)
    wide = x.detach().double().requires_grad_()
    want = truth(wide, target, **options)
    for name in names:
        got, expected = getattr(stats, name).double().cpu(), rounded(want[name]).cpu()
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6, msg=f"{name}: {got}")
    upstream = {
        name: torch.linspace(0.5, 1.5, 5, device=device) for name in ("entropy", "logprob", "lse")
    }
    (got,) = gradient(stats._asdict(), upstream, x)
    # Where lse is 6e38 it has no digit left for a float64 gradient by the textbook.
    shift = 0 if "softcap" in options else sign * x.detach().double().mul(sign).amax(-1)[:, None]
    (expected,) = gradient(truth(wide - shift, target, **options), upstream, wide)
    assert error(got, expected) < 1e-5


@EACH_IMPL
@pytest.mark.parametrize("kind", ("spread", "outlier", "far from zero", "denormal"))
def test_moments(impl, device, kind):
    normal, tiny = torch.randn(3, 300), torch.finfo(torch.float32).tiny
    x = {
        "spread": normal * torch.tensor([[1e20], [8e37], [3e15]]),
        "outlier": normal.index_fill(1, torch.tensor([5]), 0),
        "far from zero": normal + torch.tensor([[1e6], [-1e4], [0.0]]),
        "denormal": normal * tiny / torch.tensor([[1e3], [1.0], [1e-3]]),
    }[kind]
    if kind == "outlier":
        x[:, 5] = torch.tensor([1e20, -3e38, 1e4])
    names = ("logit_mean", "logit_var", "logit_skew")
    stats = em_kernels.softmax_stats(
        x.to(device), temperature=0.7, logit_scale=-1.5, outputs=names, impl=impl
    )
    want = truth(x, temperature=0.7, logit_scale=-1.5)
    for name in names:
        got, expected = getattr(stats, name).cpu().double(), rounded(want[name])
        size = (1.5 / 0.7 * x.abs().amax(-1)).double() if name == "logit_mean" else 0 * expected
        finite = expected.isfinite()
        assert torch.equal(got[~finite], expected[~finite]), name
        excess = (got - expected).abs() - 1e-3 * torch.maximum(expected.abs(), size) - tiny
        assert (excess[finite] <= 0).all(), f"{name}: {got} for {expected}"


@EACH_IMPL
def test_losses(impl, device):
    x, one = hot_rows(device), torch.ones(5, device=device)
    target = torch.tensor([3, 0, 2, 2, 6], device=device)  # one of 6e38 / T below the largest
    wide, given = x.double().requires_grad_(), x.clone().requires_grad_()
    want = truth(wide, target, temperature=0.7)
    total = want["entropy"] - want["logprob"]
    weights = dict(entropy_weight=one, logprob_weight=-one)
    loss = em_kernels.token_loss(given, target, temperature=0.7, impl=impl, **weights).loss
    assert loss == INF and rounded(total)[2] == INF and loss.grad_fn is not None
    loss.backward()
    assert error(given.grad, torch.autograd.grad(total.sum(), wide)[0]) < 1e-5
    again = x.clone().requires_grad_()
    entropy = em_kernels.entropy_loss(again, temperature=0.7, impl=impl)
    assert error(entropy, want["entropy"].mean()) < 1e-5
    entropy.backward()
    want = truth(wide, target, temperature=0.7)
    expected = torch.autograd.grad(want["entropy"].mean(), wide)[0]
    assert error(again.grad, expected) < 1e-5


@EACH_IMPL
def test_from_hidden_states_whose_products_are_finite(impl, device):
    hidden = torch.tensor([[1e38], [-1e38], [1.5e38], [1e-3]], device=device).requires_grad_()
    weight = torch.tensor([[2.0], [2.0], [1.0], [-2.0], [0.5]], device=device).requires_grad_()
    target = torch.tensor([0, 3, 1, 4], device=device)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = truth(wide[0] @ wide[1].T, target, temperature=0.5)
    expected = torch.autograd.grad((want["entropy"] - want["logprob"]).sum(), wide)
    for chunk in (None, 2):
        options = dict(temperature=0.5, impl=impl, chunk_tokens=chunk)
        stats = em_kernels.linear_softmax_stats(hidden, weight, target, **options)
        for name in ("entropy", "logprob"):
            assert error(getattr(stats, name), want[name]) < 1e-5
        found = torch.autograd.grad((stats.entropy - stats.logprob).sum(), (hidden, weight))
        one = torch.ones(4, device=device)
        loss = em_kernels.linear_token_loss(
            hidden, weight, target, entropy_weight=one, logprob_weight=-one, **options
        ).loss
        assert error(loss, (want["entropy"] - want["logprob"]).sum()) < 1e-5
        for grads in (found, torch.autograd.grad(loss, (hidden, weight))):
            for got, want_grad in zip(grads, expected, strict=True):
                assert error(got, want_grad) < 1e-4


@FAST
def test_second_derivatives(impl, device):
    x, target = hot_rows(device)[:4], torch.tensor([3, 0, 1, 2], device=device)

    def twice(x, statistics):
        first = torch.autograd.grad(sum(row.sum() for row in statistics(x)), x, create_graph=True)
        weights = torch.linspace(-1, 1, x.numel(), device=x.device).view(x.shape)
        return torch.autograd.grad((first[0] * weights).sum(), x)[0]

    def ours(x):
        return em_kernels.softmax_stats(x, target, temperature=0.7, impl=impl)[:2]

    def textbook(x):
        want = truth(x, target, temperature=0.7)
        return want["entropy"], want["logprob"]

    got = twice(x.clone().requires_grad_(), ours)
    assert error(got, twice(x.double().requires_grad_(), textbook)) < 1e-5


@EACH_IMPL
@pytest.mark.parametrize("kind", ("forward_kl", "reverse_kl", "js"))
def test_divergences(impl, device, kind):
    x = hot_rows(device)[[0, 3, 1, 4]]
    y = torch.stack([-x[0], x[1].roll(1), x[2], x[3].flip(0)])
    y[1, 0] = x[1, 1]
    pairs = [x.double().requires_grad_(), y.double().requires_grad_()]
    p, q = (torch.log_softmax(z / 0.7, -1) for z in pairs)
    m = torch.logaddexp(p, q) - math.log(2)
    a, b = {"forward_kl": (q, p), "reverse_kl": (p, q)}.get(kind, (p, m))
    want = torch.where(a.exp() > 0, a.exp() * (a - b), 0).sum(-1)
    if kind == "js":
        want = want / 2 + torch.where(q.exp() > 0, q.exp() * (q - m), 0).sum(-1) / 2
    given = [side.clone().requires_grad_() for side in (x, y)]
    got = em_kernels.divergence(*given, kind=kind, temperature=0.7, impl=impl)
    finite = rounded(want).isfinite()
    assert torch.equal(got.isfinite(), finite)
    torch.testing.assert_close(got.double(), rounded(want), rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(got[finite].sum(), given)
    expected = torch.autograd.grad(want[finite].sum(), pairs)
    for g, e in zip(found, expected, strict=True):
        assert error(g, e, torch.ones(1)) < 1e-5


@EACH_IMPL
def test_ids_ranks_and_truncation(impl, device):
    x, ids = hot_rows(device), torch.tensor([[0, 3, 5]], device=device).expand(5, 3)
    want = torch.log_softmax(x.double() / 0.5, -1)
    options = dict(temperature=0.5, impl=impl)
    stats = em_kernels.softmax_stats(x, ids, outputs=("logprob", "rank"), **options)
    torch.testing.assert_close(stats.logprob.double(), rounded(want.gather(-1, ids)))
    assert torch.equal(stats.rank, (x[:, None] > x.gather(-1, ids)[..., None]).sum(-1))
    top = em_kernels.top_logprobs(x, 3, **options)
    torch.testing.assert_close(top.logprob.double(), rounded(want.gather(-1, top.ids)))
    cut = em_kernels.softmax_stats(x, top_p=0.9, outputs=("entropy", "kept_mass"), **options)
    p = want.exp()
    kept = p.sort(descending=True, stable=True).values
    kept = torch.where(kept.cumsum(-1) - kept < 0.9 - 1e-6, kept, 0)
    kept = kept / kept.sum(-1, keepdim=True)
    entropy = -torch.where(kept > 0, kept * kept.log(), 0).sum(-1)
    torch.testing.assert_close(cut.entropy.double(), entropy, rtol=1e-5, atol=1e-6)
