"""What waits for the device, and rows that are multiplied though they do not count.

The rule of a GPU is played on the CPU: looking at the values of a tensor costs something there.
"""

import pytest
import torch
from gpu_products import play_gpu
from helpers import ON_CPU, error, make_linear, random_logits, random_target, same_bits
from torch.utils._python_dispatch import TorchDispatchMode

from em_kernels import (
    entropy_loss,
    linear_entropy_loss,
    linear_softmax_stats,
    linear_token_covariance,
    linear_token_loss,
    next_token_targets,
    softmax_stats,
    token_loss,
)
from em_kernels.backends import row_index
from em_kernels.backends.choice import backend
from em_kernels.backends.interface import RowSpec
from em_kernels.linear import chunks
from em_kernels.ops.registry import OPERATORS

N, D, V = 12, 16, 301
IGNORED = -100
LOOKS = ("nonzero", "_local_scalar_dense", "item", "is_nonzero", "equal", "masked_select", "unique")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class Looks(TorchDispatchMode):
    """Names the operations that a GPU's host would have to wait for, within operators too."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "em_kernels" and name in OPERATORS:
            with self:
                return OPERATORS[name].run(*args)
        indices = args[1] if name in ("index", "index_put_", "index_put") else ()
        by_mask = any(i is not None and i.dtype == torch.bool for i in indices)
        if name.startswith(LOOKS) or by_mask:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def gpu_rule(monkeypatch):
    monkeypatch.setattr(row_index, "is_free_to_look", lambda x: False)


@pytest.fixture
def capturing(gpu_rule, monkeypatch):
    monkeypatch.setattr(row_index, "is_capturing", lambda x: True)


def targets():
    """Some of them ignored."""
    return torch.where(torch.arange(N) % 4 == 1, IGNORED, random_target(N, vocab=V))


def weights():
    """None, one or both of them 0 in some rows."""
    return [torch.where(torch.arange(N) % step == 0, 0, torch.rand(N)) for step in (3, 2)]


def calls(target, mask, impl="reference", **options):
    """name -> a public function of (hidden, weight), giving what can be differentiated."""
    of_entropy, of_logprob = weights()
    weighed = dict(entropy_weight=of_entropy, logprob_weight=of_logprob, mask=mask, impl=impl)
    cut = dict(chunk_tokens=5, impl=impl, **options)

    def summed(stats):
        return torch.stack([stats.logprob, 0.5 * stats.entropy, stats.lse]).sum(0)

    outputs = ("logprob", "entropy", "lse")
    return {
        "linear_softmax_stats": lambda x, w: summed(
            linear_softmax_stats(x, w, target, outputs=outputs, mask=mask, **cut)
        ),
        "linear_token_loss": lambda x, w: (
            linear_token_loss(x, w, target, **weighed, chunk_tokens=5, **options).loss
        ),
        "linear_entropy_loss": lambda x, w: linear_entropy_loss(x, w, mask, **cut),
        "softmax_stats": lambda x, w: summed(
            softmax_stats(x @ w.T, target, outputs=outputs, mask=mask, impl=impl)
        ),
        "token_loss": lambda x, w: token_loss(x @ w.T, target, **weighed).loss,
        "entropy_loss": lambda x, w: entropy_loss(x @ w.T, mask, impl=impl),
        "entropy_loss with a target": lambda x, w: entropy_loss(
            x @ w.T, mask, target=target, impl=impl
        ),
    }


NAMES = tuple(calls(None, None))
LINEAR = [name for name in NAMES if name.startswith("linear")]


def run(name, hidden, weight, target, mask, impl="reference", **options):
    """[value, dX, dW]; the same random weights every time."""
    torch.manual_seed(1)
    x, w = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    value = calls(target, mask, impl, **options)[name](x, w)
    return value.detach(), *torch.autograd.grad(value.sum(), (x, w))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_without_a_mask(gpu_rule, monkeypatch, name, dtype):
    """Forward and backward, though targets are ignored and weights are 0."""
    play_gpu(monkeypatch)
    hidden, weight = make_linear(N, dim=D, vocab=V, dtype=dtype)
    with Looks() as looks:
        run(name, hidden, weight, targets(), None)
    assert looks.names == []


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_looked_for_once_with_a_mask(gpu_rule, monkeypatch, name):
    play_gpu(monkeypatch)
    hidden, weight = make_linear(N, dim=D, vocab=V, dtype=torch.bfloat16)
    with Looks() as looks:
        run(name, hidden, weight, targets(), torch.arange(N) % 5 > 0)
    assert looks.names == ["nonzero"] * (name in LINEAR)


@pytest.mark.parametrize("filter_eps", (None, 1e-3))
@pytest.mark.parametrize("name", LINEAR)
def test_nothing_waits_in_a_capture(capturing, monkeypatch, name, filter_eps):
    play_gpu(monkeypatch)
    hidden, weight = make_linear(N, dim=D, vocab=V, dtype=torch.bfloat16)
    with Looks() as looks:
        run(name, hidden, weight, targets(), torch.arange(N) % 5 > 0, filter_eps=filter_eps)
    assert looks.names == []


def test_a_mask_is_looked_at_once_for_a_covariance(gpu_rule):
    inputs = (*make_linear(N, dim=D, vocab=V), targets(), torch.rand(N))
    for mask in (None, torch.arange(N) % 5 > 0):
        with Looks() as looks:
            linear_token_covariance(*inputs, mask, impl="reference")
        assert looks.names == ([] if mask is None else ["nonzero"])


def test_a_mean_over_segments_waits_for_nothing(gpu_rule):
    logits, ids = torch.randn(N, V, requires_grad=True), torch.arange(N) // 5 - 1
    with Looks() as looks:
        options = dict(reduction="sequence_mean", segment_ids=ids, impl="reference")
        entropy_loss(logits, **options).backward()
        next_token_targets(targets(), ids)
    assert looks.names == []


def test_a_mean_over_all_tokens_makes_no_mask(monkeypatch):
    seen = []
    loss = chunks.loss

    def watched(linear, spec, *args):
        seen.append(spec.mask)
        return loss(linear, spec, *args)

    monkeypatch.setattr(chunks, "loss", watched)
    hidden, weight = make_linear(2, N // 2, dim=D, vocab=V)
    for reduction in ("token_mean", "sequence_mean", "sum", 3.0):
        linear_entropy_loss(hidden, weight, reduction=reduction)
    assert seen == [None] * 4


def test_a_captured_forward_pass_and_a_backward_pass_outside(gpu_rule, monkeypatch):
    """Both multiply the same rows, so that logits kept from one are those of the other."""
    hidden, weight = make_linear(N, dim=D, vocab=V)
    mask = torch.arange(N) % 3 > 0
    grads = []
    for captured in (False, True):
        monkeypatch.setattr(row_index, "is_capturing", lambda x, captured=captured: captured)
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
        options = dict(mask=mask, chunk_tokens=4, keep_logits=1 << 20)
        entropy = linear_softmax_stats(*leaves, **options).entropy
        monkeypatch.setattr(row_index, "is_capturing", lambda x: False)
        entropy.sum().backward()
        grads.append([x.grad for x in leaves])
    for got, want in zip(*reversed(grads), strict=True):
        assert error(got, want) < 1e-5


@pytest.mark.parametrize("masked", (False, True), ids=("ignored", "masked"))
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("impl", ON_CPU)
def test_rows_that_do_not_count_are_as_if_left_out(capturing, monkeypatch, impl, name, masked):
    """NaN in them reaches nothing, whether they are left out of the products or multiplied."""
    if name == "linear_entropy_loss" and not masked:
        pytest.skip("it counts every row")
    if impl == "triton" and (name == "linear_softmax_stats") != masked:
        pytest.skip("its interpreter is slow")
    hidden, weight = make_linear(N, dim=D, vocab=V)
    target = targets()
    mask = torch.arange(N) % 5 > 0 if masked else None
    with torch.no_grad():
        hidden[1] = torch.nan  # an ignored target
        if masked:
            hidden[0], hidden[5] = torch.inf, torch.nan
            if name == "linear_entropy_loss":
                hidden[1] = 1.0
        if name == "linear_token_loss":
            hidden[6] = torch.nan  # of no weight
    multiplied = run(name, hidden, weight, target, mask, impl)
    monkeypatch.undo()
    left_out = run(name, hidden, weight, target, mask, impl)
    for ours, theirs in zip(multiplied, left_out, strict=True):
        assert error(ours, theirs) < 1e-6
    zeros = (left_out[1] == 0).all(-1)
    assert zeros.any() and torch.equal((multiplied[1] == 0).all(-1), zeros)


@pytest.mark.parametrize("filter_eps", (None, 1e-3))
def test_no_product_of_a_row_that_does_not_count_is_kept(gpu_rule, filter_eps):
    """0 times an infinite weight is NaN, and so may an upstream gradient be that is not asked."""
    hidden, weight = make_linear(N, dim=D, vocab=V)
    target = targets()
    with torch.no_grad():
        hidden[:, 0], weight[7, 0] = -hidden[:, 0].abs() - 1, torch.inf  # a logit of -inf
    stats = linear_softmax_stats(
        hidden, weight, target, outputs=("entropy",), filter_eps=filter_eps, impl="reference"
    )
    assert (stats.entropy[target == IGNORED] == 0).all() and stats.entropy.isfinite().all()
    upstream = torch.where(target == IGNORED, torch.nan, 1.0)
    dx, dw = torch.autograd.grad(stats.entropy, (hidden, weight), upstream)
    assert (dx[target == IGNORED] == 0).all() and dw.isfinite().all()


@pytest.mark.skipif("triton" not in ON_CPU, reason="no interpreter of Triton here")
def test_fused_rows_that_do_not_count(monkeypatch):
    linear = pytest.importorskip("em_kernels.backends.triton.linear")
    hidden, weight = (t.detach() for t in make_linear(N, dim=D, vocab=V))
    target = targets()
    hidden[1] = torch.nan
    spec = RowSpec(target=target, mask=target != IGNORED, valid_vocab=V, compact=False)
    left_out = linear.linear_stats(hidden, weight, spec, ("logprob", "entropy"))
    monkeypatch.setattr(row_index, "is_free_to_look", lambda x: False)
    with Looks() as looks:
        multiplied = linear.linear_stats(hidden, weight, spec, ("logprob", "entropy"))
    assert "nonzero" not in looks.names
    # Not bit for bit: a product of the interpreter is the BLAS's, where a row's place may count.
    for ours, theirs in zip(multiplied, left_out, strict=True):
        assert error(ours, theirs) < 1e-6
        assert same_bits(ours[target == IGNORED], theirs[target == IGNORED])


def test_the_rows_of_a_trace_are_left_to_the_operators():
    """A mask without values has none to look for."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        hidden, weight = (mode.from_tensor(t) for t in make_linear(N, dim=D, vocab=V))
        mask, target = (mode.from_tensor(t) for t in (torch.arange(N) > 3, targets()))
        stats = linear_softmax_stats(hidden, weight, target, mask=mask)
        (grad,) = torch.autograd.grad(stats.entropy.sum(), hidden)
        assert grad.shape == (N, D)
    meta = make_linear(N, dim=D, vocab=V, device="meta")
    mask = torch.empty(N, dtype=torch.bool, device="meta")
    assert linear_softmax_stats(*meta, mask=mask).entropy.shape == (N,)


def on_gpu(impl):
    if impl not in ("triton", "cuda") or not backend(impl, torch.device("cuda")):
        pytest.skip("no such backend here")
    hidden, weight = make_linear(256, dim=64, vocab=4096, dtype=torch.bfloat16, device="cuda")
    target = random_target(256, vocab=4096, device="cuda")
    target[3::7] = IGNORED
    mask = torch.arange(256, device="cuda") % 5 > 0

    def function(hidden, weight):
        stats = linear_softmax_stats(hidden, weight, target, mask=mask, impl=impl)
        loss = linear_entropy_loss(hidden, weight, impl=impl)
        total = (stats.logprob + stats.entropy).sum() + loss
        return stats.entropy, loss, *torch.autograd.grad(total, (hidden, weight))

    return function, hidden, weight


def check_close(got, want):
    for ours, theirs in zip(got, want, strict=True):
        assert error(ours, theirs) < 4e-3


@GPU
@pytest.mark.parametrize("impl", ("triton", "cuda"))
def test_linear_functions_in_a_cuda_graph(impl):
    """Captured with a mask and without one, on a side stream as captures are, and replayed."""
    function, hidden, weight = on_gpu(impl)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function(hidden, weight)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(hidden, weight)
    with torch.no_grad():
        hidden.copy_(random_logits(*hidden.shape, dtype=hidden.dtype, device="cuda", scale=1.0))
    graph.replay()
    torch.cuda.synchronize()
    check_close(captured, function(hidden, weight))


@GPU
@pytest.mark.parametrize("impl", ("triton", "cuda"))
def test_linear_functions_compiled_to_cuda_graphs(impl):
    _, hidden, weight = on_gpu(impl)

    def value(hidden, weight):
        stats = linear_softmax_stats(hidden, weight, mask=hidden[:, 0] > 0, impl=impl)
        return stats.entropy.sum() + linear_entropy_loss(hidden, weight, impl=impl)

    compiled = torch.compile(value, mode="reduce-overhead", fullgraph=True)
    want = torch.autograd.grad(value(hidden, weight), (hidden, weight))
    for _ in range(4):  # warm up, record, replay
        torch.compiler.cudagraph_mark_step_begin()
        total = compiled(hidden, weight)
        check_close(torch.autograd.grad(total, (hidden, weight)), want)


@GPU
@pytest.mark.parametrize("impl", ("triton", "cuda"))
def test_linear_functions_wait_once_on_a_side_stream(impl):
    """Work on another stream is not overtaken."""
    function, hidden, weight = on_gpu(impl)
    want = function(hidden, weight)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the operands are not there yet
        late = [(x.detach() * 1).requires_grad_() for x in (hidden, weight)]
        got = function(*late)
    stream.synchronize()
    check_close(got, want)
