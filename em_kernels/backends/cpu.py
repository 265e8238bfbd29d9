"""The C++ backend: `stats`, `grad` and `loss` of `em_kernels.reference`, vectorised and threaded.

One pass for the statistics, one for the gradient; `loss` does both to a row while it is in cache.
The instruction set is chosen at run time; `set_isa` chooses another, for tests and measurements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels import _C
from em_kernels.backends.interface import RowSpec, Saved, Upstream, for_backend

isa_levels = _C.isa_levels  # instruction sets compiled and usable here, best first
get_isa = _C.get_isa
set_isa = _C.set_isa


# Rows may be gone through in parts; in parts of a multiple of this, with the bits of whole rows.
part_entries = _C.BLOCK
new_parts = _C.new_parts  # (rows) -> what is known of as many rows before their first part


def stats(
    logits: Tensor,
    spec: RowSpec,
    outputs: tuple[str, ...],
    parts: Tensor | None = None,
    first: int = 0,
) -> list[Tensor]:
    """[max, log1p_r, mean_d, *outputs], each (N,), of logits (outer, inner, V).

    With `parts`, logits are the entries of longer rows from `first` on, bias those of these
    entries, and targets count from the beginning of the rows. The results are those of all entries
    so far; logprob, is_top1 and entropy_slope once the target was among them.
    """
    return _C.stats(logits, *for_backend(spec), outputs, parts, first)


def grad(logits: Tensor, spec: RowSpec, saved: Saved, upstream: Upstream, out: Tensor) -> None:
    """Write d loss / d logits into `out`, which has the shape of `logits` and may be `logits`."""
    _C.grad(logits, *for_backend(spec), *saved, *upstream, out)


def loss(
    logits: Tensor, spec: RowSpec, upstream: Upstream, outputs: tuple[str, ...], out: Tensor
) -> list[Tensor]:
    """`stats`, then `grad` of the loss whose per-row weights are `upstream`, into `out`."""
    return _C.loss(logits, *for_backend(spec), *upstream, outputs, out)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised and contiguous, for gradients and chunks of logits.

    The memory of a large one is kept, when the tensor is freed, for the next: pages that were in
    use before need no page faults. At most three blocks are kept, until `release_memory`: as
    many as a step has, of logits kept for the backward pass, of a chunk and of dW; each until
    sixteen others have been freed after it.
    """
    return _C.empty(shape, dtype)


def release_memory() -> None:
    """Give the blocks kept by `empty` back to the system."""
    _C.release_memory()


def add_product(total: Tensor, grad_logits: Tensor, x: Tensor, add: bool) -> bool:
    """total = (total if add) + grad_logits.T @ x, in float32 throughout, for bfloat16 operands.

    Returns False, having done nothing, for other dtypes, for an empty product and where the
    processor cannot do it fast.
    """
    if grad_logits.numel() == 0:
        return False
    return _C.add_product(total, grad_logits, x, add)


def build_info() -> dict[str, object]:
    """Compiler, the instruction sets usable here and the one in use."""
    return {"compiler": _C.compiler(), "isa_levels": isa_levels(), "isa": get_isa()}
