"""One process or several: the process group, and the model sharded over it (FSDP2).

The loop is the same for both. Every rank knows all the answers of an update and works on its share
of the micro-batches; `Ranks` is how ranks talk, `Whole` and `Sharded` are how a model is trained.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from em_kernels._modes import Modes
from em_kernels.heads import causal_lm
from em_kernels.trainer.loss import LossModule, micro_batch_loss
from em_kernels.trainer.random_state import RandomState

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # how long ranks wait for one that evaluates or writes a checkpoint


class RankError(RuntimeError):
    """Another rank failed; that rank raises the error itself."""


class Ranks:
    """The processes that train together; one that is alone exchanges nothing."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None):
        self.rank, self.size, self.device = rank, size, device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, make: Callable[[], T]) -> list[T]:
        """What make() gives on every rank, in order.

        An error on one rank ends all: the lowest rank that has one raises it, the others a
        `RankError` that says which rank and why.
        """
        if self.size == 1:
            return [make()]
        value, error = None, None
        try:
            value = make()
        except BaseException as raised:
            error = raised
        said = [None] * self.size
        reason = None if error is None else f"{type(error).__name__}: {error}"
        dist.all_gather_object(said, (value, reason))
        failed = [rank for rank, (_, reason) in enumerate(said) if reason is not None]
        if failed and failed[0] == self.rank:
            raise error
        if failed:
            raise RankError(f"rank {failed[0]} failed: {said[failed[0]][1]}") from error
        return [value for value, _ in said]

    def first(self, make: Callable[[], T]) -> T:
        """What make() gives on rank 0, on every rank; it is called there only."""
        return self.gather(make if self.is_first else lambda: None)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Ranks leave the block together, or all with an error."""
        error = None
        try:
            yield
        except BaseException as raised:
            error = raised

        def outcome() -> None:
            if error is not None:
                raise error

        self.gather(outcome)

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_tensor(self, values: torch.Tensor) -> None:
        """Sum a tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)

    def deal(self, parts: Iterable[T]) -> Iterator[T]:
        """This rank's micro-batches: every size-th of them, and as many on every rank.

        A rank that has none left takes part with one that has no weight.
        """
        parts = iter(parts)
        while group := list(islice(parts, self.size)):
            yield group[self.rank] if self.rank < len(group) else group[-1].without_weight()

    @contextmanager
    def apart(self, seed: int) -> Iterator[None]:
        """Random numbers of this rank's own (dropout), then the shared state again."""
        if self.size == 1:
            yield
            return
        with RandomState(seed * self.size + self.rank):
            yield


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """The ranks of the process group there is, or of torchrun; else this process alone.

    A group made here ends with the block. After an error it is left to the end of the process:
    other ranks may still wait in it.
    """
    own = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
    own = own and not (dist.is_available() and dist.is_initialized())
    if own:
        cuda = _rank_device(device).type == "cuda"
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        with _lost_ranks_named():
            yield Ranks(dist.get_rank(), dist.get_world_size(), _rank_device(device))
    else:
        yield Ranks()
    if own:
        dist.destroy_process_group()


@contextmanager
def _lost_ranks_named() -> Iterator[None]:
    """A rank that ends in the middle of a backward pass shows elsewhere as a lost connection."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "by peer" in str(error):
            raise RankError(f"another rank has ended: {error}") from error
        raise


def _rank_device(name: str) -> torch.device:
    """The CPU, or this rank's GPU of those of its machine."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda' with several ranks, got {name!r}")
    index = int(os.environ.get("LOCAL_RANK", 0))
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r}: local rank {index} needs a GPU of its own, "
            f"this machine has {torch.cuda.device_count()}"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def place(model, temperature: float, dtype: str, ranks: Ranks) -> Whole | Sharded:
    """Make the model ready to be trained by these ranks."""
    if ranks.size == 1:
        return Whole(model, temperature, dtype)
    return Sharded(model, temperature, dtype, ranks)


class TrainMode:
    """Train mode, as the user set it: modules in eval mode below a model in train mode stay so.

    A model in eval mode (from_pretrained) is trained with all its modules in train mode. It counts
    by itself where it is in a PEFT model, which is in train mode around any.
    """

    def __init__(self, model):
        self._modes = Modes(model) if causal_lm(model).training else None

    def __call__(self, model: nn.Module) -> None:
        model.train()
        if self._modes:
            self._modes.restore(model)


class Whole:
    """A model trained by one process; bfloat16 is autocast."""

    def __init__(self, model, temperature: float, dtype: str):
        self.model, self.bfloat16 = model, dtype == "bfloat16"
        self.trained, self.module = model, LossModule(model, temperature)
        self._train_mode = TrainMode(model)

    def loss(self, part, compute: Callable = micro_batch_loss):
        """`compute(model, head, part, temperature)`, by default the loss of a `Batch`."""
        with self._autocast():
            return self.module(part, compute)

    def train(self) -> None:
        self._train_mode(self.trained)

    @contextmanager
    def sampling(self) -> Iterator[nn.Module]:
        with self._autocast():
            yield self.model

    @contextmanager
    def on_first(self, device: str | None = None) -> Iterator[nn.Module]:
        yield self.model

    def clip_gradient(self, parameters: list[nn.Parameter], largest: float) -> float:
        """Scale the gradient to a norm of at most `largest`; returns the norm before."""
        return float(nn.utils.clip_grad_norm_(parameters, largest))

    def finish(self) -> None:
        """Nothing: the model is what was trained."""

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bfloat16)


class Sharded:
    """A model trained by several: `trained` holds a shard of every parameter, `model` is whole.

    `trained` is a copy under FSDP2, by decoder layer; it computes the loss and nothing else.
    `model` has no weights, but for the time that `sampling` or `on_first` gather them into it: so
    generating, evaluating and saving are those of one process, and no rank waits for another.
    With bfloat16 the gathered parameters are bfloat16, the shards, gradients and their sum over
    ranks float32. Gradients are summed over the ranks, not averaged.
    """

    def __init__(self, model, temperature: float, dtype: str, ranks: Ranks):
        self.model, self.ranks = model, ranks
        self.compute_dtype = torch.bfloat16 if dtype == "bfloat16" else None
        parameters = {id(p): nn.Parameter(p.data, p.requires_grad) for p in model.parameters()}
        self.trained = copy.deepcopy(model, parameters)
        self.module = LossModule(self.trained, temperature)
        self._train_mode = TrainMode(model)
        _fully_shard(self.module, self.compute_dtype, ranks)
        self._release()
        model.to(ranks.device)

    def loss(self, part, compute: Callable = micro_batch_loss):
        result = self.module(part, compute)
        if not torch.is_grad_enabled():  # no backward pass will
            self.module.reshard()
        return result

    def train(self) -> None:
        self._train_mode(self.trained)

    @contextmanager
    def sampling(self) -> Iterator[nn.Module]:
        """The whole model on every rank, in the dtype that it computes in."""
        self._fill(dtype=self.compute_dtype)
        try:
            yield self.model
        finally:
            self._release()

    @contextmanager
    def on_first(self, device: str | None = None) -> Iterator[nn.Module]:
        """The whole model in its own dtype on rank 0 (on `device`); without weights elsewhere."""
        self._fill(device=device, everywhere=False)
        try:
            yield self.model
        finally:
            self._release()

    def clip_gradient(self, parameters: list[nn.Parameter], largest: float) -> float:
        """The same, of the norm over all shards."""
        return float(nn.utils.clip_grad_norm_(parameters, largest).full_tensor())

    def finish(self) -> None:
        """Leave the trained weights in the model, on every rank."""
        self._fill()

    @torch.no_grad()
    def _fill(self, dtype=None, device: str | None = None, everywhere: bool = True) -> None:
        for whole, shard in zip(self.model.parameters(), self.trained.parameters(), strict=True):
            gathered = shard.full_tensor()
            if everywhere or self.ranks.is_first:
                whole.data = gathered.to(device=device, dtype=dtype)

    def _release(self) -> None:
        for parameter in self.model.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self.ranks.device)


def _fully_shard(module: LossModule, compute_dtype: torch.dtype | None, ranks: Ranks) -> None:
    """Decoder layers one by one, then what is left: embeddings, last norm and head."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    reduce = compute_dtype and torch.float32
    lists = [m for m in module.model.get_decoder().children() if isinstance(m, nn.ModuleList)]
    for layer in (layer for layers in lists for layer in layers):
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(compute_dtype, reduce))
    weights_stay_float32 = MixedPrecisionPolicy(compute_dtype, reduce, cast_forward_inputs=False)
    fully_shard(module, mesh=mesh, mp_policy=weights_stay_float32)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_force_sum_reduction_for_comms(True)
            part.set_gradient_divide_factor(1.0)
