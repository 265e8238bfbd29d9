"""`filter_eps`: columns left out of dX and dW, the error they leave, and what they save."""

import pytest
import torch
from helpers import FAST_IMPLS, error, product_flops, random_target, same_bits

from benchmarks import filter_eps
from em_kernels import linear_entropy_loss, linear_softmax_stats, linear_token_loss
from em_kernels.linear import gradients as sums

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
FAST_IMPL = pytest.mark.parametrize("impl", FAST_IMPLS)
DTYPES = pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, torch.float64), ids=lambda dtype: str(dtype)[6:]
)
N, D, V = 12, 16, 500


def peaked(device, dtype=torch.float32, vocab=V, scale=2.5):
    """hidden and weight whose rows of logits hold nearly all probability in a few columns."""
    hidden = torch.randn(N, D).to(device, dtype)
    weight = (scale * torch.randn(vocab, D)).to(device, dtype)
    return hidden.requires_grad_(), weight.requires_grad_()


def gradients(hidden, weight, bias=None, **options):
    """The gradients of a loss with weights of both signs on both statistics."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, N, generator=generator).to(hidden.device)
    target = torch.randint(0, len(weight), (N,), generator=generator).to(hidden.device)
    inputs = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    loss = linear_token_loss(
        hidden,
        weight,
        target,
        bias=bias,
        entropy_weight=weights[0],
        logprob_weight=weights[1],
        **options,
    ).loss
    return torch.autograd.grad(loss, inputs), weights


@FAST_IMPL
@DTYPES
@pytest.mark.parametrize("chunk", (4, 100))
@pytest.mark.parametrize("eps", (1e-4, 1e-2, 0.3))
def test_the_error_is_within_the_stated_bound(impl, device, dtype, chunk, eps):
    hidden, weight = peaked(device, dtype)
    options = dict(impl=impl, chunk_tokens=chunk)
    (exact_x, exact_w), weights = gradients(hidden, weight, **options)
    (dx, dw), _ = gradients(hidden, weight, filter_eps=eps, **options)
    w_max = torch.stack([part.abs().max() for part in weights.split(chunk, dim=1)]).double()
    sizes = torch.stack([part.double().abs().sum(0) for part in hidden.detach().split(chunk)])
    bound_x = eps * w_max.max() * weight.detach().double().abs().sum(0)
    bound_w = eps * (w_max[:, None] * sizes).sum(0)
    rounding = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for out, ref, bound in ((dx, exact_x, bound_x), (dw, exact_w, bound_w)):
        off = (out.double() - ref.double()).abs()
        assert (off <= bound + rounding * ref.double().abs().max()).all()
    left_out = (dw == 0).all(1)
    assert left_out.any() and not left_out.all()
    assert error(dx, exact_x) < 100 * eps + rounding and error(dw, exact_w) < 100 * eps + rounding


@FAST_IMPL
def test_only_columns_below_the_threshold_everywhere_in_the_chunk_are_left_out(impl, device):
    hidden, weight = peaked(device)
    eps, entropy_weight = 1e-2, torch.rand(N, device=device)
    logits = (hidden @ weight.T).detach().double()
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
    dz = entropy_weight[:, None] * log_p.exp() * -(log_p + entropy)
    kept = (dz.abs() >= eps * entropy_weight.max()).any(0)
    loss = linear_token_loss(
        hidden, weight, entropy_weight=entropy_weight, filter_eps=eps, impl=impl
    )
    (dw,) = torch.autograd.grad(loss.loss, weight)
    assert 0 < kept.sum() < V / 2
    assert torch.equal((dw != 0).any(1), kept)


@FAST_IMPL
def test_what_is_left_out_costs_no_product(impl, device):
    hidden, weight = peaked(device)

    def flops(eps):
        return product_flops(lambda: gradients(hidden, weight, filter_eps=eps, impl=impl))

    ((_, dw), _) = gradients(hidden, weight, filter_eps=1e-2, impl=impl)
    kept = int((dw != 0).any(1).sum())
    assert flops(None) == 3 * 2 * N * D * V
    assert flops(1e-2) == 2 * N * D * (V + 2 * kept)


@FAST_IMPL
def test_where_most_columns_stay_the_products_are_whole(impl, device):
    hidden, weight = peaked(device, scale=0.1)
    (exact, _), (out, _) = [
        gradients(hidden, weight, filter_eps=eps, impl=impl, chunk_tokens=5) for eps in (None, 1e-6)
    ]
    for a, b in zip(out, exact, strict=True):
        assert error(a, b) < 1e-6
    whole = product_flops(lambda: gradients(hidden, weight, filter_eps=1e-6, impl=impl))
    assert whole == 3 * 2 * N * D * V


@FAST_IMPL
def test_flat_rows_can_lose_their_whole_gradient(impl, device):
    hidden, weight = peaked(device, scale=1e-3)
    loss = linear_entropy_loss(hidden, weight, filter_eps=0.1, impl=impl)
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (hidden, weight)))


@FAST_IMPL
@pytest.mark.parametrize("block", (7, 8192))
def test_columns_are_gathered_in_blocks(impl, device, block, monkeypatch):
    hidden, weight = peaked(device)
    expected, _ = gradients(hidden, weight, filter_eps=1e-3, impl=impl, chunk_tokens=5)
    monkeypatch.setattr(sums, "BLOCK", block)
    out, _ = gradients(hidden, weight, filter_eps=1e-3, impl=impl, chunk_tokens=5)
    assert (expected[1] != 0).any(1).sum() > 3 * 7
    for a, b in zip(out, expected, strict=True):
        assert error(a, b) < 1e-6


@FAST_IMPL
def test_statistics_and_the_gradient_of_the_bias_stay_exact(impl, device):
    hidden, weight = peaked(device)
    bias = torch.randn(V, device=device, requires_grad=True)
    stats = {}
    for eps in (None, 0.05):
        (*_, db), _ = gradients(hidden, weight, bias, filter_eps=eps, impl=impl, chunk_tokens=5)
        out = linear_softmax_stats(hidden, weight, bias=bias, filter_eps=eps, impl=impl)
        loss = linear_entropy_loss(hidden, weight, bias=bias, filter_eps=eps, impl=impl)
        stats[eps] = db, out.entropy, loss
    for exact, filtered in zip(*stats.values(), strict=True):
        assert same_bits(exact, filtered)


@FAST_IMPL
def test_statistics_with_gradients_of_their_own(impl, device):
    """The backward pass of linear_softmax_stats, its upstream gradients the weights."""
    hidden, weight = peaked(device)
    target = random_target(N, vocab=V, device=device)
    weights = torch.randn(2, N, device=device)
    grads = []
    for eps in (None, 1e-3):
        stats = linear_softmax_stats(
            hidden, weight, target, filter_eps=eps, chunk_tokens=5, impl=impl
        )
        loss = (weights[0] * stats.entropy + weights[1] * stats.logprob).sum()
        grads.append(torch.autograd.grad(loss, (hidden, weight)))
    assert not torch.equal(grads[0][1], grads[1][1])
    for exact, out in zip(*grads, strict=True):
        assert error(out, exact) < 2e-2


@FAST_IMPL
@pytest.mark.parametrize("trained", ("hidden", "weight"))
def test_with_a_frozen_operand(impl, device, trained):
    hidden, weight = peaked(device)
    expected, _ = gradients(hidden, weight, filter_eps=1e-2, impl=impl)
    hidden.requires_grad_(trained == "hidden")
    weight.requires_grad_(trained == "weight")
    (out,), _ = gradients(hidden, weight, filter_eps=1e-2, impl=impl)
    assert same_bits(out, expected[0 if trained == "hidden" else 1])


@FAST_IMPL
def test_masked_rows_and_padded_vocabulary(impl, device):
    hidden, weight = peaked(device)
    mask = torch.arange(N, device=device) % 3 > 0
    options = dict(mask=mask, valid_vocab=V - 9, chunk_tokens=3, impl=impl)
    exact = linear_entropy_loss(hidden, weight, **options)
    exact_grads = torch.autograd.grad(exact, (hidden, weight))
    out = linear_entropy_loss(hidden, weight, filter_eps=1e-4, **options)
    dx, dw = torch.autograd.grad(out, (hidden, weight))
    assert (dx[~mask] == 0).all() and (dw[V - 9 :] == 0).all()
    assert error(dx, exact_grads[0]) < 1e-2 and error(dw, exact_grads[1]) < 1e-2


@FAST_IMPL
def test_no_rows_and_every_row_left_out(impl, device):
    hidden, weight = peaked(device)
    none = linear_entropy_loss(hidden[:0], weight, filter_eps=0.1, impl=impl)
    nowhere = torch.zeros(N, device=device)
    masked = linear_entropy_loss(hidden, weight, nowhere, filter_eps=0.1, impl=impl)
    for loss in (none, masked):
        assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (hidden, weight)))


@FAST_IMPL
def test_nan_is_never_left_out(impl, device):
    hidden, weight = peaked(device)
    with torch.no_grad():
        hidden[3] = torch.nan
    (dx, dw), _ = gradients(hidden, weight, filter_eps=0.5, impl=impl)
    assert dx[3].isnan().all() and dw.isnan().all()
    assert dx[[i for i in range(N) if i != 3]].isfinite().all()


@FAST_IMPL
def test_compiles(impl, device):
    hidden, weight = peaked(device)
    function = torch.compile(
        lambda h, w: linear_entropy_loss(h, w, filter_eps=1e-3, impl=impl),
        fullgraph=True,
        backend="aot_eager",
    )
    out = torch.autograd.grad(function(hidden, weight), (hidden, weight))
    loss = linear_entropy_loss(hidden, weight, filter_eps=1e-3, impl=impl)
    for a, b in zip(out, torch.autograd.grad(loss, (hidden, weight)), strict=True):
        assert error(a, b) < 1e-6


@pytest.mark.parametrize("function", (linear_softmax_stats, linear_token_loss, linear_entropy_loss))
@pytest.mark.parametrize(
    "eps, exception",
    (
        (0.0, ValueError),
        (1.0, ValueError),
        (-1e-3, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (True, TypeError),
        ("1e-3", TypeError),
        (torch.tensor(0.1), TypeError),
    ),
)
def test_bad_values_raise(function, eps, exception):
    hidden, weight = peaked("cpu")
    rows = {"entropy_weight": torch.ones(N)} if function is linear_token_loss else {}
    with pytest.raises(exception, match="filter_eps must be"):
        function(hidden, weight, filter_eps=eps, **rows)


def test_the_benchmark_runs(tmp_path):
    table = filter_eps.main(
        ["--n", "12", "--d", "16", "--v", "300", "--repeats", "1", "--out", str(tmp_path)]
    )
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert len(rows) == 2 * len(filter_eps.KINDS) * len(filter_eps.EPS)
    assert all(float(row[5]) >= 0 and (row[4] != "None" or row[6] == "1.00") for row in rows)
    assert table in (tmp_path / "filter_eps.md").read_text()
