"""opcheck of every operator, and torch.compile(fullgraph=True) of the public functions."""

import shutil

import pytest
import torch
from helpers import FAST_IMPLS, error, random_logits, random_target, row_arguments, same_bits

import em_kernels
from em_kernels import (
    divergence_stats,
    entropy_from_logits,
    entropy_loss,
    linear_divergence,
    linear_divergence_loss,
    linear_entropy_loss,
    linear_softmax_stats,
    linear_token_loss,
    selective_log_softmax_and_entropy,
    softmax_stats,
    token_loss,
)
from em_kernels.backends.interface import OUTPUTS, RowSpec
from em_kernels.backends.pair import OtherSpec, PairSaved
from em_kernels.ops.registry import OPERATORS

pytestmark = pytest.mark.parametrize("impl", FAST_IMPLS)
N, V, D = 4, 37, 8


def spec(device, bias=None):
    """The shared arguments of every operator, each optional tensor given."""
    mask = torch.tensor([True, False, True, True], device=device)
    temperature = 0.5 + torch.rand(N, device=device)
    target = random_target(N, vocab=V - 2, device=device)
    index = torch.tensor([0, 2, 3], device=device)
    return RowSpec(bias, target, mask, temperature, 1.0, 5.0, 0.9, V - 2, index=index)


def with_numbers(spec):
    """The same, its numbers in a tensor."""
    numbers = torch.tensor([1.0, 5.0, 0.9, 1e-3], dtype=torch.float64)
    return spec._replace(temperature=0.1, softcap=0.2, logit_scale=0.3, numbers=numbers)


def operator_arguments(name, dtype, device, impl):
    logits = random_logits(N, V, dtype=dtype, device=device)
    operands = [random_logits(size, D, dtype=dtype, device=device) for size in (N, V)]
    bias = random_logits(V, dtype=dtype, device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def rows(count):
        return [torch.rand(N, dtype=wide, device=device) for _ in range(count)]

    needs, cut = (True, True, True, 1e-3), (2, None, impl)
    given, of_head = row_arguments(spec(device)), row_arguments(spec(device, bias))
    low = (*(random_logits(size, 3, dtype=dtype, device=device) for size in (N, V)), True, True)
    empty = [torch.empty_like(x) for x in (operands[0], bias, *low[:2])]
    into = torch.zeros_like(operands[1], dtype=wide), empty
    return {
        "softmax_stats": (logits, *given, OUTPUTS, impl),
        "softmax_grad": (logits, *given, *rows(3), *rows(3), impl),
        "softmax_loss": (logits, *given, *rows(3), ("entropy", "is_top1"), impl),
        "softmax_loss_": (logits, rows(4), *given, *rows(3), ("logprob",), impl),
        "linear_stats": (*operands, *of_head, OUTPUTS, *cut),
        "linear_grad": (*operands, *of_head, *rows(3), *rows(3), *needs, *cut),
        "linear_grad_": (*into, *operands, *of_head, *rows(3), *rows(3), *needs, *cut, None, *low),
        "linear_loss": (*operands, *of_head, *rows(3), *needs, ("entropy",), *cut, *low),
        **divergence_arguments(logits, operands, device, impl),
        "top_logprobs": (logits, *given, 3, impl),
        "linear_top_logprobs": (*operands, *of_head, 3, *cut),
        "entropy_temperature": (logits, 0.3, 0.1, 0.05, 4, impl),
        "entropy_descent": (logits, 0.3, 1.0, 3, impl),
        "scale_": (logits, torch.tensor(0.5, dtype=wide, device=device), impl),
    }[name]


def divergence_arguments(logits, operands, device, impl):
    """Those of the operators of pairs: the rows turned around are the other's."""
    hidden, weight = operands
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = [torch.rand(N, dtype=wide, device=device) for _ in range(len(PairSaved._fields))]
    other = OtherSpec(None, torch.rand(N, device=device) + 0.5, 1.0, 4.0, 1.1)
    asked = (*row_arguments(spec(device)), *other, "js", 0.3)
    pair, names = (logits, logits.flip(-1)), (OUTPUTS, ("lse", "rank"))
    heads, needs = (hidden, weight, hidden.flip(0), weight.flip(-1)), (True, True, False, None)
    cut = (2, None, impl)
    return {
        "divergence_stats": (*pair, *asked, *names, impl),
        "divergence_grad": (*pair, *asked, *rows, rows[0], None, impl),
        "divergence_loss": (*pair, *asked, rows[0], rows[1], *names, impl),
        "linear_divergence_stats": (*heads, *asked, *names, *cut),
        "linear_divergence_grad": (*heads, *asked, *rows, rows[0], *needs, *needs[:3], *cut),
        "linear_divergence_loss": (*heads, *asked, rows[0], *needs, *needs[:3], *names, *cut),
    }


# Triton's alone: tests/backends/test_triton_linear.py. Between ranks: tests/vocab_checks.py, and of
# tokens tests/ops/test_token_ranks.py.
ELSEWHERE = ("linear_stats_fused", "all_reduce", "count_tokens", "gather_alike")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in ELSEWHERE])
def test_opcheck(impl, device, name, dtype):
    operator = getattr(torch.ops.em_kernels, name).default
    torch.library.opcheck(operator, operator_arguments(name, dtype, device, impl))


@pytest.mark.parametrize("name", ("softmax_grad", "softmax_loss", "linear_stats", "linear_loss"))
def test_opcheck_of_what_requires_grad_and_of_numbers_in_a_tensor(impl, device, name):
    operator = getattr(torch.ops.em_kernels, name).default
    arguments = list(operator_arguments(name, torch.float32, device, impl))
    begin = 1 + name.startswith("linear")
    end = begin + len(row_arguments(RowSpec()))
    expected = operator(*arguments)
    arguments[begin:end] = row_arguments(with_numbers(RowSpec(*arguments[begin:end])))
    if name == "linear_loss":
        arguments[end + 6] = None  # filter_eps
    for ours, theirs in zip(operator(*arguments), expected, strict=True):
        assert same_bits(ours, theirs)
    for tensor in arguments[:begin]:
        tensor.requires_grad_()
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if name.endswith("_stats"):  # the others refuse a backward pass
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, arguments, test_utils=checks)


@pytest.mark.parametrize("name", ("softmax_stats", "softmax_grad", "linear_grad", "linear_loss"))
def test_opcheck_without_the_optional_arguments(impl, device, name):
    logits, hidden = random_logits(N, V, device=device), random_logits(N, D, device=device)
    weight, ones = random_logits(V, D, device=device), torch.ones(N, device=device)
    plain = row_arguments(RowSpec(valid_vocab=V, compact=False))
    saved, upstream, needs = (ones, ones, ones), (None, ones, None), (True, False, False, None)
    arguments = {
        "softmax_stats": (logits, *plain, ("entropy",), impl),
        "softmax_grad": (logits, *plain, *saved, *upstream, impl),
        "linear_grad": (hidden, weight, *plain, *saved, *upstream, *needs, None, None, impl),
        "linear_loss": (hidden, weight, *plain, *upstream, *needs, (), None, None, impl),
    }[name]
    torch.library.opcheck(getattr(torch.ops.em_kernels, name).default, arguments)


def functions(device, impl):
    """name -> (function of the tensors that have gradients, those tensors)."""
    x = random_logits(2, N, V, device=device)
    hidden = random_logits(2, N, D, device=device)
    weight, bias = random_logits(V, D, device=device), random_logits(V, device=device)
    target = random_target(2, N, vocab=V, device=device)
    mask = torch.rand(2, N, device=device) > 0.3
    rows = torch.rand(2, N, device=device)

    def stats(x):
        out = softmax_stats(x[:, 1:], target[:, 1:], outputs=OUTPUTS, mask=mask[:, 1:], impl=impl)
        return (out.logprob + out.entropy * 0.5 + out.lse * out.collision).sum()

    def linear_stats(hidden, weight, bias):
        out = linear_softmax_stats(
            hidden, weight, target, bias=bias, temperature=0.5 + rows, chunk_tokens=3, impl=impl
        )
        return (out.logprob * out.entropy).sum()

    def loss(x):
        return token_loss(
            x, target, entropy_weight=rows, logprob_weight=-rows, inplace=True, impl=impl
        ).loss

    def linear_loss(hidden, weight, bias):
        return linear_token_loss(
            hidden, weight, target, bias=bias, entropy_weight=rows, mask=mask, impl=impl
        ).loss

    def trl(x):
        logprob, entropy = selective_log_softmax_and_entropy(x, target, 0.7, mask)
        return (logprob + entropy).sum() + entropy_from_logits(x).sum()

    def divergences(x, y):
        options = dict(kind="js", beta=0.3, temperature=0.7, other_softcap=4.0, impl=impl)
        found = divergence_stats(x, y, other_outputs=("entropy",), **options)
        return (found.divergence * found.other_stats.entropy).sum()

    def linear_divergences(hidden, weight, bias):
        pair = (hidden, weight, hidden.detach().flip(0), weight.detach().flip(-1))
        loss = linear_divergence_loss(*pair, bias=bias, token_weight=rows, mask=mask, impl=impl)
        return loss.loss + linear_divergence(*pair, kind="reverse_kl", impl=impl).mean()

    return {
        "divergence": (divergences, (x, x.flip(-1))),
        "linear_divergence": (linear_divergences, (hidden, weight, bias)),
        "softmax_stats": (stats, (x,)),
        "linear_softmax_stats": (linear_stats, (hidden, weight, bias)),
        "token_loss": (loss, (x,)),
        "linear_token_loss": (linear_loss, (hidden, weight, bias)),
        "entropy_loss": (lambda x: 2 * entropy_loss(x, mask, temperature=0.5, impl=impl), (x,)),
        "linear_entropy_loss": (
            lambda h, w: linear_entropy_loss(h, w, mask, reduction="sequence_mean", impl=impl),
            (hidden, weight),
        ),
        "trl": (trl, (x,)),
    }


NAMES = (
    "softmax_stats",
    "linear_softmax_stats",
    "token_loss",
    "linear_token_loss",
    "entropy_loss",
    "linear_entropy_loss",
    "trl",
    "divergence",
    "linear_divergence",
)


def run(function, tensors):
    tensors = [t.clone().requires_grad_() for t in tensors]  # some may be overwritten
    value = function(*tensors)
    return value.detach(), torch.autograd.grad(value, tensors)


def check_compiled(function, tensors, **options):
    torch.compiler.reset()
    value, grads = run(torch.compile(function, fullgraph=True, **options), tensors)
    expected, expected_grads = run(function, tensors)
    assert error(value, expected) < 1e-6
    for out, ref in zip(grads, expected_grads, strict=True):
        assert error(out, ref) < 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_compiles_in_one_graph(impl, device, name):
    check_compiled(*functions(device, impl)[name], backend="aot_eager")


@pytest.mark.parametrize("name", ("softmax_stats", "linear_entropy_loss"))
def test_compiles_with_dynamic_shapes(impl, device, name):
    check_compiled(*functions(device, impl)[name], backend="aot_eager", dynamic=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
def test_compiles_with_inductor(impl, device):
    function, tensors = functions(device, impl)["entropy_loss"]
    check_compiled(lambda x: function(torch.tanh(x) * 5), tensors)


def test_leaving_one_outputs_gradient_out(impl, device):
    """An output that is only logged compiles, and sends no gradient of its own."""
    x = random_logits(N, V, device=device)
    target = random_target(N, vocab=V, device=device)

    def loss(x):
        stats = softmax_stats(x, target, outputs=("logprob", "entropy", "lse"), impl=impl)
        return stats.logprob.sum() + stats.entropy.detach().sum() * 0

    def alone(x):
        return softmax_stats(x, target, outputs=("logprob",), impl=impl).logprob.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert same_bits(run(loss, (x,))[1][0], run(alone, (x,))[1][0])
    assert same_bits(run(compiled, (x,))[1][0], run(alone, (x,))[1][0])


def test_no_gradient_at_all_calls_no_backward_operator(impl, device, monkeypatch):
    x = random_logits(N, V, device=device).requires_grad_()
    stats = softmax_stats(x, outputs=("entropy", "collision"), impl=impl)
    monkeypatch.setattr(torch.ops.em_kernels, "softmax_grad", None)
    (grad,) = torch.autograd.grad((0 * x.sum() + stats.collision.sum()), x)
    assert (grad == 0).all()


def test_a_compiled_training_step_follows_the_eager_one(impl, device):
    """Three updates of a linear head by its own entropy loss."""

    def train(compiled):
        torch.manual_seed(0)
        head = torch.nn.Linear(D, V, device=device)
        hidden = torch.randn(2, N, D, device=device)
        loss_module = em_kernels.LinearEntropyLoss(temperature=0.5, impl=impl)
        step = torch.compile(loss_module, fullgraph=True, backend="aot_eager")
        optimizer, losses = torch.optim.SGD(head.parameters(), lr=0.5), []
        for _ in range(3):
            loss = (step if compiled else loss_module)(hidden, head.weight, None, head.bias)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    losses = train(compiled=True)
    assert losses == pytest.approx(train(compiled=False), rel=1e-6)
    assert losses[0] > losses[1] > losses[2]
