"""Chunks whose logits are made in parts, the gradient beside them, and how many rows they have."""

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
from gpu_products import defer_small_chunks
from helpers import ON_CPU, error

from em_kernels.backends.choice import backend
from em_kernels.backends.reference import Reference
from em_kernels.linear import chunking, chunks, products
from em_kernels.linear.chunking import Chunking
from em_kernels.linear.chunks import Linear, Needs
from em_kernels.linear.half import ready_dtype

pytest_plugins = ("gpu_chunks",)  # its fixtures `gpu` and `deferring`
pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@pytest.mark.parametrize("name", ON_CPU)
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


@pytest.mark.parametrize("name", ON_CPU)
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

    def __init__(self, sums_weight=False):
        self.sums_weight = sums_weight


@pytest.mark.parametrize(
    "dtype, module, needs, deferred",
    (
        (torch.bfloat16, reference, ALL, True),
        (torch.float16, reference, ALL, True),
        (torch.float32, reference, ALL, False),  # nothing to narrow
        (torch.bfloat16, reference, Needs(True, False, True), False),  # no trips of dW
        (torch.bfloat16, Shard(), Needs(True, False, True), False),
        (torch.bfloat16, Shard(True), Needs(True, False, True), True),  # as the others
        (torch.bfloat16, reference, None, False),  # statistics
        (torch.bfloat16, Wide(), ALL, False),
    ),
)
def test_when_the_gradient_is_deferred(deferring, dtype, module, needs, deferred):
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


class WideShard(Wide):
    widest_shard = V


@pytest.mark.parametrize("name", ON_CPU)
def test_default_chunks_with_the_gradient_deferred(deferring, monkeypatch, name):
    """Fewer trips of dW out of the same budget, and the same gradients."""
    monkeypatch.setattr(chunking, "GPU_WORKSPACE_BYTES", 20 * chunking.row_stride(V))
    (hidden, weight), (spec, upstream) = operands(), call()
    out = gradients(hidden, weight, spec, upstream, None, backend(name, torch.device("cpu")))
    for grad, ref in zip(out, exact(hidden, weight, spec, upstream), strict=True):
        assert error(grad, ref) < 6e-3
    sums = [product.kind for product in weight_gradients(deferring)]
    assert sums == ["mm", "addmm", "mm", "addmm", "addmm"], "fewer in a loss"


@pytest.mark.parametrize("name", ON_CPU)
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
