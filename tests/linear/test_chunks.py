"""How the chunk driver works on a GPU, with the GPU's products played by ones on the CPU."""

import pytest
import torch
from gpu_products import defer_small_chunks, need_shapes_of_addmm, play_gpu
from helpers import ON_CPU, error, make_linear, random_target, random_upstream, truth
from torch.utils._python_dispatch import TorchDispatchMode

from em_kernels.backends.choice import backend
from em_kernels.backends.interface import RowSpec, Saved, Upstream
from em_kernels.backends.reference import Reference
from em_kernels.linear import chunking, chunks, products
from em_kernels.linear import gradients as added
from em_kernels.linear.chunking import Chunking
from em_kernels.linear.chunks import Linear, Needs
from em_kernels.linear.half import ready_dtype

reference = Reference()

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
NARROWING = [name for name in ON_CPU if backend(name, torch.device("cpu")).narrows]
ALL = Needs(True, True, True)
N, D, V = 12, 16, 301


@pytest.fixture
def gpu(monkeypatch):
    """Make the driver take its GPU ways; returns the wide products it ran."""
    return play_gpu(monkeypatch)


@pytest.fixture
def deferring(gpu, monkeypatch):
    """The same, chunks of more than 4 rows with the logits of 2 at a time."""
    defer_small_chunks(monkeypatch)
    return gpu


def operands(dtype=torch.bfloat16, vocab=V):
    hidden, weight = make_linear(N, dim=D, vocab=vocab, dtype=dtype)
    return hidden.detach(), weight.detach()


def gradients(hidden, weight, spec, upstream, chunk, module, needs=ALL):
    """[dX, dW, db] by `loss`, having seen that `stats` and `grad` agree with it."""
    linear = Linear.of(hidden, weight, chunk, None)
    results = chunks.loss(linear, spec, upstream, (), needs, module)
    saved = Saved(*chunks.stats(linear, spec, (), module))
    again = chunks.grad(linear, spec, saved, upstream, needs, module)
    for out, ref in zip(again, results[3:], strict=True):
        assert error(out, ref) < 1e-3 or ref.numel() == 0
    return results[3:]


def exact(hidden, weight, spec, upstream):
    """The same in float64 from all the logits."""
    wide = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    bias = torch.zeros(len(weight), dtype=torch.float64, requires_grad=True)
    values = truth(wide[0] @ wide[1].T + bias, spec.target)
    kept = torch.ones(N) if spec.mask is None else spec.mask.double()
    given = {name: g for name, g in upstream._asdict().items() if g is not None}
    total = sum((kept * g * values[name]).sum() for name, g in given.items())
    return torch.autograd.grad(total, (*wide, bias))


def weight_gradients(calls):
    return [product for product in calls if product.b.shape[1] == D and product.a.shape[1] != V]


def call(masked=False, vocab=V):
    mask = torch.arange(N) % 3 > 0 if masked else None
    spec = RowSpec(target=random_target(N, vocab=vocab), mask=mask, valid_vocab=vocab)
    upstream = Upstream(**random_upstream(N))
    return spec, upstream


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


@pytest.mark.parametrize("name", NARROWING)
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


@pytest.mark.parametrize("name", NARROWING)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("masked", (False, True), ids=("", "masked"))
@pytest.mark.parametrize("adds", (True, False), ids=("addmm", "pieces"))
def test_deferred_gradients(deferring, monkeypatch, name, dtype, masked, adds):
    """As close to the exact ones as those in place, and with the same products of dX and dW."""
    monkeypatch.setattr(products, "adds_to_float32", lambda device, dtype: adds)
    (hidden, weight), (spec, upstream) = operands(dtype), call(masked)
    out = gradients(hidden, weight, spec, upstream, 5, backend(name, torch.device("cpu")))
    limit = {torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    for grad, ref in zip(out, exact(hidden, weight, spec, upstream), strict=True):
        assert error(grad, ref) < limit
    assert [grad.dtype for grad in out] == [ready_dtype(dtype)] * 2 + [torch.float32]
    logits = [len(product.out) for product in deferring if product.out.shape[1] == V]
    last = [2, 1] if masked else [2]
    stats = [5, 3] if masked else [5, 5, 2]
    grads = [2, 2, 1, *last] if masked else [2, 2, 1, 2, 2, 1, *last]
    assert logits == [*grads, *stats, *stats], "only a loss defers"


@pytest.mark.parametrize("name", NARROWING)
def test_products_read_the_deferred_gradient_beside_the_logits(deferring, name):
    (hidden, weight), (spec, upstream) = operands(), call()
    linear = Linear.of(hidden, weight, 5, None)
    *_, dw, _ = chunks.loss(linear, spec, upstream, (), ALL, backend(name, torch.device("cpu")))
    logits = [product.out for product in deferring if product.out.shape[1] == V]
    operands_of_dx = [product.a for product in deferring if product.a.shape[1] == V]
    operands_of_dw = [product.a.T for product in weight_gradients(deferring)]
    assert [len(narrow) for narrow in operands_of_dx] == [5, 5, 2]
    for narrow, same in zip(operands_of_dx, operands_of_dw, strict=True):
        assert narrow.data_ptr() == same.data_ptr() == operands_of_dx[0].data_ptr()
        assert narrow.shape == same.shape and narrow.dtype == torch.bfloat16
        assert narrow.stride() == same.stride() == (chunking.row_stride(V), 1)
    for wide in logits:
        assert wide.dtype == torch.float32 and wide.data_ptr() == dw.data_ptr(), "not where dW goes"
        assert wide.stride() == (chunking.row_stride(V), 1)


class Shard(Reference):
    """The reference as a rank of a group sees it, the widest shard elsewhere."""

    widest_shard = 2 * V


@pytest.mark.parametrize(
    "dtype, module, needs, deferred",
    (
        (torch.bfloat16, reference, ALL, True),
        (torch.float16, reference, ALL, True),
        (torch.float32, reference, ALL, False),  # nothing to narrow
        (torch.bfloat16, reference, Needs(True, False, True), False),  # no trips of dW
        (
            torch.bfloat16,
            Shard(),
            Needs(True, False, True),
            True,
        ),  # a rank that cuts like the others
        (torch.bfloat16, reference, None, False),  # statistics
        (torch.bfloat16, "cpu", ALL, False),  # cannot narrow
    ),
)
def test_when_the_gradient_is_deferred(deferring, dtype, module, needs, deferred):
    if module == "cpu":
        pytest.importorskip("em_kernels._C")
        module = backend("cpu", torch.device("cpu"))
    linear = Linear.of(*operands(dtype), 5, None)
    assert chunks.Rows.counted(linear, None, module, needs).chunking == Chunking(
        5, 2 if deferred else 5
    )


def test_on_a_cpu_the_gradient_is_not_deferred(monkeypatch):
    defer_small_chunks(monkeypatch)
    linear = Linear.of(*operands(), 5, torch.float32)
    assert chunks.Rows.counted(linear, None, reference, ALL).chunking == Chunking(5, 5)


def test_default_chunks_are_cut_for_the_widest_shard(deferring, monkeypatch):
    """20 bytes for an entry of its vocabulary: 5 rows in place, or 10 with the logits elsewhere."""
    monkeypatch.setattr(chunking, "GPU_WORKSPACE_BYTES", 20 * chunking.row_stride(2 * V))
    linear = Linear.of(*operands(), None, None)
    assert chunks.Rows.counted(linear, None, Shard(), ALL).chunking == Chunking(6, 3)


def test_a_rank_without_a_gradient_cuts_as_the_others_do(monkeypatch):
    """They meet once a chunk. 4 bytes of a logit are 48 rows; the cast of a gradient leaves 32."""
    monkeypatch.setattr(chunking, "CPU_WORKSPACE_BYTES", 192 * chunking.row_stride(V))
    hidden, weight = torch.empty(100, D).bfloat16(), torch.empty(V, D).bfloat16()
    linear = Linear.of(hidden, weight, None, torch.float32)
    each = (None, Needs(False, True, False), Needs(True, False, False))
    made = [chunks.Rows.counted(linear, None, WideShard(), needs, True).chunking for needs in each]
    assert [chunking.chunk for chunking in made] == [32, 32, 32]


class WideShard(Reference):
    """A rank whose backend writes the gradient as wide as the logits."""

    widest_shard = V
    narrows = False


@pytest.mark.parametrize("name", NARROWING)
def test_default_chunks_with_the_gradient_deferred(deferring, monkeypatch, name):
    """Fewer trips of dW out of the same budget, and the same gradients."""
    monkeypatch.setattr(chunking, "GPU_WORKSPACE_BYTES", 20 * chunking.row_stride(V))
    (hidden, weight), (spec, upstream) = operands(), call()
    out = gradients(hidden, weight, spec, upstream, None, backend(name, torch.device("cpu")))
    for grad, ref in zip(out, exact(hidden, weight, spec, upstream), strict=True):
        assert error(grad, ref) < 6e-3
    sums = [product.kind for product in weight_gradients(deferring)]
    assert sums == ["mm", "addmm", "mm", "addmm", "addmm"], "fewer in a loss"


@pytest.mark.parametrize("name", NARROWING)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_single_chunk_goes_through_its_logits_in_parts(gpu, monkeypatch, name, dtype):
    """No sum of dW: its product is the last, and writes bfloat16 at once."""
    monkeypatch.setattr(chunking, "GPU_LOGITS_ROWS", 2)
    monkeypatch.setattr(chunking, "GPU_TILE_ROWS", 1)
    monkeypatch.setattr(chunking, "CPU_TILE_ROWS", 1)
    monkeypatch.setattr(chunking, "GPU_WORKSPACE_BYTES", 20 * chunking.row_stride(V))
    (hidden, weight), (spec, upstream) = operands(dtype), call()
    linear, module = Linear.of(hidden, weight, None, None), backend(name, torch.device("cpu"))
    out = chunks.loss(linear, spec, upstream, (), ALL, module)[3:]
    for grad, ref in zip(out, exact(hidden, weight, spec, upstream), strict=True):
        assert error(grad, ref) < {torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    assert [grad.dtype for grad in out] == [ready_dtype(dtype)] * 2 + [torch.float32]
    wide = dtype == torch.float16  # its dW is not rounded yet
    assert [product.kind for product in weight_gradients(gpu)] == ["mm"] * wide
    logits = [len(product.out) for product in gpu if product.out.shape[1] == V]
    assert max(logits) == (4 if wide else N // 2) and sum(logits) == N


@pytest.mark.parametrize("eps", (1e-3, 1e-2))
def test_columns_are_kept_by_all_the_rows_of_a_deferred_chunk(deferring, monkeypatch, eps):
    (hidden, weight), (spec, upstream) = operands(), call()
    arguments = (hidden, 3 * weight, spec, upstream, 5, reference, Needs(*ALL[:3], eps))
    deferred = gradients(*arguments)
    monkeypatch.setattr(chunking, "GPU_LOGITS_ROWS", 5)
    in_place = gradients(*arguments)
    left_out = (in_place[1] == 0).all(1)
    assert left_out.any() and torch.equal((deferred[1] == 0).all(1), left_out)
    for out, ref in zip(deferred, in_place, strict=True):
        assert error(out, ref) < 1e-5


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


@pytest.mark.parametrize("name, size", (("reference", 4), ("cpu", 6)))
def test_every_byte_of_a_logit_counts_towards_the_budget(gpu, monkeypatch, name, size):
    """Float32 logits with their gradient narrowed in place, or with a 16-bit cast beside them."""
    if name not in ON_CPU:
        pytest.skip(f"{name} is not available here")
    monkeypatch.setattr(chunking, "GPU_WORKSPACE_BYTES", 4 * 32 * chunking.row_stride(V))
    monkeypatch.setattr(chunking, "GPU_TILE_ROWS", 4)
    monkeypatch.setattr(chunking, "CPU_TILE_ROWS", 4)
    hidden, weight = make_linear(96, dim=D, vocab=V, dtype=torch.bfloat16)
    spec, upstream = RowSpec(valid_vocab=V), Upstream(entropy=torch.ones(96))
    linear = Linear.of(hidden.detach(), weight.detach(), None, None)
    module = backend(name, torch.device("cpu"))
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
