"""What ranks that hold different tokens tell each other: how many count, and whose they are.

All ranks of the group make the same calls. What can be told apart cheaply is compared first, so
that a mismatch is an error on every rank and not a wait without end.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from em_kernels.backends.vocab_parallel import gather, resolve

PADDING = -1  # the segment id of a token that belongs to no sequence; any negative one does


def count_tokens(
    counted: Tensor, segment_ids: Tensor | None, mode: str, group: str | None
) -> list[Tensor]:
    """[tokens that count, sequences that have one, tokens of each token's sequence that count].

    On all ranks together; int64, the first two 0-d and the third of the shape of `counted`. A
    sequence is a row of the last dimension, or where there are `segment_ids` all tokens of an id,
    in any place of any rank.
    """
    given = {"reduction": mode, "segment_ids": "given" if segment_ids is not None else "None"}
    if segment_ids is None:
        own = counted.sum(-1, keepdim=True)
        totals = torch.stack([own.sum(), (own > 0).sum()])
        if group is not None:
            totals = _compared(totals, group, "token_group", given).sum(0)
        return [totals[0].clone(), totals[1].clone(), own.expand(counted.shape).clone()]
    ids = torch.where(counted, segment_ids.long(), PADDING).reshape(-1)
    every, rank = ids[None], 0
    if group is not None:
        every, rank = _gather_uneven(ids, group, given), dist.get_rank(resolve(group))
    counts, sequences = _occurrences(every.reshape(-1))
    lengths = counts.view(every.shape)[rank, : ids.numel()].reshape(counted.shape)
    return [(every > PADDING).sum(), sequences, lengths.clone()]


def gather_alike(x: Tensor, group: str, layout: str) -> list[Tensor]:
    """[the tensors of all ranks, in their order, stacked]: the first tokens of their parts."""
    given = {"layout": layout, "segment_ids or none, leading shape": tuple(x.shape)}
    none = torch.zeros(2, dtype=torch.int64, device=x.device)
    _compared(none, group, "context_group", given)
    return [gather(x.contiguous(), resolve(group))]


def _gather_uneven(ids: Tensor, group: str, given: Mapping[str, Any]) -> Tensor:
    """The ids of all ranks, (ranks, most that one has), filled up with padding."""
    size = torch.tensor([ids.numel(), 0], device=ids.device)
    most = int(_compared(size, group, "token_group", given).max())
    padded = ids.new_full((most,), PADDING)
    padded[: ids.numel()] = ids
    return gather(padded, resolve(group))


def _compared(values: Tensor, group: str, name: str, given: Mapping[str, Any]) -> Tensor:
    """The values of all ranks, two of each, if all were given the same."""
    own = values.new_tensor([zlib.crc32(repr(given).encode())])
    every = gather(torch.cat([own, values]), resolve(group))
    if not (every[:, 0] == own).all():
        said = ", ".join(f"{key} ({value})" for key, value in given.items())
        raise ValueError(
            f"{name}: every rank must be given the same {said}; in brackets this rank's; "
            f"got checksums {every[:, 0].tolist()}"
        )
    return every[:, 1:]


def _occurrences(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(how often the id at each place occurs, how many different ids there are from 0 on).

    By sorting, which unlike torch.unique waits for no device.
    """
    values, order = ids.sort()
    first = torch.ones_like(values, dtype=torch.bool)
    first[1:] = values[1:] != values[:-1]
    place = torch.empty_like(order)
    place[order] = first.cumsum(0) - 1
    counts = torch.zeros_like(order).index_add_(0, place, torch.ones_like(order))
    return counts[place], (first & (values > PADDING)).sum()
