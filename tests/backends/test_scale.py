"""The gradient made in the forward pass, times the gradient that backward is given."""

import importlib

import pytest
import torch
from helpers import (
    FAST_IMPLS,
    IMPLS,
    SLOW_INTERPRETER,
    error,
    make_linear,
    random_logits,
    same_bits,
)
from torch.utils._python_dispatch import TorchDispatchMode

from em_kernels import entropy_loss, linear_entropy_loss
from em_kernels.ops import registry

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
FAST_IMPL = pytest.mark.parametrize("impl", FAST_IMPLS)
EACH_IMPL = pytest.mark.parametrize("impl", IMPLS)
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
FACTORS = (1.0, 0.5, 0.0, -3.0, 1 / 3, float("nan"), float("inf"))


@EACH_IMPL
@DTYPES
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("shape", ((3, 5), (2, 4099), (0, 3), ()))
def test_scale_in_place(impl, device, dtype, factor, shape):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = random_logits(*shape, dtype=dtype, device=device)
    by = torch.tensor(factor, dtype=wide, device=device)
    expected = (x.to(wide) * by).to(dtype)
    assert torch.ops.em_kernels.scale_(x, by, impl) is None
    if impl == "triton" and SLOW_INTERPRETER and dtype == torch.bfloat16:  # it truncates
        torch.testing.assert_close(x, expected, rtol=2**-7, atol=0, equal_nan=True)
    else:
        assert same_bits(x, expected)


@EACH_IMPL
def test_scale_of_a_view_leaves_the_rest(impl, device):
    x = torch.ones(4, 6, device=device)
    torch.ops.em_kernels.scale_(x[:, 1:3], torch.tensor(2.0, device=device), impl)
    assert x.sum() == 4 * 6 + 4 * 2 and (x[:, 1:3] == 2).all()


class Factors(TorchDispatchMode):
    """The dimensions of what tensors are multiplied by in place."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mul_.Tensor:
            self.seen.append(args[1].dim())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("impl", [name for name in IMPLS if name == "triton"])
def test_the_factor_of_a_view_is_not_rounded_to_its_dtype(impl, device, monkeypatch):
    """2^-30 is 0 in float16; a GPU rounds a factor without dimensions to that."""
    monkeypatch.setattr(registry.row_index, "is_free_to_look", lambda x: False)  # as on a GPU
    x = torch.full((4, 6), 4096.0, dtype=torch.float16, device=device)
    with Factors() as factors:
        registry.OPERATORS["scale_"].run(x[:, 1:3], torch.tensor(2.0**-30, device=device), impl)
    assert factors.seen == [2]
    assert (x[:, 1:3] == 2.0**-18).all() and (x[:, 3:] == 4096).all()


@pytest.mark.skipif("triton" not in IMPLS, reason="triton is not available here")
@pytest.mark.parametrize("programs", (1, 3))
def test_each_program_of_the_kernel_takes_several_blocks(monkeypatch, programs):
    from em_kernels.backends.triton import scale

    monkeypatch.setattr(scale, "PROGRAMS", programs)
    monkeypatch.setattr(scale, "BLOCK", 16)
    device = "cpu" if SLOW_INTERPRETER else "cuda"
    x = torch.arange(16.0 * 7 + 5, device=device)
    expected = 1.5 * x
    scale.scale_(x, torch.tensor(1.5, device=device))
    assert torch.equal(x, expected)


def losses(impl, device):
    """name -> (loss, the tensor whose gradient is looked at)."""
    hidden, weight = make_linear(5, device=device)
    logits = random_logits(5, 37, device=device).requires_grad_()
    spent = random_logits(5, 37, device=device).requires_grad_()
    return {
        "linear": (linear_entropy_loss(hidden, weight, impl=impl), weight),
        "logits": (entropy_loss(logits, impl=impl), logits),
        "inplace": (entropy_loss(spent * 1, inplace=True, impl=impl), spent),
    }


EACH_LOSS = pytest.mark.parametrize("name", ("linear", "logits", "inplace"))


@FAST_IMPL
@EACH_LOSS
@pytest.mark.parametrize("factor", (1.0, 0.5, 0.0))
def test_any_upstream(impl, device, name, factor):
    loss, x = losses(impl, device)[name]
    (unit,) = torch.autograd.grad(loss, x, retain_graph=True)
    (scaled,) = torch.autograd.grad(factor * loss, x)
    assert torch.equal(scaled, factor * unit)


@FAST_IMPL
@EACH_LOSS
def test_a_retained_graph_keeps_its_gradient(impl, device, name):
    loss, x = losses(impl, device)[name]
    factors = (0.5, 3.0, 1.0, 0.0)
    grads = [torch.autograd.grad(f * loss, x, retain_graph=True)[0] for f in factors]
    (last,) = torch.autograd.grad(2 * loss, x)
    for factor, grad in zip(factors, grads, strict=True):
        assert error(2 * grad, factor * last) < 1e-6
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


@FAST_IMPL
@EACH_LOSS
def test_a_graph_that_is_not_retained_is_scaled_in_place(impl, device, name, monkeypatch):
    """No second tensor of the gradient's size: what backward returns is what forward wrote."""
    loss, x = losses(impl, device)[name]
    kept = loss.grad_fn.saved_tensors
    pointers = {tensor.data_ptr() for tensor in kept}
    (grad,) = torch.autograd.grad(0.5 * loss, x)
    if name != "inplace":  # there a product with 1 stands between
        assert grad.data_ptr() in pointers
    loss, x = losses(impl, device)[name]
    monkeypatch.setattr(
        importlib.import_module("em_kernels.ops.forward_gradient"), "_keeps_graph", lambda: True
    )
    kept = loss.grad_fn.saved_tensors  # holding them keeps their memory from being given again
    pointers = {tensor.data_ptr() for tensor in kept}
    assert torch.autograd.grad(0.5 * loss, x)[0].data_ptr() not in pointers


@FAST_IMPL
def test_two_losses_of_one_graph(impl, device):
    """Gradients that meet in one leaf, each loss with its own factor, the first one retained."""
    hidden, weight = make_linear(5, device=device)
    first = linear_entropy_loss(hidden, weight, impl=impl)
    second = linear_entropy_loss(hidden, weight, reduction="sum", impl=impl)
    (2 * first + 0.1 * second).backward()
    expected = [torch.zeros_like(x) for x in (hidden, weight)]
    for factor, loss in ((2.0, first), (0.1, second)):
        loss = linear_entropy_loss(
            hidden, weight, reduction="token_mean" if loss is first else "sum", impl=impl
        )
        for total, grad in zip(expected, torch.autograd.grad(loss, (hidden, weight))):
            total += factor * grad
    assert error(hidden.grad, expected[0]) < 1e-6 and error(weight.grad, expected[1]) < 1e-6


@FAST_IMPL
def test_gradients_accumulate_over_steps(impl, device):
    """A leaf may keep the tensor that backward returned: the next step must not touch it."""
    hidden, weight = make_linear(5, device=device)
    expected = 0
    for factor in (0.5, 2.0, 1.0):
        loss = linear_entropy_loss(hidden, weight, impl=impl)
        (factor * loss).backward()
        expected = expected + factor
    once = linear_entropy_loss(hidden, weight, impl=impl)
    (unit,) = torch.autograd.grad(once, weight)
    assert error(weight.grad, expected * unit) < 1e-6


@FAST_IMPL
@pytest.mark.parametrize("use_reentrant", (True, False))
def test_checkpointing_with_an_upstream(impl, device, use_reentrant):
    hidden, weight = make_linear(5, device=device)
    loss = torch.utils.checkpoint.checkpoint(
        lambda h, w: linear_entropy_loss(h, w, impl=impl) * 0.25,
        hidden,
        weight,
        use_reentrant=use_reentrant,
    )
    loss.backward()
    expected = torch.autograd.grad(linear_entropy_loss(hidden, weight, impl=impl), weight)
    assert torch.equal(weight.grad, 0.25 * expected[0])


@FAST_IMPL
def test_compiled_backward_scales_out_of_place(impl, device):
    hidden, weight = make_linear(5, device=device)
    function = torch.compile(
        lambda h, w: linear_entropy_loss(h, w, impl=impl) * 0.5,
        fullgraph=True,
        backend="aot_eager",
    )
    loss = function(hidden, weight)
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    assert torch.equal(weight.grad, 2 * once)
