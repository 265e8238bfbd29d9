"""Operators outside of eager mode: torch.export, AOTInductor, the meta device, direct calls."""

import io
import shutil
import warnings

import pytest
import torch
from helpers import error, random_logits, random_target, row_arguments, same_bits
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree

from em_kernels import (
    TokenLoss,
    TokenStats,
    clip_cov_mask,
    entropy_loss,
    linear_divergence,
    linear_divergence_loss,
    linear_entropy_loss,
    linear_softmax_stats,
    linear_token_covariance,
    linear_token_loss,
    selective_log_softmax_and_entropy,
    softmax_stats,
    token_loss,
)
from em_kernels.backends.interface import OUTPUTS, RowSpec
from em_kernels.objectives import grpo_loss
from em_kernels.objectives._inputs import PolicyLoss

N, V, D = 6, 37, 8


def linear_stats(head, hidden, target, mask, rows):
    options = dict(bias=head.bias, temperature=0.5 + rows, softcap=5.0, mask=mask, chunk_tokens=2)
    stats = linear_softmax_stats(hidden, head.weight, target, outputs=OUTPUTS, **options)
    return stats.logprob + stats.entropy * stats.collision + stats.lse


def stats(head, hidden, target, mask, rows):
    options = dict(temperature=0.7, logit_scale=1.5, mask=mask, valid_vocab=V - 2)
    stats = softmax_stats(head(hidden), target, outputs=("logprob", "is_top1", "lse"), **options)
    return stats.logprob * stats.is_top1 + stats.lse


def loss(head, hidden, target, mask, rows):
    weights = dict(entropy_weight=rows, logprob_weight=-rows)
    result = token_loss(head(hidden), target, mask=mask, inplace=True, **weights)
    return result.loss + result.stats.entropy.sum()


def linear_loss(head, hidden, target, mask, rows):
    options = dict(bias=head.bias, entropy_weight=rows, softcap=5.0, filter_eps=1e-6)
    result = linear_token_loss(hidden, head.weight, target, **options)
    return result.loss - result.stats.logprob.sum()


def linear_entropy(head, hidden, target, mask, rows):
    options = dict(bias=head.bias, reduction=3.0, temperature=0.5)
    return linear_entropy_loss(hidden, head.weight, mask, **options)


def entropy(head, hidden, target, mask, rows):
    return entropy_loss(head(hidden), mask)


def trl(head, hidden, target, mask, rows):
    logprob, entropy = selective_log_softmax_and_entropy(head(hidden), target, 0.7, mask)
    return logprob + entropy


def covariance(head, hidden, target, mask, rows):
    found = linear_token_covariance(hidden, head.weight, target, rows, mask, softcap=5.0)
    return found + head(hidden).sum() * 0


def divergences(head, hidden, target, mask, rows):
    options = dict(bias=head.bias, mask=mask, kind="js", beta=0.3, other_softcap=4.0)
    pair = hidden, head.weight, hidden.flip(-1), head.weight.detach()
    loss = linear_divergence_loss(*pair, token_weight=rows, other_outputs=("entropy",), **options)
    value = linear_divergence(*pair, kind="reverse_kl", chunk_tokens=2)
    return loss.loss + loss.other_stats.entropy.sum() + value


def chosen_ids(head, hidden, target, mask, rows):
    """A target of (..., K), padding among the ids."""
    ids = torch.stack([target, (target + 3) % V, target], -1)
    options = dict(mask=mask, temperature=0.7, outputs=("logprob", "rank", "is_top1", "entropy"))
    of_hidden = linear_softmax_stats(hidden, head.weight, ids, bias=head.bias, **options)
    of_logits = softmax_stats(head(hidden), ids, **options)
    weights = dict(logprob_weight=rows[:, None] * torch.ones_like(ids))
    loss = linear_token_loss(hidden, head.weight, ids, bias=head.bias, **weights).loss
    ranked = of_hidden.logprob * of_hidden.rank + of_logits.logprob * of_logits.is_top1
    return ranked.sum(-1) + of_hidden.entropy + loss


FUNCTIONS = (
    *(stats, linear_stats, loss, linear_loss, entropy, linear_entropy, trl, covariance),
    *(divergences, chosen_ids),
)
by_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.function = nn.Linear(D, V), function

    def forward(self, *inputs):
        return self.function(self.head, *inputs)


def make_inputs(count=N):
    mask = torch.arange(count) % 3 != 1
    return random_logits(count, D), random_target(count, vocab=V - 2), mask, torch.rand(count)


def with_gradients(model, inputs):
    model.zero_grad()
    value = model(*inputs)
    value.sum().backward()
    return {"value": value.detach()} | {name: p.grad for name, p in model.named_parameters()}


def check_same(exported, model, inputs):
    """Values and gradients."""
    found, expected = with_gradients(exported, inputs), with_gradients(model, inputs)
    assert found.keys() == expected.keys() == {"value", "head.weight", "head.bias"}
    for name, ours in found.items():
        assert (ours is None) == (expected[name] is None), name
        assert ours is None or error(ours, expected[name]) < 2e-6, name


def export(model, inputs, dynamic_shapes=None, strict=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes, strict=strict)


def operators(program):
    """The names of this package's operators in the program and the regions within it."""
    graphs = [
        m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)
    ]
    names = {str(node.target).removesuffix(".default") for graph in graphs for node in graph.nodes}
    return {name for name in names if name.startswith("em_kernels.")}


@pytest.mark.parametrize(
    ("function", "strict"),
    [*((function, False) for function in FUNCTIONS), (linear_stats, True), (loss, True)],
    ids=lambda value: getattr(value, "__name__", ("traced", "strict")[value is True]),
)
def test_an_exported_program_has_the_values_and_gradients(function, strict):
    """Of every number of tokens, saved and loaded, in the operators that it keeps."""
    model, tokens = Model(function), torch.export.Dim("tokens", min=3, max=100)
    program = export(model, make_inputs(), (({0: tokens},) * 4,), strict)
    kept = operators(program)
    statistics = "softmax_stats", "linear_stats", "divergence_stats", "linear_divergence_stats"
    assert kept and kept <= {f"em_kernels.{name}" for name in statistics}
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for count in (N, 11):
        check_same(loaded, model, make_inputs(count))


@pytest.mark.parametrize("function", (stats, linear_loss), ids=lambda f: f.__name__)
def test_decompositions_keep_the_operators(function):
    model, inputs = Model(function), make_inputs()
    program = export(model, inputs)
    kept, program = operators(program), program.run_decompositions()
    assert operators(program) == kept
    assert error(program.module()(*inputs).detach(), model(*inputs).detach()) < 2e-6


def test_the_vocabulary_of_an_exported_program_may_be_dynamic():
    class Entropy(nn.Module):
        def forward(self, logits, target):
            stats = softmax_stats(logits, target, softcap=5.0)
            return stats.logprob + stats.entropy

    vocab, tokens = torch.export.Dim("vocab", min=3, max=99), torch.export.Dim("tokens", max=99)
    shapes = {"logits": {0: tokens, 1: vocab}, "target": {0: tokens}}
    inputs = random_logits(N, V), random_target(N, vocab=V)
    program = export(Entropy(), inputs, shapes).module()
    for count, size in ((N, V), (3, 50)):
        inputs = random_logits(count, size), random_target(count, vocab=size)
        assert error(program(*inputs), Entropy()(*inputs)) < 1e-6


class Named(nn.Module):
    """Results as they come, by name and nested."""

    def forward(self, logits, rows):
        loss = token_loss(logits, entropy_weight=rows, outputs=("lse", "entropy"))
        tokens = grpo_loss(-rows, -rows, rows, rows > 0.5)
        return softmax_stats(logits, outputs=("entropy", "max_prob")), loss, tokens


def test_named_results_are_saved_and_loaded():
    inputs = random_logits(N, V), torch.rand(N)
    file = io.BytesIO()
    torch.export.save(export(Named(), inputs), file)
    file.seek(0)
    found, expected = torch.export.load(file).module()(*inputs), Named()(*inputs)
    assert [type(part) for part in found] == [TokenStats, TokenLoss, PolicyLoss]
    assert found[0].lse is None and found[1].stats.max_prob is None
    pairs = zip(*map(_pytree.tree_leaves, (found, expected)), strict=True)
    assert all(error(x, y) < 1e-6 for x, y in pairs if x is not None)


def test_clip_covs_draw_may_have_any_number_of_tokens():
    class Draw(nn.Module):
        def forward(self, cov):
            return clip_cov_mask(cov, ratio=0.5)

    tokens = torch.export.Dim("tokens", min=2, max=99)
    program = export(Draw(), (torch.full((6,), 2.0),), ({0: tokens},)).module()
    for count in (6, 10):
        assert program(torch.full((count,), 2.0)).sum() == count // 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
def test_aot_inductor_has_the_values(tmp_path):
    class Both(Model):
        def forward(self, *inputs):
            return linear_entropy(self.head, *inputs), linear_stats(self.head, *inputs)

    model, inputs = Both(None), make_inputs()
    program = export(model, inputs)
    with torch.no_grad():
        package = str(tmp_path / "model.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=package)
        found = torch._inductor.aoti_load_package(package)(*inputs)
        for ours, theirs in zip(found, model(*inputs), strict=True):
            assert error(ours, theirs) < 2e-6


@by_function
@pytest.mark.parametrize("fake", (False, True), ids=("meta", "fake"))
def test_shapes_and_dtypes_of_tensors_without_memory(function, fake):
    model, inputs = Model(function), make_inputs()
    expected = with_gradients(model, inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.device("meta"):
        model = Model(function)
        inputs = [torch.empty_like(x, device="cpu" if fake else "meta") for x in inputs]
        found = with_gradients(model, inputs)
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        ours = found[name]
        assert (ours is None) == (theirs is None), name
        assert ours is None or (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name


OPTIONS = dict(valid_vocab=V - 2, softcap=5.0)


def spec():
    return RowSpec(target=random_target(N, vocab=V - 2), **OPTIONS)


def leaves(*shapes):
    return [random_logits(*shape).requires_grad_() for shape in shapes]


def check_gradients(results, stats, tensors):
    """`results` of an operator begin with what only its backward pass needs."""
    assert [r.requires_grad for r in results] == [False] * 3 + [True] * 3
    found = torch.autograd.grad(sum((r * r).sum() for r in results[3:]), tensors)
    for ours, theirs in zip(found, torch.autograd.grad((stats**2).sum(), tensors), strict=True):
        assert same_bits(ours, theirs)


def test_softmax_stats_called_directly_has_its_gradient():
    (x,), own, outputs = leaves((N, V)), spec(), ("logprob", "entropy", "lse")
    results = torch.ops.em_kernels.softmax_stats(x, *row_arguments(own), outputs, "auto")
    stats = softmax_stats(x, own.target, outputs=outputs, **OPTIONS)
    check_gradients(results, torch.stack(stats[:3]), [x])


def test_linear_stats_called_directly_has_its_gradient():
    hidden, weight, bias = tensors = leaves((N, D), (V, D), (V,))
    outputs = ("logprob", "entropy", "lse")
    own = spec()._replace(bias=bias)
    results = torch.ops.em_kernels.linear_stats(
        hidden, weight, *row_arguments(own), outputs, 2, None, "auto"
    )
    options = dict(bias=bias, outputs=outputs, chunk_tokens=2, **OPTIONS)
    stats = linear_softmax_stats(hidden, weight, own.target, **options)
    check_gradients(results, torch.stack(stats[:3]), tensors)


def underived(name):
    """Arguments of an operator that has no derivative."""
    x, hidden, weight, bias = leaves((N, V), (N, D), (V, D), (V,))
    rows, needs, cut = torch.ones(N), (True, True, True, None), (2, None, "auto")
    linear = (hidden, weight, *row_arguments(spec()._replace(bias=bias)))
    upstream, saved = (rows, rows, None), (rows, rows, rows)
    memory = [rows.clone() for _ in range(4)]
    return {
        "softmax_grad": (x, *row_arguments(spec()), *saved, *upstream, "auto"),
        "softmax_loss": (x, *row_arguments(spec()), *upstream, ("entropy",), "auto"),
        "softmax_loss_": (x, memory, *row_arguments(spec()), *upstream, ("lse",), "auto"),
        "linear_grad": (*linear, *saved, *upstream, *needs, *cut),
        "linear_loss": (*linear, *upstream, *needs, ("entropy", "is_top1"), *cut),
        "scale_": (x, torch.tensor(0.5), "auto"),
    }[name]


@pytest.mark.parametrize("name", ("softmax_grad", "softmax_loss", "linear_grad", "linear_loss"))
def test_an_operator_without_derivative_refuses_the_backward_pass(name):
    operator, arguments = getattr(torch.ops.em_kernels, name), underived(name)
    results = operator(*arguments)
    with torch.no_grad():
        expected = operator(*arguments)
    for ours, theirs in zip(results, expected, strict=True):
        assert same_bits(ours.detach(), theirs)
        if ours.is_floating_point():
            with pytest.raises(RuntimeError, match=f"em_kernels::{name} has no derivative"):
                ours.sum().backward(retain_graph=True)


@pytest.mark.parametrize("name", ("softmax_loss_", "scale_"))
def test_an_operator_in_place_refuses_what_requires_grad(name):
    operator = getattr(torch.ops.em_kernels, name)
    with pytest.raises(RuntimeError, match=f"em_kernels::{name} .*no derivative"):
        operator(*underived(name))
    with torch.no_grad():
        operator(*underived(name))
