"""The processes that work together: how they talk, and that they fail together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from typing_extensions import Self

from em_kernels.lm.lost_ranks import Watch
from em_kernels.lm.text import cut

T = TypeVar("T")


class Part(Protocol):
    """A micro-batch."""

    def without_weight(self) -> Self: ...


P = TypeVar("P", bound=Part)
PATIENCE = timedelta(hours=2)  # how long ranks wait for one that evaluates or writes a checkpoint


class RankError(RuntimeError):
    """Another rank failed; that rank raises the error itself."""


class LostRankError(RankError):
    """Another rank has ended, which may not have been able to say why."""


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
        value: Any = None
        error: BaseException | None = None
        try:
            value = make()
        except BaseException as raised:
            error = raised
        said: list[Any] = [None] * self.size
        reason = None if error is None else f"{type(error).__name__}: {error}"
        dist.all_gather_object(said, (value, reason))
        failed = [rank for rank, (_, reason) in enumerate(said) if reason is not None]
        if error is not None and failed[0] == self.rank:
            raise error
        if failed:
            raise RankError(f"rank {failed[0]} failed: {said[failed[0]][1]}") from error
        return [value for value, _ in said]

    def first(self, make: Callable[[], T]) -> T:
        """What make() gives on rank 0, on every rank; it is called there only."""
        return cast(T, self.gather(make if self.is_first else lambda: None)[0])

    def check_same(self, facts: Callable[[], Mapping[str, object]]) -> None:
        """ValueError where a rank's facts are not those of rank 0: it names the first of them."""
        if self.size == 1:
            return
        said = self.gather(lambda: {name: repr(value) for name, value in facts().items()})
        self.first(lambda: _compare(said))

    def share(self, rows: Sequence[int], make: Callable[[list[int]], list[T]]) -> list[T]:
        """What make(rows) lists, each rank for its share of the rows; all of it on every rank."""
        own = [rows[i] for i in torch.arange(len(rows)).tensor_split(self.size)[self.rank].tolist()]
        return [value for share in self.gather(lambda: make(own)) for value in share]

    @contextmanager
    def raise_together(self) -> Iterator[None]:
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

    def shard_micro_batches(self, parts: Iterable[P]) -> Iterator[P]:
        """This rank's micro-batches: every size-th of them, and as many on every rank.

        A rank that has none left takes part with one that has no weight.
        """
        parts = iter(parts)
        while group := list(islice(parts, self.size)):
            yield group[self.rank] if self.rank < len(group) else group[-1].without_weight()


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """The ranks of the process group there is, or of torchrun; else this process alone.

    A group made here ends with the block. After an error it is left to the end of the process:
    other ranks may still wait in it. A rank that ends ends the others within a minute (`Watch`).
    """
    own = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
    own = own and not (dist.is_available() and dist.is_initialized())
    if own:
        cuda = _rank_device(device).type == "cuda"
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), _rank_device(device))
        with _watched(ranks):
            yield ranks
    else:
        yield Ranks()
    if own:
        dist.destroy_process_group()


@contextmanager
def _watched(ranks: Ranks) -> Iterator[None]:
    """The end of a rank ends the others; in the middle of an exchange it shows there as a lost
    connection."""
    watch = Watch(ranks.rank, ranks.size)
    try:
        yield
    except BaseException as error:
        lost = isinstance(error, dist.DistError) or "by peer" in str(error)
        if not (lost and isinstance(error, RuntimeError)):
            watch.leave(error)
            raise
        named = LostRankError(watch.why() or f"another rank has ended: {error}")
        watch.leave(named)
        raise named from error
    watch.leave()


def _compare(said: list[dict[str, str]]) -> None:
    for name, here in said[0].items():
        for rank, there in enumerate(said):
            if there[name] != here:
                raise ValueError(
                    f"ranks must agree: {name} is {cut(here, 80)} on rank 0, "
                    f"{cut(there[name], 80)} on rank {rank}; start every rank with the same"
                )


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
