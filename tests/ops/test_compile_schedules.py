"""torch.compile(fullgraph=True) of numbers that change from call to call, such as a temperature."""

import shutil
from functools import partial

import pytest
import torch
from helpers import error, random_logits, random_target
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs

from em_kernels import (
    EntropyLoss,
    linear_entropy_loss,
    linear_softmax_stats,
    linear_token_covariance,
    linear_token_loss,
    selective_log_softmax_and_entropy,
    softmax_stats,
    token_loss,
)

N, V, D = 4, 37, 8


def run(function, tensors):
    tensors = [t.clone().requires_grad_() for t in tensors]
    value = function(*tensors)
    return value.detach(), torch.autograd.grad(value, tensors)


def count_graphs(function, tensors, values, backend):
    """Graphs made for a schedule of values, each of whose steps is compared with the eager one."""
    torch.compiler.reset()
    graphs = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=graphs)
    for value in values:
        found, grads = run(partial(compiled, value), tensors)
        expected, expected_grads = run(partial(function, value), tensors)
        assert error(found, expected) < 1e-6
        for ours, theirs in zip(grads, expected_grads, strict=True):
            assert error(ours, theirs) < 2e-6
    return graphs.frame_count


def scheduled():
    """name -> (function of a number and the tensors that have gradients, those tensors)."""
    x, hidden, weight = (random_logits(*s) for s in ((N, V), (N, D), (V, D)))
    target = random_target(N, vocab=V // 2)
    mask, rows = torch.tensor([True, True, False, True]), x[:, 0].abs()

    def stats(x, **options):
        out = softmax_stats(x, target, mask=mask, **options)
        return (out.logprob * out.entropy).sum()

    def linear_stats(h, w, **options):
        return linear_softmax_stats(h, w, target, **options).logprob.sum()

    def loss(x, **options):
        weights = dict(entropy_weight=rows, logprob_weight=-rows)
        return token_loss(x, target, **weights, **options).loss

    def linear_loss(h, w, **options):
        return linear_token_loss(h, w, entropy_weight=rows, **options).loss

    def trl(v, x):
        return sum(selective_log_softmax_and_entropy(x, target, v, mask)).sum()

    module = EntropyLoss()

    def of_module(v, x):
        module.options["temperature"] = v
        return module(x, mask)

    def together(v, x):
        return stats(x, temperature=v, softcap=5 * v, logit_scale=2 * v)

    def covariance(v, h, w):
        advantage = linear_token_covariance(h, w, target, rows, temperature=v)
        return linear_loss(h, w, temperature=v) + advantage.sum()

    on_x, on_hidden = (x,), (hidden, weight)
    return {
        "together": (together, on_x),
        "trl": (trl, on_x),
        "module": (of_module, on_x),
        "covariance": (covariance, on_hidden),
        "token_loss": (lambda v, x: loss(x, temperature=v), on_x),
        "linear_stats": (
            lambda v, *x: linear_stats(*x, temperature=v, filter_eps=v / 9),
            on_hidden,
        ),
        "linear_loss": (lambda v, *x: linear_loss(*x, softcap=v, filter_eps=v / 9), on_hidden),
        "expressions": (lambda v, *x: linear_loss(*x, softcap=9 * v, filter_eps=v / 9), on_hidden),
        "reduction": (
            lambda v, *x: linear_entropy_loss(*x, mask, reduction=v, temperature=v),
            on_hidden,
        ),
        "integer_temperature": (lambda v, x: stats(x, temperature=v), on_x),
        "valid_vocab": (lambda v, x: loss(x, valid_vocab=V // 2 + v), on_x),
        "linear_valid_vocab": (
            lambda v, *x: linear_loss(*x, valid_vocab=V // 2 + v, chunk_tokens=v),
            on_hidden,
        ),
        "ignore_index": (lambda v, x: stats(x, ignore_index=v), on_x),
    }


FLOATS = [1.0 - 0.02 * step for step in range(20)]
INTEGERS = range(1, 13)
SCHEDULES = dict.fromkeys(
    ("together", "trl", "module", "covariance", "token_loss", "linear_stats", "linear_loss"), FLOATS
)
SCHEDULES |= {"reduction": FLOATS, "integer_temperature": [1, *FLOATS[1:]]}
SCHEDULES |= dict.fromkeys(("valid_vocab", "linear_valid_vocab", "ignore_index"), INTEGERS)


before_213 = pytest.mark.skipif(
    torch.__version__ < (2, 13),
    reason="torch 2.12 compiles anew for a number that is never given as it is",
)


@pytest.mark.parametrize("name", [*SCHEDULES, pytest.param("expressions", marks=before_213)])
def test_a_schedule_takes_two_graphs(name):
    function, tensors = scheduled()[name]
    assert count_graphs(function, tensors, SCHEDULES.get(name, FLOATS), "aot_eager") <= 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
def test_a_schedule_takes_two_graphs_with_inductor():
    function, tensors = scheduled()["together"]
    assert count_graphs(function, tensors, FLOATS, "inductor") <= 2


@pytest.mark.parametrize("bad", (0.0, float("nan"), float("inf")))
def test_a_bad_number_in_a_schedule_is_refused(bad):
    function, (x,) = scheduled()["together"]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    for value in FLOATS[:3]:
        compiled(value, x)
    with pytest.raises(Exception, match="temperature must be positive and finite"):
        compiled(bad, x)
    with pytest.raises(ValueError, match=f"temperature must be positive and finite, got {bad}"):
        torch.compile(function, backend="eager")(bad, x)


def test_constants_stay_arguments_of_the_operator():
    """No tensor of numbers where nothing changes: it would keep CUDA graphs from being made."""
    torch.compiler.reset()
    graphs = EagerAndRecordGraphs()
    x = random_logits(N, V)

    @torch.compile(fullgraph=True, backend=graphs)
    def entropy(x, t):
        return softmax_stats(x, temperature=t, softcap=5.0).entropy

    entropy(x, 0.5)
    (node,) = [n for n in graphs.graphs[0].graph.nodes if "softmax_stats" in str(n.target)]
    assert node.args[5:7] == (0.5, 5.0) and node.args[10] is None
