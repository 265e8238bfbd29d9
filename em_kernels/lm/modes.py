"""Train and eval modes of a model, module by module: a user may have set each by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class Modes:
    """The mode that every module of a model is in now, by name."""

    def __init__(self, model: nn.Module):
        self._training = {name: module.training for name, module in model.named_modules()}

    def restore(self, model: nn.Module) -> None:
        """Put the model, or a copy of it, into these modes; modules added since stay as they are.

        Without `train()`, which switches all below a module at once and may be overridden.
        """
        for name, module in model.named_modules():
            module.training = self._training.get(name, module.training)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Leave every module in the mode that it was in, after an error too."""
    modes = Modes(model)
    try:
        yield
    finally:
        modes.restore(model)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and then every module in the mode that it was in."""
    with modes_kept(model):
        model.eval()
        yield
