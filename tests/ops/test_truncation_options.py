"""What limits of a sampler go together with, and what is refused."""

import math

import pytest
import torch
from helpers import IMPLS, error, make_linear, random_logits
from truncated_rows import OUT, N, V, check, fast_impl, is_kept, targets, truth

from em_kernels import (
    entropy_loss,
    linear_entropy_loss,
    linear_softmax_stats,
    linear_token_covariance,
    softmax_stats,
    token_loss,
)
from em_kernels.backends import support
from em_kernels.backends.interface import OUTPUTS


@fast_impl
def test_limits_of_each_token(impl, device):
    x = random_logits(3, 2, V, device=device)
    top_k = torch.tensor([[1, 5], [300, 10**6], [9, 2]], device=device)
    top_p = torch.tensor([[1.0, 0.5], [0.9, 0.3], [0.99, 1.0]], device=device)
    got = softmax_stats(x, outputs=("entropy", "kept_mass"), top_k=top_k, top_p=top_p, impl=impl)
    for i in range(3):
        for j in range(2):
            limits = dict(top_k=int(top_k[i, j]), top_p=float(top_p[i, j]))
            one = softmax_stats(x[i, j], outputs=("entropy", "kept_mass"), impl=impl, **limits)
            assert got.entropy[i, j] == one.entropy and got.kept_mass[i, j] == one.kept_mass


@fast_impl
def test_transforms_masks_and_a_padded_vocabulary(impl, device):
    x = random_logits(N, V, device=device)
    x[:, -11:] = math.nan
    x[2] = math.nan
    mask = torch.arange(N, device=device) != 2
    transform = dict(softcap=5.0, logit_scale=-1.3, temperature=torch.rand(N, device=device) + 0.5)
    options = dict(valid_vocab=V - 11, mask=mask, outputs=OUT, impl=impl)
    target = torch.randint(0, V - 11, (N,), device=device)
    got = softmax_stats(x, target, top_k=17, **transform, **options)
    z = 5 * torch.tanh(-1.3 * x[:, :-11].double() / 5) / transform["temperature"].double()[:, None]
    kept = is_kept(z.nan_to_num().cpu(), top_k=17)
    want = truth(z.nan_to_num().cpu(), target.cpu(), kept)
    rows = mask.cpu()
    picked = type(got)(*(v if v is None else v[mask] for v in got))
    check(picked, {name: value[rows] for name, value in want.items()})
    assert all(getattr(got, name)[2] == 0 for name in OUT)


@fast_impl
def test_rows_that_cannot_be_computed_and_no_rows(impl, device):
    x = random_logits(4, V, device=device)
    x[0, 3], x[1, 5], x[2] = math.nan, math.inf, -math.inf
    got = softmax_stats(x, outputs=("entropy", "kept_mass"), top_p=0.9, impl=impl)
    for row in (got.entropy, got.kept_mass):
        assert row.isnan().tolist() == [True, True, True, False]
    empty = softmax_stats(x[:0].requires_grad_(), outputs=("entropy",), top_k=3, impl=impl)
    empty.entropy.sum().backward()


@fast_impl
def test_without_limits_the_bits_are_those_of_before(impl, device):
    x = random_logits(N, V, device=device)
    target = torch.randint(0, V, (N,), device=device)
    plain = softmax_stats(x, target, outputs=OUT[:5], impl=impl)
    with_kept = softmax_stats(x, target, outputs=OUT, impl=impl)
    none = softmax_stats(x, target, outputs=OUT, top_k=V, top_p=1.0, min_p=0.0, impl=impl)
    for name in OUT[:5]:
        assert torch.equal(getattr(plain, name), getattr(with_kept, name))
        assert torch.equal(getattr(plain, name), getattr(none, name))
    assert with_kept.is_kept.all() and (with_kept.kept_mass == 1).all()
    assert (none.kept_mass == 1).all()


def test_losses_of_entropy_take_the_limits():
    hidden, weight = make_linear(N, vocab=V)
    logits = hidden @ weight.T
    want = softmax_stats(logits, outputs=("entropy",), top_p=0.6).entropy.mean()
    torch.testing.assert_close(entropy_loss(logits, top_p=0.6), want)
    torch.testing.assert_close(linear_entropy_loss(hidden, weight, top_p=0.6), want)


def test_covariance_leaves_out_what_has_no_logprob():
    hidden, weight = make_linear(N, vocab=V)
    kept = is_kept((hidden @ weight.T).detach(), top_k=4)
    target, advantage = targets(hidden @ weight.T, kept), torch.randn(N)
    inside = kept.gather(-1, target[:, None])[:, 0]
    got = linear_token_covariance(hidden, weight, target, advantage, top_k=4)
    want = linear_token_covariance(
        hidden[inside], weight, target[inside], advantage[inside], top_k=4
    )
    assert (got[~inside] == 0).all()
    torch.testing.assert_close(got[inside], want)


@pytest.mark.parametrize("linear", (False, True))
def test_compiled_without_a_break(linear):
    hidden, weight = make_linear(N, vocab=V)
    target = torch.randint(0, V, (N,))
    kept = (torch.arange(2 * N) % V, torch.arange(0, 2 * N + 1, 2))

    def step(hidden, weight, top_p, **options):
        args = (hidden, weight) if linear else (hidden @ weight.T,)
        function = linear_softmax_stats if linear else softmax_stats
        stats = function(*args, target, outputs=OUT, top_p=top_p, **options)
        return stats.entropy.sum() + torch.where(stats.is_kept, stats.logprob, 0).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for options in (dict(top_k=20), dict(top_k=20), dict(min_p=torch.rand(N))):
        for top_p in (0.9, 0.7, 0.5):
            got, want = (
                compiled(hidden, weight, top_p, **options),
                step(hidden, weight, top_p, **options),
            )
            torch.testing.assert_close(got, want)
            for a, b in zip(
                torch.autograd.grad(got, (hidden, weight)),
                torch.autograd.grad(want, (hidden, weight)),
            ):
                assert error(a, b) < 1e-5
    torch.testing.assert_close(
        compiled(hidden, weight, None, kept=kept), step(hidden, weight, None, kept=kept)
    )


@fast_impl
def test_the_logits_of_the_caller_are_as_they_were(impl, device, monkeypatch):
    monkeypatch.setitem(support.PIECE_BYTES, "cpu", 4 * V * 2)  # two rows at a time
    x = random_logits(3, 4, V, device=device).requires_grad_()
    before, view = x.detach().clone(), x[:, 1:]
    got = softmax_stats(view, outputs=("entropy",), top_k=5, impl=impl).entropy
    token_loss(view, entropy_weight=torch.ones(3, 3, device=device), top_k=5, impl=impl)
    got.sum().backward()
    assert torch.equal(x.detach(), before)
    rows = torch.stack(
        [softmax_stats(row, outputs=("entropy",), top_k=5, impl=impl).entropy for row in view[:, 1]]
    )
    assert torch.equal(got[:, 1], rows)


# Refused


KEPT = (torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 4]))
REFUSED = (
    (dict(top_k=0), ValueError, "top_k must be from 1 on.*got 0"),
    (dict(top_k=-1), ValueError, "top_k must be"),
    (dict(top_k=2.0), TypeError, "top_k must be an int"),
    (dict(top_k=True), TypeError, "top_k must be an int"),
    (dict(top_k=torch.tensor([1, 0, 2])), ValueError, "top_k must be from 1 on, got 0 at token 1"),
    (dict(top_k=torch.ones(3)), TypeError, "top_k must have an integer dtype"),
    (dict(top_k=torch.ones(2, dtype=torch.int64)), ValueError, "top_k must have the leading shape"),
    (dict(top_k=torch.ones(3, dtype=torch.cfloat)), TypeError, "top_k must have an integer dtype"),
    (dict(top_p=0.0), ValueError, "top_p must be in"),
    (dict(top_p=1.5), ValueError, "top_p must be in"),
    (dict(top_p=math.nan), ValueError, "top_p must be in"),
    (dict(top_p="0.5"), TypeError, "top_p must be a number"),
    (
        dict(top_p=torch.tensor([0.5, math.nan, 1.0])),
        ValueError,
        "top_p must .* got nan at token 1",
    ),
    (dict(top_p=torch.tensor([1, 1, 1])), TypeError, "top_p must have floating point"),
    (
        dict(top_p=torch.full((3,), 0.5, requires_grad=True)),
        ValueError,
        "top_p must not require grad",
    ),
    (dict(min_p=-0.1), ValueError, "min_p must be in"),
    (dict(min_p=1.1), ValueError, "min_p must be in"),
    (dict(sampler="sglang"), ValueError, "sampler must be one of"),
    (dict(kept=KEPT, top_p=0.5), ValueError, "kept .* leave out top_p"),
    (dict(kept=KEPT[0]), TypeError, r"kept must be \(ids, offsets\)"),
    (dict(kept=(KEPT[0].int(), KEPT[1])), TypeError, "kept: ids must be int64"),
    (dict(kept=(KEPT[0], KEPT[1].float())), TypeError, "kept: offsets must be int64"),
    (dict(kept=(KEPT[0], KEPT[1][:3])), ValueError, "kept: offsets must be one more than the 3"),
    (dict(kept=(KEPT[0], torch.tensor([0, 2, 1, 4]))), ValueError, "kept: .*not ascending"),
    (dict(kept=(KEPT[0], torch.tensor([0, 1, 2, 3]))), ValueError, "kept: offsets must ascend"),
    (dict(kept=(KEPT[0], torch.tensor([1, 2, 3, 4]))), ValueError, "kept: offsets must ascend"),
    (dict(kept=(KEPT[0], torch.tensor([0, 2, 2, 4]))), ValueError, "kept: .* none at token 1"),
    (dict(kept=(torch.tensor([0, 1, 2, 5]), KEPT[1])), ValueError, "kept: .*got 5 at token 2"),
    (dict(kept=(torch.tensor([-1, 1, 2, 3]), KEPT[1])), ValueError, "kept: .*got -1 at token 0"),
    (
        dict(kept=(torch.tensor([0, 1, 3, 3]), KEPT[1])),
        ValueError,
        "kept: .*got 3 again at token 2",
    ),
)


@pytest.mark.parametrize("options, kind, message", REFUSED, ids=lambda v: str(v)[:40])
def test_what_cannot_be_is_refused_by_name(options, kind, message):
    hidden, weight = torch.zeros(3, 2), torch.zeros(5, 2)
    for call in (softmax_stats, lambda x, **o: linear_softmax_stats(hidden, weight, **o)):
        with pytest.raises(kind, match=message):
            call(torch.zeros(3, 5), outputs=("entropy",), **options)


@pytest.mark.skipif("triton" not in IMPLS, reason="needs Triton")
@pytest.mark.parametrize("options", (dict(top_k=3), dict(kept=KEPT), dict(outputs=("kept_mass",))))
def test_the_fused_product_refuses(options):
    hidden, weight = torch.zeros(3, 2), torch.zeros(5, 2)
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be .*fuse_product"):
        linear_softmax_stats(hidden, weight, fuse_product=True, **options)


def test_any_number_from_v_on_keeps_all():
    x = random_logits(N, V)
    for top_k in (V, 1 << 63, 1 << 80):
        assert (softmax_stats(x, outputs=("kept_mass",), top_k=top_k).kept_mass == 1).all()


def test_every_output_is_there_with_limits():
    x, target = random_logits(N, V), torch.randint(0, V, (N,))
    stats = softmax_stats(x, target, outputs=OUTPUTS, top_k=4)
    assert all(value is not None for value in stats)
