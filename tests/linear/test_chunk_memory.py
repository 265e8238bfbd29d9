"""Memory of the chunk driver on a GPU at full size: the meta device holds sizes and no numbers."""

from dataclasses import replace

import pytest
import torch
from gpu_products import need_shapes_of_addmm
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from em_kernels.backends.interface import Backend, RowSpec, Saved, Upstream
from em_kernels.linear import chunks, products
from em_kernels.linear.chunks import Linear, Needs, Rows

GIB = 1 << 30
N = 32768
EACH_SHAPE = pytest.mark.parametrize(
    "vocab, dim", ((131072, 4096), (152064, 3584), (32000, 4096), (50257, 1024))
)


class Peak(TorchDispatchMode):
    """The most bytes alive at once of what is allocated under this mode, but for some shapes."""

    def __init__(self, *shapes):
        super().__init__()
        self.left_out, self.sizes, self.bytes, self.seen = shapes, {}, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(out, torch.Tensor):
                storage = out.untyped_storage()
                self.seen.add((out.shape, out.dtype))
                size = 0 if out.shape in self.left_out else storage.nbytes()
                self.sizes.setdefault(StorageWeakRef(storage), size)
        self.sizes = {ref: size for ref, size in self.sizes.items() if not ref.expired()}
        self.bytes = max(self.bytes, sum(self.sizes.values()))
        return result


class Kernels(Backend):
    """The row kernels allocate what they report and nothing else."""

    name, narrows = "kernels", True

    def stats(self, logits, spec, outputs):
        return [logits.new_empty(logits.shape[1]) for _ in range(3 + len(outputs))]

    def grad(self, logits, spec, saved, upstream, out):
        assert out.shape == logits.shape and out.dtype == torch.bfloat16

    def loss(self, logits, spec, upstream, outputs, out):
        self.grad(logits, spec, None, upstream, out)
        return self.stats(logits, spec, outputs)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(products, "is_gpu", lambda x: True)
    monkeypatch.setattr(products, "adds_to_float32", lambda device, dtype: True)


@pytest.fixture
def gathered(monkeypatch):
    """Rows as a mask leaves them, copied chunk by chunk: here none less than all."""
    counted = Rows.counted

    def indexed(*args, **kwargs):
        index = torch.empty(N, dtype=torch.int64, device="meta")
        return replace(counted(*args, **kwargs), index=index)

    monkeypatch.setattr(Rows, "counted", indexed)


def operands(vocab, dim):
    hidden = torch.empty(N, dim, dtype=torch.bfloat16, device="meta")
    return Linear.of(hidden, hidden.new_empty(vocab, dim), None, None)


def beyond(linear, function):
    """Bytes of a call beyond its operands, its gradients and the float32 sum of dW, or where
    `grad` has the vocabulary outermost, of dX."""
    hidden, weight = linear[:2]
    rows, vocab, needs = torch.empty(N, device="meta"), len(weight), Needs(True, True, False)
    spec, upstream = RowSpec(valid_vocab=vocab), Upstream(entropy=rows)
    with Peak(hidden.shape, weight.shape) as peak:
        hidden.view_as(hidden), weight.view_as(weight)  # seen whole before any part of them
        if function == "loss":
            chunks.loss(linear, spec, upstream, ("entropy",), needs, Kernels())
        elif function == "stats":
            chunks.stats(linear, spec, ("entropy",), Kernels())
        else:
            chunks.grad(linear, spec, Saved(rows, rows, rows), upstream, needs, Kernels())
            summed = {shape for shape, dtype in peak.seen if dtype == torch.float32}
            outermost = hidden.shape if vocab > N else weight.shape
            assert {hidden.shape, weight.shape} & summed == {outermost}
    return peak.bytes


@EACH_SHAPE
@pytest.mark.parametrize("function", ("loss", "grad"))
@pytest.mark.parametrize("adds", (True, False), ids=("addmm", "pieces"))
def test_memory_of_many_rows(gpu, gathered, monkeypatch, vocab, dim, function, adds):
    """Under 1.25 GiB, even where rows are copied and products cannot add to a float32 matrix."""
    if adds:
        need_shapes_of_addmm()
    monkeypatch.setattr(products, "adds_to_float32", lambda device, dtype: adds)
    assert 0.5 * GIB < beyond(operands(vocab, dim), function) < 1.25 * GIB


@EACH_SHAPE
def test_nearly_all_of_it_is_the_chunk(gpu, vocab, dim):
    """Next to the budget there are only dX of a chunk and the piece it is rounded from."""
    need_shapes_of_addmm()
    linear = operands(vocab, dim)
    chunk = Rows.counted(linear, None, Kernels(), Needs(True, True, False)).chunking.chunk
    rest = 2 * chunk * dim + min(4 * chunk * dim, products.GPU_PIECE_BYTES) + (1 << 20)
    assert beyond(linear, "loss") < GIB + rest


@EACH_SHAPE
def test_memory_of_statistics_alone(gpu, gathered, vocab, dim):
    """Under 0.3 GiB, rows that are copied and what is reported of them among it."""
    assert 0.2 * GIB < beyond(operands(vocab, dim), "stats") < 0.3 * GIB
