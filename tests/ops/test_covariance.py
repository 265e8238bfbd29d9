"""Covariance and the three selections, against plain loops over the whole batch."""

import math

import pytest
import torch
import torch.multiprocessing as mp
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from em_kernels import (
    clip_cov_mask,
    high_entropy_mask,
    kl_cov_mask,
    linear_token_covariance,
    softmax_stats,
    token_covariance,
)
from em_kernels.objectives import (
    aggregate_loss,
    clip_cov_loss,
    clip_cov_selection,
    high_entropy_loss,
    kl_cov_loss,
    kl_cov_selection,
)


def draw(shape=(7, 31), seed=0):
    g = torch.Generator().manual_seed(seed)
    logprob = -torch.rand(shape, generator=g) * 3
    advantage = torch.randn(shape, generator=g)
    mask = torch.rand(shape, generator=g) > 0.3
    return logprob, advantage, mask


def test_covariance_equals_a_plain_loop():
    logprob, advantage, mask = draw()
    tokens = [
        (a, p)
        for a, p, m in zip(advantage.flatten().tolist(), logprob.flatten().tolist(), mask.flatten())
        if m
    ]
    mean_a = math.fsum(a for a, _ in tokens) / len(tokens)
    mean_p = math.fsum(p for _, p in tokens) / len(tokens)
    expected = [(a - mean_a) * (p - mean_p) for a, p in tokens]
    cov = token_covariance(logprob, advantage, mask)
    torch.testing.assert_close(cov[mask], torch.tensor(expected))
    assert (cov[~mask] == 0).all() and cov.dtype == torch.float32


def test_covariance_by_hand_and_detached():
    logprob = torch.tensor([-1.0, -3.0], requires_grad=True)
    cov = token_covariance(logprob, torch.tensor([1.0, -1.0]))
    assert cov.tolist() == [1.0, 1.0] and not cov.requires_grad


@pytest.mark.parametrize("count", [0, 1])
def test_covariance_of_no_token_and_of_one_is_zero(count):
    logprob, advantage, _ = draw()
    mask = torch.zeros(logprob.shape)
    mask.view(-1)[:count] = 1
    assert (token_covariance(logprob, advantage, mask) == 0).all()


def test_masked_nan_does_not_spread():
    logprob, advantage, mask = draw()
    clean = token_covariance(logprob, advantage, mask)
    advantage[~mask] = math.nan
    logprob[~mask] = -math.inf
    assert torch.equal(token_covariance(logprob, advantage, mask), clean)


def test_linear_covariance_equals_covariance_of_the_logits():
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(5, 6, 8, generator=g), torch.randn(40, 8, generator=g)
    target = torch.randint(0, 40, (5, 6), generator=g)
    target[0, :3] = -100
    advantage = torch.randn(5, 6, generator=g)
    mask = torch.rand(5, 6, generator=g) > 0.2
    logprob = softmax_stats(hidden @ weight.T / 0.7, target).logprob
    expected = token_covariance(logprob, advantage, mask & (target != -100))
    found = linear_token_covariance(hidden, weight, target, advantage, mask, temperature=0.7)
    torch.testing.assert_close(found, expected)


def test_clip_cov_takes_exactly_the_fraction_from_the_eligible():
    cov = torch.linspace(-2, 8, 4000).view(40, 100)
    mask = torch.ones_like(cov)
    taken = clip_cov_mask(cov, mask, ratio=0.01, generator=torch.Generator().manual_seed(0))
    assert taken.sum() == 40
    assert ((cov[taken] > 1) & (cov[taken] < 5)).all()
    again = clip_cov_mask(cov, mask, ratio=0.01, generator=torch.Generator().manual_seed(0))
    other = clip_cov_mask(cov, mask, ratio=0.01, generator=torch.Generator().manual_seed(1))
    assert torch.equal(taken, again) and not torch.equal(taken, other)


def test_clip_cov_draws_uniformly():
    cov = torch.tensor([0.0, 2.0, 3.0, 4.0, 6.0])
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([clip_cov_mask(cov, generator=g) for _ in range(3000)]).sum(0)
    assert draws[0] == draws[4] == 0
    assert (draws[1:4] - 1000).abs().max() < 120  # 4.6 standard deviations


def test_clip_cov_bounds_are_exclusive_and_excluded_tokens_are_left():
    cov = torch.tensor([1.0, 5.0, 2.0, 3.0])
    exclude = torch.tensor([0, 0, 1, 0])
    assert clip_cov_mask(cov, ratio=1.0, exclude=exclude).tolist() == [False, False, False, True]


def test_clip_cov_without_eligible_tokens_is_empty():
    assert not clip_cov_mask(torch.zeros(10)).any()
    assert not clip_cov_mask(torch.full((10,), 2.0), torch.zeros(10)).any()
    assert clip_cov_mask(torch.zeros(0)).shape == (0,)


def test_kl_cov_takes_the_largest():
    _, _, mask = draw()
    cov = torch.randn(mask.shape, generator=torch.Generator().manual_seed(3))
    taken = kl_cov_mask(cov, mask, ratio=0.1)
    count = int(0.1 * int(mask.sum()))
    threshold = cov[mask].sort(descending=True).values[count - 1]
    assert torch.equal(taken, mask & (cov >= threshold)) and taken.sum() == count


def test_kl_cov_takes_at_least_one_and_breaks_ties_by_position():
    assert kl_cov_mask(torch.tensor([3.0, 7.0, 7.0])).tolist() == [False, True, False]
    assert kl_cov_mask(torch.zeros(10), ratio=0.3).tolist() == [True] * 3 + [False] * 7
    assert kl_cov_mask(torch.full((4,), -math.inf), ratio=0.5).sum() == 2
    assert not kl_cov_mask(torch.ones(5), torch.zeros(5)).any()


def test_selection_is_over_the_whole_batch_not_per_part():
    cov = torch.arange(80.0)
    parts = torch.cat([kl_cov_mask(part, ratio=0.02) for part in cov.split(10)])
    assert parts.sum() == 8 and kl_cov_mask(cov, ratio=0.02).sum() == 1


def test_high_entropy_mask_is_the_quantile():
    _, _, mask = draw()
    entropy = torch.rand(mask.shape, generator=torch.Generator().manual_seed(4))
    tau = torch.quantile(entropy[mask].double(), 0.8)
    assert torch.equal(high_entropy_mask(entropy, mask), mask & (entropy >= tau))
    assert high_entropy_mask(torch.ones(5)).all()
    assert high_entropy_mask(torch.tensor([1.0])).all()
    assert not high_entropy_mask(entropy, torch.zeros_like(mask)).any()
    assert high_entropy_mask(torch.zeros(0)).shape == (0,)


def test_high_entropy_mask_takes_all_of_a_tie_at_the_threshold():
    entropy = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    assert torch.equal(high_entropy_mask(entropy, ratio=0.2), entropy == 1)


@pytest.mark.parametrize("ratio, count", [(0.29, 28), (0.3, 30), (1.0, 100), (1e-9, 1)])
def test_counts_are_those_of_floor(ratio, count):
    """0.29 * 100 is 28.999... in binary, here as in int(ratio * N) of other code."""
    cov = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert kl_cov_mask(cov, ratio=ratio).sum() == count == max(int(ratio * 100), 1)
    assert clip_cov_mask(cov, ratio=ratio, lower=-9.0, upper=9.0).sum() == count


def test_equal_advantages_have_no_covariance():
    logprob, _, mask = draw()
    cov = token_covariance(logprob, torch.full_like(logprob, 0.1), mask)
    assert cov.abs().max() < 1e-15
    assert not clip_cov_mask(cov, mask).any()
    assert kl_cov_mask(cov, mask, ratio=0.1).sum() == int(0.1 * int(mask.sum()))


SELECTIONS = {
    "covariance": lambda x, a, m: token_covariance(x, a, m),
    "clip_cov_mask": lambda x, a, m: clip_cov_mask(x, m, exclude=m, ratio=0.1),
    "kl_cov_mask": lambda x, a, m: kl_cov_mask(x, m, ratio=0.1),
    "high_entropy_mask": lambda x, a, m: high_entropy_mask(x, m),
    "clip_cov": lambda x, a, m: clip_cov_loss(x, x, a, m, clip_cov_selection(x, x, a, m)).loss,
    "kl_cov": lambda x, a, m: kl_cov_loss(x, x, a, m, kl_cov_selection(x, a, m)).loss,
    "high_entropy": lambda x, a, m: high_entropy_loss(x, x, a, m, high_entropy_mask(x, m)).loss,
    "aggregation": lambda x, a, m: aggregate_loss(x, m, mode="sequence_mean"),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_nothing_waits_for_the_device(name):
    """A fake tensor has no values: .item(), nonzero() or a branch on one would raise."""
    with FakeTensorMode() as fake:
        inputs = [fake.from_tensor(x) for x in draw()]
        SELECTIONS[name](*inputs)
        with pytest.raises(DataDependentOutputException):
            bool(inputs[0].sum() > 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", SELECTIONS)
def test_nothing_waits_for_a_gpu(name):
    inputs = [x.cuda() for x in draw()]
    SELECTIONS[name](*inputs)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        SELECTIONS[name](*inputs)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: token_covariance([1.0], x), TypeError, "logprob must be a tensor, got list"),
        (
            lambda x: token_covariance(x, x[:2]),
            ValueError,
            r"advantage must have shape",
        ),
        (lambda x: token_covariance(x, x, x[:2]), ValueError, r"mask must have shape \(4,\)"),
        (lambda x: token_covariance(x, x, x.to("meta")), ValueError, "mask must be on cpu"),
        (lambda x: kl_cov_mask(x, ratio=20), ValueError, r"ratio must be in \(0, 1\].*got 20"),
        (lambda x: clip_cov_mask(x, ratio=0.0), ValueError, "ratio must be"),
        (lambda x: clip_cov_mask(x, lower=5, upper=1), ValueError, "lower must be below upper"),
        (lambda x: high_entropy_mask(x.long()), TypeError, "entropy must be floating point"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.rand(4))


def _on_rank(rank, world, file, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=world
    )
    group = torch.distributed.group.WORLD
    logprob, advantage, mask = (x.view(-1) for x in draw())
    own = slice(0, 60) if rank == 0 else slice(60, None)
    cov = token_covariance(logprob[own], advantage[own], mask[own], group=group)
    g = torch.Generator().manual_seed(rank)
    bounds = dict(ratio=0.1, lower=-1.0, upper=1.0, generator=g, group=group)
    results[rank] = (
        cov,
        kl_cov_mask(cov, mask[own], ratio=0.1, group=group),
        high_entropy_mask(-logprob[own], mask[own], group=group),
        clip_cov_mask(cov, mask[own], **bounds),
    )
    torch.distributed.destroy_process_group()


def test_a_group_selects_over_all_its_ranks(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_on_rank, (2, tmp_path / "store", results), nprocs=2)
        cov, top, high, drawn = (torch.cat(parts) for parts in zip(results[0], results[1]))
    logprob, advantage, mask = (x.view(-1) for x in draw())
    torch.testing.assert_close(cov, token_covariance(logprob, advantage, mask))
    assert torch.equal(top, kl_cov_mask(cov, mask, ratio=0.1))
    assert torch.equal(high, high_entropy_mask(-logprob, mask))
    g = torch.Generator().manual_seed(0)
    expected = clip_cov_mask(cov, mask, ratio=0.1, lower=-1.0, upper=1.0, generator=g)
    assert torch.equal(drawn, expected)
