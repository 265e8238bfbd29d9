"""The state of a run in parts, one of each rank that wrote it (torch.distributed.checkpoint).

One rank or many, the parts are those of the optimiser, and of the weights where a checkpoint has no
others. They load on any number of ranks, and nothing in them is run: tensors alone are read.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
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

from em_kernels.lm.adapters import is_adapted
from em_kernels.lm.data import read_json_object
from em_kernels.lm.fingerprint import digest_over_ranks
from em_kernels.lm.loading import reason_of
from em_kernels.lm.models import SHARDS, updates_of
from em_kernels.lm.ranks import Ranks
from em_kernels.lm.text import text_digest, write_text

WEIGHTS, OPTIMIZER = "model.", "optimizer.state."
FACTS = "belongs.json"
BELONGS = {
    "update": "the updates that its name says",
    "weights": "the weights",
    "optimizer": "the states of the optimiser in shards/",
    "metrics": "the lines of metrics.jsonl up to its update",
}
"""What FACTS says, in words."""
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
    state: dict[str, Tensor] = {}
    with _readable(checkpoint, ranks):
        found = _Reader(checkpoint / SHARDS).read_metadata().state_dict_metadata
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
    if found.size.numel() > 2 * parameter.numel() + 1024:
        raise ValueError(f"{tuple(found.size)} is no size of a state of {tuple(parameter.shape)}")
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
            reason = reason_of(cause(error))
            raise CheckpointError(f"cannot read {checkpoint / SHARDS}: {reason}") from error


def cause(error: BaseException) -> BaseException:
    """What went wrong, of the first rank that torch reports."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error


def write_facts(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lines: Sequence[dict],
    update: int,
    ranks: Ranks,
) -> None:
    """Beside the parts: which weights, states and metrics belong together."""
    facts = _facts(model, optimizer, lines, update, ranks)
    ranks.first(lambda: write_text(folder / FACTS, json.dumps(facts) + "\n"))


def check_facts(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lines: Sequence[dict],
    ranks: Ranks,
) -> None:
    """Make sure that what was read of a checkpoint is what was written with it.

    Raises:
        CheckpointError: weights, the optimiser's state, metrics or the folder's name are others.
    """
    path = checkpoint / SHARDS / FACTS
    with ranks.raise_together():
        if not path.is_file():  # written before there was one
            return
        try:
            written = read_json_object(path)
        except ValueError as error:
            raise CheckpointError(f"cannot read {error}; resume from another checkpoint") from None
    found = _facts(model, optimizer, lines, updates_of(checkpoint), ranks)
    for name, what in BELONGS.items():
        if written.get(name) != found[name]:
            raise CheckpointError(
                f"{checkpoint}: {what} are not those that it was written with, but of another run "
                "or update: put back what belongs there, resume "
                "from an earlier checkpoint (remove this one), or begin a new run from its weights "
                "(`model`)"
            )


def _facts(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lines: Sequence[dict],
    update: int,
    ranks: Ranks,
) -> dict[str, Any]:
    """Of a PEFT model the weights that are trained; those below have a digest of their own."""
    moved = {id(p) for p in _names(model, optimizer).values()}
    weights = (
        (_plain(name), p)
        for name, p in model.named_parameters()
        if id(p) in moved or not is_adapted(model)
    )
    states = _optimizer_state(model, optimizer)
    text = "".join(json.dumps(line) for line in lines if line["update"] <= update)
    return {
        "update": update,
        "weights": digest_over_ranks(weights, ranks),
        "optimizer": digest_over_ranks(sorted(states.items()), ranks),
        "metrics": text_digest(text),
    }


class _Reader(dcp.FileSystemReader):
    """A reader that runs nothing that a checkpoint holds."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            found = _MetadataUnpickler(file).load()
        if not isinstance(found, metadata.Metadata):
            raise pickle.UnpicklingError(f".metadata holds a {type(found).__name__}")
        for held in found.storage_data.values():
            if PurePath(held.relative_path).name != held.relative_path:
                where = f"{held.relative_path!s:.60}"
                raise pickle.UnpicklingError(f".metadata names {where!r}, outside of its folder")
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
                optimizer.state[parameter][name] = _shared_out(value, parameter)


def _shared_out(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """As the parameter is cut over the ranks; a number of one's own stays."""
    if value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        where = (parameter.device_mesh, parameter.placements)
        value = distribute_tensor(value, *where, src_data_rank=None)
    return value
