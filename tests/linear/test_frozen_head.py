"""`linear_softmax_stats` with a frozen weight and one output with a gradient: two products."""

import pytest
import torch
from helpers import (
    DIFFERENTIABLE,
    ON_CPU,
    error,
    make_linear,
    product_flops,
    random_target,
    same_bits,
    truth,
)

from em_kernels import linear_softmax_stats, softmax_stats

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
N, D, V = 11, 16, 301
FAST = tuple(name for name in ON_CPU if name != "triton")  # its interpreter is slow
PRODUCT = 2 * N * D * V


def operands(dtype=torch.float32):
    hidden, weight = make_linear(N, dim=D, vocab=V, dtype=dtype)
    return hidden, weight.detach(), random_target(N, vocab=V)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("chunk", (None, 4))
def test_gradients(impl, dtype, name, chunk):
    hidden, weight, target = operands(dtype)
    transform, mask = dict(temperature=0.7, softcap=5.0), torch.arange(N) % 3 > 0
    options = dict(mask=mask, chunk_tokens=chunk, impl=impl, **transform)
    upstream = torch.randn(N, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    upstream[0] = torch.nan  # of a row that does not count

    def gradient(outputs):
        stats = linear_softmax_stats(hidden, weight, target, outputs=outputs, **options)
        return torch.autograd.grad(getattr(stats, name), hidden, upstream)[0]

    got, usual = gradient((name, "max_prob")), gradient(DIFFERENTIABLE)
    wide = hidden.detach().double().requires_grad_()
    exact = truth(wide @ weight.double().T, target, **transform)[name]
    (ref,) = torch.autograd.grad(exact, wide, torch.where(mask, upstream, 0).double())
    slack = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-3}
    assert got.dtype == dtype and error(got, ref) < error(usual, ref) + slack[dtype]
    assert (got[~mask] == 0).all()


CALLS = {
    "logprob": (2, dict(outputs=("logprob",))),
    "entropy": (2, dict(outputs=("entropy",))),
    "both": (4, {}),
    "entropy as a number": (2, dict(entropy_requires_grad=False)),
    "filtered": (4, dict(outputs=("logprob",), filter_eps=1e-7)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("chunk", (None, 4))
def test_products(name, chunk):
    """Those of logits once or twice and that of dX; one more where the weight has a gradient."""
    products, options = CALLS[name]
    hidden, weight, target = operands()
    options = dict(options, chunk_tokens=chunk, keep_logits=0)

    def run(weight=weight):
        stats = linear_softmax_stats(hidden, weight, target, **options)
        (stats.entropy if name == "entropy" else stats.logprob).sum().backward()

    assert product_flops(run) == (3 if products == 4 else 2) * PRODUCT
    learned = weight.clone().requires_grad_()
    assert product_flops(lambda: run(learned)) == 4 * PRODUCT
    bias = torch.zeros(V, requires_grad=True)
    with torch.no_grad():
        stats = lambda: linear_softmax_stats(hidden, weight, target, bias=bias, **options)  # noqa: E731
        assert product_flops(stats) == PRODUCT


@pytest.mark.parametrize("linear", (True, False))
def test_an_entropy_without_gradient(linear):
    hidden, weight, target = operands()
    x = (hidden, weight) if linear else (hidden @ weight.T,)
    function = linear_softmax_stats if linear else softmax_stats
    stats = function(*x, target, entropy_requires_grad=False)
    full = function(*x, target)
    assert not stats.entropy.requires_grad and stats.logprob.requires_grad
    assert full.entropy.requires_grad and same_bits(stats.entropy, full.entropy.detach())
    grads = [
        torch.autograd.grad(s.logprob.sum(), hidden, retain_graph=True)[0] for s in (stats, full)
    ]
    assert error(*grads) < 1e-6
    stats.entropy.add_(1)  # memory of its own
    assert not function(*x, target, outputs=("entropy",), entropy_requires_grad=False)[
        1
    ].requires_grad
    for bad in (0, None, "no"):
        with pytest.raises(TypeError, match=r"entropy_requires_grad must be a bool, got"):
            function(*x, target, entropy_requires_grad=bad)


def test_it_can_be_run_again_and_differentiated_again():
    hidden, weight = (x.detach().double() for x in operands()[:2])
    hidden, weight, target = hidden[:4, :5].requires_grad_(), weight[:9, :5], torch.arange(4)

    def logprob(hidden):
        return linear_softmax_stats(hidden, weight, target, outputs=("logprob",)).logprob

    assert torch.autograd.gradcheck(logprob, hidden)
    assert torch.autograd.gradgradcheck(logprob, hidden)
    value = logprob(hidden).sum()
    first, second = (torch.autograd.grad(value, hidden, retain_graph=True)[0] for _ in range(2))
    assert same_bits(first, second)


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiled(dynamic):
    hidden, weight, target = operands()

    def logprob(hidden, target):
        options = dict(entropy_requires_grad=False, chunk_tokens=4)
        stats = linear_softmax_stats(hidden, weight, target, **options)
        return stats.logprob, stats.entropy

    compiled = torch.compile(logprob, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (N, 7):
        x = hidden.detach()[:n].requires_grad_()
        (got, entropy), (want, _) = compiled(x, target[:n]), logprob(x, target[:n])
        assert same_bits(got.detach(), want.detach()) and not entropy.requires_grad
        grads = [torch.autograd.grad((y * y.detach()).sum(), x)[0] for y in (got, want)]
        assert same_bits(*grads)
    torch._dynamo.reset()


def test_exported():
    hidden, weight, target = operands()

    class Logprob(torch.nn.Module):
        def forward(self, hidden, target):
            stats = linear_softmax_stats(hidden, weight, target, entropy_requires_grad=False)
            return stats.logprob, stats.entropy

    program = torch.export.export(Logprob(), (hidden.detach(), target)).module()
    logprob, entropy = program(hidden, target)
    want = linear_softmax_stats(hidden, weight, target)
    assert same_bits(logprob.detach(), want.logprob.detach()) and not entropy.requires_grad
    grads = [torch.autograd.grad(y.sum(), hidden)[0] for y in (logprob, want.logprob)]
    assert error(*grads) < 1e-6
