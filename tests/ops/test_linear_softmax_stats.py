"""linear_softmax_stats on every backend against float64 truth, and its chunk driver."""

import pytest
import torch
from helpers import (
    DIFFERENTIABLE,
    DTYPES,
    FAST_IMPLS,
    IMPLS,
    eager,
    error,
    gradient,
    product_flops,
    random_logits,
    random_target,
    random_upstream,
    same_bits,
    truth,
)

from em_kernels import linear_softmax_stats, softmax_stats
from em_kernels.backends.interface import OUTPUTS, RowSpec

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
EACH_IMPL = pytest.mark.parametrize("impl", IMPLS)
FAST_IMPL = pytest.mark.parametrize("impl", FAST_IMPLS)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])

STATS_TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6}
GRADIENT_TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 5e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}


def make_inputs(*lead, dim=24, vocab=331, dtype=torch.float32, device="cpu", bias=False):
    """hidden, weight, bias or None, target; logits of standard deviation about 3."""
    hidden = random_logits(*lead, dim, dtype=dtype, device=device, scale=1.0)
    weight = random_logits(vocab, dim, dtype=dtype, device=device, scale=3 * dim**-0.5)
    offset = random_logits(vocab, dtype=dtype, device=device, scale=1.0) if bias else None
    return hidden, weight, offset, random_target(*lead, vocab=vocab, device=device)


def leaves(*tensors, dtype=None):
    return [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors
    ]


def ours(inputs, upstream, outputs=DIFFERENTIABLE, **kwargs):
    """(stats, gradients of hidden, weight and, if there is one, bias)."""
    *operands, target = inputs
    operands = leaves(*operands)
    hidden, weight, bias = operands
    stats = linear_softmax_stats(hidden, weight, target, bias=bias, outputs=outputs, **kwargs)
    return stats, gradient(stats._asdict(), upstream, *(t for t in operands if t is not None))


def exact(inputs, upstream, dtype=torch.float64, formula=truth, **transform):
    """The same from all the logits in `dtype`."""
    *operands, target = inputs
    operands = leaves(*operands, dtype=dtype)
    hidden, weight, bias = operands
    logits = transform.pop("logit_scale", 1.0) * (hidden @ weight.T)
    logits = logits if bias is None else logits + bias
    stats = formula(logits, target, **transform)
    return stats, gradient(stats, upstream, *(t for t in operands if t is not None))


@EACH_IMPL
@EACH_DTYPE
@pytest.mark.parametrize("bias", (False, True), ids=("", "bias"))
def test_outputs_and_gradients_are_within_the_error_budget(impl, device, dtype, bias):
    inputs = make_inputs(2, 5, dtype=dtype, device=device, bias=bias)
    upstream = random_upstream(2, 5, dtype=dtype, device=device)
    stats, grads = ours(inputs, upstream, outputs=OUTPUTS, chunk_tokens=4, impl=impl)
    expected, expected_grads = exact(inputs, upstream)
    budget, budget_grads = exact(inputs, upstream, dtype, eager)
    for name in DIFFERENTIABLE:
        limit = error(budget[name], expected[name]) + STATS_TOLERANCE.get(dtype, 5e-6)
        assert error(getattr(stats, name), expected[name]) <= limit, name
    for out, ref, same_dtype in zip(grads, expected_grads, budget_grads, strict=True):
        assert out.dtype == dtype and out.shape == ref.shape
        assert error(out, ref) <= error(same_dtype, ref) + GRADIENT_TOLERANCE[dtype]


@EACH_IMPL
def test_every_output_equals_that_of_softmax_stats(impl, device):
    hidden, weight, bias, target = make_inputs(6, device=device, bias=True)
    out = linear_softmax_stats(hidden, weight, target, bias=bias, outputs=OUTPUTS, impl=impl)
    expected = softmax_stats(hidden @ weight.T + bias, target, outputs=OUTPUTS, impl=impl)
    for name in OUTPUTS:
        assert error(getattr(out, name), getattr(expected, name)) < 1e-4, name


@EACH_IMPL
def test_transforms(impl, device):
    transform = dict(temperature=0.8, softcap=6.0, logit_scale=1.7, valid_vocab=301)
    *operands, _ = make_inputs(7, device=device, bias=True)
    inputs = (*operands, random_target(7, vocab=301, device=device))
    upstream = random_upstream(7, device=device)
    stats, grads = ours(inputs, upstream, outputs=OUTPUTS, chunk_tokens=3, impl=impl, **transform)
    expected, expected_grads = exact(inputs, upstream, **transform)
    for name in ("logprob", "entropy", "lse", "varentropy", "collision", "self_certainty"):
        assert error(getattr(stats, name), expected[name]) < 1e-5, name
    for out, ref in zip(grads, expected_grads, strict=True):
        assert error(out, ref) < 1e-5
    for padded in grads[1:]:
        assert (padded[301:] == 0).all() and (padded[:301] != 0).any()


@EACH_IMPL
def test_gradcheck(impl, device):
    *operands, target = make_inputs(
        3, dim=4, vocab=6, dtype=torch.float64, device=device, bias=True
    )

    def values(hidden, weight, bias):
        stats = linear_softmax_stats(
            hidden, weight, target, bias=bias, temperature=0.7, softcap=5.0, impl=impl
        )
        return stats.logprob, stats.entropy

    assert torch.autograd.gradcheck(values, leaves(*operands), fast_mode=impl == "triton")


# Chunks


@FAST_IMPL
@pytest.mark.parametrize("chunk", (1, 2, 7, 16, 1000))
def test_any_chunk_size_gives_the_same_result(impl, device, chunk):
    inputs = make_inputs(16, device=device, bias=True)
    upstream = random_upstream(16, device=device)
    stats, grads = ours(inputs, upstream, impl=impl, chunk_tokens=chunk)
    expected, expected_grads = ours(inputs, upstream, impl=impl)
    assert error(stats.entropy, expected.entropy) < 1e-6
    for out, ref in zip(grads, expected_grads, strict=True):
        assert error(out, ref) < 2e-6


@FAST_IMPL
def test_gradients_of_the_weight_are_rounded_once(impl, device):
    """128 chunks of bfloat16 products are as exact as one: the sums between them are float32."""
    inputs = make_inputs(256, vocab=40, dtype=torch.bfloat16, device=device, bias=True)
    upstream = random_upstream(256, device=device)
    _, expected = exact(inputs, upstream)
    _, (_, weight, bias) = ours(inputs, upstream, impl=impl, chunk_tokens=2)
    _, (_, whole_weight, whole_bias) = ours(inputs, upstream, impl=impl, chunk_tokens=256)
    assert weight.dtype == bias.dtype == torch.bfloat16
    assert error(weight, expected[1]) <= 1.1 * error(whole_weight, expected[1]) + 5e-4
    assert error(bias, expected[2]) <= 1.1 * error(whole_bias, expected[2]) + 5e-4


@FAST_IMPL
def test_logits_dtype_float32_keeps_the_product_unrounded(impl, device):
    inputs = make_inputs(8, dim=64, dtype=torch.bfloat16, device=device)
    upstream = random_upstream(8, device=device)
    expected, expected_grads = exact(inputs, upstream)
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        stats, grads = ours(inputs, upstream, impl=impl, logits_dtype=dtype, chunk_tokens=3)
        errors[dtype] = error(stats.logprob, expected["logprob"])
        for out, ref in zip(grads, expected_grads, strict=True):
            assert out.dtype == torch.bfloat16
            assert error(out, ref) < 2e-2
    assert errors[torch.float32] < 1e-6 < 1e-4 < errors[torch.bfloat16]


@EACH_IMPL
def test_float32_logits_of_float64_operands(impl, device):
    """Less exact than the operands are, where it is asked for, with rows left out too."""
    inputs = make_inputs(8, dtype=torch.float64, device=device)
    upstream = random_upstream(8, dtype=torch.float64, device=device)
    mask, _ = left_out(inputs)
    settings = {"impl": impl, "logits_dtype": torch.float32}
    whole, _ = ours(inputs, upstream, **settings)
    stats, (grad_hidden, _) = ours(inputs, upstream, mask=mask, **settings)
    assert stats.logprob.dtype == grad_hidden.dtype == torch.float64
    assert error(stats.logprob[mask], whole.logprob[mask]) < 5e-6
    assert not stats.logprob[~mask].any() and not grad_hidden[~mask].any()


# What is left out costs nothing


def left_out(inputs):
    hidden, weight, bias, target = inputs
    mask = torch.arange(target.numel(), device=target.device).view(target.shape) % 3 == 1
    return mask, (hidden[mask], weight, bias, target[mask])


@EACH_IMPL
@pytest.mark.parametrize("kind", ("mask", "ignore_index"))
def test_left_out_rows_are_zeros_and_the_rest_is_as_if_they_were_not_there(impl, device, kind):
    inputs = make_inputs(3, 5, device=device, bias=True)
    mask, kept = left_out(inputs)
    upstream = random_upstream(3, 5, device=device)
    expected, expected_grads = ours(
        kept, {name: g[mask] for name, g in upstream.items()}, outputs=OUTPUTS, impl=impl
    )
    hidden, weight, bias, target = inputs
    hidden = hidden.masked_fill(~mask[..., None], torch.nan)
    upstream = {name: g.masked_fill(~mask, torch.nan) for name, g in upstream.items()}
    options = {"mask": mask} if kind == "mask" else {}
    target = target if kind == "mask" else target.masked_fill(~mask, -100)
    inputs = hidden, weight, bias, target
    stats, grads = ours(inputs, upstream, outputs=OUTPUTS, impl=impl, chunk_tokens=2, **options)
    for name in OUTPUTS:
        value = getattr(stats, name)
        assert (value[~mask] == 0).all(), name
        assert error(value[mask], getattr(expected, name)) < 1e-4, name
    assert (grads[0][~mask] == 0).all()
    assert error(grads[0][mask], expected_grads[0]) < 5e-6
    for out, ref in zip(grads[1:], expected_grads[1:], strict=True):
        assert error(out, ref) < 5e-6


@EACH_IMPL
def test_every_row_left_out(impl, device):
    inputs = make_inputs(4, device=device, bias=True)
    stats, grads = ours(
        inputs, random_upstream(4, device=device), impl=impl, mask=torch.zeros(4, device=device)
    )
    assert (stats.entropy == 0).all() and (stats.logprob == 0).all()
    assert all((grad == 0).all() for grad in grads)


@EACH_IMPL
def test_no_rows(impl, device):
    inputs = make_inputs(2, 0, device=device, bias=True)
    stats, grads = ours(inputs, random_upstream(2, 0, device=device), impl=impl)
    assert stats.entropy.shape == (2, 0)
    assert grads[0].shape == (2, 0, 24) and all((grad == 0).all() for grad in grads[1:])


@FAST_IMPL
@pytest.mark.parametrize("keep, products", ((0, 4), (None, 3)))
def test_left_out_rows_are_in_no_matrix_product(impl, device, keep, products):
    inputs = make_inputs(3, 5, device=device)
    mask, _ = left_out(inputs)
    one_product = 2 * int(mask.sum()) * 331 * 24
    upstream = random_upstream(3, 5, device=device)
    options = dict(impl=impl, mask=mask, keep_logits=keep)
    assert product_flops(lambda: ours(inputs, upstream, **options)) == products * one_product


@FAST_IMPL
@pytest.mark.parametrize(
    "trained, products", (("hidden weight", 4), ("hidden", 2), ("weight", 3), ("", 1))
)
def test_what_is_frozen_costs_no_product_and_no_memory(impl, device, trained, products):
    hidden, weight, _, _ = make_inputs(9, device=device)
    hidden.requires_grad_("hidden" in trained)
    weight.requires_grad_("weight" in trained)

    def step():
        options = dict(chunk_tokens=4, keep_logits=0, impl=impl)
        entropy = linear_softmax_stats(hidden, weight, **options).entropy
        if entropy.requires_grad:
            entropy.sum().backward()

    assert product_flops(step) == products * 2 * 9 * 331 * 24
    assert (hidden.grad is not None) == ("hidden" in trained)
    assert (weight.grad is not None) == ("weight" in trained)


@FAST_IMPL
def test_gradients_that_are_not_needed_are_not_allocated(impl, device):
    hidden, weight, bias, _ = make_inputs(5, device=device, bias=True)
    spec = RowSpec(bias, valid_vocab=331)[: RowSpec._fields.index("truncation")]
    rows = torch.ops.em_kernels.linear_stats(hidden, weight, *spec, (), None, None, impl)
    needs = (True, False, False, None)
    upstream = (None, torch.ones(5, device=device), None)
    grads = torch.ops.em_kernels.linear_grad(
        hidden, weight, *spec, *rows, *upstream, *needs, None, None, impl
    )
    assert [grad.numel() for grad in grads] == [hidden.numel(), 0, 0]


@FAST_IMPL
def test_backward_of_outputs_without_gradient_runs_no_product(impl, device):
    hidden, weight, _, target = make_inputs(5, device=device)
    stats = linear_softmax_stats(*leaves(hidden, weight), target, keep_logits=0, impl=impl)
    flops = product_flops(lambda: (stats.logprob.sum() * 0.5).backward())
    assert flops == 3 * 2 * 5 * 331 * 24


# Shapes, layouts, modes


@EACH_IMPL
@pytest.mark.parametrize("layout", ("1d", "4d", "tail", "strided_dim", "weight_view"))
def test_shapes_and_layouts(impl, device, layout):
    hidden, weight, _, _ = make_inputs(4, 5, device=device)
    match layout:
        case "1d":
            hidden = hidden[0, 0]
        case "4d":
            hidden = hidden.view(2, 2, 5, 24)
        case "tail":
            hidden = hidden[:, :-1]
        case "strided_dim":
            hidden, weight = hidden[..., ::2], weight[:, ::2]
        case "weight_view":
            weight = torch.cat([weight.T, weight.T], 1)[:, 100:300].T
    target = random_target(*hidden.shape[:-1], vocab=len(weight), device=device)
    inputs, upstream = (hidden, weight, None, target), random_upstream(*target.shape, device=device)
    stats, grads = ours(inputs, upstream, impl=impl)
    expected, expected_grads = exact(inputs, upstream)
    assert error(stats.logprob, expected["logprob"]) < 5e-6
    assert error(stats.entropy, expected["entropy"]) < 5e-6
    for out, ref in zip(grads, expected_grads, strict=True):
        assert out.shape == ref.shape and error(out, ref) < 5e-6


@FAST_IMPL
def test_autocast_casts_both_operands_and_returns_gradients_in_their_own_dtype(impl, device):
    inputs = make_inputs(6, device=device, bias=True)
    upstream = random_upstream(6, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        stats, grads = ours(inputs, upstream, impl=impl)
    hidden, weight, bias, target = inputs
    rounded = hidden.bfloat16(), weight.bfloat16(), bias, target
    expected, expected_grads = ours(rounded, upstream, impl=impl)
    assert same_bits(stats.entropy, expected.entropy)
    for out, ref in zip(grads, expected_grads, strict=True):
        assert out.dtype == torch.float32
        assert same_bits(out, ref.float())


@FAST_IMPL
def test_float64_stays_float64_under_autocast(impl, device):
    hidden, weight, _, _ = make_inputs(6, dtype=torch.float64, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        entropy = linear_softmax_stats(hidden, weight, impl=impl).entropy
    assert entropy.dtype == torch.float64
    assert error(entropy, truth(hidden @ weight.T)["entropy"]) < 1e-13


@FAST_IMPL
def test_same_inputs_give_the_same_bits(impl, device, two_threads):
    inputs = make_inputs(40, device=device, bias=True)
    upstream = random_upstream(40, device=device)
    stats, grads = ours(inputs, upstream, impl=impl, chunk_tokens=16)
    again, grads_again = ours(inputs, upstream, impl=impl, chunk_tokens=16)
    assert same_bits(stats.entropy, again.entropy) and same_bits(stats.logprob, again.logprob)
    assert all(same_bits(a, b) for a, b in zip(grads, grads_again, strict=True))


@FAST_IMPL
@pytest.mark.parametrize("use_reentrant", (True, False))
def test_gradient_checkpointing(impl, device, use_reentrant):
    hidden, weight, _, target = make_inputs(6, device=device)

    def loss(hidden, weight):
        stats = linear_softmax_stats(hidden, weight, target, impl=impl)
        return (stats.logprob + stats.entropy).sum()

    plain, checkpointed = leaves(hidden, weight), leaves(hidden, weight)
    loss(*plain).backward()
    torch.utils.checkpoint.checkpoint(loss, *checkpointed, use_reentrant=use_reentrant).backward()
    for a, b in zip(plain, checkpointed, strict=True):
        assert same_bits(a.grad, b.grad)


@FAST_IMPL
def test_a_bad_token_touches_no_other_token(impl, device):
    inputs = make_inputs(5, device=device)
    upstream = random_upstream(5, device=device)
    clean, clean_grads = ours(inputs, upstream, impl=impl)
    inputs[0][2] = torch.nan
    stats, grads = ours(inputs, upstream, impl=impl)
    others = [0, 1, 3, 4]
    assert stats.entropy[2].isnan() and stats.logprob[2].isnan() and grads[0][2].isnan().all()
    assert error(stats.entropy[others], clean.entropy[others]) < 1e-6
    assert error(grads[0][others], clean_grads[0][others]) < 1e-6
