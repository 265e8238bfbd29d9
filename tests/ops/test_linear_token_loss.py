"""Losses from hidden states: three products, no full logits, the same as from all the logits."""

import pytest
import torch
from helpers import (
    DTYPES,
    FAST_IMPLS,
    IMPLS,
    error,
    make_linear,
    make_weights,
    product_flops,
    random_target,
    same_bits,
    truth,
)

from benchmarks.common import peak_memory
from em_kernels import entropy_loss, linear_entropy_loss, linear_token_loss

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
EACH_IMPL = pytest.mark.parametrize("impl", IMPLS)
FAST_IMPL = pytest.mark.parametrize("impl", FAST_IMPLS)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
TOLERANCE = {torch.float64: 1e-13, torch.float32: 8e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]])


@EACH_IMPL
@EACH_DTYPE
@pytest.mark.parametrize("kind", ("entropy", "logprob", "both"))
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
    assert error(stats.entropy, values["entropy"]) <= TOLERANCE[dtype]
    for out, ref in zip(grads, expected_grads, strict=True):
        assert out.dtype == dtype and error(out, ref) <= TOLERANCE[dtype]


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
    assert 100e6 < peak < 200e6, "a chunk of logits is 160 MB: less was not measured"


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
