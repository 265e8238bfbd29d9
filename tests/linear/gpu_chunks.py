"""The chunk driver on a GPU, whose products ones on the CPU play; and its exact gradients."""

import pytest
import torch
from gpu_products import defer_small_chunks, play_gpu
from helpers import error, make_linear, random_target, random_upstream, truth

from em_kernels.backends.interface import RowSpec, Saved, Upstream
from em_kernels.backends.reference import Reference
from em_kernels.linear import chunks
from em_kernels.linear.chunks import Linear, Needs


class Wide(Reference):
    """A backend that writes the gradient as wide as the logits."""

    narrows = False


reference = Reference()
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
