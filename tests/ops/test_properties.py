"""Properties that hold for any input hypothesis thinks of: shapes, strides, dtypes, masks."""

import math

import hypothesis.strategies as st
import pytest
import torch
from helpers import DTYPES, FAST_IMPLS, ROWWISE_IMPLS, error, same_bits, truth
from hypothesis import HealthCheck, given, settings

from em_kernels import entropy_loss, linear_softmax_stats, softmax_stats
from em_kernels.backends.interface import OUTPUTS

pytestmark = pytest.mark.parametrize("impl", FAST_IMPLS)
EXAMPLES = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@st.composite
def batches(draw, max_rows=7, max_vocab=130):
    """Any leading shape, any view of any larger memory; see `place`."""
    lead = draw(st.lists(st.integers(0, max_rows), max_size=3))
    vocab = draw(st.integers(1, max_vocab))
    pad = [draw(st.integers(0, 2)) for _ in (*lead, 0)]
    torch.manual_seed(draw(st.integers(0, 2**31)))
    big = torch.randn([size + extra for size, extra in zip((*lead, vocab), pad)])
    big = (big * draw(st.sampled_from((0.0, 0.1, 3.0, 30.0)))).to(draw(st.sampled_from(DTYPES)))
    swapped = len(lead) > 1 and draw(st.booleans())

    def cut(memory):
        view = memory[tuple(slice(extra, None) for extra in pad)]
        return view.transpose(0, 1) if swapped else view

    shape = cut(big).shape[:-1]
    target = torch.randint(0, vocab, shape)
    mask = torch.rand(shape) < draw(st.sampled_from((0.0, 0.5, 1.0)))
    wide = torch.float64 if big.dtype == torch.float64 else torch.float32
    temperature = torch.full(shape, draw(st.sampled_from((1.0, 0.5, 1.7))), dtype=wide)
    return big, cut, target, mask, temperature


def place(batch, device):
    """(logits, target, mask, temperature) of a batch, on a device, the logits being the view."""
    big, cut, *rows = batch
    return cut(big.to(device)), *(row.to(device) for row in rows)


@EXAMPLES
@given(batch=batches())
def test_outputs_are_those_of_the_truth_where_the_mask_is(impl, device, batch):
    x, target, mask, temperature = place(batch, device)
    stats = softmax_stats(x, target, mask=mask, temperature=temperature, outputs=OUTPUTS, impl=impl)
    expected = truth(x, target, temperature=temperature)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name in ("logprob", "entropy", "lse", "varentropy", "collision", "max_prob"):
        value = getattr(stats, name)
        assert value.shape == mask.shape and value.dtype == wide
        assert (value[~mask] == 0).all()
        exact = expected[name][mask]
        torch.testing.assert_close(value[mask].double(), exact, rtol=2e-4, atol=2e-5, msg=name)
    assert torch.equal(stats.is_top1, expected["is_top1"] & mask) or x.dtype != torch.float64


@EXAMPLES
@given(batch=batches())
def test_ranges(impl, device, batch):
    x, target, _, temperature = place(batch, device)
    stats = softmax_stats(x, target, temperature=temperature, outputs=OUTPUTS, impl=impl)
    slack = 1e-5
    assert (stats.entropy >= 0).all()
    assert (stats.entropy <= math.log(x.shape[-1]) + slack).all()
    assert (stats.logprob <= 0).all()
    assert (stats.max_prob > 0).all() and (stats.max_prob <= 1).all()
    assert (stats.collision <= stats.max_prob + slack).all()
    assert (stats.varentropy >= 0).all() and (stats.logit_var >= 0).all()
    assert (stats.self_certainty >= -2e-4).all()
    assert (stats.entropy >= -stats.max_prob.log() - slack).all()


@EXAMPLES
@given(batch=batches())
def test_the_gradient_is_zero_where_the_mask_is_and_sums_to_zero(impl, device, batch):
    x, target, mask, temperature = place(batch, device)
    x = x.requires_grad_()
    stats = softmax_stats(x, target, mask=mask, temperature=temperature, impl=impl)
    upstream = torch.randn_like(stats.entropy)
    (grad,) = torch.autograd.grad((upstream * (stats.entropy - stats.logprob)).sum(), x)
    assert grad.shape == x.shape and grad.dtype == x.dtype
    assert (grad[~mask] == 0).all() and grad.isfinite().all()
    size = grad.double().abs().sum(-1)
    assert (grad.double().sum(-1).abs() <= TOLERANCE[x.dtype] * size + 1e-5).all()


@EXAMPLES
@given(batch=batches(), other=st.integers(0, 6))
def test_a_row_computed_alone_has_the_same_bits(impl, device, batch, other):
    x, target, _, temperature = place(batch, device)
    if target.numel() == 0:
        return
    if impl not in ROWWISE_IMPLS:
        pytest.skip("not promised by the reference")
    index = torch.unravel_index(torch.tensor(other % target.numel()), target.shape)
    together = softmax_stats(x, target, temperature=temperature, outputs=OUTPUTS, impl=impl)
    alone = softmax_stats(
        x[index], target[index], temperature=temperature[index], outputs=OUTPUTS, impl=impl
    )
    for name in OUTPUTS:
        assert same_bits(getattr(together, name)[index], getattr(alone, name)), name


@EXAMPLES
@given(batch=batches(max_vocab=20), reduction=st.sampled_from(("token_mean", "sequence_mean")))
def test_a_mean_loss_is_within_the_entropies_it_is_the_mean_of(impl, device, batch, reduction):
    x, _, mask, _ = place(batch, device)
    loss = entropy_loss(x, mask, reduction=reduction, impl=impl)
    entropy = truth(x)["entropy"][mask]
    if entropy.numel() == 0:
        assert loss == 0
    else:
        assert entropy.min() - 1e-5 <= loss <= entropy.max() * (1 + 1e-5) + 1e-5


@EXAMPLES
@given(
    batch=batches(max_vocab=20),
    vocab=st.integers(1, 60),
    chunk=st.integers(1, 9),
    frozen=st.booleans(),
)
def test_linear_is_softmax_stats_of_the_product(impl, device, batch, vocab, chunk, frozen):
    hidden, _, mask, temperature = place(batch, device)
    hidden = (hidden.clamp(-5, 5) / hidden.shape[-1] ** 0.5).requires_grad_()
    weight = torch.randn(vocab, hidden.shape[-1]).to(hidden).requires_grad_(not frozen)
    target = torch.randint(0, vocab, mask.shape, device=device)
    options = dict(mask=mask, temperature=temperature, impl=impl)
    stats = linear_softmax_stats(hidden, weight, target, chunk_tokens=chunk, **options)
    wide, wide_weight = hidden.detach().double().requires_grad_(), weight.detach().double()
    expected = truth(wide @ wide_weight.T, target, temperature=temperature)
    tolerance = 3 * TOLERANCE[hidden.dtype]
    scale = torch.ones_like(expected["entropy"])
    for name in ("logprob", "entropy"):
        exact = expected[name].masked_fill(~mask, 0)
        assert error(getattr(stats, name), exact, scale) <= tolerance
    (grad,) = torch.autograd.grad((stats.entropy - stats.logprob).sum(), hidden)
    loss = (expected["entropy"] - expected["logprob"])[mask].sum()
    (exact_grad,) = torch.autograd.grad(loss, wide)
    assert error(grad, exact_grad, scale * wide_weight.norm()) <= tolerance
