"""Checkpoints of several ranks: each writes its part of weights and optimiser (torch's DCP).

They load on any number of ranks, one included, and merge into a model folder of transformers.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from warnings import catch_warnings, filterwarnings

import torch

from em_kernels.lm.adapters import has_adapter, is_adapted, merged_copy
from em_kernels.lm.models import SHARDS, load_architecture, load_model
from em_kernels.lm.ranks import Ranks
from em_kernels.lm.text import one_line
from em_kernels.trainer.checkpoint import CheckpointError


def has_shards(checkpoint: Path) -> bool:
    return (checkpoint / SHARDS).is_dir()


def save_shards(
    folder: Path, update: int, model, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> Path:
    """Write every rank's part, to a temporary folder that is to become part of a checkpoint."""
    import torch.distributed.checkpoint as dcp

    temporary = folder / f".checkpoint-{update}.{SHARDS}.tmp"
    ranks.first(lambda: shutil.rmtree(temporary, ignore_errors=True))
    with _checkpoint_errors(f"cannot write {temporary}", ranks):
        dcp.save(_state(model, optimizer), checkpoint_id=temporary)
    return temporary


def load_shards(
    checkpoint: Path, model, optimizer: torch.optim.Optimizer | None, ranks: Ranks
) -> None:
    """Read this rank's part of weights and optimiser, however many ranks wrote them."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    state = _state(model, optimizer)
    with _checkpoint_errors(f"cannot read {checkpoint / SHARDS}", ranks), catch_warnings():
        filterwarnings("ignore", message="torch.distributed is disabled")  # one process: so it is
        dcp.load(state, checkpoint_id=checkpoint / SHARDS, no_dist=ranks.size == 1)
    set_model_state_dict(model, state["model"], options=_options(model))
    if optimizer:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])


def load_whole_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load the optimiser state of one process, of which every rank takes its part."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for parameter, values in zip(optimizer.param_groups[0]["params"], state["state"].values()):
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            for name, value in values.items():
                if value.shape == parameter.shape:
                    value = value.to(parameter.device)
                    values[name] = distribute_tensor(value, mesh, placements, src_data_rank=None)
    optimizer.load_state_dict(state)


def merge_checkpoint(checkpoint: str | Path, output: str | Path) -> Path:
    """Make a model folder for transformers of a checkpoint's parts; needs no other process.

    Of an adapter, trained by however many ranks, with the model below it, in float32.

    Raises:
        ValueError: `checkpoint` has no parts and is no adapter, or `output` is there already.
        ModelError: the model below the adapter is not there, or the two cannot be merged.
        CheckpointError: the parts cannot be read.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    if not has_shards(checkpoint) and not has_adapter(checkpoint):
        raise ValueError(
            f"checkpoint must be a folder with {SHARDS}/ in it, got {checkpoint}, "
            "which holds no adapter either"
        )
    if output.exists():
        raise ValueError(f"output must be a new folder, {output} is there already")
    if has_adapter(checkpoint):
        model, tokenizer = load_model(str(checkpoint), "cpu")
        model = merged_copy(model)
    else:
        model, tokenizer = load_architecture(checkpoint, "cpu")
        load_shards(checkpoint, model, None, Ranks())
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return output


def _state(model, optimizer: torch.optim.Optimizer | None) -> dict:
    """By name of parameter, so that it does not depend on how they are sharded."""
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    state = {"model": get_model_state_dict(model, options=_options(model))}
    if optimizer:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    return state


def _options(model):
    """Of a PEFT model what is trained: the weights below the adapter are those of its base."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    adapted = is_adapted(model)
    return StateDictOptions(ignore_frozen_params=adapted, strict=not adapted)


@contextmanager
def _checkpoint_errors(what: str, ranks: Ranks) -> Iterator[None]:
    """What torch raises on all ranks, as one error; it is no Exception, but a BaseException."""
    from torch.distributed.checkpoint.api import CheckpointException

    with ranks.together():
        try:
            yield
        except (CheckpointException, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{what}: {one_line(error)}") from error
