"""Packed rows: sequence means over segments, ids from offsets and positions, next-token targets."""

import pytest
import torch
from helpers import FAST_IMPLS

import em_kernels as em
from em_kernels import entropy_loss, linear_entropy_loss, next_token_targets
from em_kernels import segment_ids_from_cu_seqlens as from_offsets
from em_kernels import segment_ids_from_position_ids as from_positions
from em_kernels.objectives import aggregate_loss, aggregation_denominator, aggregation_weight

OFFSETS = torch.tensor([0, 4, 4, 5, 9])  # the second is empty; two tokens of padding follow
IDS = torch.tensor([0, 0, 0, 0, 2, 3, 3, 3, 3, -1, -1])
MASK = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1])  # nothing of id 2 counts
MEMBERS = ([0, 2, 3], [5, 6, 7])  # the places of the tokens that count, sequence by sequence
LABELS = torch.arange(11) + 20


def draw(dtype=torch.float64):
    torch.manual_seed(3)
    return torch.randn(11, 7, dtype=dtype)


def textbook(rows, mode):
    """By loops over the sequences, of rows (11,)."""
    sums = [rows[places].sum() for places in MEMBERS]
    match mode:
        case "token_mean":
            return sum(sums) / 6
        case "sequence_mean":
            return sum(s / 3 for s in sums) / 2
        case "sequence_mean_token_sum":
            return sum(sums) / 2
        case "sum":
            return sum(sums)
    return sum(sums) / mode


@pytest.mark.parametrize("impl", FAST_IMPLS)
@pytest.mark.parametrize("shape", ((11,), (1, 11), (11, 1)))
@pytest.mark.parametrize("reduction", ("token_mean", "sequence_mean", "sum", 4.0))
def test_a_reduction_over_segments_is_the_textbooks(impl, device, reduction, shape):
    x = draw().to(device).view(*shape, 7).requires_grad_()
    ids, mask = IDS.to(device).view(shape), MASK.to(device).view(shape)
    loss = entropy_loss(x, mask, reduction=reduction, segment_ids=ids, impl=impl)
    (gradient,) = torch.autograd.grad(loss, x)
    p = draw().requires_grad_()
    expected = textbook(-(p.softmax(-1) * p.log_softmax(-1)).sum(-1), reduction)
    torch.testing.assert_close(loss.cpu(), expected.detach())
    torch.testing.assert_close(gradient.view(11, 7).cpu(), torch.autograd.grad(expected, p)[0])


def test_lengths_differ_and_order_does_not_matter():
    rows = torch.tensor([3.0, 1.0, 2.0, 8.0, 5.0])
    ids = torch.tensor([7, 2, 7, 100, 7])
    got = aggregate_loss(rows, torch.ones(5), mode="sequence_mean", segment_ids=ids)
    assert got.item() == pytest.approx(((3 + 2 + 5) / 3 + 1 + 8) / 3)
    assert aggregation_denominator(ids >= 0, mode="sequence_mean", segment_ids=ids) == 3


@pytest.mark.parametrize("mode", ("token_mean", "sequence_mean", "sequence_mean_token_sum"))
def test_aggregation_over_segments_is_the_textbooks(mode):
    loss = torch.linspace(1, 2, 11, dtype=torch.float64)
    loss[9:] = torch.nan  # padding
    options = dict(mode=mode, segment_ids=IDS)
    torch.testing.assert_close(aggregate_loss(loss, MASK, **options), textbook(loss, mode))
    weight = aggregation_weight(MASK, **options)
    torch.testing.assert_close((weight * loss.nan_to_num()).sum(), textbook(loss, mode))
    number = aggregation_denominator(MASK, **options)
    assert number == (6 if mode == "token_mean" else 2)
    cut = [slice(0, 5), slice(5, 11)]  # between sequences
    parts = [
        aggregate_loss(loss[c], MASK[c], denominator=number, mode=mode, segment_ids=IDS[c])
        for c in cut
    ]
    torch.testing.assert_close(sum(parts), textbook(loss, mode))


def test_rows_as_segments_are_the_rows():
    x, mask = draw()[:10].view(2, 5, 7), MASK[:10].view(2, 5)
    rows = torch.arange(2)[:, None].expand(2, 5)
    for reduction in ("token_mean", "sequence_mean"):
        plain = entropy_loss(x, mask, reduction=reduction)
        packed = entropy_loss(x, mask, reduction=reduction, segment_ids=rows.int())
        assert torch.equal(plain, packed)


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int16, torch.int32))
def test_ids_of_any_integer_type(dtype):
    ids = (IDS[:9] + 2).to(dtype)
    x, mask = draw()[:9], MASK[:9]
    options = dict(reduction="sequence_mean")
    want = entropy_loss(x, mask, segment_ids=IDS[:9], **options)
    assert torch.equal(entropy_loss(x, mask, segment_ids=ids, **options), want)
    assert torch.equal(next_token_targets(LABELS[:9], ids), next_token_targets(LABELS[:9], IDS[:9]))
    (_, _, lengths) = torch.ops.em_kernels.count_tokens(mask > 0, ids, "sequence_mean", None)
    assert lengths[mask > 0].tolist() == [3] * 6


def test_nothing_counts():
    x = draw().requires_grad_()
    for mask, ids in ((MASK * 0, IDS), (None, IDS * 0 - 5)):
        loss = entropy_loss(x, mask, reduction="sequence_mean", segment_ids=ids)
        assert loss == 0 and (torch.autograd.grad(loss, x)[0] == 0).all()
    none = entropy_loss(x[:0], reduction="sequence_mean", segment_ids=IDS[:0])
    assert none == 0


def test_modules_and_hidden_states_take_segments():
    hidden, weight = draw(torch.float32), draw(torch.float32)[:9]
    options = dict(reduction="sequence_mean", temperature=0.5)
    loss = linear_entropy_loss(hidden, weight, MASK, segment_ids=IDS, **options)
    logits = (hidden @ weight.T) / 0.5
    expected = textbook(-(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1), "sequence_mean")
    torch.testing.assert_close(loss, expected)
    module = em.LinearEntropyLoss(**options)(hidden, weight, MASK, segment_ids=IDS)
    from_logits = em.EntropyLoss(**options)(hidden @ weight.T, MASK, IDS)
    torch.testing.assert_close(module, loss, rtol=0, atol=0)
    torch.testing.assert_close(from_logits, expected)


def test_compiled_without_a_break():
    def loss(x, mask, ids):
        whole = entropy_loss(x, mask, reduction="sequence_mean", segment_ids=ids)
        return whole + aggregate_loss(x[:, 0], mask, mode="sequence_mean", segment_ids=ids)

    x = draw().requires_grad_()
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, MASK, IDS)
    want = loss(x, MASK, IDS)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v in (got, want)))


def test_the_operator_passes_opcheck():
    for ids in (IDS, None):
        torch.library.opcheck(
            torch.ops.em_kernels.count_tokens.default, (MASK > 0, ids, "sequence_mean", None)
        )


def test_ids_of_offsets():
    assert from_offsets(OFFSETS, 11).tolist() == IDS.tolist()
    assert from_offsets(OFFSETS.int()).tolist() == IDS[:9].tolist()
    assert from_offsets(OFFSETS, 10, first_id=40).tolist() == [40] * 4 + [42] + [43] * 4 + [-1]
    assert from_offsets(torch.tensor([0]), 2).tolist() == [-1, -1]
    assert from_offsets(OFFSETS).dtype == torch.int64


def test_ids_of_positions():
    packed = torch.tensor([[0, 1, 2, 0, 1, 0], [5, 6, 0, 1, 2, 3]])
    assert from_positions(packed).tolist() == [[0, 0, 0, 1, 1, 2], [3, 3, 4, 4, 4, 4]]
    assert from_positions(packed[0].int(), first_id=9).tolist() == [9, 9, 9, 10, 10, 11]
    assert from_positions(packed[:, :0]).shape == (2, 0)


def test_targets_end_with_their_segment():
    want = [21, 22, 23, -1, -1, 26, 27, 28, -1, -1, -1]
    got = next_token_targets(LABELS.int(), IDS.int(), ignore_index=-1)
    assert got.tolist() == want and got.dtype == torch.int64
    assert next_token_targets(LABELS.view(1, 11)).tolist() == [[*range(21, 31), -100]]
    even, segments = LABELS[:8].view(2, 4), torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2]])
    assert torch.equal(next_token_targets(even, layout="zigzag"), next_token_targets(even))
    whole = next_token_targets(even, segments)
    assert torch.equal(next_token_targets(even, segments, layout="packed_zigzag"), whole)
    assert next_token_targets(LABELS[:0]).shape == (0,)


def test_labels_that_are_ignored_stay_so():
    labels = LABELS.clone()
    labels[2] = -100
    assert next_token_targets(labels)[1] == -100 and next_token_targets(labels)[2] == 23


X = torch.zeros(3, 5)
THREE = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: entropy_loss(X, segment_ids=[0]), TypeError, "segment_ids must be a tensor"),
        (lambda: entropy_loss(X, segment_ids=THREE > 0), TypeError, "segment_ids must be integers"),
        (
            lambda: entropy_loss(X, segment_ids=THREE[:2]),
            ValueError,
            r"segment_ids must have shape \(3,\), got shape \(2,\)",
        ),
        (lambda: entropy_loss(X, token_group="dp"), TypeError, "token_group must be .*, got str"),
        (lambda: em.EntropyLoss(token_group=3)(X), TypeError, "token_group must be .*, got int"),
        (
            lambda: aggregate_loss(X, X, segment_ids=THREE),
            ValueError,
            r"segment_ids must have shape \(3, 5\)",
        ),
        (
            lambda: aggregation_weight(X, token_group=1),
            TypeError,
            "token_group must be .*, got int",
        ),
        (lambda: from_offsets(X[0]), TypeError, "cu_seqlens must be integers, got torch.float32"),
        (lambda: from_offsets(THREE.view(1, 3)), ValueError, r"cu_seqlens must be \(S \+ 1,\)"),
        (lambda: from_offsets(THREE[:0]), ValueError, r"cu_seqlens must be \(S \+ 1,\)"),
        (lambda: from_offsets(THREE + 1), ValueError, "cu_seqlens must begin with 0"),
        (lambda: from_offsets(OFFSETS.flip(0)), ValueError, "cu_seqlens must begin with 0"),
        (lambda: from_offsets(OFFSETS, 8), ValueError, r"num_tokens must be at least .* 9, got 8"),
        (lambda: from_offsets(OFFSETS, 9.0), TypeError, "num_tokens must be an int, got float"),
        (lambda: from_offsets(OFFSETS, first_id=-1), ValueError, "first_id must be 0 or more"),
        (lambda: from_positions(X), TypeError, "position_ids must be integers"),
        (lambda: from_positions(THREE[0]), ValueError, r"position_ids must be \(\.\.\., T\)"),
        (lambda: next_token_targets(X), TypeError, "ids must be integers, got torch.float32"),
        (lambda: next_token_targets(THREE[0]), ValueError, r"ids must be \(\.\.\., T\)"),
        (lambda: next_token_targets(THREE, THREE[:2]), ValueError, "segment_ids must have shape"),
        (lambda: next_token_targets(THREE, layout="ring"), ValueError, "layout must be one of"),
        (lambda: next_token_targets(THREE, layout="zigzag"), ValueError, "two equal chunks"),
        (
            lambda: next_token_targets(THREE, layout="packed_zigzag"),
            ValueError,
            "segment_ids must be given for layout 'packed_zigzag'",
        ),
        (
            lambda: next_token_targets(THREE, THREE + 4, layout="packed_zigzag"),
            ValueError,
            "segment_ids must have an even number .* got 3 of id 4",
        ),
        (lambda: next_token_targets(THREE, context_group=2), TypeError, "context_group must be"),
        (lambda: next_token_targets(THREE, ignore_index=None), TypeError, "ignore_index must be"),
        (lambda: next_token_targets(THREE, ignore_index=1 << 64), ValueError, "ignore_index must"),
        (lambda: next_token_targets(THREE, layout=["zigzag"]), ValueError, "layout must be one of"),
        (lambda: from_offsets(OFFSETS, 1 << 64), ValueError, "num_tokens must .*64 bits do not"),
        (lambda: from_offsets(OFFSETS, first_id=1 << 64), ValueError, "first_id must be an int"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
