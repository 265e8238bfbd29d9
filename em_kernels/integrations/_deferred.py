"""A head whose loss is computed after the model's forward, with its place in the forward's graph.

DDP, FSDP2 and gradient checkpointing look at a forward's graph to see which parameters it used, and
may take a weight away when it has ended. A loss function that comes later must not use the weight
behind their backs: so the head is called where it always is, gives logits of width 0 that depend on
its weight, and the gradient that the loss makes of itself enters the graph there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels.lm.head_call import Taken, check_dtypes
from em_kernels.lm.heads import Head, read_head
from em_kernels.ops.dtensor import is_dtensor, local_operands
from em_kernels.ops.forward_gradient import ready_gradients, scaled
from em_kernels.ops.registry import call
from em_kernels.ops.schemas import AllReduce
from em_kernels.ops.token_loss import linear_token_loss


def gathered_as(head: Head, dtype: torch.dtype) -> Head:
    """The head, in `dtype` if it is FSDP2's shards, which may be wider than what they become."""
    if not is_dtensor(head.weight):
        return head
    bias = head.bias if head.bias is None else head.bias.to(dtype)
    return head._replace(weight=head.weight.to(dtype), bias=bias)


class Operands(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def detached(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Operands:
    return Operands(hidden.detach(), weight.detach(), None if bias is None else bias.detach())


class HeadCall:
    """One call of a head: what it was to multiply, and later the gradient of its operands.

    operands: as the head's own forward would have had them, what the hooks of the layer and of the
    model do to them included. group: of a vocabulary cut between ranks.
    """

    def __init__(self, model, head: Head, hidden: Tensor, group):
        operands, device = (hidden, head.weight, head.bias), hidden.device.type
        enabled = torch.is_grad_enabled()
        self.needs = [enabled and x is not None and x.requires_grad for x in operands]
        self.operands = detached(hidden, head.weight, head.bias)
        self.model = model
        self.options = dict(softcap=head.softcap, logit_scale=head.logit_scale, group=group)
        self.autocast = torch.is_autocast_enabled(device)
        self.autocast_dtype = torch.get_autocast_dtype(device)
        self.gradient: list[Tensor | None] | None = None

    @property
    def hidden(self) -> Tensor:
        """What the head multiplies, (B, T, D)."""
        return self.operands.hidden

    def loss(self, logits: Tensor, target: Tensor, **arguments) -> Tensor:
        """`linear_token_loss(hidden, weight, target, **arguments)`, with its gradient made now.

        Args:
            logits: what the model made of the head's answer; has the graph of its forward.

        Raises:
            ModelError: the weight has been freed since, and not by FSDP2.
        """
        operands = self._whole()
        if torch.is_grad_enabled() and logits.requires_grad:
            for x, need in zip(operands, self.needs):
                if need and x is not None:
                    x.requires_grad_()
        hidden, weight, bias = operands
        arguments = {**arguments, **self.options, "bias": bias}
        with torch.autocast(hidden.device.type, self.autocast_dtype, enabled=self.autocast):
            loss = linear_token_loss(hidden, weight, target, **arguments).loss
        if not loss.requires_grad:
            return loss
        return _Loss.apply(logits, self, loss.detach(), *self._gradient(loss, operands))

    def _gradient(self, loss: Tensor, operands: Operands) -> list[Tensor]:
        """Of what needs one, as wide as it was made: a loss scale for float16 comes in backward."""
        _, gradient, _ = ready_gradients(loss.grad_fn)
        group = self.options["group"]
        if group is not None and gradient[0] is not None:
            (gradient[0],) = call(AllReduce(gradient[0], group.group_name))
        return [
            g.to(torch.promote_types(g.dtype, x.dtype))
            for g, x in zip(gradient, operands)
            if g is not None and x is not None
        ]

    @torch.no_grad()
    def _whole(self) -> Operands:
        """The operands anew; weight and bias gathered if their memory was freed with the forward's
        end."""
        hidden, weight, bias = self.operands
        if _is_freed(weight) or _is_freed(bias):
            head = gathered_as(read_head(self.model), weight.dtype)
            _, weight, bias, _ = local_operands(hidden, head.weight, head.bias, None)
        return detached(hidden, weight, bias)

    def add_gradient(self, gradient: list[Tensor]) -> None:
        """Of one loss; the graph may hold several of this call."""
        left = iter(gradient)
        new = [next(left) if need else None for need in self.needs]
        before = self.gradient or [None] * len(new)
        self.gradient = [b if a is None else a if b is None else a + b for a, b in zip(before, new)]

    def take_gradient(self) -> list[Tensor | None]:
        """That of all losses, (hidden, weight, bias), which is then forgotten."""
        gradient, self.gradient = self.gradient, None
        return [None] * 3 if gradient is None else gradient


class HeadStand(Taken):
    """A `Taken` whose logits have the head's place in the graph, and which gives a `HeadCall`."""

    def __init__(self, model) -> None:
        self.model = model
        self.calls: list[HeadCall] = []  # the last, until it is taken

    @torch.compiler.disable
    def __call__(self, hidden: Tensor) -> Tensor:
        super().__call__(hidden)
        head = read_head(self.model)
        check_dtypes(head, hidden)
        hidden, weight, bias, group = local_operands(hidden, head.weight, head.bias, None)
        hidden, head = hidden.to(weight.device), head._replace(weight=weight, bias=bias)
        self.calls = [HeadCall(self.model, head, hidden, group)]
        return _Head.apply(self.calls[0], hidden, weight, bias)

    @torch.compiler.disable
    def take_call(self) -> HeadCall:
        """The call of the head, which is then forgotten; after `take`, which finds it missing."""
        return self.calls.pop()


def _is_freed(x: Tensor | None) -> bool:
    return x is not None and x.numel() > 0 and x.untyped_storage().nbytes() == 0


class _Head(torch.autograd.Function):
    """The head's node in the graph of the forward."""

    @staticmethod
    def forward(ctx, call, hidden, weight, bias):
        ctx.call = call
        return hidden.new_empty((*hidden.shape[:-1], 0))

    @staticmethod
    def backward(ctx, _):
        return None, *ctx.call.take_gradient()


class _Loss(torch.autograd.Function):
    """A loss of a `HeadCall`: its gradient is handed to that, not through the empty logits."""

    @staticmethod
    def forward(ctx, logits, call, loss, *gradient):
        ctx.call, ctx.nothing = call, torch.zeros_like(logits)
        ctx.save_for_backward(*gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: the gradient of this loss was made with the loss and has no "
                "derivative; compute the loss in the model's forward, out of "
                'model(..., labels=labels, em_outputs=("logprob", "entropy"))'
            )
        gradient = [scaled(x, upstream, "auto") for x in ctx.saved_tensors]
        ctx.call.add_gradient(gradient)
        return ctx.nothing, *[None] * (2 + len(gradient))
