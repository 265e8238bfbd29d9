"""Whether the loss trains what the model's own logits would train."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from em_kernels._modes import eval_mode
from em_kernels.heads import Head, ModelError
from em_kernels.trainer.models import hidden_states

_TOLERANCE = 0.1  # an adapter that is left out differs by 1, half precision by hundredths


def check_reached(model, head: Head, prompt: list[int]) -> None:
    """Make sure that every parameter that requires grad has the gradient through hidden states and
    head that it has through the model's own logits.

    An adapter starts as zero, so its values do not show that it is left out; its gradient does.

    Raises:
        ModelError: one has another gradient, or none by either way, and so would never move.
    """
    ids = torch.tensor([prompt], device=model.device)
    mask = torch.ones_like(ids)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with eval_mode(model):
        own = _gradients(
            trained,
            lambda: model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, -1],
        )
        ours = _gradients(trained, lambda: head.logits(hidden_states(model, ids, mask)[0, -1]))
    for name in trained:
        if own[name] is None and ours[name] is None:
            raise ModelError(
                f"{name} requires grad, but the logits do not depend on it, so it would never "
                "move: freeze it (requires_grad_(False)), or leave its module out of the adapter"
            )
        if not _same(own[name], ours[name]):
            raise ModelError(
                f"{name} has another gradient through the final hidden states and the head than "
                "through the model's own logits: an adapter on the head (put lm_head into "
                "modules_to_save instead of target_modules, or leave it out), or one that works "
                "by hooks of the whole model, is not supported"
            )


def _gradients(trained: dict[str, Tensor], logits: Callable[[], Tensor]) -> dict:
    with torch.enable_grad():
        row = logits().float()
        if not row.requires_grad:
            return dict.fromkeys(trained)
        weights = torch.randn(row.shape, generator=torch.Generator().manual_seed(0)).to(row)
        found = torch.autograd.grad((row * weights).sum(), [*trained.values()], allow_unused=True)
    return dict(zip(trained, found))


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return False
    return bool((one - other).norm() <= _TOLERANCE * one.norm())
