"""linear_divergence and its loss: of two heads, against divergence of their logits."""

import pytest
import torch
from divergences import KIND_NAMES, KINDS, OTHER, OWN, doubles, gradients, leaves, truth
from helpers import (
    DTYPES,
    FAST_IMPLS,
    error,
    product_flops,
    random_logits,
    random_target,
    same_bits,
)

from benchmarks.common import peak_memory
from em_kernels import (
    linear_divergence,
    linear_divergence_loss,
    linear_divergence_stats,
    linear_softmax_stats,
)

EVERY_IMPL = pytest.mark.parametrize("impl", FAST_IMPLS)
EVERY_KIND = pytest.mark.parametrize(("kind", "beta"), KINDS, ids=KIND_NAMES)
N, V, D, OTHER_D = 7, 101, 8, 12
NAMES = ("hidden", "weight", "bias", "other_hidden", "other_weight", "other_bias")


def draw_heads(device, dtype=torch.float32, other_dtype=None, rows=(N,)):
    """(hidden, weight, bias) twice, of different sizes."""
    tensors = []
    for dim, kind in ((D, dtype), (OTHER_D, other_dtype or dtype)):
        tensors.append(random_logits(*rows, dim, dtype=kind, device=device) / 4)
        tensors.append(random_logits(V, dim, dtype=kind, device=device) / 4)
        tensors.append(random_logits(V, dtype=kind, device=device) / 2)
    return tensors


def expected_of(tensors, kind, beta, **options):
    x, weight, bias, y, other_weight, other_bias = tensors
    biases = dict(bias=bias, other_bias=other_bias)
    return truth(x @ weight.T, y @ other_weight.T, kind, beta, **biases, **options)


def called(function, tensors, **options):
    x, weight, bias, y, other_weight, other_bias = tensors
    return function(x, weight, y, other_weight, bias=bias, other_bias=other_bias, **options)


def check(tensors, impl, kind, beta, bound, **options):
    wide = doubles(*tensors)
    given = {name: v for name, v in options.items() if name not in ("chunk_tokens", "logits_dtype")}
    expected = expected_of(wide, kind, beta, **given)
    weights = torch.linspace(0.5, 2, expected.numel(), device=expected.device)
    weights = weights.view(expected.shape)
    expected_grads = gradients(expected, wide, weights)
    own, again = leaves(*tensors), leaves(*tensors)
    options |= dict(kind=kind, beta=beta, impl=impl)
    value = called(linear_divergence, own, **options)
    assert error(value, expected) < bound
    loss = called(linear_divergence_loss, again, token_weight=weights, **options)
    assert error(loss.divergence, expected) < bound
    assert error(loss.loss, (weights * expected).sum()) < bound
    made = torch.autograd.grad(loss.loss, again)
    for name, ours, ready, theirs, like in zip(
        NAMES, gradients(value, own, weights.to(value)), made, expected_grads, tensors, strict=True
    ):
        assert ours.dtype == ready.dtype == like.dtype, name
        assert error(ours, theirs) < bound, name
        assert error(ready, theirs) < bound, name


BOUND = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@EVERY_IMPL
@EVERY_KIND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradients_of_both_heads(impl, device, kind, beta, dtype):
    check(draw_heads(device, dtype), impl, kind, beta, BOUND[dtype], chunk_tokens=3)


@EVERY_IMPL
@EVERY_KIND
def test_options_of_each_side(impl, device, kind, beta):
    heads = draw_heads(device, rows=(2, 3))
    check(heads, impl, kind, beta, 5e-5, **OWN, **OTHER)
    rows = 0.5 + torch.rand(2, 3, device=device)
    check(heads, impl, kind, beta, 5e-5, temperature=rows, valid_vocab=V - 3, chunk_tokens=4)


@EVERY_IMPL
def test_heads_of_different_dtypes_and_float32_logits(impl, device):
    heads = draw_heads(device, torch.bfloat16, torch.float32)
    check(heads, impl, "reverse_kl", 0.5, 2e-2, chunk_tokens=2)
    heads[1], heads[4] = heads[1].float(), heads[4].bfloat16()
    check(heads, impl, "forward_kl", 0.5, 2e-2, chunk_tokens=2)
    heads = draw_heads(device, torch.bfloat16)
    check(heads, impl, "js", 0.3, 2e-2, logits_dtype=torch.float32)


@EVERY_IMPL
def test_rows_that_are_left_out(impl, device):
    """By mask, ignored target and weight: exact zeros, and what is in them does no harm."""
    heads = draw_heads(device)
    mask = torch.tensor([1, 0, 1, 1, 1, 1, 1], device=device) > 0
    target = random_target(N, vocab=V, device=device)
    target[2], kept = -100, torch.tensor([0, 3, 4, 5, 6], device=device)
    heads[0][1], heads[3][2] = torch.inf, torch.nan
    own, some = leaves(*heads), leaves(*heads)
    options = dict(impl=impl, chunk_tokens=2)
    value = called(linear_divergence, own, mask=mask, target=target, **options)
    expected = called(
        linear_divergence, [x[kept] if i in (0, 3) else x for i, x in enumerate(some)], **options
    )
    assert (value[[1, 2]] == 0).all() and error(value[kept], expected) < 1e-6
    grads = gradients(value, own)
    for ours, theirs in zip(grads, gradients(expected, some), strict=True):
        assert error(ours, theirs) < 1e-5
    weight = torch.zeros(N, device=device)
    weight[kept] = 1.0
    loss = called(linear_divergence_loss, own, token_weight=weight, **options)
    assert error(loss.loss, expected.sum()) < 1e-6
    for ours, theirs in zip(torch.autograd.grad(loss.loss, own), grads, strict=True):
        assert error(ours, theirs) < 1e-5
    nothing = called(linear_divergence_loss, own, token_weight=0 * weight, **options)
    assert all((g == 0).all() for g in torch.autograd.grad(nothing.loss, own))


@EVERY_IMPL
def test_a_frozen_head_costs_no_product(impl, device):
    """4 products in a loss with the other head frozen, 6 with both; 2 and 2 more per token."""
    x, weight, _, y, other_weight, _ = draw_heads(device)
    own, other = 2 * N * V * D, 2 * N * V * OTHER_D
    for wanted, products in ((2, 3 * own + other), (4, 3 * (own + other))):
        tensors, made = [x, weight, y, other_weight], []
        for tensor in tensors[:wanted]:
            tensor.requires_grad_()
        given = dict(token_weight=torch.ones(N, device=device), impl=impl)

        def loss(given=given, tensors=tensors, made=made):
            made.append(linear_divergence_loss(*tensors, **given).loss)

        def per_token(tensors=tensors, made=made):
            made.append(linear_divergence(*tensors, impl=impl).sum())

        assert product_flops(loss) == products
        assert product_flops(per_token) == own + other
        assert product_flops(made[0].backward) == 0
        assert product_flops(made[1].backward) == products


@EVERY_IMPL
def test_the_other_head_alone(impl, device):
    heads = draw_heads(device)
    both = gradients(called(linear_divergence, own := leaves(*heads), impl=impl), own)
    heads[3].requires_grad_()
    value = called(linear_divergence, heads, impl=impl)
    (grad,) = torch.autograd.grad(value.sum(), heads[3])
    assert same_bits(grad, both[3])


@EVERY_IMPL
def test_statistics_of_both_heads(impl, device):
    x, weight, _, y, other_weight, _ = draw_heads(device)
    target = random_target(N, vocab=V, device=device)
    options = dict(outputs=("logprob", "entropy", "rank"), target=target)
    options |= dict(other_outputs=("entropy", "lse", "is_kept"))
    found = linear_divergence_stats(x, weight, y, other_weight, impl=impl, **options)
    own = linear_softmax_stats(x, weight, target, outputs=options["outputs"], impl=impl)
    other = linear_softmax_stats(y, other_weight, outputs=("entropy", "lse"), impl=impl)
    assert torch.equal(found.stats.rank, own.rank) and found.other_stats.is_kept.all()
    assert error(found.stats.logprob, own.logprob) < 1e-6
    assert error(found.stats.entropy, own.entropy) < 1e-6
    assert error(found.other_stats.entropy, other.entropy) < 1e-6
    assert error(found.other_stats.lse, other.lse) < 1e-6


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the workspace is 1 GiB")
@pytest.mark.parametrize("impl", [name for name in FAST_IMPLS if name == "cpu"])
@pytest.mark.parametrize("frozen", (True, False), ids=("teacher", "both"))
def test_under_200_mb_however_many_tokens(impl, frozen):
    """All the logits of one head would be 200 MB in bfloat16."""
    torch.use_deterministic_algorithms(False)
    heads = [random_logits(*shape, 16, dtype=torch.bfloat16) for shape in ((2048,), (50021,)) * 2]
    for tensor in heads[: 2 if frozen else 4]:
        tensor.requires_grad_()
    options = dict(token_weight=torch.ones(2048), kind="js", impl=impl)

    def step():
        torch.autograd.grad(
            linear_divergence_loss(*heads, **options).loss, [x for x in heads if x.requires_grad]
        )

    step()
    peak = peak_memory(step, "cpu")
    if peak is None:
        pytest.skip("no resettable peak in /proc/self/status here")
    assert 100e6 < peak < 200e6, "chunks of logits are 160 MB: less was not measured"


@EVERY_IMPL
def test_second_derivatives(impl, device):
    x, weight, _, y, other_weight, _ = draw_heads(device, torch.float64, rows=(2,))
    heads = leaves(x, weight[:5], y, other_weight[:5])

    def call(*heads):
        return linear_divergence(*heads, kind="js", beta=0.3, softcap=4.0, impl=impl)

    assert torch.autograd.gradcheck(call, heads)
    assert torch.autograd.gradgradcheck(call, heads)


@pytest.mark.parametrize("impl", FAST_IMPLS[:1])
def test_autocast_casts_both_heads(impl, device):
    heads = leaves(*draw_heads(device))
    x, weight, _, y, other_weight, _ = heads
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        value = linear_divergence(x, weight, y, other_weight, impl=impl)
    expected = linear_divergence(*(t.bfloat16() for t in (x, weight, y, other_weight)))
    assert error(value, expected) < 1e-6
    assert torch.autograd.grad(value.sum(), weight)[0].dtype == torch.float32


@pytest.mark.parametrize("impl", FAST_IMPLS[:1])
def test_bad_heads_are_named(impl, device):
    x, weight, bias, y, other_weight, _ = draw_heads(device)
    cases = (
        ((x, weight, y, other_weight[:-1]), "other_weight must have the 101 rows of weight"),
        ((x, weight, y[1:], other_weight), "other_hidden must have the leading shape of hidden"),
        ((x, weight, y, weight), r"other_weight must be \(V, D\) with D = 12 as in other_hidden"),
        ((x, other_weight, y, other_weight), r"^weight must be \(V, D\) with D = 8"),
    )
    for tensors, message in cases:
        with pytest.raises(ValueError, match=message):
            linear_divergence(*tensors)
    with pytest.raises(ValueError, match=r"other_bias must be \(101,\)"):
        linear_divergence(x, weight, y, other_weight, other_bias=bias[1:])
    with pytest.raises(TypeError, match="other_weight and other_hidden have dtypes neither"):
        linear_divergence(x, weight, y.half(), other_weight.bfloat16())
    weights = torch.ones(N, device=device)
    with pytest.raises(ValueError, match=r"hidden or weight or other_hidden .* must require grad"):
        linear_divergence_loss(x, weight, y, other_weight, token_weight=weights)
    assert not linear_divergence(x, weight, y, other_weight).requires_grad
