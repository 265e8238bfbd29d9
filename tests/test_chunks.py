"""How the chunk driver works on a GPU, with the GPU's products played by ones on the CPU."""

from typing import NamedTuple

import pytest
import torch
from helpers import IMPLS, error, make_linear, random_target, random_upstream, truth
from torch.utils._python_dispatch import TorchDispatchMode

from em_kernels import _chunks, _products, reference
from em_kernels._chunks import Linear, Needs, default_chunk_tokens
from em_kernels._ops import backend
from em_kernels._spec import RowSpec, Saved, Upstream

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
NARROWING = [name for name in IMPLS if getattr(backend(name, torch.device("cpu")), "narrows", 0)]
ALL = Needs(True, True, True)
N, D, V = 12, 16, 301


class Product(NamedTuple):
    """A call of one of the wide products: its operands and where the result went."""

    kind: str
    a: torch.Tensor
    b: torch.Tensor
    out: torch.Tensor


@pytest.fixture
def gpu(monkeypatch):
    """Make the driver take its GPU ways; returns the wide products it ran."""
    calls = []

    def mm_wide(a, b, out):
        calls.append(Product("mm", a, b, out))
        assert a.dtype == b.dtype != out.dtype
        out.copy_(a.to(out.dtype) @ b.to(out.dtype))

    def addmm_wide(total, a, b):
        calls.append(Product("addmm", a, b, total))
        assert a.dtype == b.dtype != total.dtype
        total += a.to(total.dtype) @ b.to(total.dtype)

    monkeypatch.setattr(_products, "is_gpu", lambda x: True)
    monkeypatch.setattr(_products, "mm_wide", mm_wide)
    monkeypatch.setattr(_products, "addmm_wide", addmm_wide)
    monkeypatch.setattr(_products, "adds_to_float32", lambda device, dtype: True)
    return calls


def operands(dtype=torch.bfloat16, vocab=V):
    hidden, weight = make_linear(N, dim=D, vocab=vocab, dtype=dtype)
    return hidden.detach(), weight.detach()


def gradients(hidden, weight, spec, upstream, chunk, module, needs=ALL):
    """[dX, dW, db] by `loss`, having seen that `stats` and `grad` agree with it."""
    linear = Linear.cut(hidden, weight, chunk, None)
    results = _chunks.loss(linear, spec, upstream, (), needs, module)
    saved = Saved(*_chunks.stats(linear, spec, (), module))
    again = _chunks.grad(linear, spec, saved, upstream, needs, module)
    for out, ref in zip(again, results[3:], strict=True):
        assert error(out, ref) < 1e-3 or ref.numel() == 0
    return results[3:]


def exact(hidden, weight, spec, upstream):
    """The same in float64 from all the logits."""
    wide = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    bias = torch.zeros(len(weight), dtype=torch.float64, requires_grad=True)
    values = truth(wide[0] @ wide[1].T + bias, spec.target)
    kept = torch.ones(N) if spec.mask is None else spec.mask.double()
    total = sum((kept * g * values[k]).sum() for k, g in zip(upstream._fields, upstream))
    return torch.autograd.grad(total, (*wide, bias))


def weight_gradients(calls):
    return [product for product in calls if product.b.shape[1] == D and product.a.shape[1] != V]


def call(masked=False, vocab=V):
    mask = torch.arange(N) % 3 > 0 if masked else None
    spec = RowSpec(target=random_target(N, vocab=vocab), mask=mask, valid_vocab=vocab)
    upstream = Upstream(**random_upstream(N))
    return spec, upstream


@pytest.mark.parametrize("name", ("reference", "cpu"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("chunk", (5, 100))
@pytest.mark.parametrize("masked", (False, True), ids=("", "masked"))
@pytest.mark.parametrize("adds", (True, False), ids=("addmm", "pieces"))
def test_gradients_on_a_gpu(gpu, monkeypatch, name, dtype, chunk, masked, adds):
    """As exact as 16-bit operands allow, whether or not the gradient is narrowed in place."""
    if name not in IMPLS:
        pytest.skip(f"{name} is not available here")
    monkeypatch.setattr(_products, "adds_to_float32", lambda device, dtype: adds)
    monkeypatch.setattr(_products, "GPU_PIECE_BYTES", 128 * D * 4)
    (hidden, weight), (spec, upstream) = operands(dtype), call(masked)
    module = backend(name, torch.device("cpu"))
    out = gradients(hidden, weight, spec, upstream, chunk, module)
    limit = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    for grad, ref in zip(out, exact(hidden, weight, spec, upstream), strict=True):
        assert error(grad, ref) < limit
    assert [grad.dtype for grad in out] == [dtype, dtype, torch.float32]


@pytest.mark.parametrize("name", NARROWING)
def test_products_read_the_narrow_gradient_where_the_logits_were(gpu, name):
    (hidden, weight), (spec, upstream) = operands(), call()
    linear = Linear.cut(hidden, weight, 5, None)
    _chunks.loss(linear, spec, upstream, (), ALL, backend(name, torch.device("cpu")))
    logits = [product.out for product in gpu if product.out.shape[1] == V]
    operands_of_dx = [product.a for product in gpu if product.a.shape[1] == V]
    operands_of_dw = [product.a.T for product in weight_gradients(gpu)]
    assert len(logits) == len(operands_of_dx) == len(operands_of_dw) == 3
    for wide, narrow, same in zip(logits, operands_of_dx, operands_of_dw):
        assert narrow.data_ptr() == same.data_ptr() and narrow.stride() == same.stride()
        assert wide.dtype == torch.float32 and narrow.dtype == torch.bfloat16
        assert narrow.data_ptr() == wide.data_ptr() and narrow.shape == wide.shape
        assert narrow.stride() == (2 * wide.stride(0), 1)
        assert wide.stride(0) * wide.itemsize % 16 == 0


def test_the_weight_gradient_is_summed_in_its_product(gpu):
    (hidden, weight), (spec, upstream) = operands(), call()
    _chunks.loss(Linear.cut(hidden, weight, 4, None), spec, upstream, (), ALL, reference)
    sums = weight_gradients(gpu)
    assert [product.kind for product in sums] == ["mm", "addmm", "addmm"]
    assert len({product.out.data_ptr() for product in sums}) == 1
    assert all(product.out.dtype == torch.float32 for product in sums)


def test_a_single_chunk_writes_the_weight_gradient_at_once(gpu):
    (hidden, weight), (spec, upstream) = operands(), call()
    _chunks.loss(Linear.cut(hidden, weight, N, None), spec, upstream, (), ALL, reference)
    assert [product.out.shape for product in gpu] == [(N, V), (N, D)], "dW is not among the wider"


@pytest.mark.parametrize("adds", (True, False), ids=("addmm", "pieces"))
@pytest.mark.parametrize("chunk", (5, 100))
def test_filtered_products_on_a_gpu(gpu, monkeypatch, adds, chunk):
    """Only gathered columns meet the wide products, and the result is close to the exact one."""
    monkeypatch.setattr(_products, "adds_to_float32", lambda device, dtype: adds)
    monkeypatch.setattr(_chunks, "BLOCK", 40)
    (hidden, weight), (spec, upstream) = operands(), call()
    weight = 3 * weight
    filtered = gradients(hidden, weight, spec, upstream, chunk, reference, Needs(*ALL[:3], 1e-3))
    sums = [product.out for product in gpu if product.out.shape[1] == D]
    assert sums and all(len(out) in (len(hidden[:chunk]), N % 5) or len(out) <= 40 for out in sums)
    for out, ref in zip(filtered, exact(hidden, weight, spec, upstream), strict=True):
        assert error(out, ref) < 2e-2


def test_pieces_are_bounded(gpu, monkeypatch):
    monkeypatch.setattr(_products, "adds_to_float32", lambda device, dtype: False)
    monkeypatch.setattr(_products, "GPU_PIECE_BYTES", 128 * D * 4)
    (hidden, weight), (spec, upstream) = operands(), call()
    _chunks.loss(Linear.cut(hidden, weight, 6, None), spec, upstream, (), ALL, reference)
    sums = [product.out for product in weight_gradients(gpu)]
    assert [len(out) for out in sums] == [V, 128, 128, V - 256]
    assert len({out.data_ptr() for out in sums[1:]}) == 1


@pytest.mark.parametrize("masked", (False, True), ids=("", "masked"))
def test_the_host_waits_for_the_device_once_at_most(gpu, masked):
    names = []

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in ("nonzero", "_local_scalar_dense", "equal"):
                names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    (hidden, weight), (spec, upstream) = operands(), call(masked)
    with Waits():
        _chunks.loss(Linear.cut(hidden, weight, 4, None), spec, upstream, (), ALL, reference)
    assert names == (["nonzero"] if masked else [])


def test_the_wide_products_are_calls_that_torch_has():
    """On the meta device, which checks arguments and shapes and computes nothing."""
    a = torch.empty(3, 5, dtype=torch.bfloat16, device="meta")
    b, total = torch.empty(5, 7, dtype=torch.bfloat16, device="meta"), a.new_empty(3, 7).float()
    _products.mm_wide(a, b, total)
    _products.addmm_wide(total, a, b)
    with pytest.raises(RuntimeError):
        _products.mm_wide(b, a, total)


@pytest.mark.parametrize("message", (None, "self and mat2 must have the same dtype"))
def test_what_the_product_can_add_to_is_tried_once(monkeypatch, message):
    tries = []

    def addmm_wide(total, a, b):
        tries.append(total.dtype)
        if message is not None:
            raise RuntimeError(message)

    monkeypatch.setattr(_products, "addmm_wide", addmm_wide)
    _products.adds_to_float32.cache_clear()
    for _ in range(3):
        found = _products.adds_to_float32(torch.device("cpu"), torch.bfloat16)
        assert found == (message is None)
    assert tries == [torch.float32]
    _products.adds_to_float32.cache_clear()


# (rows, vocabulary, bytes a logit) -> rows per chunk on a GPU with 1 GiB of workspace
@pytest.mark.parametrize(
    "count, vocab, size, rows",
    (
        (8192, 131072, 4, 2048),  # 4 equal ones, the budget in full
        (8192, 152064, 4, 1664),  # 5, all but the last equal
        (8192, 131072, 6, 1280),  # where a cast stands beside the logits
        (9000, 131072, 4, 1920),  # 5 of 1800, not 4 of 2048 and a sliver
        (2049, 131072, 4, 1152),
        (2048, 131072, 4, 2048),
        (100, 131072, 4, 128),
        (0, 131072, 4, 128),
        (32768, 32000, 4, 8192),
        (8192, 1 << 22, 4, 64),  # less than a tile fits
        (8192, 1 << 26, 4, 16),  # nothing fits: as little as is sensible
    ),
)
def test_default_chunks_on_a_gpu(count, vocab, size, rows):
    assert default_chunk_tokens(count, vocab, size, gpu=True) == rows


@pytest.mark.parametrize("gpu_rows", (True, False))
@pytest.mark.parametrize("size", (2, 4, 6, 8))
def test_default_chunks_fit_the_budget_and_are_as_few_as_it_allows(gpu_rows, size):
    budget = _chunks.GPU_WORKSPACE_BYTES if gpu_rows else _chunks.CPU_WORKSPACE_BYTES
    tile = 128 if gpu_rows else 16
    for vocab in (1000, 32000, 50257, 131072, 151936, 262144):
        limit = budget // (vocab * size) // tile * tile
        for count in (1, 127, 128, 129, 2000, 8192, 10000, 32768):
            rows = default_chunk_tokens(count, vocab, size, gpu_rows)
            assert rows * vocab * size <= budget and rows % tile == 0
            chunks = -(-count // limit)
            assert -(-count // rows) <= chunks
            assert rows - count / chunks < tile


@pytest.mark.parametrize("name, size", (("reference", 4), ("cpu", 6)))
def test_every_byte_of_a_logit_counts_towards_the_budget(gpu, monkeypatch, name, size):
    """Float32 logits with their gradient narrowed in place, or with a 16-bit cast beside them."""
    if name not in IMPLS:
        pytest.skip(f"{name} is not available here")
    monkeypatch.setattr(_chunks, "GPU_WORKSPACE_BYTES", 4 * 32 * V)
    monkeypatch.setattr(_chunks, "GPU_TILE_ROWS", 4)
    monkeypatch.setattr(_chunks, "CPU_TILE_ROWS", 4)
    hidden, weight = make_linear(96, dim=D, vocab=V, dtype=torch.bfloat16)
    spec, upstream = RowSpec(valid_vocab=V), Upstream(entropy=torch.ones(96))
    linear = Linear.cut(hidden.detach(), weight.detach(), None, None)
    module = backend(name, torch.device("cpu"))
    _chunks.loss(linear, spec, upstream, (), ALL, module)
    chunk = next(len(product.out) for product in gpu if product.out.shape[1] == V)
    assert chunk == 32 * 4 // size // 4 * 4


def test_a_target_or_temperature_that_cannot_be_checked_gives_nan():
    """On a GPU nothing looks at their values first: the reference answers like the kernels."""
    (hidden, weight), (spec, upstream) = operands(), call()
    spec.target[2], spec.target[5] = V, -3
    spec = spec._replace(temperature_rows=torch.ones(N).index_fill_(0, torch.tensor([7]), 0.0))
    linear = Linear.cut(hidden, weight, 5, None)
    rows = _chunks.loss(linear, spec, upstream, ("entropy",), ALL, reference)
    bad = torch.zeros(N, dtype=torch.bool).index_fill_(0, torch.tensor([2, 5, 7]), True)
    for values in rows[:4]:
        assert torch.equal(values.isnan(), bad)
    assert torch.equal(rows[4].isnan().all(1), bad) and torch.equal(rows[4].isnan().any(1), bad)
