"""How the chunk driver works on a GPU, with the GPU's products played by ones on the CPU."""

import pytest
import torch
from gpu_chunks import (
    ALL,
    D,
    N,
    V,
    Wide,
    call,
    exact,
    gradients,
    operands,
    reference,
    weight_gradients,
)
from gpu_products import need_shapes_of_addmm
from helpers import ON_CPU, error, make_linear, random_target, random_upstream
from torch.utils._python_dispatch import TorchDispatchMode

from em_kernels.backends.choice import backend
from em_kernels.backends.interface import RowSpec, Upstream
from em_kernels.linear import chunking, chunks, products
from em_kernels.linear import gradients as added
from em_kernels.linear.chunks import Linear, Needs
from em_kernels.linear.half import ready_dtype

pytest_plugins = ("gpu_chunks",)  # its fixture `gpu`
pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@pytest.mark.parametrize("name", ("reference", "cpu", "triton"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("chunk", (5, 100))
@pytest.mark.parametrize("masked", (False, True), ids=("", "masked"))
@pytest.mark.parametrize("adds", (True, False), ids=("addmm", "pieces"))
def test_gradients_on_a_gpu(gpu, monkeypatch, name, dtype, chunk, masked, adds):
    """As exact as 16-bit operands allow, whether or not the gradient is narrowed in place."""
    if name not in ON_CPU:
        pytest.skip(f"{name} is not available here")
    monkeypatch.setattr(products, "adds_to_float32", lambda device, dtype: adds)
    monkeypatch.setattr(products, "GPU_PIECE_BYTES", 128 * D * 4)
    (hidden, weight), (spec, upstream) = operands(dtype), call(masked)
    module = backend(name, torch.device("cpu"))
    out = gradients(hidden, weight, spec, upstream, chunk, module)
    limit = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    for grad, ref in zip(out, exact(hidden, weight, spec, upstream), strict=True):
        assert error(grad, ref) < limit
    assert [grad.dtype for grad in out] == [ready_dtype(dtype)] * 2 + [torch.float32]


@pytest.mark.parametrize("name", ON_CPU)
def test_products_read_the_narrow_gradient_where_the_logits_were(gpu, name):
    (hidden, weight), (spec, upstream) = operands(), call()
    linear = Linear.of(hidden, weight, 5, None)
    chunks.loss(linear, spec, upstream, (), ALL, backend(name, torch.device("cpu")))
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
    chunks.loss(Linear.of(hidden, weight, 4, None), spec, upstream, (), ALL, reference)
    sums = weight_gradients(gpu)
    assert [product.kind for product in sums] == ["mm", "addmm", "addmm"]
    assert len({product.out.data_ptr() for product in sums}) == 1
    assert all(product.out.dtype == torch.float32 for product in sums)


def test_a_single_chunk_writes_the_weight_gradient_at_once(gpu):
    (hidden, weight), (spec, upstream) = operands(), call()
    chunks.loss(Linear.of(hidden, weight, N, None), spec, upstream, (), ALL, reference)
    assert [product.out.shape for product in gpu] == [(N, V), (N, D)], "dW is not among the wider"


@pytest.mark.parametrize("adds", (True, False), ids=("addmm", "pieces"))
@pytest.mark.parametrize("chunk", (5, 100))
def test_filtered_products_on_a_gpu(gpu, monkeypatch, adds, chunk):
    """Only gathered columns meet the wide products, and the result is close to the exact one."""
    monkeypatch.setattr(products, "adds_to_float32", lambda device, dtype: adds)
    monkeypatch.setattr(added, "BLOCK", 40)
    (hidden, weight), (spec, upstream) = operands(), call()
    weight = 3 * weight
    filtered = gradients(hidden, weight, spec, upstream, chunk, reference, Needs(*ALL[:3], 1e-3))
    sums = [product.out for product in gpu if product.out.shape[1] == D]
    assert sums and all(len(out) in (len(hidden[:chunk]), N % 5) or len(out) <= 40 for out in sums)
    for out, ref in zip(filtered, exact(hidden, weight, spec, upstream), strict=True):
        assert error(out, ref) < 2e-2


def test_pieces_are_bounded(gpu, monkeypatch):
    monkeypatch.setattr(products, "adds_to_float32", lambda device, dtype: False)
    monkeypatch.setattr(products, "GPU_PIECE_BYTES", 128 * D * 4)
    (hidden, weight), (spec, upstream) = operands(), call()
    chunks.loss(Linear.of(hidden, weight, 6, None), spec, upstream, (), ALL, reference)
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
        chunks.loss(Linear.of(hidden, weight, 4, None), spec, upstream, (), ALL, reference)
    assert names == (["nonzero"] if masked else [])


def test_the_wide_products_are_calls_that_torch_has():
    """On the meta device, which checks arguments and shapes and computes nothing."""
    need_shapes_of_addmm()
    a = torch.empty(3, 5, dtype=torch.bfloat16, device="meta")
    b, total = torch.empty(5, 7, dtype=torch.bfloat16, device="meta"), a.new_empty(3, 7).float()
    products.mm_wide(a, b, total)
    products.addmm_wide(total, a, b)
    with pytest.raises(RuntimeError):
        products.mm_wide(b, a, total)


@pytest.mark.parametrize("message", (None, "self and mat2 must have the same dtype"))
def test_what_the_product_can_add_to_is_tried_once(monkeypatch, message):
    tries = []

    def addmm_wide(total, a, b):
        tries.append(total.dtype)
        if message is not None:
            raise RuntimeError(message)

    monkeypatch.setattr(products, "addmm_wide", addmm_wide)
    products.adds_to_float32.cache_clear()
    for _ in range(3):
        found = products.adds_to_float32(torch.device("cpu"), torch.bfloat16)
        assert found == (message is None)
    assert tries == [torch.float32]
    products.adds_to_float32.cache_clear()


def test_without_a_column_to_keep_no_product_is_run(gpu):
    """Flat rows: all their gradients are below the threshold, and that of the bias stays exact."""
    (hidden, weight), (spec, _) = operands(), call()
    upstream = Upstream(entropy=torch.ones(N))
    arguments = (hidden, 1e-3 * weight, spec, upstream)
    dx, dw, db = gradients(*arguments, 5, reference, Needs(*ALL[:3], 0.1))
    assert (dx == 0).all() and (dw == 0).all()
    assert error(db, exact(*arguments)[2]) < 6e-3
    assert [product.out.shape[1] for product in gpu] == 9 * [V]


def test_the_product_of_dx_is_run_in_pieces(gpu, monkeypatch):
    monkeypatch.setattr(products, "GPU_PIECE_BYTES", 128 * D * 4)
    gradient = torch.randn(300, V).bfloat16()
    _, weight = operands()
    parts = products.pieces(gradient, weight)
    assert [(part.start, part.stop) for part in parts] == [(0, 128), (128, 256), (256, 300)]
    out = torch.cat([products.back_multiply(gradient[part], weight, reference) for part in parts])
    assert error(out, gradient.double() @ weight.double()) < 3e-3
    assert [len(product.out) for product in gpu] == [128, 128, 44]


@pytest.mark.parametrize("module, size", ((reference, 4), (Wide(), 6)), ids=("narrow", "wide"))
def test_every_byte_of_a_logit_counts_towards_the_budget(gpu, monkeypatch, module, size):
    """Float32 logits with their gradient narrowed in place, or with a 16-bit cast beside them."""
    monkeypatch.setattr(chunking, "GPU_WORKSPACE_BYTES", 4 * 32 * chunking.row_stride(V))
    monkeypatch.setattr(chunking, "GPU_TILE_ROWS", 4)
    monkeypatch.setattr(chunking, "CPU_TILE_ROWS", 4)
    hidden, weight = make_linear(96, dim=D, vocab=V, dtype=torch.bfloat16)
    spec, upstream = RowSpec(valid_vocab=V), Upstream(entropy=torch.ones(96))
    linear = Linear.of(hidden.detach(), weight.detach(), None, None)
    chunks.loss(linear, spec, upstream, (), ALL, module)
    chunk = next(len(product.out) for product in gpu if product.out.shape[1] == V)
    assert chunk == 32 * 4 // size // 4 * 4


def test_a_target_or_temperature_that_cannot_be_checked_gives_nan():
    """On a GPU nothing looks at their values first: the reference answers like the kernels."""
    (hidden, weight), (spec, upstream) = operands(), call()
    spec.target[2], spec.target[5] = V, -3
    spec = spec._replace(temperature_rows=torch.ones(N).index_fill_(0, torch.tensor([7]), 0.0))
    linear = Linear.of(hidden, weight, 5, None)
    rows = chunks.loss(linear, spec, upstream, ("entropy",), ALL, reference)
    bad = torch.zeros(N, dtype=torch.bool).index_fill_(0, torch.tensor([2, 5, 7]), True)
    for values in rows[:4]:
        assert torch.equal(values.isnan(), bad)
    assert torch.equal(rows[4].isnan().all(1), bad) and torch.equal(rows[4].isnan().any(1), bad)


@pytest.mark.parametrize("filter_eps", (None, 1e-4))
def test_gradients_are_contiguous_whatever_the_strides_of_hidden(filter_eps):
    """As the operators' fakes say, which torch.compile relies on."""
    hidden, weight = operands(torch.float32)
    spec = RowSpec(target=random_target(N, vocab=V), valid_vocab=V)
    upstream, needs = Upstream(**random_upstream(N)), ALL._replace(filter_eps=filter_eps)
    linear = Linear.of(hidden, weight, 5, None)
    want = chunks.loss(linear, spec, upstream, (), needs, reference)[3:]
    linear = linear._replace(hidden=hidden.T.contiguous().T)
    for got, ref in zip(chunks.loss(linear, spec, upstream, (), needs, reference)[3:], want):
        assert got.is_contiguous()
        torch.testing.assert_close(got, ref)
