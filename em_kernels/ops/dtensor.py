"""DTensors among the arguments: what this rank holds of them, and the group that makes a whole.

A gradient comes back as a DTensor with the placement of what was given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

VOCABULARY_DIMS = ("tp", "tensor", "tensor_parallel", "vocab")
"""Names of mesh dimensions over which a weight cut in dimension 0 is a vocabulary cut.

Data-parallel sharding (FSDP2) cuts dimension 0 as well; only the name of the mesh dimension, or a
`group` given with the weight, tells one from the other.
"""


def own_part(x: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return x.to_local() if is_dtensor(x) else x


def local_logits(logits: Tensor, group: Any, name: str = "logits") -> tuple[Tensor, Any]:
    """(logits of this rank, the group they are cut over): vocabulary-sharded or replicated."""
    if not is_dtensor(logits):
        return logits, group
    last = logits.dim() - 1
    for placement in logits.placements:
        if not (placement.is_replicate() or placement.is_shard(last)):
            raise ValueError(
                f"{name} must be sharded on the vocabulary or replicated, "
                f"got placements {logits.placements}"
            )
    kept = [i for i, placement in enumerate(logits.placements) if placement.is_shard(last)]
    found = _group_of(logits, name, kept, group)
    return logits.to_local(), found


def local_operands(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, group: Any, prefix: str = ""
) -> tuple[Tensor, Tensor, Tensor | None, Any]:
    """(hidden, this rank's weight and bias, their group); `prefix` is that of the caller's names.

    A weight cut over a tensor-parallel mesh stays cut; one cut over any other is gathered, and its
    gradient averaged over that mesh, as FSDP2 does. A hidden that is a DTensor is gathered.
    """
    found = group
    if is_dtensor(weight):
        weight, found = _local_weight(weight, f"{prefix}weight", group)
    if is_dtensor(bias):
        bias, bias_group = _local_weight(bias, f"{prefix}bias", group)
        if bias_group is not found:
            raise ValueError(f"{prefix}bias must be sharded as {prefix}weight is")
    if is_dtensor(hidden):
        hidden = hidden.full_tensor()
    return hidden, weight, bias, found


def is_dtensor(x: Any) -> TypeGuard[DTensor]:
    return isinstance(x, Tensor) and hasattr(x, "device_mesh")


def _local_weight(weight: DTensor, name: str, group: Any) -> tuple[Tensor, Any]:
    from torch.distributed.tensor import Partial, Replicate

    mesh = weight.device_mesh
    kept = [
        i
        for i, placement in enumerate(weight.placements)
        if placement.is_shard(0) and _cuts_vocabulary(mesh, i, group)
    ]
    found = _group_of(weight, name, kept, group)
    if all(i in kept or p.is_replicate() for i, p in enumerate(weight.placements)):
        return weight.to_local(), found
    placements, gradients, ranks = list(weight.placements), list(weight.placements), 1
    for i, placement in enumerate(weight.placements):
        if i not in kept and not placement.is_replicate():
            placements[i], gradients[i] = Replicate(), Partial()
            ranks *= mesh.size(i)
    local = weight.redistribute(placements=placements).to_local(grad_placements=gradients)
    if local.requires_grad:
        local.register_hook(lambda grad: grad / ranks)
    return local, found


def _cuts_vocabulary(mesh: Any, dim: int, group: Any) -> bool:
    if group is not None:
        return mesh.get_group(dim) is group
    names = mesh.mesh_dim_names
    return names is not None and names[dim] in VOCABULARY_DIMS


def _group_of(x: DTensor, name: str, kept: list[int], group: Any) -> Any:
    """The group of the mesh dimension over which `x` is cut, which must be `group` if given."""
    if len(kept) > 1:
        raise ValueError(f"{name} must be cut over one mesh dimension, got {x.placements}")
    found = x.device_mesh.get_group(kept[0]) if kept else None
    if group is not None and found is not group:
        raise ValueError(f"group must be the one over which {name}, a DTensor, is cut")
    return found
