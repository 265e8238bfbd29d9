"""The k likeliest entries of rows, around any backend, also where ranks share a vocabulary.

Torch does not say which of equal entries `topk` takes. Here it is those of the lower ids: an order
by (u, -id), the same on every device and however the vocabulary is cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels.backends import row_index
from em_kernels.backends.chosen_ids import ChosenIds, u_of_entries
from em_kernels.backends.interface import Backend, RowSpec, Saved
from em_kernels.backends.support import pieces
from em_kernels.backends.units import units

_NO_ID = 1 << 52  # after all others, and a float64


def top_logprobs(backend: Backend, logits: Tensor, spec: RowSpec, k: int) -> tuple[Tensor, Tensor]:
    """(ids (N, k) int64, their log-probabilities (N, k)), in descending order of u.

    Ids of rows that are left out, or have no probabilities, are any; a logprob is 0, or NaN, there.
    """
    ids = top_ids(backend, logits, spec, k)
    rows = ChosenIds(backend).stats(logits, spec._replace(target=ids), ("logprob",))
    return ids, rows[len(Saved._fields)]


def top_ids(backend: Backend, logits: Tensor, spec: RowSpec, k: int) -> Tensor:
    """(N, k) int64; the k likeliest of each rank's entries, merged."""
    rows, own = logits.shape[:-1].numel(), min(k, spec.valid_vocab)
    ids = torch.full((rows, k), _NO_ID, device=logits.device)
    u = torch.full((rows, k), -torch.inf, dtype=torch.float64, device=logits.device)
    if own:
        parts = [_largest(units(piece, picked), own) for piece, picked in pieces(logits, spec)]
        found = torch.cat(parts)
        u[:, :own] = u_of_entries(backend.local, logits, spec, found).double()
        ids[:, :own] = found + backend.first_entry
    if backend.widest_shard is not None:
        every = backend.gathered(torch.stack([u, ids.double()]))
        u, merged = every.permute(1, 2, 0, 3).flatten(2)
        ids = merged.to(torch.int64)
    ids, order = ids.sort(-1)
    order = u.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return ids.gather(-1, order)


def _largest(u: Tensor, k: int) -> Tensor:
    """The ids of the k largest u of each row (N, V), lower ids first where they tie; NaN last."""
    u = u.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    values, ids = u.topk(k)
    level = values[:, -1:]
    if not row_index.is_free_to_look(u):
        return _with_lowest(u, ids, level, values > level)
    more = (u == level).sum(-1) > (values == level).sum(-1)
    for rows in more.nonzero()[:, 0].split(1):
        above = values[rows] > level[rows]
        ids[rows] = _with_lowest(u[rows], ids[rows], level[rows], above)
    return ids


def _with_lowest(u: Tensor, ids: Tensor, level: Tensor, above: Tensor) -> Tensor:
    """The ids of u above the level, which come first, and after them the lowest of those at it."""
    vocab, k = u.shape[1], ids.shape[1]
    from_end = torch.arange(vocab, 0, -1, dtype=torch.int32, device=u.device)
    tied = vocab - torch.where(u == level, from_end, 0).topk(k).values.to(torch.int64)
    place = torch.arange(k, device=u.device) - above.sum(-1, keepdim=True)
    return torch.where(above, ids, tied.gather(1, place.clamp(min=0)))
