"""A head whose loss is computed after the model's forward, with its place in the forward's graph.

DDP, FSDP2 and gradient checkpointing look at a forward's graph to see which parameters it used, and
may take a weight away when it has ended. A loss function that comes later must not use the weight
behind their backs: so the head is called where it always is, gives logits of width 0 that depend on
its weight, and the gradient that the loss makes of itself enters the graph there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels.lm.head_call import Taken, check_dtypes
from em_kernels.lm.heads import Head, read_head
from em_kernels.ops.dtensor import is_dtensor, local_operands
from em_kernels.ops.forward_gradient import ready_gradients, scaled
from em_kernels.ops.registry import call
from em_kernels.ops.schemas import AllReduce
from em_kernels.ops.token_loss import TokenLoss, linear_token_loss


def gathered_as(head: Head, dtype: torch.dtype) -> Head:
    """The head, in `dtype` if it is FSDP2's shards, which may be wider than what they become."""
    if not is_dtensor(head.weight):
        return head
    bias, lora = head.bias if head.bias is None else head.bias.to(dtype), head.lora
    if lora is not None:
        lora = lora[0].to(dtype), lora[1].to(dtype), lora[2]
    return head._replace(weight=head.weight.to(dtype), bias=bias, lora=lora)


class Operands(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor | None = None  # of the head's LoRA, as `b`
    b: Tensor | None = None

    @classmethod
    def local(cls, hidden: Tensor, head: Head) -> tuple[Operands, object]:
        """(what this rank has of them, the group that the vocabulary is cut over)"""
        hidden, weight, bias, group = local_operands(hidden, head.weight, head.bias, None)
        own = cls(hidden.to(weight.device), weight, bias)
        if head.lora is None:
            return own, group
        a = local_operands(hidden, head.lora[0], None, None)[1]
        return own._replace(a=a, b=local_operands(hidden, head.lora[1], None, group)[1]), group

    def detached(self) -> Operands:
        made: list = [None if x is None else x.detach() for x in self]
        return Operands(*made)


class HeadCall:
    """One call of a head: what it was to multiply, and later the gradient of its operands.

    operands: as the head's own forward would have had them, what the hooks of the layer and of the
    model do to them included. group: of a vocabulary cut between ranks.
    """

    def __init__(self, model, head: Head, operands: Operands, group):
        device, enabled = operands.hidden.device.type, torch.is_grad_enabled()
        self.needs = [enabled and x is not None and x.requires_grad for x in operands]
        self.operands = operands.detached()
        self.model, self.scaling = model, 0.0 if head.lora is None else head.lora[2]
        self.options = dict(softcap=head.softcap, logit_scale=head.logit_scale, group=group)
        self.autocast = torch.is_autocast_enabled(device)
        self.autocast_dtype = torch.get_autocast_dtype(device)
        self.gradient: list[Tensor | None] | None = None

    @property
    def hidden(self) -> Tensor:
        """What the head multiplies, (B, T, D)."""
        return self.operands.hidden

    def loss(
        self,
        logits: Tensor,
        target: Tensor,
        function: Callable[..., TokenLoss] | None = None,
        **arguments,
    ) -> Tensor:
        """`function(hidden, weight, target, **arguments)`, with its gradient made now.

        Args:
            logits: what the model made of the head's answer; has the graph of its forward.
            function: what gives the loss of `linear_token_loss`, None for that itself.

        Raises:
            ModelError: the weight has been freed since, and not by FSDP2.
        """
        operands = self._whole()
        if torch.is_grad_enabled() and logits.requires_grad:
            for x, need in zip(operands, self.needs):
                if need and x is not None:
                    x.requires_grad_()
        hidden, weight, bias, a, b = operands
        lora = None if a is None else (a, b, self.scaling)
        arguments = {**arguments, **self.options, "bias": bias, "lora": lora}
        with torch.autocast(hidden.device.type, self.autocast_dtype, enabled=self.autocast):
            loss = (function or linear_token_loss)(hidden, weight, target, **arguments).loss
        if not loss.requires_grad:
            return loss
        return _Loss.apply(logits, self, loss.detach(), *self._gradient(loss, operands))

    def _gradient(self, loss: Tensor, operands: Operands) -> list[Tensor]:
        """Of what needs one, as wide as it was made: a loss scale for float16 comes in backward."""
        _, made, _ = ready_gradients(loss.grad_fn)
        group = self.options["group"]
        if group is not None:
            made = [
                call(AllReduce(g, group.group_name))[0] if whole and g is not None else g
                for g, whole in zip(made, (True, False, False, True, False))
            ]
        gradient = self._through_a(made, operands)
        return [
            g.to(torch.promote_types(g.dtype, x.dtype))
            for g, x, need in zip(gradient, operands, self.needs)
            if need and x is not None
        ]

    @torch.no_grad()
    def _through_a(self, made: list, operands: Operands) -> list:
        """For the gradient of scaling hidden @ A.T that of A, and its part in that of hidden."""
        of_hidden, of_weight, of_bias, low, of_b = made
        hidden, a = operands.hidden, operands.a
        if low is None or a is None:
            return made
        wide = torch.promote_types(torch.promote_types(low.dtype, hidden.dtype), a.dtype)
        low = self.scaling * low.to(wide)
        of_a = low.reshape(-1, low.shape[-1]).T @ hidden.reshape(-1, hidden.shape[-1]).to(wide)
        if of_hidden is not None:
            of_hidden = of_hidden + low @ a.to(wide)
        return [of_hidden, of_weight, of_bias, of_a, of_b]

    @torch.no_grad()
    def _whole(self) -> Operands:
        """The operands anew; weight and bias gathered if their memory was freed with the forward's
        end."""
        own = self.operands
        if any(map(_is_freed, own[1:])):
            head = gathered_as(read_head(self.model), own.weight.dtype)
            own, _ = Operands.local(own.hidden, head)
        return own.detached()

    def add_gradient(self, gradient: list[Tensor]) -> None:
        """Of one loss; the graph may hold several of this call."""
        left = iter(gradient)
        new = [next(left) if need else None for need in self.needs]
        before = self.gradient or [None] * len(new)
        self.gradient = [b if a is None else a if b is None else a + b for a, b in zip(before, new)]

    def take_gradient(self) -> list[Tensor | None]:
        """That of all losses, of the operands, which is then forgotten."""
        gradient, self.gradient = self.gradient, None
        return [None] * len(self.needs) if gradient is None else gradient


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
        operands, group = Operands.local(hidden, head)
        self.calls = [HeadCall(self.model, head, operands, group)]
        return _Head.apply(self.calls[0], *operands)

    @torch.compiler.disable
    def take_call(self) -> HeadCall:
        """The call of the head, which is then forgotten; after `take`, which finds it missing."""
        return self.calls.pop()


def _is_freed(x: Tensor | None) -> bool:
    return x is not None and x.numel() > 0 and x.untyped_storage().nbytes() == 0


class _Head(torch.autograd.Function):
    """The head's node in the graph of the forward."""

    @staticmethod
    def forward(ctx, call, hidden, *operands):
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
