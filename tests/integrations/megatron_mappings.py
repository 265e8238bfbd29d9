"""Megatron's tensor-parallel mappings on gloo, and a small model made with them.

Forward and backward are those of megatron.core.tensor_parallel.mappings (0.16.1): what goes through
the model parallel region is copied and reduced, or with sequence parallelism gathered and
reduce-scattered along the first dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Copy(torch.autograd.Function):
    """copy_to_tensor_model_parallel_region"""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _reduced(grad, ctx.group), None


class Reduce(torch.autograd.Function):
    """reduce_from_tensor_model_parallel_region"""

    @staticmethod
    def forward(ctx, x, group):
        return _reduced(x, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Gather(torch.autograd.Function):
    """gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=partial)"""

    @staticmethod
    def forward(ctx, x, group, partial=True):
        ctx.group, ctx.partial = group, partial
        return _gathered(x, group)

    @staticmethod
    def backward(ctx, grad):
        total = _reduced(grad, ctx.group) if ctx.partial else grad
        return _own(total, ctx.group), None, None


class ReduceScatter(torch.autograd.Function):
    """reduce_scatter_to_sequence_parallel_region"""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _own(_reduced(x, group), group)

    @staticmethod
    def backward(ctx, grad):
        return _gathered(grad, ctx.group), None


class Weights(NamedTuple):
    """x (T, D), the input; norm (D,), the same on every rank; up (F, D), down (D, F) and head
    (V, D), cut over F and V."""

    x: Tensor
    norm: Tensor
    up: Tensor
    down: Tensor
    head: Tensor

    def leaves(self) -> Weights:
        return Weights(*(w.detach().clone().requires_grad_() for w in self))

    def own(self, group, sequence_parallel: bool) -> Weights:
        x = _own(self.x, group) if sequence_parallel else self.x
        parts = (_own(self.up, group), _own(self.down.T, group).T, _own(self.head, group))
        return Weights(x, self.norm, *parts).leaves()


def draw_weights() -> Weights:
    shapes = ((8, 128), (128,), (12, 128), (128, 12), (256, 128))
    drawn = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return Weights(*drawn[:2], *(w / 8 for w in drawn[2:]))


def backbone(w: Weights, group=None, sequence_parallel: bool = False) -> Tensor:
    """The hidden states before the head; with sequence parallelism those of this rank's tokens."""
    h = w.x * w.norm
    if group is not None:
        h = Gather.apply(h, group) if sequence_parallel else Copy.apply(h, group)
    h = (h @ w.up.T).tanh() @ w.down.T
    if group is not None:
        h = ReduceScatter.apply(h, group) if sequence_parallel else Reduce.apply(h, group)
    return w.x + h


def _reduced(x: Tensor, group) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def _gathered(x: Tensor, group) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def _own(x: Tensor, group) -> Tensor:
    return x.chunk(dist.get_world_size(group))[dist.get_rank(group)]
