"""How the CUDA kernels are launched: pure arithmetic on the host, so no GPU is needed."""

import pytest
import torch
from cuda_emulator.load import COMPILER, H200, library
from helpers import corners_and_sample

from em_kernels.backends.cuda import DTYPES
from em_kernels.backends.interface import ROW_OUTPUTS, Saved

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

# Compute capability: shared memory a block may have, and a multiprocessor has, in bytes.
LIMITS = {
    80: (166912, 167936),
    86: (101376, 102400),
    90: (232448, 233472),
    100: (232448, 233472),
    120: (101376, 102400),
}
VOCABS = (1, 2, 31, 1000, 4097, 32000, 50257, 65536, 128256, 151936, 152064, 200019, 262144)
BYTES = {0: 4, 1: 2, 2: 2, 3: 8}  # by number of the dtype: float32, bfloat16, float16, float64
RESERVED = 1024  # of shared memory per block, by the system
MAX_BLOCKS = 2**31 - 1


def device(capability=90, largest_cluster=8, multiprocessors=132):
    block, multiprocessor = LIMITS[capability]
    return library().Device(
        compute_capability=capability,
        shared_per_block=block,
        shared_per_multiprocessor=multiprocessor,
        largest_cluster=largest_cluster,
        multiprocessors=multiprocessors,
    )


def plan(
    operation="loss",
    capability=90,
    dtype=1,
    out_dtype=None,
    columns=(1, 1, 1),
    largest_cluster=8,
    multiprocessors=132,
    **problem,
):
    cuda = library()
    vocab = problem.get("vocab", 1000)
    fields = dict(rows=8, inner=1, outer_stride=vocab, inner_stride=vocab, vocab=vocab)
    fields |= {"valid_vocab": vocab, "logits": 0, "dtype": dtype} | problem
    gradient = cuda.Gradient(
        out=0,
        outer_stride=vocab,
        inner_stride=vocab,
        out_dtype=dtype if out_dtype is None else out_dtype,
    )
    return cuda.plan(
        getattr(cuda.Operation, operation),
        cuda.Problem(**fields),
        cuda.Results(list(columns)),
        gradient,
        device(capability, largest_cluster, multiprocessors),
    )


OPERATIONS = ("statistics", "gradient", "loss")


@pytest.mark.parametrize(
    "vocab, operation, dtype, capability",
    corners_and_sample(64, VOCABS, OPERATIONS, tuple(BYTES), tuple(LIMITS)),
)
def test_a_plan_keeps_to_the_limits_of_the_device(vocab, operation, dtype, capability):
    p = plan(operation, capability, dtype, vocab=vocab, rows=70_001)
    block, multiprocessor = LIMITS[capability]
    assert p.threads in (32, 64, 128, 256)
    assert p.cluster in (1, 2, 4, 8)
    assert p.row_blocks == p.cluster
    assert p.blocks == 70_001 * p.cluster <= MAX_BLOCKS
    assert p.shared_bytes <= block
    assert p.shared_bytes + RESERVED <= multiprocessor
    if capability < 90 or operation != "loss" or dtype == 3:
        assert not p.resident and p.cluster == 1
    if p.resident:
        slice_bytes = p.slice * BYTES[dtype]
        assert slice_bytes % 16 == 0 and p.shared_bytes == slice_bytes + 656
        assert p.cluster * p.slice >= vocab > (p.cluster - 1) * p.slice
    else:
        fields = 13 if dtype == 3 else 3
        sums = 0 if operation == "gradient" else p.threads * fields * max(4, BYTES[dtype])
        assert p.shared_bytes == 1024 + sums


@pytest.mark.parametrize(
    ("vocab", "dtype", "cluster"),
    (
        (1000, 1, 1),
        (32000, 1, 1),
        (50257, 1, 2),
        (128256, 1, 4),
        (151936, 1, 4),
        (152064, 1, 4),
        (262144, 1, 8),
        (128256, 0, 8),
        (152064, 0, 8),
    ),
)
def test_three_blocks_share_a_multiprocessor_of_an_h200(vocab, dtype, cluster):
    p = plan("loss", 90, dtype, vocab=vocab)
    assert p.resident and p.cluster == cluster
    assert 3 * (p.shared_bytes + RESERVED) <= LIMITS[90][1]


def test_longer_rows_take_fewer_blocks_and_the_longest_are_streamed():
    assert plan("loss", 90, 0, vocab=200_019).resident  # two on a multiprocessor
    assert plan("loss", 90, 0, vocab=262_144).resident  # one
    assert not plan("loss", 90, 0, vocab=600_000).resident


@pytest.mark.parametrize("dtype", (0, 1))
@pytest.mark.parametrize("vocab", VOCABS)
def test_a_plan_keeps_to_the_clusters_that_the_device_runs(vocab, dtype):
    """Fewer blocks of a row, each with more of it; where that has no room, the row is streamed."""
    for largest in (0, 1, 2, 4, 8):
        p = plan(dtype=dtype, vocab=vocab, largest_cluster=largest)
        room = largest * (LIMITS[90][0] - 1024) // BYTES[dtype]
        assert p.resident == (vocab <= room)
        assert p.cluster <= max(1, largest) and p.blocks == 8 * p.cluster
        assert p.shared_bytes <= LIMITS[90][0]


@pytest.mark.parametrize("operation", ("statistics", "gradient", "loss"))
@pytest.mark.parametrize("vocab", (7, 4097, 151936))
@pytest.mark.parametrize("multiprocessors", (0, 1, 108, 132, 148))
def test_a_row_is_worked_through_alike_whatever_the_number_of_rows(
    operation, vocab, multiprocessors
):
    """But for who writes which of its gradient, whose numbers do not depend on each other."""
    few = plan(operation, vocab=vocab, rows=1, multiprocessors=multiprocessors)
    many = plan(operation, vocab=vocab, rows=100_000)
    fields = ("plain", "resident", "threads", "shared_bytes")
    for field in fields if operation == "gradient" else (*fields, "slice"):
        assert getattr(few, field) == getattr(many, field), field
    assert many.row_blocks == (4 if operation == "loss" and vocab == 151936 else 1)
    assert many.blocks == 100_000 * many.row_blocks and few.blocks == few.row_blocks


@pytest.mark.parametrize("capability", LIMITS)
@pytest.mark.parametrize("multiprocessors", (20, 108, 132, 148))
@pytest.mark.parametrize("dtype", BYTES)
def test_blocks_share_a_row_where_rows_leave_multiprocessors_idle(
    dtype, multiprocessors, capability
):
    full = 2 * multiprocessors
    for vocab in (*VOCABS, 83_999, 84_000, 2**20, 2**30):
        for rows in (1, 7, multiprocessors, full - 1, full, 10**6):
            of = dict(dtype=dtype, vocab=vocab, rows=rows, multiprocessors=multiprocessors)
            p = plan("statistics", capability, **of)
            parts = -(-vocab // p.slice)
            shared = capability >= 90 and parts > 1 and rows < full
            assert p.row_blocks == p.cluster == (1 << (parts - 1).bit_length() if shared else 1)
            assert parts <= 8 and (parts > 1) == (vocab >= 84_000)
            p = plan("gradient", capability, **of)
            chunk = 4 * p.threads * 16 // BYTES[dtype]
            assert p.cluster == 1 and (p.row_blocks - 1) * p.slice < vocab <= p.row_blocks * p.slice
            assert p.slice % chunk == 0 and (p.row_blocks == 1 or p.slice >= 2 * chunk)
            assert p.row_blocks <= max(1, -(-full // rows))
            assert p.row_blocks > 1 or rows >= full or vocab < 4 * chunk


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("vocab", (84_000, 128_256, 151_936, 262_144, 2**20))
def test_parts_are_a_vector_a_thread_and_whole_chunks(vocab, dtype):
    """So that what is read past the first vectors is whole but for the last part's end."""
    p = plan("statistics", dtype=dtype, vocab=vocab)
    stride = p.threads * 16 // BYTES[dtype]
    assert p.slice % (4 * stride) == stride


def test_statistics_are_shared_by_no_more_blocks_than_the_device_runs_as_one():
    for largest in (0, 1, 2, 4, 8):
        p = plan("statistics", vocab=262_144, rows=1, largest_cluster=largest)
        assert p.row_blocks == p.cluster == (8 if largest == 8 else 1)


def test_a_narrow_gradient_is_shared_by_no_blocks():
    """It may lie on logits that another block has not read."""
    assert plan("gradient", dtype=0, vocab=151_936, rows=1).row_blocks > 1
    for narrow in (1, 2):
        assert plan("gradient", dtype=0, out_dtype=narrow, vocab=151_936, rows=1).row_blocks == 1


def test_a_loss_that_is_not_resident_has_the_plan_of_its_statistics():
    fields = ("plain", "row_blocks", "cluster", "threads", "blocks", "slice", "shared_bytes")
    for capability, change in ((80, {}), (90, {"softcap": 3.0}), (90, {"dtype": 3})):
        loss, statistics = (
            plan(operation, capability, vocab=151_936, rows=3, **change)
            for operation in ("loss", "statistics")
        )
        assert not loss.resident
        assert [getattr(loss, field) for field in fields] == [
            getattr(statistics, field) for field in fields
        ]


def test_padded_vocabulary_and_strides_do_not_change_the_plan():
    tight = plan("loss", vocab=151_665)
    padded = plan("loss", vocab=152_064, valid_vocab=151_665, inner=4, outer_stride=10**12)
    for field in ("resident", "cluster", "threads", "slice", "shared_bytes", "blocks"):
        assert getattr(tight, field) == getattr(padded, field), field


@pytest.mark.parametrize(
    ("rows", "logits", "strides", "out", "out_strides", "expected"),
    (
        (8, 0, (5, 5), 0, (5, 5), (False, True)),  # rows of 5 numbers, and their gradient
        (8, 0, (8, 8), 0, (8, 8), (True, True)),
        (8, 2, (8, 8), 2, (8, 8), (False, True)),
        (8, 0, (8, 8), 2, (8, 8), (True, False)),
        (8, 16, (40, 5), 0, (40, 5), (False, True)),
        (8, 16, (40, 8), 0, (40, 5), (True, False)),
        (8, 16, (44, 8), 0, (40, 8), (False, False)),
        (4, 16, (44, 8), 0, (40, 8), (True, True)),  # one step of the outer stride is never made
        (1, 16, (44, 9), 0, (40, 5), (True, True)),
    ),
)
def test_what_is_known_of_where_rows_begin(rows, logits, strides, out, out_strides, expected):
    cuda = library()
    outer, inner = strides
    sizes = dict(inner=4, outer_stride=outer, inner_stride=inner, vocab=5, valid_vocab=5)
    problem = cuda.Problem(dtype=1, logits=4096 + logits, rows=rows, **sizes)
    outer, inner = out_strides
    gradient = cuda.Gradient(out=8192 + out, outer_stride=outer, inner_stride=inner, out_dtype=1)
    p = cuda.plan(cuda.Operation.gradient, problem, cuda.Results([]), gradient, device())
    assert (p.aligned_logits, p.aligned_gradient) == expected


@pytest.mark.parametrize(("out", "expected"), ((0, True), (2, False), (8, True), (12, False)))
def test_what_is_known_of_a_narrow_gradient(out, expected):
    cuda = library()
    sizes = dict(inner=1, outer_stride=8, inner_stride=8, vocab=5, valid_vocab=5)
    problem = cuda.Problem(dtype=0, logits=4096, rows=8, **sizes)
    gradient = cuda.Gradient(out=8192 + out, outer_stride=16, inner_stride=16, out_dtype=1)
    p = cuda.plan(cuda.Operation.gradient, problem, cuda.Results([]), gradient, device())
    assert p.aligned_logits and p.aligned_gradient is expected


@pytest.mark.parametrize("change", ({"bias": 16}, {"softcap": 30.0}, {"logit_scale": -1.0}))
def test_what_the_fast_sums_cannot_do_takes_the_general_kernels(change):
    assert plan("loss").plain
    p = plan("loss", **change)
    assert not p.plain and not p.resident


def test_outputs_beyond_the_first_order_take_the_general_kernels():
    """Whatever is not named here does: also an output that is added later."""
    fast = {*Saved._fields, "logprob", "entropy", "lse", "max_prob"}
    names = (*Saved._fields, *ROW_OUTPUTS)
    assert plan("loss", columns=[name in fast for name in names]).plain
    for i, name in enumerate(names):
        columns = [each in Saved._fields or each == name for each in names]
        assert plan("loss", columns=columns).plain == (name in fast), (i, name)


def test_rows_beyond_65535_and_numbers_beyond_2_to_the_31():
    p = plan("loss", rows=2**20, vocab=151_936)  # 1.6e11 logits
    assert p.blocks == 2**20 * 4
    assert plan("statistics", rows=MAX_BLOCKS, vocab=2).blocks == MAX_BLOCKS
    assert plan("statistics", rows=0).blocks == 0


@pytest.mark.parametrize(
    ("case", "message"),
    (
        ({"operation": "statistics", "rows": 2**31}, "rows must be less than 2\\^31"),
        ({"rows": 2**30, "vocab": 151_936}, "blocks per row"),
        ({"vocab": 2**30 + 1}, "V must be in"),
        ({"vocab": 0}, "V must be in"),
        ({"valid_vocab": 0}, "valid_vocab"),
        ({"valid_vocab": 1001}, "valid_vocab must be in \\[1, V\\], got 1001"),
        ({"dtype": 1, "out_dtype": 2}, "dtype of out"),
        ({"dtype": 3, "out_dtype": 1}, "dtype of out"),
        ({"columns": (1, 1, 0)}, "columns"),
    ),
)
def test_what_cannot_be_launched_is_refused(case, message):
    with pytest.raises(ValueError, match=message):
        plan(**case)


def test_a_device_that_is_too_old_is_refused():
    cuda = library()
    old = cuda.Device(**{**H200, "compute_capability": 75})
    problem = cuda.Problem(
        dtype=0,
        logits=0,
        rows=1,
        inner=1,
        outer_stride=1,
        inner_stride=1,
        vocab=1,
        valid_vocab=1,
    )
    with pytest.raises(ValueError, match="compute capability must be at least 80, got 75"):
        cuda.plan(cuda.Operation.statistics, problem, cuda.Results([]), cuda.Gradient(), old)


def test_the_order_of_dtypes_is_that_of_the_kernels():
    sizes = [torch.finfo(dtype).bits // 8 for dtype in DTYPES]
    assert sizes == list(BYTES.values())
