"""Packed sequences, and sequences cut over ranks: their ids, and what each position predicts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from em_kernels.backends.row_index import has_values, is_free_to_look
from em_kernels.ops.checks import check_group, check_int, check_integers, check_shape
from em_kernels.ops.options import IGNORED
from em_kernels.ops.ranks import PADDING
from em_kernels.ops.registry import call
from em_kernels.ops.schemas import GatherAlike

LAYOUTS = {"contiguous": 1, "zigzag": 2, "packed_zigzag": 1}  # in how many chunks a part comes


def segment_ids_from_cu_seqlens(
    cu_seqlens: Tensor, num_tokens: int | None = None, *, first_id: int = 0
) -> Tensor:
    """`segment_ids` of packed sequences from their offsets.

    Token t has the id first_id + s where cu_seqlens[s] <= t < cu_seqlens[s + 1].

    Args:
        cu_seqlens: (S + 1,) integers, 0 and then the end of each sequence, as flash-attention and
            transformers' packed batches (`cu_seq_lens_q`) have them; sequences may be empty.
        num_tokens: N, at least the last offset; tokens from that on are padding, with the id -1.
            None is the last offset, which on a GPU waits for the device.
        first_id: of the first sequence, 0 or more. Ranks with other sequences need other ids: give
            data-parallel rank r the ids from r * (more sequences than a rank has) on.

    Returns:
        (N,) int64; `.view` it where the packed tokens are a row of a batch.

    Raises:
        TypeError, ValueError: naming the argument and what was received. On a GPU, to spare a
            synchronisation, offsets are taken as they are.
    """
    check_integers("cu_seqlens", cu_seqlens)
    _check_count("first_id", first_id)
    if cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise ValueError(
            f"cu_seqlens must be (S + 1,) offsets that begin with 0, got shape "
            f"{tuple(cu_seqlens.shape)}"
        )
    _check_offsets(cu_seqlens, num_tokens)
    if num_tokens is None:
        num_tokens = int(cu_seqlens[-1])
    offsets = cu_seqlens.long()
    place = torch.arange(num_tokens, device=offsets.device)
    ids = torch.searchsorted(offsets, place, right=True) - 1
    return torch.where(place < offsets[-1], ids + first_id, PADDING)


def segment_ids_from_position_ids(position_ids: Tensor, *, first_id: int = 0) -> Tensor:
    """`segment_ids` of packed sequences from the position of each token in its own.

    A sequence begins with each row, and where a position is not the one before it plus 1. Ids count
    through all rows, from `first_id` on.

    Args:
        position_ids: (..., T) integers, as transformers' packed batches have them: of whole rows,
            before they are cut over ranks.
        first_id: as in `segment_ids_from_cu_seqlens`.

    Returns:
        (..., T) int64.

    Raises:
        TypeError, ValueError: naming the argument and what was received.
    """
    check_integers("position_ids", position_ids)
    _check_count("first_id", first_id)
    if position_ids.dim() == 0:
        raise ValueError("position_ids must be (..., T), got shape ()")
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[..., 1:] = position_ids.diff(dim=-1) != 1
    return (begins.reshape(-1).cumsum(0) + (first_id - 1)).view(position_ids.shape)


def next_token_targets(
    ids: Tensor,
    segment_ids: Tensor | None = None,
    *,
    ignore_index: int = IGNORED,
    context_group: dist.ProcessGroup | None = None,
    layout: str = "contiguous",
) -> Tensor:
    """What each position predicts: ids_{t + 1}, also where the next token lies on another rank.

    Every rank can then compute the loss of its own tokens; nothing is left out at a cut.
    `ignore_index` stands at the end of the whole row and, with `segment_ids`, wherever the next
    token is of another segment, or this one is padding (a negative id).

    Args:
        ids: (..., T) integers, this rank's part of each row: token ids, or labels that hold
            `ignore_index` for tokens that are not to be predicted.
        segment_ids: (..., T) integers, this rank's part; equal in the parts of one sequence.
        ignore_index: what stands where there is no target.
        context_group: torch.distributed process group over whose ranks the rows are cut, the
            leading shape the same on each. First tokens of the parts travel (all of them for
            "packed_zigzag"); being called differently is an error on every rank, and comparing
            that waits for the device.
        layout: which part is whose. "contiguous": rank r of W has the r-th part, of any length from
            1 on. "zigzag": the row is cut in 2 W equal chunks and rank r has the chunks r and
            2 W - 1 - r one after the other, as Megatron-LM and PyTorch's context_parallel balance
            their load over whole rows. "packed_zigzag": each sequence by itself is cut so, as
            Transformer Engine cuts packed ones (its "thd" format): `segment_ids` say where it is,
            padding that belongs to its chunks having its id. For any other cut, shift the labels
            first and cut them as the ids.

    Returns:
        (..., T) int64, a `target` for the functions of em_kernels.

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source of the zigzag: Llama Team, "The Llama 3 Herd of Models" (2024), section 3.3.2.
    """
    check_integers("ids", ids)
    check_int("ignore_index", ignore_index)
    group = check_group(context_group, "context_group")
    chunks = _check_layout(layout, ids, segment_ids, group is not None)
    tensors, values = [ids.long()], [ignore_index]
    if segment_ids is not None:
        check_integers("segment_ids", segment_ids)
        check_shape("segment_ids", segment_ids, ids)
        tensors, values = [*tensors, segment_ids.long()], [*values, PADDING]
    rows = torch.stack(tensors)
    end = torch.stack([rows.new_full((*ids.shape[:-1], 1), value) for value in values])
    if layout == "packed_zigzag":
        following = _following_in_sequences(rows, end, context_group)
    else:
        following = _following_in_rows(rows, end, context_group, layout, chunks)
    if segment_ids is None:
        return following[0].clone()
    known = (rows[1] == following[1]) & (rows[1] > PADDING)
    return torch.where(known, following[0], ignore_index)


def _following_in_rows(
    rows: Tensor, end: Tensor, group: dist.ProcessGroup | None, layout: str, chunks: int
) -> Tensor:
    """What follows each entry of `rows` (k, ..., T), `end` (k, ..., 1) the last of all."""
    parts: Tensor = rows.unflatten(-1, (chunks, rows.shape[-1] // chunks))
    following = parts.roll(-1, -1)
    if following.numel():
        rank, every = _gathered(parts[..., 0], group, layout)
        ranks = range(len(every))
        own = [[r] if layout == "contiguous" else [r, 2 * len(every) - 1 - r] for r in ranks]
        places = sorted((chunk, r, at) for r in ranks for at, chunk in enumerate(own[r]))
        first = torch.cat([torch.stack([every[r, ..., at] for _, r, at in places], -1), end], -1)
        # Of all of them: torch.compile leaves out a collective whose result this rank has no use
        # for, and the others would wait for it.
        low, high = own[rank][0], own[rank][-1]
        wanted = torch.arange(low + 1, high + 2, max(high - low, 1), device=rows.device)
        following[..., -1] = first.index_select(-1, wanted)
    return following.flatten(-2)


def _following_in_sequences(rows: Tensor, end: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`_following_in_rows` where this rank r has the chunks r and 2 W - 1 - r of each sequence.

    All ranks have the same places for them. From the end of the first chunk it goes on with that of
    rank r + 1, or here on the last rank; from the end of the second with that of rank r - 1.
    """
    segments = rows[1]
    place = torch.arange(rows.shape[-1], device=rows.device).expand(segments.shape)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[..., 1:] = segments.diff(dim=-1) != 0
    start = torch.where(begins, place, 0).cummax(-1).values
    ends = torch.ones_like(begins)
    ends[..., :-1] = begins[..., 1:]
    stop = torch.where(ends, place, rows.shape[-1]).flip(-1).cummin(-1).values.flip(-1)
    length = stop + 1 - start
    _check_even(length, segments)
    middle = start + length // 2
    rank, every = _gathered(rows, group, "packed_zigzag")
    following = rows.roll(-1, -1)
    if rank + 1 < len(every):
        first = every[rank + 1].gather(-1, start.expand(rows.shape))
        following = torch.where(place == middle - 1, first, following)
    second = every[rank - 1].gather(-1, middle.expand(rows.shape)) if rank else end
    return torch.where(place == stop, second, following)


def _gathered(x: Tensor, group: dist.ProcessGroup | None, layout: str) -> tuple[int, Tensor]:
    """(this rank, the tensors of all ranks)."""
    if group is None:
        return 0, x[None]
    (every,) = call(GatherAlike(x, group.group_name, layout))
    return dist.get_rank(group), every


def _check_even(length: Tensor, segments: Tensor) -> None:
    """On a GPU, to spare a synchronisation, nothing is checked."""
    if has_values(length) and is_free_to_look(length):
        odd = (length % 2 > 0) & (segments > PADDING)
        if odd.any():
            raise ValueError(
                "segment_ids must have an even number of tokens of each sequence, two chunks, in "
                f'layout "packed_zigzag", got {int(length[odd][0])} of id {int(segments[odd][0])}'
            )


def _check_layout(layout: str, ids: Tensor, segment_ids: Tensor | None, is_cut: bool) -> int:
    """How many chunks of each row `ids` has."""
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {tuple(LAYOUTS)}, got {layout!r}")
    if layout == "packed_zigzag" and segment_ids is None:
        raise ValueError(f"segment_ids must be given for layout {layout!r}, got None")
    chunks = LAYOUTS[layout]
    if ids.dim() == 0:
        raise ValueError("ids must be (..., T), got shape ()")
    if ids.shape[-1] % chunks or (is_cut and ids.shape[-1] == 0):
        rule = "a T of two equal chunks" if chunks == 2 else "T >= 1 where rows are cut over ranks"
        raise ValueError(f"ids must be (..., T) with {rule}, got shape {tuple(ids.shape)}")
    return chunks


def _check_count(name: str, value: int) -> None:
    check_int(name, value)
    if value < 0:
        raise ValueError(f"{name} must be 0 or more, got {value}")


def _check_offsets(cu_seqlens: Tensor, num_tokens: int | None) -> None:
    if num_tokens is not None:
        _check_count("num_tokens", num_tokens)
    if not (has_values(cu_seqlens) and is_free_to_look(cu_seqlens)):
        return
    if cu_seqlens[0] != 0 or (cu_seqlens.diff() < 0).any():
        raise ValueError(
            "cu_seqlens must begin with 0 and never fall: the end of each sequence after the "
            f"other, got {cu_seqlens.tolist()[:8]}"
        )
    if num_tokens is not None and num_tokens < cu_seqlens[-1]:
        raise ValueError(
            f"num_tokens must be at least cu_seqlens[-1] = {int(cu_seqlens[-1])}, got {num_tokens}"
        )
