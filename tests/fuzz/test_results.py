"""Results on anything hypothesis thinks of: close to the definition, whatever else is asked.

How close is said in contract/closeness.py alone.
"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from contract.closeness import CONDITION, LIMIT, check_gradient, exact
from contract.subject import DTYPES, Subject, misaligned, pick
from divergences import KINDS
from helpers import FAST_IMPLS, ROWWISE_IMPLS, same_bits
from hypothesis import example, given, note

import em_kernels as em
from em_kernels.backends import choice, reference
from em_kernels.backends.interface import RowSpec, Upstream, accumulate_dtype
from fuzz.budget import FACTOR, examples

# Interpreted kernels in `make fuzz` alone.
OWN_BITS = [name for name in ROWWISE_IMPLS if name in FAST_IMPLS or FACTOR > 1]
EACH = pytest.mark.parametrize("impl", FAST_IMPLS)
ROWWISE = pytest.mark.parametrize("impl", OWN_BITS)
SIZES = st.one_of(st.integers(1, 70), st.sampled_from((127, 128, 129, 1023, 1025, 4095, 4097)))
NUMBERS = st.floats(0.5, 2.0)


@st.composite
def rows(draw):
    """(logits (1, N, V), spec, upstream) with whatever a spec may hold."""
    count, vocab = draw(st.integers(1, 5)), draw(SIZES)
    dtype = draw(st.sampled_from(DTYPES))
    wide, valid = accumulate_dtype(dtype), draw(st.integers(1, vocab))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(1, count, vocab) * draw(st.floats(0, 4))
    target = torch.randint(0, valid, (count,))
    if draw(st.booleans()):  # of probability 0, but for one entry of each row
        x[torch.rand(x.shape) < 0.3] = -torch.inf
        x[0, torch.arange(count), target] = 1.0
    spec = RowSpec(
        bias=draw(st.sampled_from((None, torch.randn(vocab).to(wide)))),
        target=target,
        mask=draw(st.sampled_from((None, torch.rand(count) < 0.7))),
        temperature_rows=draw(st.sampled_from((None, torch.rand(count).to(wide) + 0.5))),
        temperature=draw(NUMBERS),
        softcap=draw(st.sampled_from((0.0, 3.0, 30.0))),
        logit_scale=draw(NUMBERS) * draw(st.sampled_from((1, -1))),
        valid_vocab=valid,
    )
    if not x.isfinite().all():  # their mirror image would be +inf
        spec = spec._replace(logit_scale=abs(spec.logit_scale), softcap=0.0)
    note(str({k: v for k, v in spec._asdict().items() if not torch.is_tensor(v)}))
    upstream = Upstream(*(torch.randn(count).to(wide) for _ in range(3)))
    return x.to(dtype), spec, upstream


def subject_of(impl: str, device: str) -> Subject:
    return Subject(choice.backend(impl, torch.device(device)), device, condition=CONDITION)


def size_of(x: torch.Tensor, spec: RowSpec) -> float:
    """The largest z of rows whose u is rounded; 0 of others, where u is an entry of x."""
    if spec.bias is None and not spec.softcap:
        return 0.0
    z = reference.transform(x[..., : spec.valid_vocab].double(), exact(spec))
    return float(z[z.isfinite()].abs().max())


def far_behind_one():
    """The mean of d^2 is 400 times its variance."""
    x = torch.zeros(1, 1, 2800, dtype=torch.bfloat16)
    x[0, 0, 1900] = 2.0
    spec = RowSpec(target=torch.tensor([0]), temperature_rows=torch.tensor([0.999]))
    return x, spec._replace(valid_vocab=2800), Upstream(*(torch.ones(1) for _ in range(3)))


def near_each_other():
    """Two u that are 3 and 0.01 apart: d has the rounding of the 3."""
    x, bias = torch.tensor([[[1.3064, 1.0]]]), torch.tensor([0.3932, 0.9734])
    spec = RowSpec(target=torch.tensor([1]), bias=bias, logit_scale=1.94439, valid_vocab=2)
    return x, spec, Upstream(*(torch.ones(1) for _ in range(3)))


@EACH
@examples(12)
@example(case=far_behind_one())
@example(case=near_each_other())
@given(case=rows())
def test_a_backend_gives_what_the_definition_does(impl, device, case):
    x, spec, upstream = case
    subject = subject_of(impl, device)._replace(size=size_of(x, spec))
    subject.check(x.to(device), subject.place(spec), subject.place(upstream))


@ROWWISE
@examples(12)
@given(case=rows(), by=st.integers(0, 9), data=st.data())
def test_the_bits_of_a_row_are_its_own(impl, device, case, by, data):
    """Whatever the other rows, their number, where they lie, and what else is asked for."""
    x, spec, upstream = case
    subject = subject_of(impl, device)
    x, spec, upstream = x.to(device), subject.place(spec), subject.place(upstream)
    order = torch.tensor(data.draw(st.permutations(range(x.shape[1]))), device=device)
    some = order[: data.draw(st.integers(1, len(order)))]
    whole = subject.run(x, spec, upstream)
    there = subject.run(misaligned(x, by), spec, upstream)
    parts = subject.run(x[:, some].contiguous(), pick(spec, some), pick(upstream, some))
    for one, moved, part in zip(whole, there, parts, strict=True):
        assert same_bits(one, moved) and same_bits(one[some], part)


@ROWWISE
@examples(12)
@given(case=rows(), steps=st.integers(-64, 64))
def test_a_shift_changes_nothing_but_the_level(impl, device, case, steps):
    x, spec, _ = case
    x = torch.where(x.isfinite(), (x.float() * 16).round() / 16, x.float()).to(device)
    plain = RowSpec(target=spec.target, mask=spec.mask, valid_vocab=spec.valid_vocab)
    subject = subject_of(impl, device)
    names = ("entropy", "logprob", "varentropy", "collision", "max_prob")
    one, other = (subject.stats(v, subject.place(plain), names) for v in (x, x + steps / 16))
    assert all(same_bits(one[name], other[name]) for name in names)


@EACH
@examples(6)
@given(data=st.data())
def test_gradients_are_those_of_the_values(impl, device, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    count, vocab, dim = (data.draw(st.integers(1, 4)) for _ in range(3))
    x = torch.randn(count, vocab, dtype=torch.float64, device=device, requires_grad=True)
    y = torch.randn(count, vocab, dtype=torch.float64, device=device, requires_grad=True)
    h = torch.randn(count, dim, dtype=torch.float64, device=device, requires_grad=True)
    w = torch.randn(vocab, dim, dtype=torch.float64, device=device, requires_grad=True)
    target = torch.randint(0, vocab, (count,), device=device)
    weights = torch.randn(count, dtype=torch.float64, device=device)
    options = dict(temperature=data.draw(NUMBERS), logit_scale=data.draw(NUMBERS), impl=impl)
    kind, beta = data.draw(st.sampled_from(KINDS))
    every = dict(outputs=("logprob", "entropy", "lse"), **options)
    loss = dict(entropy_weight=weights, logprob_weight=weights.flip(0), **options)
    for call, inputs in (
        (lambda x: tuple(em.softmax_stats(x, target, **every)[:3]), (x,)),
        (lambda x: em.token_loss(x, target, **loss).loss, (x,)),
        (lambda h, w: tuple(em.linear_softmax_stats(h, w, target, **every)[:3]), (h, w)),
        (lambda h, w: em.linear_token_loss(h, w, target, chunk_tokens=1, **loss).loss, (h, w)),
        (lambda x, y: em.divergence(x, y, kind=kind, beta=beta, **options), (x, y)),
    ):
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@EACH
@examples(8)
@given(data=st.data())
def test_parts_of_a_call_make_the_whole(impl, device, data):
    """Chunks of rows, and calls on some of the rows, whose losses and gradients add up."""
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    count, vocab, dim = data.draw(st.integers(2, 9)), data.draw(SIZES), data.draw(st.integers(1, 9))
    h = torch.randn(count, dim, dtype=torch.float64, device=device, requires_grad=True)
    w = torch.randn(vocab, dim, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.randn(count, dtype=torch.float64, device=device)
    weights[data.draw(st.integers(0, count - 1))] = 0
    cut, chunk = data.draw(st.integers(1, count - 1)), data.draw(st.integers(1, count))

    def made(rows: slice, **options):
        found = em.linear_token_loss(h[rows], w, entropy_weight=weights[rows], impl=impl, **options)
        return (found.loss, *torch.autograd.grad(found.loss, (h, w)))

    whole = made(slice(None))
    chunked = made(slice(None), chunk_tokens=chunk)
    parts = [sum(both) for both in zip(made(slice(cut)), made(slice(cut, None)), strict=True)]
    plain = em.token_loss(h @ w.T, entropy_weight=weights, impl=impl).loss
    for other in (chunked, parts, (plain, *torch.autograd.grad(plain, (h, w)))):
        for a, b in zip(whole, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@EACH
@examples(8)
@given(case=rows(), data=st.data())
def test_rows_left_out_are_exact_zeros(impl, device, case, data):
    x, spec, _ = case
    x = x[0].to(device).masked_fill(torch.tensor(True, device=device), torch.nan).clone()
    good = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(x), max_size=len(x))))
    good = good.to(device)
    x[good] = torch.randn(int(good.sum()), x.shape[1], device=device).to(x.dtype)
    x.requires_grad_()
    target = spec.target.to(device)
    stats = em.softmax_stats(x, target, mask=good, impl=impl)
    loss = em.token_loss(x, target, entropy_weight=good.to(accumulate_dtype(x.dtype)), impl=impl)
    pair = em.divergence(x, x.detach(), mask=good, impl=impl)
    for value in (stats.entropy, stats.logprob, loss.stats.entropy, pair):
        assert (value[~good] == 0).all() and value[good].isfinite().all()
    for total in (stats.entropy.sum(), loss.loss, pair.sum()):
        (gradient,) = torch.autograd.grad(total, x, retain_graph=True)
        assert (gradient[~good] == 0).all() and gradient[good].isfinite().all()


@EACH
@examples(10)
@given(case=rows(), kind=st.sampled_from(KINDS))
def test_a_divergence_is_none_of_itself_and_never_negative(impl, device, case, kind):
    x, spec, _ = case
    x = x[0].nan_to_num(neginf=-9.0).to(device)
    options = dict(kind=kind[0], beta=kind[1], temperature=spec.temperature, impl=impl)
    assert (em.divergence(x, x, **options) == 0).all()
    value = em.divergence(x, x.flip(0), **options)
    assert (value >= 0).all() and value.isfinite().all()
    if kind == ("js", 0.5):
        other = em.divergence(x.flip(0), x, **options)
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)


@EACH
@examples(8)
@given(case=rows(), data=st.data())
def test_entries_in_another_order_have_the_same_entropy(impl, device, case, data):
    x = case[0][0].nan_to_num(neginf=-9.0).to(device)
    order = torch.tensor(data.draw(st.permutations(range(min(x.shape[1], 60)))), device=device)
    x = x[:, : len(order)]
    upstream = Upstream(entropy=torch.ones(len(x), device=device))
    found = []
    for v in (x, x[:, order]):
        v = v.detach().requires_grad_()
        entropy = em.softmax_stats(v, outputs=("entropy",), impl=impl).entropy
        (gradient,) = torch.autograd.grad((entropy * upstream.entropy).sum(), v)
        found.append((entropy.detach(), gradient))
    (one, gradient), (other, moved) = found
    limit = LIMIT[one.dtype] * 2
    assert ((one - other).abs() <= limit * one.abs()).all()
    check_gradient(moved, gradient[:, order].double())
