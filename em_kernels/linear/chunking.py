"""How the chunk driver divides rows and vocabulary: arithmetic on sizes, no tensors.

In place, a chunk of R rows holds R rows of logits, and then their gradient in the same memory.
Deferred, it holds the 16-bit gradient of R rows while float32 logits exist for only S of them: the
rows of a chunk are gone through S at a time, and the products of dX and dW follow over all R. The
logits lie where dW will be rounded to 16 bits after the last chunk, if that has room for them.

Where statistics are known, several chunks are gone through block by block of the vocabulary
instead (`vocab_blocks`): the gradient of all rows, but of C columns only. So is the forward pass
where the backend can go through rows in parts (`vocab_forward`): then a chunk is all rows, or as
many as have blocks that are wide enough, and is finished before the next.
"""

from __future__ import annotations

from typing import NamedTuple

CPU_WORKSPACE_BYTES = 160 << 20
GPU_WORKSPACE_BYTES = 1 << 30
GPU_STATISTICS_BYTES = 256 << 20  # of a call without a gradient
CPU_TILE_ROWS, GPU_TILE_ROWS = 16, 128
CPU_PAGE_ENTRIES = 512  # of 8 bytes
# Entries: a CPU's cache line of 4 bytes each; Triton loads 16 bytes at once where a stride is a
# multiple of 16.
ROW_ALIGN = 16
GPU_LOGITS_ROWS = 512  # the least that deferred chunks multiply at once
LOGIT_BYTES, GRADIENT_BYTES = 4, 2  # where they are deferred
COLUMN_TILE, LEAST_COLUMNS = 128, 1024


class Chunking(NamedTuple):
    """Rows per chunk, R, and how many of them have logits at once, S; S = R is in place. In how
    many blocks of the vocabulary logits are multiplied, each some tiles wide: with one, rows are
    outermost throughout."""

    chunk: int
    logits: int
    blocks: int = 1
    tile: int | None = None  # of `column_blocks`; given where blocks are in forward too


def chunk_rows(
    count: int,
    width: int,
    bytes_per_logit: int,
    gpu: bool,
    spare: int | None = None,
    chunk_tokens: int | None = None,
    wide: bool = False,
    alone: bool = False,
) -> Chunking:
    """Deferred where that is possible and pays, else in place; `alone`: statistics, no gradient.

    `spare` is the rows of logits that the memory of dW holds, None where nothing can be deferred.
    With `chunk_tokens` rows it pays where 2 R + 4 S bytes a column are less than 4 R; else where it
    makes fewer chunks out of the same budget. `wide`: a single chunk sums dW in float32 too.
    """
    chunk = chunk_tokens or default_chunk_tokens(count, width, bytes_per_logit, gpu, alone)
    in_place = Chunking(chunk, chunk)
    if spare is None or count <= chunk:
        return in_place
    if chunk_tokens:
        asked = Chunking(chunk, _part_of(chunk, max(spare, GPU_LOGITS_ROWS)))
        return asked if chunk > 2 * GPU_LOGITS_ROWS else in_place
    single = single_chunk(count, width, spare // 2 if wide else spare)
    deferred = single or deferred_chunks(count, width, spare) or in_place
    fewer = _pieces(count, deferred.chunk) < _pieces(count, chunk)
    return deferred if fewer else in_place


def default_chunk_tokens(
    count: int, width: int, bytes_per_logit: int, gpu: bool, alone: bool = False
) -> int:
    """Rows per chunk in place: as few chunks as the workspace budget allows, all of one size.

    Every chunk but the first reads and writes the float32 dW once more, 2 x 4 x V x D bytes: at
    V = 131072, D = 4096 that is 4.3 GB, a millisecond on an H200 beside the 8.6 ms of the chunk's
    three products over 2048 rows. So the chunks are as large as the budget holds, and since a
    short last one would pay the same, `count` rows are divided evenly and rounded up to the tile
    height of the products.

    Statistics alone have no dW, and a quarter of that costs them nothing on a GPU: 441 rows of
    V = 152064 in float32, 384 in tiles. Their product does 384 operations for each byte of weight
    it reads, and an H200 about 180 in the time of one byte; it has 3 x 594 tiles of 128 x 256, 13.5
    for each of 132 multiprocessors, which 14 rounds do.
    """
    memory = min(workspace_bytes(gpu), GPU_STATISTICS_BYTES) if alone else workspace_bytes(gpu)
    limit = memory // (width * bytes_per_logit)
    tile = GPU_TILE_ROWS if gpu and limit >= GPU_TILE_ROWS else CPU_TILE_ROWS
    return _evenly(max(1, count), max(tile, limit // tile * tile), tile)


def deferred_chunks(count: int, width: int, spare: int) -> Chunking | None:
    """The same with the gradient deferred; None where that holds no more rows than in place.

    The product of S rows does S operations for each byte of weight it reads, and an H200 about 180
    in the time of one byte: GPU_LOGITS_ROWS hides the reading nearly three times over. If the
    memory of dW, 2 D bytes for each entry of the vocabulary, holds as many rows of logits, and
    there are several chunks, the `column` bytes of the budget are for the gradient alone. Else
    logits take 4 S of them and the gradient the rest; what is left when R has been evened out goes
    to S.
    """
    column, tile = GPU_WORKSPACE_BYTES // width, GPU_TILE_ROWS
    alone = column // GRADIENT_BYTES // tile * tile
    if spare >= GPU_LOGITS_ROWS and 2 * GPU_LOGITS_ROWS < alone < count:
        chunk = _evenly(count, alone, tile)
        return Chunking(chunk, _part_of(chunk, spare))
    limit = (column - LOGIT_BYTES * GPU_LOGITS_ROWS) // GRADIENT_BYTES // tile * tile
    if limit <= 2 * GPU_LOGITS_ROWS:
        return None
    chunk = _evenly(count, limit, tile)
    return Chunking(chunk, _part_of(chunk, (column - GRADIENT_BYTES * chunk) // LOGIT_BYTES))


def single_chunk(count: int, width: int, spare: int) -> Chunking | None:
    """All rows in one chunk, where that takes no more memory than several; else None.

    The product of a single chunk writes dW in 16 bits. Several sum it in float32, which makes a
    trip more for each chunk and one for the rounding, and takes 4 D bytes for each entry of the
    vocabulary: twice the bytes of the `spare` rows of logits. A single chunk may have those too.
    """
    chunk = _whole_tiles(count, GPU_TILE_ROWS)
    column = GPU_WORKSPACE_BYTES // width + 2 * LOGIT_BYTES * spare
    logits = (column - GRADIENT_BYTES * chunk) // LOGIT_BYTES
    if chunk <= 2 * GPU_LOGITS_ROWS or logits < GPU_LOGITS_ROWS:
        return None
    return Chunking(chunk, _part_of(chunk, logits))


def single_chunk_in_place(count: int, width: int, dim: int, bytes_per_logit: int) -> int | None:
    """`single_chunk` on a CPU: its rows. Logits and gradient may take what the float32
    dW of several chunks would beside the budget, 4 D bytes for each entry of the vocabulary."""
    chunk = _whole_tiles(count, CPU_TILE_ROWS)
    memory = CPU_WORKSPACE_BYTES + LOGIT_BYTES * dim * width
    return chunk if chunk * width * bytes_per_logit <= memory else None


def count_blocks(
    count: int, width: int, chunk: int, gradient_bytes: int, logit_bytes: int, memory: int
) -> int:
    """Blocks of the vocabulary for a backward pass that has them outermost; 1 where it has rows.

    It holds `gradient_bytes` for each of N x C entries and `logit_bytes` for each of R x C; as few
    blocks as `memory` allows. Every block but the first reads and writes the sum of dX, (N, D),
    once more, where every chunk of rows would that of dW, (V, D): it pays while N < V. Below
    LEAST_COLUMNS the products of a block would wait for memory.
    """
    if not chunk < count < width:
        return 1
    limit = memory // (gradient_bytes * count + logit_bytes * chunk)
    return _pieces(width, limit - COLUMN_TILE) if limit >= LEAST_COLUMNS + COLUMN_TILE else 1


def block_columns(count: int, width: int, size: int, memory: int, tile: int) -> Chunking | None:
    """All rows in one chunk, and its logits, of `size` bytes each, in as few blocks of whole tiles
    as `memory` allows.

    Where it does not hold two tiles of all rows, there are as few chunks as have two each; None
    where it does not hold two tiles of CPU_TILE_ROWS.
    """
    most = memory // (size * 2 * tile) // CPU_TILE_ROWS * CPU_TILE_ROWS
    if most == 0:
        return None
    chunk = _evenly(count, most, CPU_TILE_ROWS) if count > most else count
    return Chunking(
        chunk, chunk, _pieces(_pieces(width, tile), memory // (size * chunk * tile)), tile
    )


def column_blocks(vocab: int, blocks: int, tile: int | None = None) -> list[slice]:
    """The blocks, of whole tiles (None is COLUMN_TILE) and all about as wide; the last is cut off.

    What is left of a last tile joins the one before: a product with a single column has other bits
    elsewhere.
    """
    tile = tile or COLUMN_TILE
    tiles = max(1, vocab // tile)
    blocks = max(1, min(blocks, tiles))
    starts = [_pieces(i * tiles, blocks) * tile for i in range(blocks)]
    return [slice(*ends) for ends in zip(starts, [*starts[1:], vocab])]


def width_of(columns: slice) -> int:
    width: int = columns.stop - columns.start
    return width


def workspace_bytes(gpu: bool) -> int:
    return GPU_WORKSPACE_BYTES if gpu else CPU_WORKSPACE_BYTES


def spare_rows(vocab: int, dim: int) -> int:
    """Rows of float32 logits that a 16-bit dW has room for: about D / 2."""
    return vocab * dim * GRADIENT_BYTES // (row_stride(vocab) * LOGIT_BYTES)


def row_stride(vocab: int) -> int:
    """Products and kernels on a GPU are slow where rows do not start at 16 bytes; those of a CPU
    may give other bits where rows start elsewhere in a cache line."""
    return -(-vocab // ROW_ALIGN) * ROW_ALIGN


def block_stride(width: int, gpu: bool) -> int:
    """The same of a block of columns. On a CPU no multiple of a page either: the rows that a
    product writes at once would all begin at one place of a page, and share a few cache lines."""
    stride = row_stride(width)
    return stride if gpu or stride % CPU_PAGE_ENTRIES else stride + ROW_ALIGN


def _part_of(chunk: int, limit: int) -> int:
    """S rows: even parts of a chunk, two at least."""
    tile = GPU_TILE_ROWS
    return _evenly(chunk, max(tile, min(limit, chunk // 2) // tile * tile), tile)


def _whole_tiles(count: int, tile: int) -> int:
    return _pieces(count, tile) * tile


def _pieces(count: int, limit: int) -> int:
    return -(-count // limit)


def _evenly(count: int, limit: int, tile: int) -> int:
    """The size of as few pieces of `count` rows as `limit` allows, rounded up to `tile`."""
    return min(limit, -(-count // (_pieces(count, limit) * tile)) * tile)
