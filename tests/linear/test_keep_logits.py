"""`keep_logits` of `linear_softmax_stats`: fewer products, the same bits."""

import pytest
import torch
from gpu_products import block_small_vocabularies, play_gpu
from helpers import (
    ON_CPU,
    make_linear,
    product_flops,
    random_target,
    random_upstream,
    row_arguments,
    same_bits,
)

from em_kernels import linear_softmax_stats
from em_kernels.backends.interface import RowSpec
from em_kernels.linear import chunks

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
N, D, V = 13, 16, 301
FAST = tuple(name for name in ON_CPU if name != "triton")  # its interpreter is slow
PRODUCT = 2 * N * D * V
WIDTH = 304  # of a row of V entries
ROW = 4 * WIDTH


def call(keep, dtype=torch.float32, frozen=(), masked=False, seed=0, **options):
    """(statistics, gradients twice) of one call."""
    torch.manual_seed(seed)
    hidden, weight = make_linear(N, dim=D, vocab=V, dtype=dtype)
    bias = torch.randn(V).to(dtype)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias.requires_grad_()}
    for name in frozen:
        leaves[name].requires_grad_(False)
    leaves = [x for x in leaves.values() if x.requires_grad]
    upstream = random_upstream(N, dtype=dtype)
    stats = linear_softmax_stats(
        hidden,
        weight,
        random_target(N, vocab=V),
        bias=bias,
        outputs=tuple(upstream),
        temperature=0.7,
        mask=torch.arange(N) % 4 > 0 if masked else None,
        keep_logits=keep,
        **options,
    )
    values = [getattr(stats, name) for name in upstream]
    both = [
        torch.autograd.grad(values, leaves, list(upstream.values()), retain_graph=True)
        for _ in range(2)
    ]
    return [x.detach() for x in values], *both


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("frozen", ((), ("weight",)), ids=("all", "frozen"))
@pytest.mark.parametrize("masked", (False, True), ids=("", "masked"))
@pytest.mark.parametrize("blocks", (False, True), ids=("rows", "blocks"))
def test_the_bits_are_those_of_recomputing(monkeypatch, impl, dtype, frozen, masked, blocks):
    """And those of a second backward pass: what is kept is not written to."""
    if blocks:
        block_small_vocabularies(monkeypatch)
    options = dict(dtype=dtype, frozen=frozen, masked=masked, chunk_tokens=4, impl=impl)
    expected = call(0, **options)
    for keep in (None, 1, 9 * V * dtype.itemsize, N * V * dtype.itemsize, 1 << 40):
        for got, want in zip(call(keep, **options), expected, strict=True):
            assert all(map(same_bits, got, want)), keep


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("logits_dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("blocks", (False, True), ids=("rows", "blocks"))
def test_and_so_they_are_on_a_gpu(monkeypatch, impl, logits_dtype, blocks):
    """float32 logits, with a gradient in 16 bits beside them."""
    play_gpu(monkeypatch)
    if blocks:
        block_small_vocabularies(monkeypatch)
    options = dict(dtype=torch.bfloat16, chunk_tokens=4, logits_dtype=logits_dtype, impl=impl)
    expected = call(0, **options)
    for keep in (None, 9 * ROW, 1 << 40):
        for got, want in zip(call(keep, **options), expected, strict=True):
            assert all(map(same_bits, got, want)), keep


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("blocks", (False, True), ids=("rows", "blocks"))
@pytest.mark.parametrize(
    "keep, rows", ((0, 0), (4 * ROW - 1, 0), (None, 4), (4 * ROW, 4), (9 * ROW, 8), (13 * ROW, 13))
)
def test_rows_that_are_kept_cost_no_product_again(monkeypatch, impl, blocks, keep, rows):
    """Chunks of 4 rows; 13 are all of them."""
    if blocks:
        block_small_vocabularies(monkeypatch)
    hidden, weight = make_linear(N, dim=D, vocab=V)

    def run():
        stats = linear_softmax_stats(
            hidden, weight, chunk_tokens=4, keep_logits=keep, outputs=("entropy",), impl=impl
        )
        stats.entropy.sum().backward()

    assert product_flops(run) == 4 * PRODUCT - 2 * rows * D * V


def kept_by(monkeypatch, **options):
    """The shape of what a call keeps, None where it does not ask."""
    shapes, kept_shape = [None], chunks.kept_shape

    def seen(*args):
        shapes.append(tuple(kept_shape(*args)))
        return shapes[-1]

    with monkeypatch.context() as patch:
        patch.setattr(chunks, "kept_shape", seen)
        hidden, weight = make_linear(N, dim=D, vocab=V)
        options.setdefault("outputs", ("entropy",))
        if options.pop("frozen", False):
            hidden, weight = hidden.detach(), weight.detach()
        linear_softmax_stats(hidden, weight, **options)
    return shapes[-1]


def test_how_many_rows_are_kept(monkeypatch):
    assert kept_by(monkeypatch) == (N, WIDTH), "they fit one chunk"
    assert kept_by(monkeypatch, chunk_tokens=5) == (5, WIDTH)
    assert kept_by(monkeypatch, chunk_tokens=5, keep_logits=0) == (0, WIDTH)
    assert kept_by(monkeypatch, keep_logits=7 * ROW + 3) == (7, WIDTH)
    assert kept_by(monkeypatch, keep_logits=1 << 50) == (N, WIDTH)
    monkeypatch.setattr("em_kernels.linear.chunking.CPU_WORKSPACE_BYTES", 6 * ROW)
    assert kept_by(monkeypatch) == (6, WIDTH)


def test_without_a_gradient_nothing_is_kept(monkeypatch):
    assert kept_by(monkeypatch, keep_logits=1 << 50, frozen=True) is None
    assert kept_by(monkeypatch, keep_logits=1 << 50, outputs=("max_prob",)) is None
    with torch.no_grad():
        assert kept_by(monkeypatch, keep_logits=1 << 50) is None


@pytest.mark.parametrize("keep", (-1, 1 << 63, True, False, 1.5, 1e9, "all", torch.tensor(3)))
def test_bad_values(keep):
    hidden, weight = make_linear(N, dim=D, vocab=V)
    with pytest.raises((TypeError, ValueError), match=r"keep_logits must be .*, got"):
        linear_softmax_stats(hidden, weight, keep_logits=keep)


@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("keep", (None, 0, 9 * ROW, 1 << 40))
def test_compiled(dynamic, keep):
    _, weight = make_linear(N, dim=D, vocab=V)

    def entropy(hidden, weight):
        return linear_softmax_stats(hidden, weight, chunk_tokens=4, keep_logits=keep).entropy

    compiled = torch.compile(entropy, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (N, 7, N + 5):
        x = torch.randn(n, D, requires_grad=True)
        got, want = compiled(x, weight), entropy(x, weight)
        assert same_bits(got.detach(), want.detach())
        grads = [torch.autograd.grad(y.sum(), (x, weight)) for y in (got, want)]
        assert all(map(same_bits, *grads))
    torch._dynamo.reset()


@pytest.mark.parametrize("keep", (0, 1 << 40))
@pytest.mark.parametrize("chunk", (None, 4))
def test_opcheck(keep, chunk):
    hidden, weight = (x.detach() for x in make_linear(2, N, dim=D, vocab=V))
    later = (True, True, False, None, keep)
    arguments = (*row_arguments(RowSpec(valid_vocab=V)), ("entropy",), chunk, None, "auto")
    operator = torch.ops.em_kernels.linear_stats.default
    torch.library.opcheck(operator, (hidden, weight, *arguments, *later))
    assert len(operator(hidden, weight, *arguments)) == 4, "nothing is kept unless told"


def test_second_derivatives():
    hidden, weight = make_linear(5, dim=4, vocab=9, dtype=torch.float64)

    def entropy(hidden, weight):
        return linear_softmax_stats(hidden, weight, keep_logits=1 << 20, chunk_tokens=2).entropy

    assert torch.autograd.gradgradcheck(entropy, (hidden, weight))
