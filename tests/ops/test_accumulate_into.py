"""accumulate_into: dW is added to a matrix that is there, in the backward pass."""

from __future__ import annotations

import pytest
import torch
from helpers import each_impl, error, make_linear, random_target, truth
from test_operands import Sizes

from em_kernels import linear_entropy_loss, linear_softmax_stats, linear_token_loss
from em_kernels.backends.interface import RowSpec, Saved, Upstream
from em_kernels.backends.reference import Reference
from em_kernels.linear import chunking, chunks, products
from em_kernels.linear.plan import Linear, Needs

N, D, V, STEPS = 24, 16, 301, 4


DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


def operands(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    hidden, weight = make_linear(N, dim=D, vocab=V, dtype=dtype)
    bias = torch.randn(V, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden.detach().requires_grad_(), weight, bias, random_target(N, vocab=V)


def by_stats(hidden, weight, bias, target, **options):
    stats = linear_softmax_stats(hidden, weight, target, bias=bias, **options)
    return (stats.logprob + 0.3 * stats.entropy).mean()


def by_loss(hidden, weight, bias, target, **options):
    rows = torch.full((N,), 1 / N, dtype=torch.float64)
    given = dict(logprob_weight=rows, entropy_weight=0.3 * rows)
    return linear_token_loss(hidden, weight, target, bias=bias, **given, **options).loss


EACH_CALL = pytest.mark.parametrize("call", (by_stats, by_loss))


def batches(dtype):
    """(weight, bias, [(hidden, target)]), and dW of the sum in float64."""
    _, weight, bias, _ = operands(dtype)
    parts = [(h, y) for h, _, _, y in (operands(dtype, seed) for seed in range(1, STEPS + 1))]
    wide = weight.detach().double().requires_grad_()
    total = 0.0
    for hidden, target in parts:
        values = truth(hidden.detach().double() @ wide.T + bias.detach().double(), target)
        total = total + (values["logprob"] + 0.3 * values["entropy"]).mean()
    return weight, bias, parts, torch.autograd.grad(total, wide)[0]


@EACH_CALL
@each_impl
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    ({}, {"chunk_tokens": 7}, {"filter_eps": 1e-9, "chunk_tokens": 7}),
    ids=str,
)
def test_it_is_the_sum_of_the_gradients(call, dtypes, impl, options):
    dtype, kind = dtypes
    weight, bias, parts, expected = batches(dtype)
    before = (torch.randn(V, D) * expected.std()).to(kind)
    into = before.clone()
    for hidden, target in parts:
        total = call(hidden, weight, bias, target, accumulate_into=into, impl=impl, **options)
        total.backward()
        plain = call(hidden, weight, bias, target, impl=impl, **options)
        (of_hidden,) = torch.autograd.grad(plain, hidden)
        assert error(total.detach(), plain.detach()) < 1e-6
        assert error(hidden.grad, of_hidden) < 2 * torch.finfo(dtype).eps + 1e-6
    assert weight.grad is None
    assert bias.grad is not None
    limit = max(1e-6, torch.finfo(dtype).eps if dtype.itemsize == 2 else 0)
    if kind.itemsize == 2:
        limit = 4 * torch.finfo(kind).eps  # rounded after every chunk
    assert error(into.double() - before.double(), expected) < limit


@EACH_CALL
@each_impl
def test_it_rounds_less_than_adding_rounded_gradients(call, impl):
    weight, bias, parts, expected = batches(torch.bfloat16)
    into = torch.zeros(V, D)
    added = torch.zeros(V, D)
    options = dict(impl=impl, logits_dtype=torch.float32)
    for hidden, target in parts:
        call(hidden, weight, bias, target, accumulate_into=into, **options).backward()
        total = call(hidden, weight, bias, target, **options)
        added += torch.autograd.grad(total, weight)[0].float()
    assert error(into, expected) < error(added, expected)


@each_impl
def test_the_factor_that_backward_brings_counts(impl):
    """A loss scale, which float16 needs: gradients of 1e-9 are added to float32 all the same."""
    for dtype in (torch.float32, torch.float16):
        hidden, weight, bias, target = operands(dtype)
        once, scaled = torch.zeros(V, D), torch.zeros(V, D)
        by_loss(hidden, weight, bias, target, accumulate_into=once, impl=impl).backward()
        small = by_loss(hidden, weight, bias, target, accumulate_into=scaled, impl=impl)
        (small * 2.0**-30).backward()
        assert error(scaled * 2.0**30, once) < 1e-3
        assert once.abs().max() > 0


@EACH_CALL
def test_every_backward_pass_adds_once(call):
    hidden, weight, bias, target = operands()
    once, twice = torch.zeros(V, D), torch.zeros(V, D)
    call(hidden, weight, bias, target, accumulate_into=once).backward()
    total = call(hidden, weight, bias, target, accumulate_into=twice)
    total.backward(retain_graph=True)
    total.backward()
    assert error(twice, 2 * once) < 1e-6
    torch.autograd.grad(call(hidden, weight, bias, target, accumulate_into=twice), (hidden, bias))
    assert error(twice, 2 * once) < 1e-6  # nobody asked for that of weight
    total = call(hidden, weight, bias, target, accumulate_into=twice)
    none = torch.autograd.grad(total, (hidden, weight), allow_unused=True)[1]
    assert none is None and error(twice, 3 * once) < 1e-6


@EACH_CALL
def test_no_second_derivative(call):
    hidden, weight, bias, target = operands()
    into = torch.zeros(V, D)
    total = call(hidden, weight, bias, target, accumulate_into=into)
    with pytest.raises(RuntimeError, match="leave accumulate_into out where create_graph=True"):
        torch.autograd.grad(total, hidden, create_graph=True)
    assert (into == 0).all()


@each_impl
def test_blocks_of_the_vocabulary(impl, monkeypatch):
    monkeypatch.setattr(chunking, "CPU_WORKSPACE_BYTES", 6 * 8 * chunking.row_stride(V))
    monkeypatch.setattr(chunking, "LEAST_COLUMNS", 1)
    monkeypatch.setattr(chunking, "COLUMN_TILE", 16)
    for dtype in (torch.float32, torch.float64):
        hidden, weight, bias, target = operands(dtype)
        into = torch.zeros(V, D, dtype=dtype)
        by_stats(hidden, weight, bias, target, accumulate_into=into, impl=impl).backward()
        plain = by_stats(hidden, weight, bias, target, impl=impl)
        assert error(into, torch.autograd.grad(plain, weight)[0]) < 1e-6


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("eps", (None, 1e-6))
def test_there_is_no_second_matrix(dtypes, eps, monkeypatch):
    monkeypatch.setattr(products, "CPU_PIECE_BYTES", 128 * D * 4)
    monkeypatch.setattr(products, "BLOCK", 64)
    hidden, weight, _, target = (x.detach() for x in operands(dtypes[0]))
    linear, spec = Linear.of(hidden, weight, 4, None), RowSpec(target=target, valid_vocab=V)
    rows, upstream = torch.zeros(N), Upstream(entropy=torch.ones(N))
    needs, saved = Needs(True, True, True, eps), Saved(rows, rows, rows)
    into = torch.zeros(V, D, dtype=dtypes[1])
    with Sizes(weight, into) as sizes:
        chunks.grad(linear, spec, saved, upstream, needs, Reference(), into=into)
    assert max(size for size, _ in sizes.seen) < V * D
    with Sizes(weight) as sizes:
        chunks.grad(linear, spec, saved, upstream, needs, Reference())
    assert max(size for size, _ in sizes.seen) >= V * D


def test_autocast_and_other_dtypes_of_hidden():
    hidden, weight, bias, target = operands()
    into, plain = torch.zeros(V, D), torch.zeros(V, D)
    with torch.autocast("cpu", torch.bfloat16):
        total = by_loss(hidden, weight, bias, target, accumulate_into=into)
        plain = by_loss(hidden, weight, bias, target)
    total.backward()
    assert error(into, torch.autograd.grad(plain, weight)[0]) < 5e-3
    into.zero_()
    narrow = hidden.detach().bfloat16()
    by_loss(narrow, weight, bias, target, accumulate_into=into).backward()
    expected = torch.autograd.grad(by_loss(narrow, weight, bias, target), weight)[0]
    assert error(into, expected) < 1e-6


def test_the_entropy_loss_takes_it():
    hidden, weight, bias, _ = operands()
    into = torch.zeros(V, D)
    linear_entropy_loss(hidden, weight, bias=bias, accumulate_into=into).backward()
    plain = linear_entropy_loss(hidden, weight, bias=bias)
    assert error(into, torch.autograd.grad(plain, weight)[0]) < 1e-6


def test_rows_beyond_the_vocabulary_stay_as_they_were():
    hidden, weight, bias, target = operands()
    into = torch.ones(V, D)
    target = target.clamp(max=V - 11)
    given = dict(accumulate_into=into, valid_vocab=V - 10)
    by_loss(hidden, weight, bias, target, **given).backward()
    assert (into[-10:] == 1).all() and (into[:-10] != 1).any()


def test_megatrons_flag():
    hidden, weight, bias, target = operands()
    weight = torch.nn.Parameter(weight.detach())
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(V, D), False
    total = by_loss(hidden, weight, bias, target, accumulate_into=weight.main_grad)
    assert weight.grad_added_to_main_grad is False
    total.backward()
    assert weight.grad_added_to_main_grad is True and weight.main_grad.abs().sum() > 0


def test_without_gradients_nothing_is_added():
    hidden, weight, bias, target = operands()
    into = torch.zeros(V, D)
    with torch.no_grad():
        for call in (by_stats, by_loss):
            call(hidden, weight, bias, target, accumulate_into=into)
    assert (into == 0).all()


def bad(into, pattern, kind=ValueError, change=lambda weight: weight):
    return pytest.param(into, pattern, kind, change, id=pattern)


@EACH_CALL
@pytest.mark.parametrize(
    "into, pattern, kind, change",
    [
        bad(torch.zeros(V, D - 1), r"must have shape \(301, 16\), got shape \(301, 15\)"),
        bad(torch.zeros(V, D).bfloat16(), "got torch.bfloat16", TypeError),
        bad(torch.zeros(V, D).to("meta"), "must be on cpu, got meta"),
        bad(torch.zeros(V, D).requires_grad_(), "must be .* not require grad, got one that requ"),
        bad(torch.zeros(D, V).T, r"must be contiguous .*, got one that has strides \(1, 301\)"),
        bad("grad", "must be a tensor, got str", TypeError),
        bad(torch.zeros(V, D), "got one that is frozen", change=torch.Tensor.detach),
        bad(torch.zeros(V, D), "one that was computed from others", change=lambda w: 2 * w),
        bad(torch.zeros(V, D), r"hold that \(torch.float64\)", TypeError, torch.Tensor.double),
    ],
)
def test_bad_input(call, into, pattern, kind, change):
    hidden, weight, bias, target = operands()
    weight = change(weight)
    if weight.dtype == torch.float64:
        weight = weight.detach().requires_grad_()
    with pytest.raises(kind, match=f"^accumulate_into .*{pattern}"):
        call(hidden, weight, bias, target, accumulate_into=into)


def test_compiled_programs_refuse_it():
    hidden, weight, bias, target = operands()
    compiled = torch.compile(by_stats, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="accumulate_into must be None in a compiled or exported"):
        compiled(hidden, weight, bias, target, accumulate_into=torch.zeros(V, D))
