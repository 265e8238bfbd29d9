"""Whether every parameter of an adapter has a part in the loss."""

from __future__ import annotations

import torch

from em_kernels.lm.heads import Head, ModelError
from em_kernels.lm.models import hidden_states
from em_kernels.lm.modes import eval_mode


@torch.enable_grad()
def check_reached(model, head: Head, prompt: list[int]) -> None:
    """Make sure that every parameter that requires grad has a gradient in the logits of a prompt.

    Many adapters start as zero, so that no value shows one that is not in use. Those of experts
    are left out: a router need not send the prompt there.

    Raises:
        ModelError: one has none, so it would never move.
    """
    ids = torch.tensor([prompt], device=model.device)
    parameters = model.named_parameters()
    trained = {n: p for n, p in parameters if p.requires_grad and "expert" not in n}
    # One entry of the vocabulary depends on all that any does, without a float32 copy of the head.
    with eval_mode(model):
        logits = head.first(1).logits(hidden_states(model, ids, torch.ones_like(ids))[0, -1])
    left = list(trained)
    if trained and logits.requires_grad:
        found = torch.autograd.grad(logits.sum(), [*trained.values()], allow_unused=True)
        left = [name for name, gradient in zip(trained, found) if gradient is None]
    if left:
        raise ModelError(
            f"{len(left)} parameters require grad ({left[0]} is one), but the logits do not depend "
            "on them, so they would never move: freeze them (requires_grad_(False)), leave their "
            "modules out of the adapter, or undo merge_adapter"
        )
