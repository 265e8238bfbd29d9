"""On a CPU a bfloat16 dW that is summed over chunks needs a float32 sum; one chunk may have the
memory of it."""

import pytest
import torch
from helpers import error

from em_kernels import linear_entropy_loss
from em_kernels.backends.reference import Reference
from em_kernels.linear import chunking
from em_kernels.linear.chunks import Linear, Needs, Rows

V, D, BUDGET_ROWS = 64, 8, 32
ALL = Needs(True, True, False)
MOST = BUDGET_ROWS + 2 * D  # 4 D bytes for each entry of V, of 2 each


class Shard(Reference):
    """The reference as a rank of a group sees it, which may hold that a rank needs dW."""

    widest_shard = V

    def __init__(self, sums_weight):
        self.sums_weight = sums_weight


@pytest.fixture(autouse=True)
def small_budget(monkeypatch):
    memory = BUDGET_ROWS * chunking.row_stride(V) * 2
    monkeypatch.setattr(chunking, "CPU_WORKSPACE_BYTES", memory)


def chunk_of(rows, needs=ALL, backend=None, dtype=torch.bfloat16, again=False, tokens=None):
    linear = Linear.of(torch.empty(rows, D).to(dtype), torch.empty(V, D).to(dtype), tokens, None)
    return Rows.counted(linear, None, backend or Reference(), needs, again).chunking.chunk


def test_one_chunk_takes_the_memory_of_the_sum_it_saves():
    assert chunk_of(MOST) == MOST
    assert chunk_of(MOST + 1) == BUDGET_ROWS


def test_only_where_that_sum_would_be():
    hidden_alone = Needs(True, False, False)
    assert chunk_of(MOST, hidden_alone) < MOST
    assert chunk_of(MOST, hidden_alone, Shard(False)) < MOST
    assert chunk_of(MOST, hidden_alone, Shard(True)) == MOST  # all ranks chunk alike
    assert chunk_of(MOST, dtype=torch.float32) < MOST
    assert chunk_of(MOST, again=True) < MOST
    assert chunk_of(MOST, tokens=16) == 16


def test_its_gradient_is_that_of_float64():
    torch.manual_seed(0)
    hidden, weight = torch.randn(MOST, D).bfloat16(), torch.randn(V, D).bfloat16()
    found, expected = [], []
    for dtype, grads in ((torch.bfloat16, found), (torch.float64, expected)):
        given = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        linear_entropy_loss(
            *given, logits_dtype=torch.float32 if grads is found else None
        ).backward()
        grads += [x.grad for x in given]
    for own, truth in zip(found, expected, strict=True):
        assert own.dtype == torch.bfloat16 and error(own, truth) < 1e-2
