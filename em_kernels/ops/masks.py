"""Masks: which tokens count. A mask chooses and does not weigh, so a weight in one is refused."""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels.backends import row_index

_RULE = (
    "must be bool, integer or a floating 0 or 1: it only says which tokens count; weigh them by "
    "entropy_weight, logprob_weight, the advantage or the loss itself"
)


def nonzero(name: str, mask: Tensor) -> Tensor:
    """Where `mask` is not 0, a new bool tensor.

    Raises:
        ValueError: a floating mask holds something else than 0 and 1, NaN included. On a GPU, to
            spare a synchronisation, that is a device-side assertion: a RuntimeError later on.
    """
    if not (mask.is_floating_point() or mask.is_complex()):
        return mask != 0
    counted: Tensor = torch.ops.em_kernels.zero_or_one(mask.detach(), name)
    return counted


def _zero_or_one(mask: Tensor, name: str) -> Tensor:
    counted = mask != 0
    good = counted == mask
    if not row_index.is_free_to_look(mask):
        torch._assert_async(good.all(), f"{name} {_RULE}")
    elif not good.all():
        raise ValueError(f"{name} {_RULE}; got {mask[~good][0].item()!r}")
    return counted


_library = torch.library.Library("em_kernels", "FRAGMENT")
_library.define("zero_or_one(Tensor mask, str name) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("zero_or_one", _zero_or_one, "CompositeExplicitAutograd")
torch.library.register_fake(
    "em_kernels::zero_or_one", lambda mask, name: torch.empty_like(mask, dtype=torch.bool)
)
torch.library.register_vmap(
    "em_kernels::zero_or_one",
    lambda info, dims, mask, name: (torch.ops.em_kernels.zero_or_one(mask, name), dims[0]),
)
