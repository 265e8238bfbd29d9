"""The head of a transformers causal language model, as the ops take it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ModelError(ValueError):
    """A model that cannot be loaded, or that this package cannot serve."""


class Head(NamedTuple):
    """logits = softcap(logit_scale * hidden @ weight.T + bias), softcap(u) = c tanh(u / c)."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    @property
    def arguments(self) -> dict:
        """All but the weight, by the names that the `linear_*` functions have for it."""
        return dict(bias=self.bias, softcap=self.softcap, logit_scale=self.logit_scale)

    def transform(self, products: Tensor) -> Tensor:
        """The logits out of what the model's own layer gives, hidden @ weight.T + its bias."""
        logits = self.logit_scale * products
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """All the logits, in float32: for checks on a few tokens."""
        products = hidden.float() @ self.weight.float().T
        if self.bias is not None:
            products = products + self.bias.float() / self.logit_scale
        return self.transform(products)


def read_head(model) -> Head:
    """The model's head. A scale is applied by the models that have one after the bias, so to both.

    Raises:
        ModelError: the model has no linear head.
    """
    layer = model.get_output_embeddings()
    if getattr(layer, "weight", None) is None:
        raise ModelError(f"{type(model).__name__} has no language-model head")
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0)
    bias = getattr(layer, "bias", None)
    return Head(layer.weight, bias if bias is None or scale == 1 else scale * bias, softcap, scale)
