"""What a transformers model adds to its loss by itself: a router's balance, for example.

The model's own forward adds it, to a loss function that gives 0: so its coefficient is taken from
where the model keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from em_kernels.backends.interface import accumulate_dtype
from em_kernels.lm.head_call import call_probed
from em_kernels.lm.heads import ModelError, read_head

_SWITCHES = ("output_router_logits", "z_loss_coefficient")  # in configs, may be turned on later


@contextmanager
def loss_of_zero(model, loss=None) -> Iterator[None]:
    """In the block `model.loss_function` gives 0: the model's loss is what it adds to that."""
    before = model.__dict__.get("_loss_function")
    model._loss_function = loss or _zero
    try:
        yield
    finally:
        del model._loss_function
        if before is not None:
            model._loss_function = before


def _zero(logits: Tensor, *args, **kwargs) -> Tensor:
    return torch.zeros((), dtype=accumulate_dtype(logits.dtype), device=logits.device)


def adds_to_loss(model) -> bool:
    """Whether the model can add something to what its `loss_function` gives; called when patched.

    Raises:
        ModelError: it adds something made of its logits.
    """
    added = [_added(model, seed) for seed in (0, 1)]
    if None in added:
        return False
    if added[0] != added[1]:
        raise ModelError(
            f"{type(model).__name__} adds to its loss something made of its logits, as "
            "z_loss_coefficient does; such a loss is not supported: set that to 0"
        )
    configs = (model.config, model.config.get_text_config())
    return added[0] != 0 or any(hasattr(c, name) for c in configs for name in _SWITCHES)


@torch.no_grad()
def _added(model, seed: int) -> float | None:
    """What the model's loss is with random logits and a loss function that gives 0.

    None for a model that does not call its loss function, or not with two tokens alone.
    """
    called = []

    def loss(logits: Tensor, *args, **kwargs) -> Tensor:
        called.append(True)
        return _zero(logits)

    def answer(hidden: Tensor) -> Tensor:
        size = (*hidden.shape[:-1], read_head(model).weight.shape[0])
        return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(hidden)

    try:
        with loss_of_zero(model, loss):
            total = call_probed(model, answer, labelled=True).loss
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception:  # a loss of its own, or inputs that it misses
        return None
    return float(total) if called else None
