"""Derivatives of gradients: right, against textbook formulas in float64, or an error; never 0."""

import weakref

import pytest
import torch
import torch.distributed as dist
from helpers import truth
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, hvp, vhp
from torch.utils.checkpoint import checkpoint

from em_kernels import (
    EntropyLoss,
    entropy_from_logits,
    entropy_loss,
    linear_entropy_loss,
    linear_softmax_stats,
    linear_token_loss,
    selective_log_softmax_and_entropy,
    softmax_stats,
    token_loss,
)
from em_kernels.backends.choice import IMPLS, why_not

CPU_IMPLS = [impl for impl in IMPLS[1:] if why_not(impl, torch.device("cpu")) is None]
DOUBLE, VOCAB, ROWS = torch.float64, 7, (2, 3)
TARGET = torch.tensor([[1, 0, 5], [3, 2, 4]])
GIVEN = torch.linspace(-1, 2, 6, dtype=DOUBLE).view(ROWS)  # weights of the rows
HEAD = torch.linspace(-1, 1, VOCAB * 4, dtype=DOUBLE).sin().view(VOCAB, 4)
OPTIONS = {
    "plain": {},
    "transformed": {"softcap": 2.0, "logit_scale": -1.3, "valid_vocab": 6},
    "temperatures": {"temperature": torch.linspace(0.5, 1.5, 6, dtype=DOUBLE).view(ROWS)},
}
NAMES = ("logprob", "entropy", "lse")


def logits():
    return torch.linspace(-2, 2, 6 * VOCAB, dtype=DOUBLE).mul(3).cos().view(*ROWS, VOCAB)


def hidden():
    return torch.linspace(-2, 2, 24, dtype=DOUBLE).mul(5).cos().view(*ROWS, 4)


def weighted(stats):
    """A sum to which every differentiable statistic adds something else."""
    get = stats.__getitem__ if isinstance(stats, dict) else lambda name: getattr(stats, name)
    return sum((k * GIVEN * get(name)).sum() for k, name in enumerate(NAMES, 1))


def penalised(f, *inputs):
    """Gradients of |d(f + |x|^2 / 2) / dx|^2: a Hessian-vector product beside another term."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    value = f(*inputs) + sum(x.square().sum() for x in inputs) / 2
    grads = torch.autograd.grad(value, inputs, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)


def check(f, definition, *inputs, tolerance=1e-12):
    for got, right in zip(penalised(f, *inputs), penalised(definition, *inputs), strict=True):
        assert (got - right).norm() <= tolerance * right.norm()


def defined_loss(z, **options):
    values = truth(z, TARGET, **options)
    return (GIVEN * values["entropy"] - values["logprob"] / 3).sum()


WEIGHTS = {"entropy_weight": GIVEN, "logprob_weight": torch.full(ROWS, -1 / 3, dtype=DOUBLE)}


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_from_logits(impl, options):
    def stats(z):
        return weighted(softmax_stats(z, TARGET, outputs=NAMES, impl=impl, **options))

    def loss(z):
        return token_loss(z, TARGET, impl=impl, **WEIGHTS, **options).loss

    check(stats, lambda z: weighted(truth(z, TARGET, **options)), logits())
    check(loss, lambda z: defined_loss(z, **options), logits())


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_from_hidden_states(impl, options):
    def stats(x, w, b):
        cut = dict(outputs=NAMES, impl=impl, chunk_tokens=4)
        return weighted(linear_softmax_stats(x, w, TARGET, bias=b, **cut, **options))

    def loss(x, w, b):
        return linear_token_loss(x, w, TARGET, bias=b, impl=impl, **WEIGHTS, **options).loss

    def products(x, w, b):
        return x @ w.T + b / options.get("logit_scale", 1.0)

    inputs = hidden(), HEAD, torch.linspace(-1, 1, VOCAB, dtype=DOUBLE)
    check(stats, lambda *x: weighted(truth(products(*x), TARGET, **options)), *inputs)
    check(loss, lambda *x: defined_loss(products(*x), **options), *inputs)


def mean_entropy(z):
    return truth(z)["entropy"].mean()


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_the_other_functions(impl):
    def logprob_and_entropy(z):
        logprob, entropy = selective_log_softmax_and_entropy(z, TARGET, 0.7)
        return (logprob + GIVEN * entropy).sum()

    def defined(z):
        values = truth(z, TARGET, temperature=0.7)
        return (values["logprob"] + GIVEN * values["entropy"]).sum()

    check(lambda z: entropy_loss(z, impl=impl), mean_entropy, logits())
    check(EntropyLoss(impl=impl), mean_entropy, logits())
    check(lambda z: entropy_from_logits(z).mean(), mean_entropy, logits())
    check(logprob_and_entropy, defined, logits())
    head = HEAD.clone()  # frozen
    check(
        lambda x: linear_entropy_loss(x, head, impl=impl),
        lambda x: mean_entropy(x @ head.T),
        hidden(),
    )


@pytest.mark.parametrize("f", (entropy_loss, lambda z: softmax_stats(z).entropy.mean()))
def test_autograd_functional(f):
    x, v = logits(), GIVEN[..., None] * logits().square()
    right = hessian(mean_entropy, x)
    assert right.norm() > 0.1
    assert (hessian(f, x) - right).norm() < 1e-12
    for product in (hvp, vhp):
        assert (product(f, x, v)[1] - product(mean_entropy, x, v)[1]).norm() < 1e-12


def test_a_third_derivative_and_one_in_the_upstream_gradient():
    def third(f):
        x = logits().requires_grad_()
        (g,) = torch.autograd.grad(f(x), x, create_graph=True)
        (g,) = torch.autograd.grad(g.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    def upstream(f):
        x, factor = logits().requires_grad_(), torch.tensor(1.5, dtype=DOUBLE, requires_grad=True)
        (g,) = torch.autograd.grad(factor.square() * f(x), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), factor)[0]

    for f in (entropy_loss, lambda z: softmax_stats(z).entropy.mean()):
        for order in (third, upstream):
            right = order(mean_entropy)
            assert (order(f) - right).norm() < 1e-10 * right.norm()


def test_rows_that_are_left_out_or_hold_minus_infinity():
    z, target = logits(), TARGET.clone()
    mask = torch.ones(ROWS)
    z[0, 1], mask[0, 1], target[1, 2] = torch.nan, 0, -100
    z[1, 0, 0] = -torch.inf  # as if the entry were not there
    z = z.requires_grad_()

    def ours():
        stats = softmax_stats(z, target, mask=mask)
        return (stats.logprob + stats.entropy).sum()

    def defined():
        rows = (z[0, 0], target[0, 0]), (z[0, 2], target[0, 2]), (z[1, 1], target[1, 1])
        rows = (*rows, (z[1, 0, 1:], target[1, 0] - 1))
        return sum(v["logprob"] + v["entropy"] for v in (truth(*row) for row in rows))

    def second(value):
        (g,) = torch.autograd.grad(value, z, create_graph=True)
        return torch.autograd.grad(g.square().sum(), z)[0]

    got, right = second(ours()), second(defined())
    assert right[1, 0].norm() > 0
    assert (got - right).norm() < 1e-12


def test_in_a_checkpoint_that_does_not_reenter():
    def run(f):
        head = torch.nn.Parameter(HEAD.clone())
        return penalised(lambda x: checkpoint(f, x, head, use_reentrant=False), hidden())[0]

    right = run(lambda x, w: mean_entropy(x @ w.T))
    for f in (
        lambda x, w: linear_softmax_stats(x, w).entropy.mean(),
        lambda x, w: softmax_stats(x @ w.T).entropy.mean(),
        lambda x, w: linear_entropy_loss(x, w),
    ):
        assert (run(f) - right).norm() < 1e-12


# What cannot be right raises, also where the gradient is one term of a sum.


def second(f, x):
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(g.square().sum() + x.sum(), x)


def changed_between(x):
    changed_between.kept = z = x * 1.0
    loss = entropy_loss(z)
    z.detach().zero_()
    return loss


GONE = {
    "logits": (logits, lambda x: entropy_loss(x * 1.0)),
    "hidden": (hidden, lambda x: linear_entropy_loss(x * 1.0, HEAD)),
    "weight": (hidden, lambda x: linear_entropy_loss(x, HEAD * 1.0)),
    "overwritten": (logits, lambda x: entropy_loss(x * 1.0, inplace=True)),
    "changed": (logits, changed_between),
}


@pytest.mark.parametrize("make, f", GONE.values(), ids=GONE)
def test_a_loss_whose_inputs_are_gone(make, f):
    x = make().requires_grad_()
    (grad,) = torch.autograd.grad(f(x), x)  # one derivative needs none of them
    assert grad.norm() > 0
    with pytest.raises(RuntimeError, match="keep the logits"):
        second(f, x)


def test_autocasts_copies_are_not_what_has_to_be_kept():
    """They are gone when the loss is there; what the caller gave is not."""
    x, head = hidden().float(), torch.nn.Parameter(HEAD.float())
    bias = HEAD[:, 0].float()

    def run(f):
        return torch.cat([g.flatten() for g in penalised(f, x, head, bias)])

    def loss(x, w, b):
        with torch.autocast("cpu", torch.bfloat16):
            return linear_entropy_loss(x, w, bias=b)

    def stats(x, w, b):
        with torch.autocast("cpu", torch.bfloat16):
            return linear_softmax_stats(x, w, bias=b).entropy.mean()

    right = run(lambda x, w, b: mean_entropy(x @ w.T + b))
    for f in (loss, stats):
        assert (run(f) - right).norm() < 2e-2 * right.norm()


@pytest.mark.parametrize(
    "f", (entropy_loss, lambda z: linear_entropy_loss(z, HEAD @ HEAD.T)), ids=("logits", "linear")
)
def test_compiled_autograd_has_one_derivative_of_a_loss(f):
    x = logits().requires_grad_()
    (right,) = torch.autograd.grad(f(x), x)
    enabled = torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager"))
    with enabled:
        assert torch.equal(torch.autograd.grad(f(x), x)[0], right)
        with pytest.raises(RuntimeError, match="compiled autograd has no second derivative"):
            second(lambda z: f(z) + z.square().sum(), x)


def test_a_loss_keeps_its_inputs_alive_no_longer_than_without():
    for make, f in ((logits, entropy_loss), (hidden, lambda x: linear_entropy_loss(x, HEAD))):
        x = make().requires_grad_() * 1.0
        kept, loss = weakref.ref(x), f(x)
        del x
        assert kept() is None and loss.requires_grad


def test_a_row_changed_in_place_is_no_other_second_derivative():
    x, target = logits().requires_grad_(), TARGET.clone()
    for loss in (
        lambda: -softmax_stats(x, target).logprob.sum(),
        lambda: token_loss(x, target, **WEIGHTS).loss,
    ):
        (g,) = torch.autograd.grad(loss(), x, create_graph=True)
        target.fill_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            torch.autograd.grad(g.square().sum() + x.sum(), x)


SQUARE = torch.eye(VOCAB, dtype=DOUBLE)
CALLS = {
    "softmax_stats": lambda x, **options: softmax_stats(x, **options).entropy.sum(),
    "entropy_loss": entropy_loss,
    "linear_softmax_stats": lambda x, **options: linear_softmax_stats(
        x, SQUARE, **options
    ).entropy.sum(),
    "linear_entropy_loss": lambda x, **options: linear_entropy_loss(x, SQUARE, **options),
}


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("f", CALLS.values(), ids=CALLS)
def test_with_a_group(f, group):
    with pytest.raises(RuntimeError, match="with a group there is no second derivative"):
        second(lambda x: f(x, group=group), logits().requires_grad_())


@pytest.mark.parametrize("f", CALLS.values(), ids=CALLS)
def test_functorch_and_forward_mode_are_refused(f):
    x = logits()
    transforms = (
        lambda: torch.func.grad(f)(x),
        lambda: torch.func.vmap(f)(x),
        lambda: torch.func.jvp(f, (x,), (x,)),
        lambda: torch.func.hessian(f)(x),
    )
    for transform in transforms:
        with pytest.raises(RuntimeError, match="functorch"):
            transform()
    with pytest.raises(NotImplementedError), forward_ad.dual_level():
        f(forward_ad.make_dual(x, x))


@pytest.mark.skipif("triton" not in CPU_IMPLS, reason="needs Triton's interpreter")
def test_the_fused_product_has_no_tangent_either():
    x, weight = hidden().float(), HEAD.float()

    def f(x):
        return linear_softmax_stats(x, weight, fuse_product=True).entropy.sum()

    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.jvp(f, (x,), (x,))
    with pytest.raises(NotImplementedError), forward_ad.dual_level():
        f(forward_ad.make_dual(x, x))
