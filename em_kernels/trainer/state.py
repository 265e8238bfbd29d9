"""The state of a run in parts, one of each rank that wrote it (torch.distributed.checkpoint).

One rank or many, the parts are those of the optimiser, and of the weights where a checkpoint has no
others. They load on any number of ranks, and nothing in them is run: tensors alone are read.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.tensor import DTensor, distribute_tensor

from em_kernels.lm.models import SHARDS
from em_kernels.lm.ranks import Ranks
from em_kernels.lm.text import one_line

WEIGHTS, OPTIMIZER = "model.", "optimizer.state."
_OLD_STATE = "trainer_state.pt"  # of one process, before it wrote parts as several do


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read."""


def save_parts(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, weights: bool, ranks: Ranks
) -> None:
    """Write every rank's part."""
    state = _optimizer_state(model, optimizer) | (_weights(model) if weights else {})
    with catch_warnings():
        filterwarnings("ignore", message="torch.distributed is disabled")  # one process: so it is
        dcp.save(state, checkpoint_id=folder, no_dist=ranks.size == 1)


def load_weights_from_parts(checkpoint: Path, model: nn.Module, ranks: Ranks) -> None:
    """Read this rank's part of the weights, however many ranks wrote them."""
    _load(checkpoint, _weights(model), ranks)


def load_optimizer(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> None:
    """Read this rank's part of the optimiser's state, however many ranks wrote it."""
    if not (checkpoint / SHARDS).is_dir():
        _load_old_optimizer(checkpoint, optimizer, ranks)
        return
    with _readable(checkpoint, ranks):
        found = _Reader(checkpoint / SHARDS).read_metadata().state_dict_metadata
    state: dict[str, Tensor] = {}
    for name, parameter in _names(model, optimizer).items():
        for key in [key for key in found if key.startswith(f"{OPTIMIZER}{name}.")]:
            value = _empty(found[key], parameter)
            state[key] = optimizer.state[parameter][key.rpartition(".")[2]] = value
    left = [key for key in found if key.startswith(OPTIMIZER) and key not in state]
    if left:
        raise CheckpointError(f"{checkpoint} is of another model: it has {left[0]}")
    _load(checkpoint, state, ranks)


def _empty(found: Any, parameter: nn.Parameter) -> Tensor:
    """A tensor to read into: cut over the ranks as the parameter is, or a number of one's own."""
    if found.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=found.properties.dtype, requires_grad=False)
    return torch.zeros(found.size, dtype=found.properties.dtype)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {f"{WEIGHTS}{_plain(name)}": value for name, value in model.state_dict().items()}


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{OPTIMIZER}{name}.{key}": value
        for name, parameter in _names(model, optimizer).items()
        for key, value in optimizer.state[parameter].items()
    }


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The parameters that the optimiser moves, by names that do not depend on how it is called."""
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {_plain(name): p for name, p in model.named_parameters() if id(p) in moved}


def _plain(name: str) -> str:
    """As before torch.compile."""
    return name.replace("_orig_mod.", "")


def _load(checkpoint: Path, state: dict[str, Tensor], ranks: Ranks) -> None:
    """Read into the tensors of `state`, in place."""
    with _readable(checkpoint, ranks), catch_warnings():
        filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(
            state,
            storage_reader=_Reader(checkpoint / SHARDS),
            planner=_TensorsOnly(),
            no_dist=ranks.size == 1,
        )


@contextmanager
def _readable(checkpoint: Path, ranks: Ranks) -> Iterator[None]:
    """What goes wrong in the block as a `CheckpointError`, on all ranks together."""
    with ranks.raise_together():
        try:
            yield
        except (CheckpointException, Exception) as error:
            reason = one_line(cause(error))
            raise CheckpointError(f"cannot read {checkpoint / SHARDS}: {reason}") from error


def cause(error: BaseException) -> BaseException:
    """What went wrong, of the first rank that torch reports."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error


class _Reader(dcp.FileSystemReader):
    """A reader that runs nothing that a checkpoint holds."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            found = _MetadataUnpickler(file).load()
        if not isinstance(found, metadata.Metadata):
            raise pickle.UnpicklingError(f".metadata holds a {type(found).__name__}")
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found


class _MetadataUnpickler(pickle.Unpickler):
    """Of what torch describes tensors with, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        if module.startswith("pathlib") and name.endswith("Path"):
            return PurePath
        place = {"torch": torch, metadata.__name__: metadata, filesystem.__name__: filesystem}
        found = getattr(place.get(module), name, None)
        described = isinstance(found, type) and found.__module__ == metadata.__name__
        if found in (torch.Size, filesystem._StorageInfo) or described:
            return found
        if isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f".metadata names {module}.{name}, which has no place there")


class _TensorsOnly(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is no tensor")


def _load_old_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """The state that one process wrote before it wrote parts, of which every rank takes its own."""
    with _readable(checkpoint, ranks):
        old = torch.load(checkpoint / _OLD_STATE, map_location="cpu", weights_only=True)
    parameters = optimizer.param_groups[0]["params"]
    for parameter, values in zip(parameters, old["optimizer"]["state"].values()):
        for name, value in values.items():
            if value.shape == parameter.shape:
                value = value.to(parameter.device)
                if isinstance(parameter, DTensor):
                    where = (parameter.device_mesh, parameter.placements)
                    value = distribute_tensor(value, *where, src_data_rank=None)
            optimizer.state[parameter][name] = value
