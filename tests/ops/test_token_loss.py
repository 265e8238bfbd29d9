"""Losses with the gradient made in the forward pass: equal to the same loss of softmax_stats."""

import pytest
import torch
from helpers import (
    DTYPES,
    FAST_IMPLS,
    IMPLS,
    error,
    make_linear,
    make_weights,
    random_logits,
    random_target,
    same_bits,
    truth,
)

from em_kernels import (
    EntropyLoss,
    LinearEntropyLoss,
    entropy_loss,
    linear_entropy_loss,
    softmax_stats,
    token_loss,
)
from em_kernels.backends.interface import OUTPUTS

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
EACH_IMPL = pytest.mark.parametrize("impl", IMPLS)
FAST_IMPL = pytest.mark.parametrize("impl", FAST_IMPLS)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
WEIGHTINGS = ("entropy", "logprob", "both")


def composed(stats, entropy_weight=None, logprob_weight=None):
    loss = 0.0
    if entropy_weight is not None:
        loss = loss + (entropy_weight * stats.entropy).sum()
    if logprob_weight is not None:
        loss = loss + (logprob_weight * stats.logprob).sum()
    return loss


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
def test_a_mask_is_where_it_is_not_zero_whatever_its_integers(impl, device):
    x = random_logits(3, 100, device=device)
    by_bool = entropy_loss(x, torch.tensor([True, False, True], device=device), impl=impl)
    for numbers in ([2, 0, -3], [1.0, 0.0, 1.0]):
        loss = entropy_loss(x, torch.tensor(numbers, device=device), impl=impl)
        assert same_bits(loss, by_bool)


@EACH_IMPL
def test_one_token_without_a_batch(impl, device):
    x = random_logits(100, device=device)
    for reduction in ("token_mean", "sequence_mean", "sum"):
        loss = entropy_loss(x, reduction=reduction, impl=impl)
        assert error(loss, truth(x)["entropy"]) < 1e-6


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
