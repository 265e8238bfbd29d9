"""lora=(A, B, scaling): a low-rank part of the head, whose merged weight is never made."""

from __future__ import annotations

import pytest
import torch
from gpu_products import play_gpu
from helpers import each_impl, error, make_linear, random_target, truth
from test_operands import Sizes

from em_kernels import (
    LinearEntropyLoss,
    linear_entropy_loss,
    linear_softmax_stats,
    linear_token_covariance,
    linear_token_loss,
)
from em_kernels.backends.interface import RowSpec, Saved, Upstream
from em_kernels.backends.reference import Reference
from em_kernels.linear import chunking, chunks, products
from em_kernels.linear.low_rank import LowRank
from em_kernels.linear.plan import Linear, Needs

N, D, V, R, SCALING = 24, 16, 301, 3, 0.75
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NAMES = ("hidden", "weight", "a", "b", "bias")


def operands(dtype=F64, low=None):
    """(hidden, weight, A, B, bias), leaves, and targets."""
    hidden, weight = make_linear(N, dim=D, vocab=V, dtype=dtype)
    torch.manual_seed(3)
    a, b = torch.randn(R, D, dtype=F64) / 4, torch.randn(V, R, dtype=F64)
    bias = torch.randn(V, dtype=F64)
    made = (hidden, weight, a.to(low or dtype), b.to(low or dtype), bias.to(dtype))
    return [x.detach().clone().requires_grad_() for x in made], random_target(N, vocab=V)


def by_stats(x, target, **options):
    hidden, weight, a, b, bias = x
    stats = linear_softmax_stats(
        hidden, weight, target, bias=bias, lora=(a, b, SCALING), temperature=0.7, **options
    )
    return (stats.logprob + 0.3 * stats.entropy).mean()


def by_loss(x, target, **options):
    hidden, weight, a, b, bias = x
    rows = torch.full((N,), 1 / N, dtype=F64)
    given = dict(logprob_weight=rows, entropy_weight=0.3 * rows, temperature=0.7)
    lora = (a, b, SCALING)
    return linear_token_loss(hidden, weight, target, bias=bias, lora=lora, **given, **options).loss


def exact(x, target, mask=None):
    hidden, weight, a, b, bias = (t.detach().double().requires_grad_() for t in x)
    logits = hidden @ weight.T + SCALING * (hidden @ a.T) @ b.T + bias
    values = truth(logits, target, temperature=0.7)
    rows = values["logprob"] + 0.3 * values["entropy"]
    total = rows.mean() if mask is None else (rows * mask).sum() / N
    return total, torch.autograd.grad(total, (hidden, weight, a, b, bias))


EACH_CALL = pytest.mark.parametrize("call", (by_stats, by_loss))


@EACH_CALL
@each_impl
@pytest.mark.parametrize(
    "dtypes",
    ((F64, F64), (F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16), (F32, BF16)),
    ids=str,
)
@pytest.mark.parametrize("chunk", (None, 7))
def test_statistics_and_gradients(call, impl, dtypes, chunk):
    x, target = operands(*dtypes)
    total, gradients = exact(x, target)
    unit = max(torch.finfo(dtype).eps for dtype in dtypes)
    value = call(x, target, impl=impl, chunk_tokens=chunk, logits_dtype=None)
    assert error(value, total) < max(2 * unit, 1e-6 if F64 not in dtypes else 1e-12)
    found = torch.autograd.grad(value, x)
    for name, leaf, got, expected in zip(NAMES, x, found, gradients, strict=True):
        assert got.dtype == leaf.dtype and got.shape == leaf.shape
        assert error(got, expected) < (1e-10 if F64 in dtypes else max(4 * unit, 1e-5)), name


@EACH_CALL
@each_impl
def test_each_gradient_only_where_it_is_required(call, impl):
    for frozen in (
        ("weight", "bias"),
        ("a",),
        ("b", "weight"),
        ("hidden", "weight", "bias"),
        NAMES,
    ):
        x, target = operands()
        total, gradients = exact(x, target)
        for name in frozen:
            x[NAMES.index(name)].requires_grad_(False)
        value = call(x, target, impl=impl, chunk_tokens=7)
        assert value.requires_grad == (frozen != NAMES)
        assert error(value, total) < 1e-12
        left = [i for i, name in enumerate(NAMES) if name not in frozen]
        if left:
            for i, got in zip(left, torch.autograd.grad(value, [x[i] for i in left])):
                assert error(got, gradients[i]) < 1e-10


@each_impl
@pytest.mark.parametrize("source", ("logprob", "lse", "entropy"))
def test_a_frozen_head_with_one_output(impl, source):
    """Where hidden alone would have its gradient made on the way: with `lora` it has two parts."""
    (hidden, weight, a, b, _), target = operands()
    for frozen in (weight, a, b):
        frozen.requires_grad_(False)
    stats = linear_softmax_stats(
        hidden, weight, target, outputs=(source,), lora=(a, b, SCALING), impl=impl
    )
    (got,) = torch.autograd.grad(getattr(stats, source).sum(), hidden)
    x = hidden.detach().requires_grad_()
    values = truth(x @ weight.T + SCALING * (x @ a.T) @ b.T, target)
    assert error(got, torch.autograd.grad(values[source].sum(), x)[0]) < 1e-10


@EACH_CALL
@each_impl
def test_masks_blocks_and_kept_logits(call, impl, monkeypatch):
    monkeypatch.setattr(chunking, "CPU_WORKSPACE_BYTES", 6 * 8 * chunking.row_stride(V))
    monkeypatch.setattr(chunking, "LEAST_COLUMNS", 1)
    monkeypatch.setattr(chunking, "COLUMN_TILE", 16)
    mask = torch.arange(N) % 3 > 0
    for masked in (None, mask):
        x, target = operands()
        value = call(x, target, impl=impl) if masked is None else None
        if masked is not None:
            hidden, weight, a, b, bias = x
            options = dict(bias=bias, lora=(a, b, SCALING), temperature=0.7, mask=mask, impl=impl)
            stats = linear_softmax_stats(hidden, weight, target, **options)
            value = (stats.logprob + 0.3 * stats.entropy).sum() / N
        total, gradients = exact(x, target, masked)
        assert error(value, total) < 1e-12
        for got, expected in zip(torch.autograd.grad(value, x), gradients, strict=True):
            assert error(got, expected) < 1e-10
    if call is by_stats:
        x, target = operands()
        kept = call(x, target, impl=impl, keep_logits=1 << 30)
        for got, expected in zip(torch.autograd.grad(kept, x), exact(x, target)[1], strict=True):
            assert error(got, expected) < 1e-10


@EACH_CALL
@pytest.mark.parametrize("dtype", (BF16, F16, F32))
def test_as_on_a_gpu(call, dtype, monkeypatch):
    play_gpu(monkeypatch)
    x, target = operands(dtype)
    total, gradients = exact(x, target)
    value = call(x, target, impl="reference", chunk_tokens=7)
    assert error(value, total) < (1e-2 if dtype.itemsize == 2 else 1e-6)
    for got, expected in zip(torch.autograd.grad(value, x), gradients, strict=True):
        assert error(got, expected) < max(4 * torch.finfo(dtype).eps, 1e-5)


@each_impl
def test_with_the_other_options(impl):
    x, target = operands()
    into = torch.zeros(V, D, dtype=F64)
    total, gradients = exact(x, target)
    by_loss(x, target, accumulate_into=into, impl=impl).backward()
    assert error(into, gradients[1]) < 1e-10 and x[1].grad is None
    for i in (0, 2, 3, 4):
        assert error(x[i].grad, gradients[i]) < 1e-10
    filtered = by_stats(x, target, filter_eps=1e-12, chunk_tokens=7, impl=impl)
    for got, expected in zip(torch.autograd.grad(filtered, x), gradients, strict=True):
        assert error(got, expected) < 1e-8
    with torch.autocast("cpu", torch.bfloat16):
        told = by_stats([t.float() for t in x], target, product_dtype=F32, impl=impl)
        cast = by_stats([t.float() for t in x], target, impl=impl)
    assert error(told, total) < 1e-5
    assert 0 < error(cast, total) < 0.05
    hidden, weight, a, b, bias = x
    lora = dict(bias=bias, lora=(a, b, SCALING), impl=impl)
    logits = hidden @ weight.T + SCALING * (hidden @ a.T) @ b.T + bias
    entropy = truth(logits)["entropy"].mean()
    assert error(linear_entropy_loss(hidden, weight, **lora), entropy) < 1e-12
    fixed = LinearEntropyLoss(lora=(a, b, SCALING), impl=impl)
    assert error(fixed(hidden, weight, None, bias), entropy) < 1e-12
    rows = torch.randn(N, dtype=F64)
    given = linear_token_covariance(hidden, weight, target, rows, **lora)
    logprob = truth(logits, target)["logprob"]
    assert error(given, (rows - rows.mean()) * (logprob - logprob.mean())) < 1e-10


def test_second_derivatives():
    for call in (by_stats, by_loss):
        x, target = operands()
        value = call(x, target)
        first = torch.autograd.grad(value, x, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), x)
        wide = [t.detach().requires_grad_() for t in x]
        hidden, weight, a, b, bias = wide
        logits = hidden @ weight.T + SCALING * (hidden @ a.T) @ b.T + bias
        values = truth(logits, target, temperature=0.7)
        total = (values["logprob"] + 0.3 * values["entropy"]).mean()
        first = torch.autograd.grad(total, wide, create_graph=True)
        expected = torch.autograd.grad(sum(g.square().sum() for g in first), wide)
        for got, right in zip(second, expected, strict=True):
            assert error(got, right) < 1e-8


@EACH_CALL
def test_compiled_and_exported(call):
    x, target = operands(F32)
    total, gradients = exact(x, target)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    value = compiled(x, target)
    assert error(value, total) < 1e-6
    for got, expected in zip(torch.autograd.grad(value, x), gradients, strict=True):
        assert error(got, expected) < 1e-5

    class Module(torch.nn.Module):
        def forward(self, *x):
            return call(list(x), target)

    exported = torch.export.export(Module(), tuple(x)).module()
    value = exported(*x)
    assert error(value, total) < 1e-6
    for got, expected in zip(torch.autograd.grad(value, x), gradients, strict=True):
        assert error(got, expected) < 1e-5


def test_the_merged_weight_is_never_made(monkeypatch):
    monkeypatch.setattr(products, "CPU_PIECE_BYTES", 128 * D * 4)
    (hidden, weight, a, b, _), target = operands(F32, BF16)
    hidden, weight, b = hidden.detach(), weight.detach(), b.detach()
    low = LowRank(SCALING * hidden @ a.detach().float().T, b, True, True)
    linear, spec = Linear.of(hidden, weight, 4, None, low), RowSpec(target=target, valid_vocab=V)
    upstream, rows = Upstream(entropy=torch.ones(N)), torch.zeros(N)
    with Sizes(weight) as sizes:
        chunks.stats(linear, spec, ("entropy",), Reference())
        chunks.loss(linear, spec, upstream, (), Needs(True), Reference())
        chunks.grad(linear, spec, Saved(rows, rows, rows), upstream, Needs(True), Reference())
    assert max(size for size, _ in sizes.seen) < V * D


A, B = torch.zeros(R, D), torch.zeros(V, R)
BAD = [
    (3, TypeError, r"lora must be \(A, B, scaling\), got int"),
    ((A, B), TypeError, r"lora must be \(A, B, scaling\), got 2 of them"),
    ((A.T, B, 1.0), ValueError, r"lora: A must be \(r, D\) with D = 16, got shape \(16, 3\)"),
    ((A, B.T, 1.0), ValueError, r"lora: B must be \(V, r\) = \(301, 3\), got shape \(3, 301\)"),
    ((A, B, "1"), TypeError, "lora: scaling must be a number, got str"),
    ((A, B, float("nan")), ValueError, "lora: scaling must be a number and finite, got nan"),
    ((A.int(), B, 1.0), TypeError, "lora: A must be float32, .* got torch.int32"),
    ((A, B.to("meta"), 1.0), ValueError, "lora: B must be on cpu, got meta"),
    ((None, B, 1.0), TypeError, "lora: A must be a tensor, got NoneType"),
]


@pytest.mark.parametrize("lora, kind, message", BAD)
def test_bad_input(lora, kind, message):
    (hidden, weight, *_), _ = operands(F32)
    with pytest.raises(kind, match=message):
        linear_softmax_stats(hidden, weight, lora=lora)
    with pytest.raises(kind, match=message):
        linear_entropy_loss(hidden, weight, lora=lora)
