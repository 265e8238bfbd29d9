"""The backward pass of `linear_softmax_stats` with blocks of the vocabulary outermost."""

import pytest
import torch
from gpu_products import block_small_vocabularies, play_gpu
from helpers import IMPLS, ON_CPU, error, make_linear, random_target, random_upstream, truth

from em_kernels import linear_softmax_stats
from em_kernels.backends.choice import backend
from em_kernels.backends.interface import RowSpec, Saved, Upstream
from em_kernels.linear import chunks, products, vocab_blocks
from em_kernels.linear.chunking import column_blocks
from em_kernels.linear.chunks import Linear, Needs

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
N, D, V = 13, 16, 301
WIDE = (torch.float32, torch.float64)
FAST = tuple(name for name in ON_CPU if name != "triton")  # its interpreter is slow


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    block_small_vocabularies(monkeypatch)


@pytest.fixture
def blocks(monkeypatch):
    """The blocks of each backward pass that had them outermost."""
    found = []

    def column_blocks_seen(*sizes):
        found.append(column_blocks(*sizes))
        return found[-1]

    monkeypatch.setattr(vocab_blocks, "column_blocks", column_blocks_seen)
    return found


@pytest.fixture
def pieces(monkeypatch):
    """The shapes of the products of logits that were run."""
    shapes, multiply = [], products.multiply

    def seen(x, weight, out, backend):
        shapes.append((len(x), len(weight)))
        multiply(x, weight, out, backend)

    monkeypatch.setattr(products, "multiply", seen)
    return shapes


def leaves(dtype=torch.float32, n=N, vocab=V):
    hidden, weight = make_linear(n, dim=D, vocab=vocab, dtype=dtype)
    return hidden, weight, torch.randn(vocab).to(dtype).requires_grad_()


TRANSFORMS = {
    "plain": {},
    "softcap": dict(softcap=4.0, logit_scale=0.7),
    "temperatures": dict(temperature=torch.linspace(0.5, 2, N)),
    "valid_vocab": dict(valid_vocab=V - 40, temperature=0.7),
}


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("masked", (False, True), ids=("", "masked"))
@pytest.mark.parametrize("chunk", (3, 5))
def test_gradients(blocks, impl, dtype, transform, masked, chunk):
    transform = TRANSFORMS[transform]
    valid = transform.get("valid_vocab", V)
    *inputs, bias = leaves(dtype)
    target, upstream = random_target(N, vocab=valid), random_upstream(N, dtype=dtype)
    mask = torch.arange(N) % 3 > 0 if masked else torch.ones(N, dtype=torch.bool)
    arguments = dict(outputs=tuple(upstream), mask=mask, chunk_tokens=chunk, impl=impl)
    arguments["keep_logits"] = 0
    stats = linear_softmax_stats(*inputs, target, bias=bias, **arguments, **transform)
    values = {name: getattr(stats, name) for name in upstream}
    given = [upstream[name] * mask for name in values]
    got = torch.autograd.grad(list(values.values()), (*inputs, bias), given)
    wide = [x.detach().double().requires_grad_() for x in (*inputs, bias)]
    exact = truth(wide[0] @ wide[1].T, target, bias=wide[2], **transform)
    refs = torch.autograd.grad([exact[name] for name in values], wide, [g.double() for g in given])
    assert len(blocks[0]) > 1
    for out, ref in zip(got, refs, strict=True):
        assert out.dtype == dtype and out.is_contiguous()
        assert error(out, ref) < (5e-6 if dtype == torch.float32 else 1e-12)
    assert (got[1][valid:] == 0).all() and (got[0][~mask] == 0).all()


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("masked", (False, True), ids=("", "masked"))
@pytest.mark.parametrize("adds", (True, False), ids=("addmm", "pieces"))
def test_gradients_of_16_bit_operands_on_a_gpu(monkeypatch, blocks, name, dtype, masked, adds):
    """dX is summed in float32 and rounded once; a block of dW is one product."""
    made = play_gpu(monkeypatch)
    monkeypatch.setattr(products, "adds_to_float32", lambda device, dtype: adds)
    hidden, weight, bias = (x.detach() for x in leaves(dtype))
    mask = torch.arange(N) % 3 > 0 if masked else None
    spec = RowSpec(bias=bias, target=random_target(N, vocab=V), mask=mask, valid_vocab=V)
    upstream, needs = Upstream(**random_upstream(N)), Needs(True, True, True)
    linear, module = Linear.of(hidden, weight, 5, None), backend(name, torch.device("cpu"))
    saved = Saved(*chunks.stats(linear, spec, (), module, needs)[:3])
    got = chunks.grad(linear, spec, saved, upstream, needs, module)
    wide = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    exact = truth(wide[0] @ wide[1].T, spec.target, bias=wide[2])
    kept = torch.ones(N) if mask is None else mask.double()
    total = sum((kept * g * exact[name]).sum() for name, g in upstream._asdict().items())
    assert len(blocks[0]) > 1
    for out, ref in zip(got, torch.autograd.grad(total, wide), strict=True):
        assert out.dtype == dtype
        assert error(out, ref) < {torch.float16: 1.5e-3, torch.bfloat16: 6e-3}[dtype]
    assert all(product.out.shape != weight.shape for product in made), "a wide dW"


@pytest.mark.parametrize("chunk", (1, 4, 5, 6))
@pytest.mark.parametrize("vocab", (60, 97, 301))
def test_logits_are_multiplied_again_in_the_same_pieces(pieces, blocks, chunk, vocab):
    hidden, weight, _ = leaves(vocab=vocab)
    stats = linear_softmax_stats(hidden, weight, chunk_tokens=chunk, keep_logits=0)
    forward = sorted(pieces)
    pieces.clear()
    stats.entropy.sum().backward()
    assert sorted(pieces) == forward
    if chunk == 5:
        assert len(blocks) == 1 and len(forward) == 3 * len(blocks[0])


@pytest.mark.parametrize("frozen", (None, "weight"))
@pytest.mark.parametrize("eps", (None, 1e-6))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("on_gpu", (False, True), ids=("cpu", "gpu"))
@pytest.mark.parametrize("narrows", (False, True), ids=("wide", "narrow"))
@pytest.mark.parametrize("impl", FAST)
def test_and_so_they_are_where_rows_are_outermost(
    pieces, monkeypatch, frozen, eps, dtype, on_gpu, narrows, impl
):
    """The float32 logits of a backend that cannot narrow them have a cast beside them."""
    monkeypatch.setattr(type(backend(impl, torch.device("cpu"))), "narrows", narrows)
    if on_gpu:
        play_gpu(monkeypatch)
    hidden, weight, _ = leaves(dtype, n=40)
    if frozen:
        weight.requires_grad_(False)
    for name in ("GPU_WORKSPACE_BYTES", "CPU_WORKSPACE_BYTES"):
        monkeypatch.setattr(f"em_kernels.linear.chunking.{name}", 4 * 24 * 304)
    monkeypatch.setattr("em_kernels.linear.chunking.CPU_TILE_ROWS", 1)
    options = dict(filter_eps=eps, logits_dtype=torch.float32, keep_logits=0, impl=impl)
    stats = linear_softmax_stats(hidden, weight, outputs=("entropy", "lse"), **options)
    forward = sorted(pieces)
    pieces.clear()
    (stats.entropy + stats.lse).sum().backward()
    assert sorted(pieces) == forward and len(forward) > 1


def sure_head(n, vocab):
    """hidden, weight: rows of entropies around 1e-9, the largest logit anywhere."""
    torch.manual_seed(3)
    weight = torch.randn(vocab, D)
    top = torch.arange(n) * (vocab - 1) // (n - 1)
    hidden = weight[top] / weight[top].norm(dim=1, keepdim=True) ** 2
    margin = hidden @ weight.T
    margin[torch.arange(n), top] = -torch.inf
    return hidden * (22 / (1 - margin.amax(1, keepdim=True))), weight


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("chunk", (3, 5, 7))
def test_the_gradient_of_a_small_entropy_keeps_its_digits(blocks, impl, device, chunk):
    """One digit of the maximum other than in the forward pass and it is wrong by a factor."""
    leaves = [x.to(device).requires_grad_() for x in sure_head(N, V)]
    stats = linear_softmax_stats(
        *leaves, outputs=("entropy",), chunk_tokens=chunk, keep_logits=0, impl=impl
    )
    got = torch.autograd.grad(stats.entropy.sum(), leaves)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    entropy = truth(wide[0] @ wide[1].T)["entropy"]
    refs = torch.autograd.grad(entropy.sum(), wide)
    assert len(blocks[0]) > 1 and entropy.min() > 1e-11 and entropy.max() < 1e-7
    for row in range(N):
        assert error(got[0][row], refs[0][row]) < 1e-3, row
    assert error(got[1], refs[1]) < 1e-3


def test_a_nan_stays_in_its_row_and_minus_inf_has_no_gradient():
    hidden, weight, bias = leaves()
    with torch.no_grad():
        hidden[4, 3] = torch.nan
        bias[100:103] = -torch.inf
    stats = linear_softmax_stats(hidden, weight, bias=bias, chunk_tokens=5)
    others = torch.arange(N) != 4
    dx, dw = torch.autograd.grad(stats.entropy, (hidden, weight), others.float())
    assert dx[4].isnan().all() and not dx[others].isnan().any()
    assert dw.isnan().all()  # a NaN of hidden is in every product with it
    stats = linear_softmax_stats(hidden[others], weight, bias=bias, chunk_tokens=5)
    (dw,) = torch.autograd.grad(stats.entropy.sum(), weight)
    assert (dw[100:103] == 0).all() and not dw.isnan().any()


def test_frozen_hidden_and_no_rows(blocks):
    hidden, weight, _ = leaves()
    full = linear_softmax_stats(hidden, weight, chunk_tokens=5).entropy.sum()
    (dw,) = torch.autograd.grad(full, weight)
    stats = linear_softmax_stats(hidden.detach(), weight, chunk_tokens=5)
    (got,) = torch.autograd.grad(stats.entropy.sum(), weight)
    assert torch.equal(got, dw) and len(blocks) == 2
    stats = linear_softmax_stats(hidden, weight, mask=torch.zeros(N), chunk_tokens=5)
    for grad in torch.autograd.grad(stats.entropy.sum(), (hidden, weight)):
        assert (grad == 0).all()
