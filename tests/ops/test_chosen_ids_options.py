"""K ids a row with what else a head takes: float16, filter_eps, lora, two dtypes, chunks."""

import pytest
import torch
from helpers import FAST_IMPLS, error, make_linear
from test_operands import Sizes

from em_kernels import linear_softmax_stats, linear_token_loss, softmax_stats, token_loss
from em_kernels.backends.choice import backend
from em_kernels.backends.chosen_ids import ChosenIds
from em_kernels.backends.interface import RowSpec, Saved, Upstream
from em_kernels.linear import chunks
from em_kernels.linear.plan import Linear, Needs

N, D, V, K, R, SCALING = 24, 16, 301, 4, 3, 0.75
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
UNIT = {F16: 2**-11, BF16: 2**-8, F32: 1e-6, F64: 1e-13}
EACH_IMPL = pytest.mark.parametrize("impl", FAST_IMPLS)


def make_ids(device="cpu"):
    ids = torch.randint(0, V, (N, K))
    ids[::5, 1] = ids[::5, 0]
    ids[::7, 2] = -100
    return ids.to(device)


def make_heads(device, dtypes, low=None):
    """(hidden, weight[, A, B]), leaves, of `dtypes`, A and B of `low`."""
    hidden, weight = make_linear(N, dim=D, vocab=V, dtype=F64)
    made = [hidden.to(dtypes[0]), weight.to(dtypes[1])]
    if low is not None:
        made += [(torch.randn(R, D) / 4).to(low), torch.randn(V, R).to(low)]
    return [x.detach().to(device).requires_grad_() for x in made]


def log_probabilities(x, ids):
    log_p = x.double().log_softmax(-1)
    return torch.where(ids < 0, 0, log_p.gather(-1, ids.clamp(min=0)))


def exact(x, ids, given):
    hidden, weight, *low = (t.detach().double().requires_grad_() for t in x)
    logits = hidden @ weight.T
    if low:
        logits = logits + SCALING * (hidden @ low[0].T) @ low[1].T
    total = (given.double() * log_probabilities(logits, ids)).sum()
    return total, torch.autograd.grad(total, (hidden, weight, *low))


def by_stats(x, ids, given, **options):
    lora = (*x[2:], SCALING) if len(x) > 2 else None
    stats = linear_softmax_stats(*x[:2], ids, outputs=("logprob",), lora=lora, **options)
    return (given * stats.logprob).sum()


def by_loss(x, ids, given, **options):
    lora = (*x[2:], SCALING) if len(x) > 2 else None
    return linear_token_loss(*x[:2], ids, logprob_weight=given, lora=lora, **options).loss


EACH_CALL = pytest.mark.parametrize("call", (by_stats, by_loss))


@EACH_CALL
@EACH_IMPL
@pytest.mark.parametrize("low", (False, True), ids=("head", "lora"))
@pytest.mark.parametrize(
    "dtypes", ((F32, F32), (BF16, F32), (F32, BF16), (F16, F32), (BF16, BF16)), ids=str
)
@pytest.mark.parametrize("chunk", (None, 7))
def test_dtypes_that_differ_and_a_low_rank_part(call, impl, device, low, dtypes, chunk):
    x = make_heads(device, dtypes, dtypes[0] if low else None)
    ids, given = make_ids(device), torch.randn(N, K, device=device)
    total, gradients = exact(x, ids, given)
    value = call(x, ids, given, impl=impl, chunk_tokens=chunk, logits_dtype=F32)
    unit = max(UNIT[dtype] for dtype in dtypes)
    assert error(value, total) < (4 * unit if low else 2e-5)  # hidden A is of their dtype
    for leaf, got, want in zip(x, torch.autograd.grad(value, x), gradients, strict=True):
        assert got.dtype == leaf.dtype and got.shape == leaf.shape
        assert error(got, want) < max(4 * unit, 1e-5)


@EACH_CALL
@EACH_IMPL
@pytest.mark.parametrize("chunk", (None, 7))
def test_float16_with_a_loss_scale(call, impl, device, chunk):
    """Gradients that are below float16 are there under a scale, from hidden states."""
    x, scale = make_heads(device, (F16, F16)), 2.0**18
    ids, given = make_ids(device), 1e-6 * torch.randn(N, K, device=device)
    value = call(x, ids, given, impl=impl, chunk_tokens=chunk, logits_dtype=F32)
    for got, want in zip(torch.autograd.grad(scale * value, x), exact(x, ids, given)[1]):
        assert error(got.double() / scale, want) < 4 * UNIT[F16]


@EACH_IMPL
def test_float16_logits_with_a_loss_scale(impl, device):
    x, scale = (3 * torch.randn(N, V)).half().to(device).requires_grad_(), 2.0**18
    ids, given = make_ids(device), 1e-6 * torch.randn(N, K, device=device)
    wide = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad((given.double() * log_probabilities(wide, ids)).sum(), wide)
    stats = softmax_stats(x, ids, outputs=("logprob",), impl=impl)
    (got,) = torch.autograd.grad(scale * (given * stats.logprob).sum(), x)
    assert error(got.double() / scale, want) < 4 * UNIT[F16]
    loss = token_loss(x, ids, logprob_weight=scale * given, impl=impl).loss
    (got,) = torch.autograd.grad(loss, x)
    assert error(got.double() / scale, want) < 4 * UNIT[F16]


@EACH_CALL
@EACH_IMPL
@pytest.mark.parametrize("eps", (1e-3, 0.05))
def test_filter_eps_leaves_its_stated_error(call, impl, device, eps):
    """w of the bound is the largest weight of an id. That of a row that has an id several times
    is no larger: what it leaves out is the entry of the gradient."""
    hidden, weight = make_linear(N, dim=D, vocab=V)
    x = [t.detach().to(device).requires_grad_() for t in (hidden, 3 * weight)]
    ids, given = make_ids(device), torch.randn(N, K, device=device)
    value = call(x, ids, given, impl=impl, chunk_tokens=7, filter_eps=eps)
    dx, dw = torch.autograd.grad(value, x)
    want = exact(x, ids, given)[1]
    w = torch.stack([part.abs().max() for part in given.split(7)]).double()
    sizes = torch.stack([part.double().abs().sum(0) for part in x[0].detach().split(7)])
    bounds = w.max() * x[1].detach().double().abs().sum(0), (w[:, None] * sizes).sum(0)
    for got, true, bound in zip((dx, dw), want, bounds):
        off = (got.double() - true).abs()
        assert (off <= eps * bound + 1e-5 * true.abs().max()).all()
    assert error(dw, want[1]) > 1e-5 and (dw == 0).all(1).any()


@EACH_IMPL
@pytest.mark.parametrize(
    "names", (("logprob",), ("logprob", "rank", "is_top1", "entropy")), ids=len
)
def test_logits_are_there_a_chunk_at_a_time(impl, device, names):
    """From hidden states nothing of (N, V) is made, nor of (N, K, V) in a chunk."""
    chunk, rows = 4, torch.zeros(N, device=device)
    hidden, weight = (x.detach().to(device) for x in make_linear(N, dim=D, vocab=V))
    linear, own = Linear.of(hidden, weight, chunk, None), ChosenIds(backend(impl, hidden.device))
    spec = RowSpec(target=make_ids(device), valid_vocab=V)
    upstream, needs = Upstream(logprob=torch.randn(N, K, device=device)), Needs(True, True, False)
    calls = (
        lambda: chunks.stats(linear, spec, names, own),
        lambda: chunks.loss(linear, spec, upstream, names, needs, own),
        lambda: chunks.grad(linear, spec, Saved(rows, rows, rows), upstream, needs, own),
    )
    for call in calls:
        with Sizes(hidden, weight) as sizes:
            call()
        largest = max(size for size, _ in sizes.seen)
        assert chunk * V <= largest <= max(2 * chunk, D) * V < N * V
