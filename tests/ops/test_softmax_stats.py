"""softmax_stats on every backend against float64 truth.

The budget: our error is at most that of eager PyTorch in the same dtype plus a tolerance, errors
being ||out - ref|| / ||ref||. New memory is filled with NaN, so an unwritten element fails too.
"""

import pytest
import torch
from helpers import (
    DIFFERENTIABLE,
    DTYPES,
    IMPLS,
    SLOW_INTERPRETER,
    eager,
    error,
    gradient,
    random_logits,
    random_target,
    random_upstream,
    rows_of_entropy,
    truth,
)

from em_kernels import entropy_loss, softmax_stats, token_loss
from em_kernels.backends.interface import OUTPUTS, RESULT_DTYPES, RowSpec
from em_kernels.backends.specs import as_rows

pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory"),
    pytest.mark.parametrize("impl", IMPLS),
]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])

# Outputs are float32 or float64 whatever the input; gradients have the dtype of the input.
OUTPUT_TOLERANCE = {torch.float64: 1e-13}
# Triton's interpreter cuts bfloat16 off where hardware rounds, hence twice this without a GPU.
GRADIENT_TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 3e-4,
    torch.bfloat16: 2e-3,
}
# Differences of sums of both signs: the rounding of the sums is large next to the result.
ILL_CONDITIONED = {"logit_mean": 10, "logit_skew": 30, "entropy_slope": 30}

SHAPES = [
    (6, 100),
    (257,),
    (2, 3, 129),
    (2, 2, 2, 31),
    (0, 33),
    (5, 1),
    (3, 2),
    (3, 1000),
    (2, 4095),
    (2, 4096),
    (2, 4097),
    (2, 8191),
    (2, 8192),
    (2, 8193),
    (1, 20011),
]
TRANSFORMS = {
    "temperature": {"temperature": 0.7},
    "scale": {"logit_scale": -1.3},
    "softcap": {"softcap": 4.0},
    "padded": {"valid_vocab": 777},
    "everything": {"temperature": 1.9, "softcap": 7.0, "logit_scale": 0.6, "valid_vocab": 901},
}


def check_outputs(out, x, target, **transform):
    expected = truth(x, target, **transform)
    budget = eager(x, target) if not transform else {}
    tolerance = OUTPUT_TOLERANCE.get(x.dtype, 2e-6)
    for name in OUTPUTS:
        value = getattr(out, name)
        assert value.shape == x.shape[:-1], name
        if name in RESULT_DTYPES:
            assert torch.equal(value, expected[name])
            continue
        assert value.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
        limit = tolerance * ILL_CONDITIONED.get(name, 1)
        if name in budget:
            limit += error(budget[name], expected[name])
        scale = natural_scale(name, expected)
        assert error(value, expected[name], scale) <= limit, name


def natural_scale(name, expected):
    """What the rounding of a result that may be 0 is measured by."""
    if name == "logit_skew":
        return torch.ones_like(expected["logit_skew"])
    return expected["logit_var"].sqrt() if name == "logit_mean" else None


def check_gradient(grad, x, target, upstream, **transform):
    exact = x.detach().double().requires_grad_()
    expected = gradient(truth(exact, target, **transform), upstream, exact)[0]
    limit = (2 if SLOW_INTERPRETER else 1) * GRADIENT_TOLERANCE[x.dtype]
    if not transform:
        leaf = x.detach().clone().requires_grad_()
        limit += error(gradient(eager(leaf, target), upstream, leaf)[0], expected)
    assert grad.dtype == x.dtype and grad.shape == x.shape
    assert error(grad, expected) <= limit


@EACH_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_outputs_and_gradient_are_within_the_error_budget(impl, device, dtype, shape):
    x = random_logits(*shape, dtype=dtype, device=device).requires_grad_()
    target = random_target(*shape[:-1], vocab=shape[-1], device=device)
    upstream = random_upstream(*shape[:-1], dtype=dtype, device=device)
    out = softmax_stats(x, target, outputs=OUTPUTS, impl=impl)
    check_outputs(out, x.detach(), target)
    check_gradient(gradient(out._asdict(), upstream, x)[0], x, target, upstream)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(impl, device, name):
    transform = TRANSFORMS[name]
    x = random_logits(3, 1003, device=device).requires_grad_()
    target = random_target(3, vocab=777, device=device)
    upstream = random_upstream(3, device=device)
    out = softmax_stats(x, target, outputs=OUTPUTS, impl=impl, **transform)
    check_outputs(out, x.detach(), target, **transform)
    check_gradient(gradient(out._asdict(), upstream, x)[0], x, target, upstream, **transform)


@EACH_DTYPE
def test_temperature_per_token(impl, device, dtype):
    x = random_logits(2, 4, 300, dtype=dtype, device=device).requires_grad_()
    target = random_target(2, 4, vocab=300, device=device)
    upstream = random_upstream(2, 4, dtype=dtype, device=device)
    temperature = 0.3 + torch.rand(2, 4, device=device, dtype=torch.float64)
    if dtype != torch.float64:
        temperature = temperature.float()
    out = softmax_stats(x, target, outputs=OUTPUTS, impl=impl, temperature=temperature)
    check_outputs(out, x.detach(), target, temperature=temperature)
    grad = gradient(out._asdict(), upstream, x)[0]
    check_gradient(grad, x, target, upstream, temperature=temperature)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradient_of_one_output_alone(impl, device, name):
    x = random_logits(4, 515, device=device).requires_grad_()
    target = random_target(4, vocab=515, device=device)
    upstream = {name: torch.randn(4, device=device)}
    out = softmax_stats(x, target, outputs=DIFFERENTIABLE, impl=impl)
    check_gradient(gradient(out._asdict(), upstream, x)[0], x, target, upstream)


@EACH_DTYPE
@pytest.mark.parametrize("cut", ("tail", "head", "every_other_token", "vocab_slice"))
def test_strided_views(impl, device, dtype, cut):
    full = random_logits(3, 5, 401, dtype=dtype, device=device)
    view = {
        "tail": full[:, :-1],
        "head": full[:, 1:],
        "every_other_token": full[:, ::2],
        "vocab_slice": full[..., 7:390],
    }[cut].requires_grad_()
    target = random_target(*view.shape[:-1], vocab=view.shape[-1], device=device)
    upstream = random_upstream(*view.shape[:-1], dtype=dtype, device=device)
    out = softmax_stats(view, target, outputs=OUTPUTS, impl=impl)
    check_outputs(out, view.detach(), target)
    check_gradient(gradient(out._asdict(), upstream, view)[0], view, target, upstream)


@pytest.mark.parametrize(
    "layout", ("transposed", "vocab_stride_2", "expanded", "permuted_4d", "tail_4d")
)
def test_layouts_that_are_no_plain_rows(impl, device, layout):
    x = {
        "transposed": random_logits(70, 6, device=device).T,
        "vocab_stride_2": random_logits(6, 140, device=device)[:, ::2],
        "expanded": random_logits(1, 70, device=device).expand(6, 70),
        "permuted_4d": random_logits(3, 2, 4, 70, device=device).permute(1, 2, 0, 3),
        "tail_4d": random_logits(2, 2, 3, 70, device=device)[:, :, :-1],
    }[layout].requires_grad_()
    lead = x.shape[:-1]
    target, upstream = random_target(*lead, vocab=70, device=device), random_upstream(*lead)
    upstream = {name: value.to(device) for name, value in upstream.items()}
    stats = softmax_stats(x, target, outputs=OUTPUTS, impl=impl)
    check_outputs(stats, x.detach(), target)
    check_gradient(gradient(stats._asdict(), upstream, x)[0], x, target, upstream)
    weights = {f"{name}_weight": upstream[name] for name in ("logprob", "entropy")}
    loss = token_loss(x, target, impl=impl, **weights).loss
    del upstream["lse"]
    check_gradient(torch.autograd.grad(loss, x)[0], x, target, upstream)


def test_row_strided_logits_are_read_in_place(impl):
    logits = torch.empty(3, 5, 8)
    assert as_rows(logits[:, :-1]).data_ptr() == logits.data_ptr()
    assert as_rows(logits[:, 1:]).data_ptr() == logits[:, 1:].data_ptr()


@pytest.mark.parametrize("vocab", (64, 4099))
def test_entropy_and_its_gradient_from_1e_9_to_log_v(impl, device, vocab):
    entropies = torch.logspace(-9, torch.tensor(vocab).log10().log10().item(), 12)
    entropies[-1] = 0.999 * torch.tensor(float(vocab)).log()
    x = rows_of_entropy(entropies, vocab).to(device).requires_grad_()
    exact = x.detach().double().requires_grad_()
    expected = truth(exact)["entropy"]
    assert expected.min() < 1.1e-9 and expected.max() > 0.99 * torch.tensor(float(vocab)).log()

    entropy = softmax_stats(x, outputs=("entropy",), impl=impl).entropy
    relative = ((entropy.double() - expected) / expected).abs()
    assert relative.max() <= 1e-4

    (grad,) = torch.autograd.grad(entropy.sum(), x)
    (expected_grad,) = torch.autograd.grad(expected.sum(), exact)
    by_row = (grad.double() - expected_grad).norm(dim=-1) / expected_grad.norm(dim=-1)
    assert by_row.max() <= 1e-4


def test_uniform_row_has_entropy_log_v_and_no_entropy_gradient(impl, device):
    x = torch.full((2, 1021), 3.5, device=device, requires_grad=True)
    entropy = softmax_stats(x, outputs=("entropy",), impl=impl).entropy
    assert error(entropy, torch.full((2,), 1021.0).log()) < 1e-6
    assert torch.autograd.grad(entropy.sum(), x)[0].abs().max() < 1e-7


@pytest.mark.parametrize("output", ("logprob", "entropy"))
def test_gradient_sums_to_zero_over_the_vocabulary(impl, device, output):
    x = random_logits(4, 3001, device=device).requires_grad_()
    target = random_target(4, vocab=3001, device=device)
    stats = softmax_stats(x, target, impl=impl)
    (grad,) = torch.autograd.grad(getattr(stats, output).sum(), x)
    assert grad.abs().sum(-1).min() > 1e-2
    assert (grad.double().sum(-1).abs() <= 1e-6 * grad.double().abs().sum(-1)).all()


@pytest.mark.parametrize("output", DIFFERENTIABLE)
def test_gradcheck(impl, device, output):
    x = random_logits(2, 2, 6, dtype=torch.float64, device=device).requires_grad_()
    target = random_target(2, 2, vocab=6, device=device)

    def value(logits):
        stats = softmax_stats(
            logits, target, outputs=(output,), temperature=0.8, softcap=5.0, impl=impl
        )
        return getattr(stats, output)

    assert torch.autograd.gradcheck(value, x, fast_mode=impl == "triton")


def test_only_what_is_asked_for_is_computed(impl, device):
    x = random_logits(3, 50, device=device)
    stats = softmax_stats(x, outputs=("lse", "collision"), impl=impl)
    assert {name for name, value in stats._asdict().items() if value is not None} == {
        "lse",
        "collision",
    }
    spec = RowSpec(valid_vocab=50)[: RowSpec._fields.index("truncation")]
    rows = torch.ops.em_kernels.softmax_stats(x, *spec, ("lse",), impl)
    assert len(rows) == 4


def test_default_outputs_leave_logprob_out_without_a_target(impl, device):
    stats = softmax_stats(random_logits(3, 50, device=device), impl=impl)
    assert stats.entropy is not None and stats.logprob is None


def test_statistics_without_gradient_do_not_require_it(impl, device):
    x = random_logits(3, 50, device=device).requires_grad_()
    stats = softmax_stats(x, random_target(3, vocab=50, device=device), outputs=OUTPUTS, impl=impl)
    for name, value in stats._asdict().items():
        assert value.requires_grad == (name in DIFFERENTIABLE), name


def test_no_grad_keeps_nothing_for_backward(impl, device):
    x = random_logits(3, 50, device=device).requires_grad_()
    with torch.no_grad():
        stats = softmax_stats(x, impl=impl)
    assert not stats.entropy.requires_grad


def test_inference_mode(impl, device):
    x = random_logits(3, 50, device=device)
    with torch.inference_mode():
        y = x * 1.0
        entropy = softmax_stats(y, impl=impl).entropy
        loss = entropy_loss(y, inplace=True, impl=impl)
    assert error(entropy, truth(x)["entropy"]) < 1e-6
    assert error(loss, truth(x)["entropy"].mean()) < 1e-6


def test_backward_twice_with_retain_graph_gives_the_same_bits(impl, device):
    x = random_logits(3, 50, device=device).requires_grad_()
    entropy = softmax_stats(x, impl=impl).entropy.sum()
    (first,) = torch.autograd.grad(entropy, x, retain_graph=True)
    (second,) = torch.autograd.grad(entropy, x)
    assert torch.equal(first, second)


@pytest.mark.parametrize("use_reentrant", (True, False))
def test_gradient_checkpointing(impl, device, use_reentrant):
    x = random_logits(3, 50, device=device).requires_grad_()

    def loss(logits):
        return softmax_stats(2 * logits, impl=impl).entropy.sum()

    checkpointed = torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=use_reentrant)
    (grad,) = torch.autograd.grad(checkpointed, x) if not use_reentrant else (None,)
    if use_reentrant:
        checkpointed.backward()
        grad = x.grad
    leaf = x.detach().clone().requires_grad_()
    assert torch.equal(grad, torch.autograd.grad(loss(leaf), leaf)[0])


@pytest.mark.parametrize("autocast", (False, True))
def test_logits_are_read_in_their_own_dtype_under_autocast(impl, device, autocast):
    x = random_logits(3, 50, device=device)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        entropy = softmax_stats(x, impl=impl).entropy
    assert error(entropy, truth(x)["entropy"]) < 1e-6
