"""The weights of distillation by hand, and the loss that they make."""

import math

import pytest
import torch
import torch.distributed as dist

from em_kernels.objectives import aggregation_denominator, aggregation_weight, opd_weight
from em_kernels.ops.divergence import linear_divergence_loss

MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]])
ENTROPY = torch.tensor([[1.0, 3.0, math.nan, 9.0], [0.0, 2.0, 4.0, math.nan], [math.nan] * 4])


def test_weights_by_hand():
    # The mean entropy of the five tokens is 2.
    weight = opd_weight(MASK, ENTROPY)
    expected = torch.tensor([[0.1, 0.3, 0, 0], [0, 0.2, 0.4, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(weight, expected)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(opd_weight(MASK), MASK / 5.0)
    # Answers of 2 and 3 tokens, two of them.
    expected = torch.tensor([[1 / 8, 3 / 8, 0, 0], [0, 1 / 6, 1 / 3, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(opd_weight(MASK, ENTROPY, mode="sequence_mean"), expected)


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean", "sequence_mean_token_sum"])
def test_entropies_that_are_all_the_same_change_nothing(mode):
    plain = opd_weight(MASK, mode=mode)
    torch.testing.assert_close(plain, aggregation_weight(MASK, mode=mode).float())
    for value in (0.0, 1e-30, 0.3):
        torch.testing.assert_close(
            opd_weight(MASK, torch.full((3, 4), value), mode=mode), plain, rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean"])
def test_weights_of_micro_batches_are_those_of_the_whole(mode):
    whole = opd_weight(MASK, ENTROPY, mode=mode)
    of = dict(denominator=aggregation_denominator(MASK, mode=mode), mean_entropy=2.0)
    for rows in (slice(0, 1), slice(1, 3)):
        part = opd_weight(MASK[rows], ENTROPY[rows], mode=mode, **of)
        torch.testing.assert_close(part, whole[rows])
    packed = opd_weight(
        MASK.reshape(-1),
        ENTROPY.reshape(-1),
        mode=mode,
        segment_ids=torch.arange(3).repeat_interleave(4),
    )
    torch.testing.assert_close(packed.view(3, 4), whole)


def of_one_rank(rank, folder):
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    rows = slice(0, 1) if rank == 0 else slice(1, 3)
    weight = opd_weight(MASK[rows], ENTROPY[rows], token_group=dist.group.WORLD)
    torch.save(weight, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_have_one_mean(tmp_path):
    torch.multiprocessing.spawn(of_one_rank, (tmp_path,), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(torch.cat(parts), opd_weight(MASK, ENTROPY))


def test_the_constant_normaliser_is_that_of_aggregate_loss():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    how = dict(mode="sequence_mean_token_sum_norm", max_length=5)
    torch.testing.assert_close(opd_weight(mask, **how), mask / 10)
    whole = opd_weight(mask, torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]]), **how)
    torch.testing.assert_close(whole.sum().item(), 0.3)


def test_no_token_and_no_gradient():
    entropy = torch.rand(2, 3, requires_grad=True)
    assert opd_weight(torch.zeros(2, 3), entropy).tolist() == [[0.0] * 3] * 2
    assert not opd_weight(torch.ones(2, 3), entropy).requires_grad


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "js"])
def test_the_loss_is_the_weighted_divergence_and_its_parts_add_up(kind):
    """Of whole logits in float64, however the update is cut."""
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(3, 4, 6).double(), torch.randn(3, 4, 9).double()
    weight, teacher_weight = torch.randn(20, 6).double(), torch.randn(20, 9).double()
    hidden.requires_grad_()
    p = (hidden @ weight.T).log_softmax(-1)
    q = (teacher_hidden @ teacher_weight.T).log_softmax(-1)
    entropy = -(q.exp() * q).sum(-1)
    mean = entropy[MASK.bool()].mean()
    both = {"reverse_kl": (p, q), "forward_kl": (q, p)}.get(kind)
    if both:
        divergence = (both[0].exp() * (both[0] - both[1])).sum(-1)
    else:
        m = ((p.exp() + q.exp()) / 2).log()
        divergence = sum((x.exp() * (x - m)).sum(-1) for x in (p, q)) / 2
    expected = (divergence * MASK * entropy / mean).sum() / 5
    (gradient,) = torch.autograd.grad(expected, hidden)
    w = opd_weight(MASK, entropy)
    total, found = 0.0, torch.zeros_like(hidden)
    for rows in (slice(0, 1), slice(1, 3)):
        own = hidden.detach()[rows].requires_grad_()
        loss = linear_divergence_loss(
            own, weight, teacher_hidden[rows], teacher_weight, kind=kind, token_weight=w[rows]
        )[0]
        loss.backward()
        total, found[rows] = total + loss.item(), own.grad
    assert total == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: opd_weight([1]), TypeError, "mask must be a tensor"),
        (lambda: opd_weight(MASK, ENTROPY[:1]), ValueError, "teacher_entropy must have shape"),
        (lambda: opd_weight(MASK, MASK), TypeError, "teacher_entropy must be floating point"),
        (lambda: opd_weight(MASK, mode="mean"), ValueError, "mode must be one of"),
        (lambda: opd_weight(MASK, ENTROPY, mean_entropy=-1), ValueError, "mean_entropy must be"),
        (lambda: opd_weight(MASK, ENTROPY, mean_entropy=ENTROPY), ValueError, "mean_entropy must"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
