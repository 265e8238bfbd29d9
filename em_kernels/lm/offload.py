"""Activations that wait for the backward pass in the machine's memory instead of a GPU's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

STAY = ("cpu",)  # devices whose memory is the machine's


class ActivationsOnCPU(saved_tensors_hooks):
    """`torch.autograd.graph.save_on_cpu` for what has a row for every token: (B, T, ...), floats.

    Weights, which a backward pass keeps too, stay where they are. With layers that are checkpointed
    that leaves what each layer was given. Where the model is on a CPU it moves nothing.
    """

    def __init__(self, tokens: Tensor, *, pinned: bool = True):
        moved, shape = save_on_cpu(pin_memory=pinned), tokens.shape

        def pack(x: Tensor) -> Any:
            of_tokens = x.shape[:2] == shape and x.dim() > 2 and x.is_floating_point()
            return moved.pack_hook(x) if of_tokens and x.device.type not in STAY else x

        def unpack(held: Any) -> Tensor:
            return held if isinstance(held, Tensor) else moved.unpack_hook(held)

        super().__init__(pack, unpack)


def activations(long: bool, tokens: Tensor) -> AbstractContextManager[Any]:
    """Where what a forward pass keeps of tokens (B, T) waits for the backward pass."""
    return ActivationsOnCPU(tokens) if long else nullcontext()
