"""How many rows the chunk driver takes at a time: `chunking`."""

import pytest

from em_kernels.linear import chunking
from em_kernels.linear.chunking import (
    Chunking,
    chunk_rows,
    column_blocks,
    count_blocks,
    default_chunk_tokens,
    deferred_chunks,
    single_chunk,
    spare_rows,
)

COUNTS = (1, 127, 128, 129, 2000, 2049, 4097, 8192, 10000, 32768, 100_000)
VOCABS = (1000, 32000, 50264, 131072, 151936, 152064, 262144, 1 << 20, 1 << 26)


# (rows, vocabulary, bytes a logit) -> rows per chunk on a GPU with 1 GiB of workspace
@pytest.mark.parametrize(
    "count, vocab, size, rows",
    (
        (8192, 131072, 4, 2048),  # 4 equal ones, the budget in full
        (8192, 152064, 4, 1664),  # 5, all but the last equal
        (8192, 131072, 6, 1280),  # where a cast stands beside the logits
        (9000, 131072, 4, 1920),  # 5 of 1800, not 4 of 2048 and a sliver
        (2049, 131072, 4, 1152),
        (2048, 131072, 4, 2048),
        (100, 131072, 4, 128),
        (0, 131072, 4, 128),
        (32768, 32000, 4, 8192),
        (8192, 1 << 22, 4, 64),  # less than a tile fits
        (8192, 1 << 26, 4, 16),  # nothing fits: as little as is sensible
    ),
)
def test_default_chunks_on_a_gpu(count, vocab, size, rows):
    assert default_chunk_tokens(count, vocab, size, gpu=True) == rows
    assert chunk_rows(count, vocab, size, gpu=True) == Chunking(rows, rows)


# (rows, vocabulary, bytes a logit) -> rows per chunk on a GPU of a call without a gradient
@pytest.mark.parametrize(
    "count, vocab, size, rows",
    (
        (8192, 131072, 4, 512),  # a quarter of a GiB in full
        (32768, 152064, 4, 384),
        (32768, 152064, 8, 128),
        (512, 131072, 4, 512),
        (8192, 1 << 26, 4, 16),
    ),
)
def test_chunks_of_statistics_alone_on_a_gpu(count, vocab, size, rows):
    assert chunk_rows(count, vocab, size, gpu=True, alone=True) == Chunking(rows, rows)
    assert rows * vocab * size <= 256 << 20 or rows == 16
    on_cpu = [chunk_rows(count, vocab, size, gpu=False, alone=alone) for alone in (False, True)]
    assert on_cpu[0] == on_cpu[1]


@pytest.mark.parametrize("gpu_rows", (True, False))
@pytest.mark.parametrize("size", (2, 4, 6, 8))
def test_default_chunks_fit_the_budget_and_are_as_few_as_it_allows(gpu_rows, size):
    budget = chunking.GPU_WORKSPACE_BYTES if gpu_rows else chunking.CPU_WORKSPACE_BYTES
    tile = 128 if gpu_rows else 16
    for vocab in (1000, 32000, 50257, 131072, 151936, 262144):
        limit = budget // (vocab * size) // tile * tile
        for count in (1, 127, 128, 129, 2000, 8192, 10000, 32768):
            rows = default_chunk_tokens(count, vocab, size, gpu_rows)
            assert rows * vocab * size <= budget and rows % tile == 0
            chunks = -(-count // limit)
            assert -(-count // rows) <= chunks
            assert rows - count / chunks < tile


# (rows, vocabulary, hidden size) -> the cut with the gradient deferred where that pays, its chunks
@pytest.mark.parametrize(
    "count, vocab, dim, cut, chunks",
    (
        (8192, 131072, 4096, Chunking(8192, 2048), 1),  # in place 4 of 2048; no float32 dW
        (11264, 131072, 4096, Chunking(11264, 512), 1),
        (
            11265,
            131072,
            4096,
            Chunking(3840, 1920),
            3,
        ),  # in one chunk it would take more than that dW
        (32768, 131072, 4096, Chunking(4096, 2048), 8),  # in place 16
        (8192, 152064, 3584, Chunking(8192, 1024), 1),  # in place 5
        (32768, 152064, 3584, Chunking(3328, 1664), 10),  # in place 20
        (8192, 131072, 896, Chunking(2816, 640), 3),  # dW has no room for 512 rows of logits
        (32768, 131072, 896, Chunking(3072, 512), 11),
        (2049, 131072, 4096, Chunking(2176, 768), 1),  # a single chunk rounds dW in its product
        (2048, 131072, 4096, Chunking(2048, 2048), 1),
        (4096, 131072, 4096, Chunking(4096, 2048), 1),
        (4096, 131072, 896, Chunking(4096, 896), 1),
        (4096, 131072, 64, Chunking(2048, 2048), 2),  # as many as deferred
        (32768, 32000, 4096, Chunking(16384, 2048), 2),
        (32768, 262144, 4096, Chunking(2048, 1024), 16),
        (32768, 262144, 896, Chunking(1024, 1024), 32),  # 512 rows of logits leave room for no more
        (8192, 1 << 26, 4096, Chunking(16, 16), 512),
        (0, 131072, 4096, Chunking(128, 128), 0),
    ),
)
def test_default_cuts_where_the_gradient_can_be_deferred(count, vocab, dim, cut, chunks):
    assert chunk_rows(count, vocab, 4, gpu=True, spare=spare_rows(vocab, dim)) == cut
    assert -(-count // cut.chunk) == chunks


@pytest.mark.parametrize("dim", (64, 896, 1024, 4096))
@pytest.mark.parametrize("vocab", VOCABS)
def test_deferred_chunks_fit_the_budget_and_are_as_few_as_it_allows(vocab, dim):
    column, spare = chunking.GPU_WORKSPACE_BYTES // vocab, spare_rows(vocab, dim)
    beside = (column - 4 * 512) // 2 // 128 * 128
    alone = column // 2 // 128 * 128
    for count in COUNTS:
        cut = deferred_chunks(count, vocab, spare)
        borrows = spare >= 512 and 1024 < alone < count
        longest = alone if borrows else beside
        assert (cut is None) == (longest <= 1024)
        if cut is not None:
            held = 2 * cut.chunk + (0 if borrows else 4 * cut.logits)
            assert held * vocab <= chunking.GPU_WORKSPACE_BYTES
            assert not borrows or 4 * cut.logits * vocab <= 2 * vocab * dim
            assert cut.chunk % 128 == cut.logits % 128 == 0
            assert -(-count // cut.chunk) == -(-count // longest)
            assert cut.logits <= cut.chunk


@pytest.mark.parametrize("dim", (64, 896, 1024, 4096))
@pytest.mark.parametrize("vocab", VOCABS)
def test_a_single_chunk_takes_no_more_than_the_budget_and_the_sum_it_saves(vocab, dim):
    spare = spare_rows(vocab, dim)
    for count in COUNTS:
        cut = single_chunk(count, vocab, spare)
        if cut is not None:
            held = 2 * cut.chunk + 4 * cut.logits
            assert held * vocab <= chunking.GPU_WORKSPACE_BYTES + 4 * vocab * dim
            assert count <= cut.chunk < count + 128 and 256 <= cut.logits <= cut.chunk // 2
            assert chunk_rows(count, vocab, 4, gpu=True, spare=spare).chunk >= count


@pytest.mark.parametrize("dim", (64, 896, 4096))
@pytest.mark.parametrize("vocab", VOCABS)
def test_the_gradient_is_deferred_only_for_fewer_chunks(vocab, dim):
    for count in COUNTS:
        in_place = chunk_rows(count, vocab, 4, gpu=True)
        cut = chunk_rows(count, vocab, 4, gpu=True, spare=spare_rows(vocab, dim))
        assert in_place.chunk == in_place.logits
        if cut != in_place:
            assert -(-count // cut.chunk) < -(-count // in_place.chunk)
            assert 256 <= cut.logits < cut.chunk


@pytest.mark.parametrize(
    "count, given, spare, cut",
    (
        (8192, 3000, 0, Chunking(3000, 512)),
        (8192, 3000, 2048, Chunking(3000, 1024)),  # 3 of 1024, 1024 and 952: even parts
        (8192, 1280, 0, Chunking(1280, 512)),
        (8192, 1100, 0, Chunking(1100, 384)),
        (8192, 1024, 2048, Chunking(1024, 1024)),  # deferring would take as much memory
        (8192, 100, 2048, Chunking(100, 100)),
        (3000, 3000, 2048, Chunking(3000, 3000)),  # a single chunk
    ),
)
def test_chunk_tokens_are_the_rows_of_the_gradient(count, given, spare, cut):
    assert chunk_rows(count, 131072, 4, True, spare, chunk_tokens=given) == cut
    assert chunk_rows(count, 131072, 4, True, chunk_tokens=given) == Chunking(given, given)


@pytest.mark.parametrize("vocab", (1, 7, 8, 50257, 131072))
@pytest.mark.parametrize("dim", (1, 16, 1024))
def test_spare_rows_fit_where_dw_goes(vocab, dim):
    rows, row = spare_rows(vocab, dim), 4 * chunking.row_stride(vocab)
    assert rows * row <= 2 * vocab * dim < (rows + 1) * row


@pytest.mark.parametrize("vocab", (1, 15, 16, 32001, 50257, 128257, 151665, 152065))
def test_rows_are_multiples_of_what_triton_takes_for_aligned(vocab):
    """It specialises kernels on strides that 16 divides, whatever the bytes of an entry."""
    assert chunking.row_stride(vocab) % 16 == 0
    assert vocab <= chunking.row_stride(vocab) < vocab + 16


# (rows, vocabulary, bytes of a gradient, of a logit beside it, GPU) -> blocks of the vocabulary
@pytest.mark.parametrize(
    "count, vocab, gradient, logit, gpu, blocks",
    (
        (32768, 152064, 2, 4, True, 11),  # 20 chunks of rows
        (8192, 131072, 2, 4, True, 4),
        (2048, 131072, 2, 4, True, 1),  # a single chunk
        (1024, 151936, 4, 0, False, 4),
        (8192, 4096, 4, 0, False, 1),  # dX is larger than dW
        (1 << 19, 1 << 20, 2, 4, True, 1),  # less than LEAST_COLUMNS at a time
    ),
)
def test_blocks_of_the_vocabulary(count, vocab, gradient, logit, gpu, blocks):
    chunk = default_chunk_tokens(count, vocab, 4, gpu)
    memory = chunking.workspace_bytes(gpu)
    assert count_blocks(count, vocab, chunk, gradient, logit, memory) == blocks


@pytest.mark.parametrize("logit", (0, 4))
@pytest.mark.parametrize("vocab", VOCABS)
def test_blocks_are_even_and_fit_the_memory(vocab, logit):
    for memory in (chunking.CPU_WORKSPACE_BYTES, chunking.GPU_WORKSPACE_BYTES, 5000 * vocab):
        for count in COUNTS:
            chunk = default_chunk_tokens(count, vocab, 4, gpu=True)
            blocks = column_blocks(vocab, count_blocks(count, vocab, chunk, 2, logit, memory))
            widths = [block.stop - block.start for block in blocks]
            assert blocks[0].start == 0 and sum(widths) == blocks[-1].stop == vocab
            assert [a.stop for a in blocks[:-1]] == [b.start for b in blocks[1:]]
            if len(blocks) > 1:
                assert max(widths) * (2 * count + logit * chunk) <= memory
                assert max(widths) - min(widths) < 2 * 128 and min(widths) >= 512


@pytest.mark.parametrize("vocab", (0, 1, 2, 127, 128, 129, 257, 1000))
@pytest.mark.parametrize("blocks", (1, 2, 7, 1000))
def test_no_block_of_several_is_narrow(vocab, blocks):
    """Those of a small shard, which are cut like the widest."""
    widths = [block.stop - block.start for block in column_blocks(vocab, blocks)]
    assert sum(widths) == vocab and (len(widths) == 1 or min(widths) >= 128)
