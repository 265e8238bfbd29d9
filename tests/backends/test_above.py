"""How much of a row lies above given levels, on every backend, and the ranks made of it."""

import pytest
import torch
from helpers import IMPLS, error, random_logits, random_target, truth

from em_kernels import linear_softmax_stats, linear_token_loss, softmax_stats, token_loss
from em_kernels.backends import above
from em_kernels.backends.choice import backend
from em_kernels.backends.interface import RowSpec

VOCAB, VALID = 523, 510
TRANSFORMS = {
    "plain": {},
    "scaled": dict(temperature=0.7),
    "rows": dict(temperature_rows=torch.tensor([0.5, 1.0, 2.0, 0.9, 1.1, 1.2])),
    "everything": dict(softcap=5.0, logit_scale=-0.5, temperature=0.7, bias=torch.randn(VOCAB)),
}
EACH_IMPL = pytest.mark.parametrize("impl", IMPLS)
INF = float("inf")


@EACH_IMPL
@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_counts_and_sums_above_levels(impl, device, dtype, options):
    x = random_logits(2, 3, VOCAB, dtype=dtype)
    x[0, 1, 5:300] = INF if options.get("logit_scale", 1) < 0 else -INF
    mask = torch.tensor([True, True, False, True, True, True])
    spec = RowSpec(valid_vocab=VALID, mask=mask, **options)
    heat = spec.temperature_rows if "temperature_rows" in options else spec.temperature
    heat = heat[:, None].double() if torch.is_tensor(heat) else heat
    u = spec.logit_scale * x.double().view(6, VOCAB)
    u = u + (0 if spec.bias is None else spec.bias.double())
    u = u if not spec.softcap else torch.where(u == -INF, u, 5 * torch.tanh(u / 5))
    u = u[:, :VALID]
    order = u.sort(-1).values
    places = torch.tensor([-2, -10, -100, -180, 0])
    levels = (order[:, places] + order[:, places - 1])[:, :4] / 2
    levels = torch.cat([levels, torch.full((6, 1), -INF)], 1)
    over = (u[:, None] > levels[..., None]) & mask[:, None, None]
    top = u.amax(-1)
    want = torch.where(over, ((u - top[:, None]) / heat).exp()[:, None], 0).sum(-1)
    near = (u[:, None] - levels[..., None]).abs().amin(-1) < 1e-5  # ties of 16-bit logits
    placed = RowSpec(*(v.to(device) if torch.is_tensor(v) else v for v in spec))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    module = backend(impl, torch.device(device))
    given = x.to(device), placed, levels.to(wide).to(device)
    counts, sums = above.above(module, *given, top.to(wide).to(device))
    assert torch.equal(counts.cpu()[~near], over.sum(-1)[~near]) and (~near).sum() > 20
    assert error(sums.cpu()[~near], want[~near]) < (1e-12 if dtype == torch.float64 else 2e-6)
    again, none = above.above(module, *given)
    assert none is None and torch.equal(again, counts)


@EACH_IMPL
def test_ties_before_an_id_count_where_ids_are_given(impl, device):
    x = torch.tensor([[1.0, 3.0, 1.0, 0.0, 1.0, 3.0]]).repeat(2, 1000)[None].to(device)
    ids = torch.tensor([[0, 5, 4, -3, 9000], [1, 2, 6, 5999, 3]]).to(device)
    levels = torch.tensor([[1.0, 3.0, 1.0, 3.0, 0.0], [3.0, 1.0, 1.0, 3.0, 0.0]]).to(device)
    top = torch.tensor([3.0, 3.0]).to(device)
    spec = RowSpec(valid_vocab=6000)
    module = backend(impl, torch.device(device))
    strict, _ = above.above(module, x, spec, levels, top)
    counts, sums = above.above(module, x, spec, levels, top, ids)
    z, index = x[0].cpu()[:, None], torch.arange(6000)
    tied = (z == levels.cpu()[..., None]) & (index < ids.cpu()[..., None])
    over = z > levels.cpu()[..., None]
    assert torch.equal(strict.cpu(), over.sum(-1))
    assert torch.equal(counts.cpu(), (over | tied).sum(-1))
    want = torch.where(over | tied, (z.double() - 3).exp(), 0).sum(-1)
    assert error(sums.cpu(), want) < 1e-6


@EACH_IMPL
def test_no_levels_and_no_rows(impl, device):
    module, spec = backend(impl, torch.device(device)), RowSpec(valid_vocab=7)
    for rows, number in ((0, 3), (4, 0)):
        x, levels = torch.randn(1, rows, 7).to(device), torch.randn(rows, number).to(device)
        counts, sums = above.above(module, x, spec, levels, levels.new_zeros(rows))
        assert counts.shape == sums.shape == (rows, number)
        assert counts.dtype == torch.int64 and sums.dtype == torch.float64


@EACH_IMPL
def test_rank_from_logits_and_from_hidden_states(impl, device):
    hidden = random_logits(2, 4, 8, scale=1.0, device=device)
    weight = random_logits(61, 8, scale=1.0, device=device)
    target = random_target(2, 4, vocab=61, device=device)
    target[1, 2] = -100
    logits, counted = hidden @ weight.T, target != -100
    z = 5 * torch.tanh(logits.double() / 5)
    want = (z > z.gather(-1, target.clamp(min=0)[..., None])).sum(-1) * counted
    options = dict(softcap=5.0, outputs=("rank", "entropy"), impl=impl)
    hidden.requires_grad_()
    results = [
        softmax_stats(logits, target, **options),
        linear_softmax_stats(hidden, weight, target, chunk_tokens=3, **options),
        token_loss(logits.clone(), target, entropy_weight=counted.float(), **options).stats,
        linear_token_loss(hidden, weight, target, entropy_weight=counted.float(), **options).stats,
    ]
    for stats in results:
        assert torch.equal(stats.rank, want) and not stats.rank.requires_grad
    results[1].entropy.sum().backward()
    given = hidden.detach().requires_grad_()
    softmax_stats(given @ weight.T, target, softcap=5.0, impl=impl).entropy.sum().backward()
    assert error(hidden.grad, given.grad) < 1e-5


@EACH_IMPL
def test_rank_of_edges(impl, device):
    """Ties share a rank; -inf ranks last; a row without probabilities has none."""
    x = torch.tensor([[2.0, 1.0, 2.0, -INF], [0.0, 0, 0, 0], [INF, 0, 0, 0], [-INF, 0, 1, -INF]])
    target = torch.tensor([2, 3, 0, 0])
    stats = softmax_stats(x.to(device), target.to(device), outputs=("rank",), impl=impl)
    assert stats.rank.tolist() == [0, 0, -1, 2] and stats.rank.dtype == torch.int64


def test_the_truth_of_the_helpers_ranks():
    x = torch.tensor([[0.0, 3.0, 1.0]])
    assert truth(x, torch.tensor([2]))["rank"].tolist() == [1]
