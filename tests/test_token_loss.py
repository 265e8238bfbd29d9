"""Losses with the gradient made in the forward pass: equal to the same loss of softmax_stats."""

import pytest
import torch
from helpers import (
    DTYPES,
    FAST_IMPLS,
    IMPLS,
    error,
    product_flops,
    random_logits,
    random_target,
    same_bits,
    truth,
)

from benchmarks.common import peak_memory
from em_kernels import (
    EntropyLoss,
    LinearEntropyLoss,
    entropy_loss,
    linear_entropy_loss,
    linear_token_loss,
    softmax_stats,
    token_loss,
)
from em_kernels._spec import OUTPUTS

EACH_IMPL = pytest.mark.parametrize("impl", IMPLS)
FAST_IMPL = pytest.mark.parametrize("impl", FAST_IMPLS)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
WEIGHTINGS = ("entropy", "logprob", "both")


@pytest.fixture(autouse=True)
def _nan(nan_filled_memory):
    """Every test here sees an element that was not written."""


def make_weights(kind, *lead, device="cpu"):
    weights = {}
    if kind != "logprob":
        weights["entropy_weight"] = torch.randn(lead, device=device)
    if kind != "entropy":
        weights["logprob_weight"] = torch.randn(lead, device=device)
    return weights


def composed(stats, entropy_weight=None, logprob_weight=None):
    loss = 0.0
    if entropy_weight is not None:
        loss = loss + (entropy_weight * stats.entropy).sum()
    if logprob_weight is not None:
        loss = loss + (logprob_weight * stats.logprob).sum()
    return loss


def make_linear(*lead, dim=16, vocab=301, dtype=torch.float32, device="cpu"):
    hidden = random_logits(*lead, dim, dtype=dtype, device=device, scale=1.0)
    weight = random_logits(vocab, dim, dtype=dtype, device=device, scale=3 * dim**-0.5)
    return hidden.requires_grad_(), weight.requires_grad_()


# From logits


@EACH_IMPL
@EACH_DTYPE
@pytest.mark.parametrize("kind", WEIGHTINGS)
def test_equals_the_loss_composed_from_softmax_stats(impl, device, dtype, kind):
    x = random_logits(2, 3, 515, dtype=dtype, device=device).requires_grad_()
    target = random_target(2, 3, vocab=515, device=device)
    weights = make_weights(kind, 2, 3, device=device)
    options = dict(temperature=0.7, softcap=9.0, logit_scale=1.2, valid_vocab=515, impl=impl)
    loss, stats = token_loss(x, target, outputs=OUTPUTS, **weights, **options)
    separate = softmax_stats(x, target, outputs=OUTPUTS, **options)
    expected = composed(separate, **weights)
    assert loss.dtype == expected.dtype and loss.shape == ()
    assert error(loss, expected) < 1e-5
    for name in OUTPUTS:
        assert error(getattr(stats, name), getattr(separate, name)) < 1e-5, name
        assert not getattr(stats, name).requires_grad
    (grad,), (expected_grad,) = (torch.autograd.grad(value, x) for value in (loss, expected))
    assert grad.dtype == dtype
    assert error(grad, expected_grad) <= TOLERANCE[dtype]


@EACH_IMPL
def test_outputs_need_not_hold_what_the_loss_is_made_of(impl, device):
    x = random_logits(4, 100, device=device)
    loss, stats = token_loss(
        x, entropy_weight=torch.ones(4, device=device), outputs=("max_prob",), impl=impl
    )
    assert {name for name, value in stats._asdict().items() if value is not None} == {"max_prob"}
    assert error(loss, truth(x)["entropy"].sum()) < 1e-6


@EACH_IMPL
@pytest.mark.parametrize("kind", WEIGHTINGS)
def test_strided_logits(impl, device, kind):
    full = random_logits(2, 4, 130, device=device).requires_grad_()
    target = random_target(2, 3, vocab=130, device=device)
    weights = make_weights(kind, 2, 3, device=device)
    loss = token_loss(full[:, :-1], target, impl=impl, **weights).loss
    expected = composed(softmax_stats(full[:, :-1], target, impl=impl), **weights)
    (grad,), (expected_grad,) = (torch.autograd.grad(value, full) for value in (loss, expected))
    assert error(grad, expected_grad) < 2e-6
    assert (grad[:, -1] == 0).all()


@EACH_IMPL
def test_a_token_without_weight_is_left_out(impl, device):
    x = random_logits(4, 100, device=device)
    x[1], x[2] = torch.nan, torch.inf
    x.requires_grad_()
    weight = torch.tensor([0.5, 0.0, 0.0, 2.0], device=device)
    loss, stats = token_loss(x, entropy_weight=weight, impl=impl)
    expected = truth(x.detach()[[0, 3]])["entropy"]
    assert error(loss, 0.5 * expected[0] + 2 * expected[1]) < 1e-6
    assert (stats.entropy[1:3] == 0).all()
    (grad,) = torch.autograd.grad(loss, x)
    assert (grad[1:3] == 0).all() and (grad[[0, 3]] != 0).any(-1).all()


@EACH_IMPL
@pytest.mark.parametrize("kind", ("ignore_index", "mask"))
def test_left_out_rows(impl, device, kind):
    x = random_logits(4, 100, device=device)
    x[1] = torch.nan
    target = torch.tensor([3, -100 if kind == "ignore_index" else 10**9, 5, 6], device=device)
    mask = None if kind == "ignore_index" else torch.tensor([1, 0, 1, 1], device=device)
    ones, leaf = torch.ones(4, device=device), x.requires_grad_()
    loss = token_loss(leaf, target, mask=mask, logprob_weight=ones, impl=impl).loss
    kept = [0, 2, 3]
    assert error(loss, truth(x.detach()[kept], target[kept])["logprob"].sum()) < 1e-6
    (grad,) = torch.autograd.grad(loss, leaf)
    assert (grad[1] == 0).all() and grad.isfinite().all()


@EACH_IMPL
@pytest.mark.parametrize("upstream", (1.0, -2.5, 0.0))
def test_the_gradient_from_above_scales_the_gradient(impl, device, upstream):
    x = random_logits(3, 100, device=device).requires_grad_()
    (once,) = torch.autograd.grad(entropy_loss(x, impl=impl), x)
    (scaled,) = torch.autograd.grad(upstream * entropy_loss(x, impl=impl), x)
    assert error(scaled, upstream * once) < 1e-7


@EACH_IMPL
def test_losses_add_up_over_micro_batches(impl, device):
    x = random_logits(6, 100, device=device).requires_grad_()
    whole = torch.autograd.grad(entropy_loss(x, reduction="sum", impl=impl), x)[0]
    for part in x.split(2):
        entropy_loss(part, reduction="sum", impl=impl).backward()
    assert error(x.grad, whole) < 1e-7


@EACH_IMPL
def test_backward_twice_with_retain_graph(impl, device):
    x = random_logits(3, 100, device=device).requires_grad_()
    loss = entropy_loss(x, impl=impl)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * once)


@EACH_IMPL
def test_a_gradient_changed_in_place_cannot_change_the_next(impl, device):
    x = random_logits(3, 100, device=device).requires_grad_()
    loss = entropy_loss(x, impl=impl)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    expected = first.clone()
    first.zero_()
    try:
        (second,) = torch.autograd.grad(loss, x)
    except RuntimeError as refused:
        assert "modified by an inplace operation" in str(refused)
    else:
        assert torch.equal(second, expected)


@EACH_IMPL
def test_backward_twice_without_retain_graph_is_refused(impl, device):
    loss = entropy_loss(random_logits(3, 100, device=device).requires_grad_(), impl=impl)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@EACH_IMPL
def test_without_grad_only_the_statistics_are_made(impl, device):
    x = random_logits(3, 100, device=device).requires_grad_()
    before = x.detach().clone()
    with torch.no_grad():
        loss = entropy_loss(x, inplace=True, impl=impl)
    assert not loss.requires_grad
    assert torch.equal(x, before)
    assert error(loss, truth(before)["entropy"].mean()) < 1e-6


@FAST_IMPL
@pytest.mark.parametrize("use_reentrant", (True, False))
def test_gradient_checkpointing(impl, device, use_reentrant):
    plain = random_logits(3, 100, device=device).requires_grad_()
    other = plain.detach().clone().requires_grad_()
    checkpoint = torch.utils.checkpoint.checkpoint
    entropy_loss(3 * plain, impl=impl).backward()
    checkpoint(
        lambda x: entropy_loss(3 * x, impl=impl), other, use_reentrant=use_reentrant
    ).backward()
    assert same_bits(plain.grad, other.grad)


# In place


@EACH_IMPL
@EACH_DTYPE
@pytest.mark.parametrize("cut", ("whole", "tail", "transposed"))
def test_inplace_gives_the_same_and_uses_the_memory_of_the_logits(impl, device, dtype, cut):
    full = random_logits(2, 4, 130, dtype=dtype, device=device)
    transposed = full.transpose(1, 2).contiguous().transpose(1, 2)
    view = {"whole": full, "tail": full[:, :-1], "transposed": transposed}[cut]
    plain = view.clone().requires_grad_()
    expected = entropy_loss(plain, impl=impl)
    (expected_grad,) = torch.autograd.grad(expected, plain)
    view.requires_grad_()
    loss = entropy_loss(view, inplace=True, impl=impl)
    (grad,) = torch.autograd.grad(loss, view)
    assert same_bits(loss, expected)
    assert error(grad, expected_grad) <= TOLERANCE[dtype]
    assert error(view, grad) == 0


@EACH_IMPL
def test_inplace_of_logits_that_were_computed(impl, device):
    hidden, weight = make_linear(6, device=device)
    entropy_loss(hidden @ weight.T, inplace=True, impl=impl).backward()
    grads = hidden.grad, weight.grad
    expected = torch.autograd.grad(entropy_loss(hidden @ weight.T, impl=impl), (hidden, weight))
    assert all(error(a, b) < 2e-6 for a, b in zip(grads, expected, strict=True))


@EACH_IMPL
def test_inplace_is_noticed_by_an_operation_that_kept_the_logits(impl, device):
    """tanh needs its own output for its gradient: overwriting it must raise, not mislead."""
    logits = torch.tanh(random_logits(3, 100, device=device).requires_grad_())
    loss = entropy_loss(logits, inplace=True, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@EACH_IMPL
def test_inplace_with_retain_graph(impl, device):
    x = random_logits(3, 100, device=device).requires_grad_()
    loss = entropy_loss(x, inplace=True, impl=impl)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * once)


# Reductions

MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]])


def reduced(entropy, mask, reduction):
    match reduction:
        case "token_mean":
            return entropy[mask > 0].mean()
        case "sum":
            return entropy[mask > 0].sum()
        case "sequence_mean":
            rows = [e[m > 0].mean() for e, m in zip(entropy, mask) if m.any()]
            return torch.stack(rows).mean()
    return entropy[mask > 0].sum() / reduction


@EACH_IMPL
@pytest.mark.parametrize("masked", (True, False))
@pytest.mark.parametrize("reduction", ("token_mean", "sequence_mean", "sum", 7.5, 2))
def test_reductions(impl, device, reduction, masked):
    x = random_logits(3, 4, 100, device=device).requires_grad_()
    mask = MASK.to(device) if masked else None
    loss = entropy_loss(x, mask, reduction=reduction, temperature=0.5, impl=impl)
    exact = x.detach().double().requires_grad_()
    entropy = truth(exact, temperature=0.5)["entropy"]
    full = torch.ones_like(MASK).to(device) if mask is None else mask
    expected = reduced(entropy, full, reduction)
    assert error(loss, expected) < 1e-6
    grads = torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, exact)[0]
    assert error(*grads) < 2e-6


@EACH_IMPL
@pytest.mark.parametrize("reduction", ("token_mean", "sequence_mean", "sum", 3.0))
def test_an_empty_mask_gives_zero_and_a_zero_gradient(impl, device, reduction):
    x = torch.full((2, 3, 100), torch.nan, device=device, requires_grad=True)
    mask = torch.zeros(2, 3, device=device)
    loss = entropy_loss(x, mask, reduction=reduction, impl=impl)
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, x)[0] == 0).all()


@EACH_IMPL
def test_a_mask_is_where_it_is_not_zero_whatever_its_numbers(impl, device):
    x = random_logits(3, 100, device=device)
    by_float = entropy_loss(x, torch.tensor([0.5, 0.0, -3.0], device=device), impl=impl)
    by_bool = entropy_loss(x, torch.tensor([True, False, True], device=device), impl=impl)
    assert same_bits(by_float, by_bool)


@EACH_IMPL
def test_one_token_without_a_batch(impl, device):
    x = random_logits(100, device=device)
    for reduction in ("token_mean", "sequence_mean", "sum"):
        loss = entropy_loss(x, reduction=reduction, impl=impl)
        assert error(loss, truth(x)["entropy"]) < 1e-6


# From hidden states


@EACH_IMPL
@EACH_DTYPE
@pytest.mark.parametrize("kind", WEIGHTINGS)
def test_linear_equals_the_loss_of_all_the_logits(impl, device, dtype, kind):
    hidden, weight = make_linear(3, 4, dtype=dtype, device=device)
    target = random_target(3, 4, vocab=301, device=device)
    weights = make_weights(kind, 3, 4, device=device)
    loss, stats = linear_token_loss(
        hidden, weight, target, temperature=0.8, chunk_tokens=5, impl=impl, **weights
    )
    grads = torch.autograd.grad(loss, (hidden, weight))

    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    values = truth(wide[0] @ wide[1].T, target, temperature=0.8)
    expected = sum((w * values[name.split("_")[0]]).sum() for name, w in weights.items())
    expected_grads = torch.autograd.grad(expected, wide)
    scale = sum((w * values[name.split("_")[0]]).abs().sum() for name, w in weights.items())
    assert abs(loss.item() - expected.item()) <= TOLERANCE[dtype] * scale.item()
    assert error(stats.entropy, values["entropy"]) <= 2 * TOLERANCE[dtype]
    for out, ref in zip(grads, expected_grads, strict=True):
        assert out.dtype == dtype and error(out, ref) <= 4 * TOLERANCE[dtype]


@EACH_IMPL
def test_linear_entropy_loss_with_every_option(impl, device):
    hidden, weight = make_linear(3, 4, device=device)
    bias = torch.randn(301, device=device, requires_grad=True)
    options = dict(temperature=0.5, softcap=8.0, logit_scale=0.9, valid_vocab=250, impl=impl)
    mask, inputs = MASK.to(device), (hidden, weight, bias)
    loss = linear_entropy_loss(
        hidden, weight, mask, bias=bias, reduction="sequence_mean", chunk_tokens=2, **options
    )
    grads = torch.autograd.grad(3 * loss, inputs)
    logits = 0.9 * (hidden @ weight.T) + bias
    options["logit_scale"] = 1.0
    expected = entropy_loss(logits, mask, reduction="sequence_mean", **options)
    expected_grads = torch.autograd.grad(3 * expected, inputs)
    assert error(loss, expected) < 5e-6
    for out, ref in zip(grads, expected_grads, strict=True):
        assert error(out, ref) < 1e-5
        assert out.shape[0] != 301 or (out[250:] == 0).all()


@FAST_IMPL
@pytest.mark.parametrize(
    "trained, products", (("hidden weight", 3), ("hidden", 2), ("weight", 2), ("", 1))
)
def test_linear_takes_three_products_and_fewer_where_frozen(impl, device, trained, products):
    hidden, weight = make_linear(9, device=device)
    hidden.requires_grad_("hidden" in trained)
    weight.requires_grad_("weight" in trained)
    mask = torch.arange(9, device=device) % 3 > 0

    def step():
        loss = linear_entropy_loss(hidden, weight, mask, chunk_tokens=4, impl=impl)
        if loss.requires_grad:
            loss.backward()

    assert product_flops(step) == products * 2 * 6 * 301 * 16
    assert (hidden.grad is not None) == ("hidden" in trained)
    assert (weight.grad is not None) == ("weight" in trained)


@FAST_IMPL
def test_linear_without_grad_runs_one_product(impl, device):
    hidden, weight = make_linear(9, device=device)
    with torch.no_grad():
        flops = product_flops(lambda: linear_entropy_loss(hidden, weight, impl=impl))
    assert flops == 2 * 9 * 301 * 16


@FAST_IMPL
@pytest.mark.parametrize("reduction", ("token_mean", "sequence_mean", "sum"))
def test_linear_empty_mask(impl, device, reduction):
    hidden, weight = make_linear(2, 3, device=device)
    mask = torch.zeros(2, 3, device=device)
    loss = linear_entropy_loss(hidden, weight, mask, reduction=reduction, impl=impl)
    assert loss.item() == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (hidden, weight)))


@FAST_IMPL
def test_linear_backward_twice_with_retain_graph(impl, device):
    hidden, weight = make_linear(5, device=device)
    loss = linear_entropy_loss(hidden, weight, impl=impl)
    loss.backward(retain_graph=True)
    once = hidden.grad.clone(), weight.grad.clone()
    loss.backward()
    assert torch.equal(hidden.grad, 2 * once[0]) and torch.equal(weight.grad, 2 * once[1])


@FAST_IMPL
@pytest.mark.parametrize("use_reentrant", (True, False))
def test_linear_gradient_checkpointing(impl, device, use_reentrant):
    hidden, weight = make_linear(5, device=device)
    loss = torch.utils.checkpoint.checkpoint(
        lambda h, w: linear_entropy_loss(h, w, impl=impl),
        hidden,
        weight,
        use_reentrant=use_reentrant,
    )
    loss.backward()
    expected = torch.autograd.grad(linear_entropy_loss(hidden, weight, impl=impl), (hidden, weight))
    assert same_bits(hidden.grad, expected[0]) and same_bits(weight.grad, expected[1])


@FAST_IMPL
def test_linear_autocast(impl, device):
    hidden, weight = make_linear(6, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = linear_entropy_loss(hidden, weight, impl=impl)
    grads = torch.autograd.grad(loss, (hidden, weight))
    rounded = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight)]
    expected = linear_entropy_loss(*rounded, impl=impl)
    assert same_bits(loss, expected)
    for out, ref in zip(grads, torch.autograd.grad(expected, rounded), strict=True):
        assert out.dtype == torch.float32 and same_bits(out, ref.float())


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the workspace is 1 GiB")
@pytest.mark.parametrize("impl", [name for name in IMPLS if name == "cpu"])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_linear_takes_under_200_mb_however_many_tokens(impl, dtype):
    """All the logits would be 400 MB (200 MB in bfloat16), four times over."""
    torch.use_deterministic_algorithms(False)
    hidden, weight = make_linear(2048, dim=16, vocab=50021, dtype=dtype)

    def step():
        torch.autograd.grad(linear_entropy_loss(hidden, weight, impl=impl), (hidden, weight))

    step()
    peak = peak_memory(step, "cpu")
    if peak is None:
        pytest.skip("no resettable peak in /proc/self/status here")
    assert peak < 200e6


# Modules


@FAST_IMPL
def test_modules_equal_their_functions(impl, device):
    hidden, weight = make_linear(3, 4, device=device)
    mask, options = MASK.to(device), dict(reduction="sum", temperature=0.5, impl=impl)
    bias = torch.randn(301, device=device)
    logits = hidden @ weight.T + bias
    assert same_bits(EntropyLoss(**options)(logits, mask), entropy_loss(logits, mask, **options))
    assert same_bits(
        LinearEntropyLoss(**options)(hidden, weight, mask, bias),
        linear_entropy_loss(hidden, weight, mask, bias=bias, **options),
    )
    assert "temperature=0.5" in repr(EntropyLoss(**options))


# Finite differences


@FAST_IMPL
def test_gradcheck_of_token_loss(impl, device):
    x = random_logits(3, 6, dtype=torch.float64, device=device).requires_grad_()
    target = random_target(3, vocab=6, device=device)
    weights = {name: w.double() for name, w in make_weights("both", 3, device=device).items()}
    assert torch.autograd.gradcheck(lambda x: token_loss(x, target, impl=impl, **weights).loss, x)


@FAST_IMPL
def test_gradcheck_of_linear_token_loss(impl, device):
    hidden, weight = make_linear(3, dim=4, vocab=6, dtype=torch.float64, device=device)
    bias = torch.randn(6, dtype=torch.float64, device=device, requires_grad=True)
    target = random_target(3, vocab=6, device=device)
    weights = {name: w.double() for name, w in make_weights("both", 3, device=device).items()}

    def loss(hidden, weight, bias):
        return linear_token_loss(
            hidden, weight, target, bias=bias, softcap=4.0, impl=impl, **weights
        ).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))
