"""The edge rules, one by one, on every backend."""

import math
import os

import pytest
import torch
from helpers import (
    IMPLS,
    ROWWISE_IMPLS,
    SLOW_INTERPRETER,
    error,
    gradient,
    random_logits,
    random_target,
    random_upstream,
    same_bits,
    truth,
)

from em_kernels import entropy_loss, softmax_stats, token_loss
from em_kernels.backends.choice import backend
from em_kernels.backends.interface import ROW_OUTPUTS, RowSpec, Upstream
from em_kernels.backends.specs import as_rows

pytestmark = pytest.mark.parametrize("impl", IMPLS)
VOCAB = 4500  # more than one block of any backend, and no multiple of anything
INF, NAN = math.inf, math.nan


def run(impl, x, target=None, upstream=None, **kwargs):
    """({output: value}, gradient) of every output that the target allows."""
    x = x.detach().requires_grad_()
    names = tuple(n for n in ROW_OUTPUTS if target is not None or n in truth(torch.zeros(1, 2)))
    stats = softmax_stats(x, target, outputs=names, impl=impl, **kwargs)._asdict()
    stats = {name: stats[name] for name in names}
    upstream = upstream or random_upstream(*x.shape[:-1], dtype=x.dtype, device=x.device)
    wanted = {name: g for name, g in upstream.items() if name in stats}
    return {k: v.detach() for k, v in stats.items()}, gradient(stats, wanted, x)[0]


def check_same(got, expected):
    """Bit for bit: outputs and gradient."""
    for name in expected[0]:
        assert same_bits(got[0][name], expected[0][name]), name
    assert same_bits(got[1], expected[1])


# Logits of -inf


@pytest.mark.parametrize("masked", ("-inf", "lowest"))
def test_minus_inf_logits_are_as_if_they_were_not_there(impl, device, masked):
    x = random_logits(3, VOCAB, device=device)
    gone = torch.rand(VOCAB) < 0.4
    gone[:3] = gone[-3:] = True
    target = torch.randint(0, int((~gone).sum()), (3,), device=device)
    upstream = random_upstream(3, device=device)
    lowest = torch.finfo(x.dtype).min
    holed = x.masked_fill(gone.to(device), -INF if masked == "-inf" else lowest)
    position = (~gone).nonzero()[:, 0].to(device)
    stats, grad = run(impl, holed, position[target], upstream)

    kept = x[:, ~gone].double().requires_grad_()
    expected = truth(kept, target)
    # A logit of -3e38 is finite, so it does count in the moments of the logits.
    moments = {"self_certainty", "logit_mean", "logit_var", "logit_skew"}
    for name in set(ROW_OUTPUTS) - {"is_top1"} - (moments if masked == "lowest" else set()):
        assert error(stats[name], expected[name]) < 1e-4, name
    assert error(grad[:, ~gone], gradient(expected, upstream, kept)[0]) < 1e-5
    assert (grad[:, gone] == 0).all()


# Rows that cannot be computed


@pytest.mark.parametrize("poison", ("nan", "+inf", "nan_and_inf", "all -inf"))
@pytest.mark.parametrize("place", (0, 4098, VOCAB - 1))
def test_a_bad_row_is_nan_and_touches_no_other_row(impl, device, poison, place):
    x = random_logits(3, VOCAB, device=device)
    target, upstream = random_target(3, vocab=VOCAB, device=device), random_upstream(3)
    upstream = {name: value.to(device) for name, value in upstream.items()}
    clean = run(impl, x, target, upstream)
    bad = x.clone()
    match poison:
        case "nan":
            bad[1, place] = NAN
        case "+inf":
            bad[1, place] = INF
        case "nan_and_inf":
            bad[1, place], bad[1, place - 1] = NAN, INF
        case _:
            bad[1] = -INF
    stats, grad = run(impl, bad, target, upstream)
    for name, value in stats.items():
        assert same_bits(value[[0, 2]], clean[0][name][[0, 2]]), name
        assert name == "is_top1" or value[1].isnan(), name
    assert not stats["is_top1"][1]
    assert same_bits(grad[[0, 2]], clean[1][[0, 2]])
    assert grad[1].isnan().all()


@pytest.mark.parametrize("entropy_only", (False, True))
def test_token_loss_of_a_bad_row_is_nan_in_that_row_alone(impl, device, entropy_only):
    x = random_logits(3, VOCAB, device=device)
    x[1, 4099] = NAN
    x.requires_grad_()
    target = None if entropy_only else random_target(3, vocab=VOCAB, device=device)
    ones = torch.ones(3, device=device)
    weights = {"entropy_weight": ones} if entropy_only else {"logprob_weight": ones}
    loss = token_loss(x, target, impl=impl, **weights).loss
    assert loss.isnan()
    (grad,) = torch.autograd.grad(loss, x)
    assert grad[1].isnan().all() and grad[[0, 2]].isfinite().all()


# Rows that are left out


@pytest.mark.parametrize("kind", ("bool", "int", "float", "ignore_index", "own ignore_index"))
def test_left_out_rows_are_exact_zeros_even_if_they_hold_nan(impl, device, kind):
    x = random_logits(2, 3, VOCAB, device=device)
    target = random_target(2, 3, vocab=VOCAB, device=device)
    kept = torch.tensor([[1, 0, 1], [0, 0, 1]], device=device)
    upstream = random_upstream(2, 3, device=device)
    expected = run(impl, x, target, upstream)

    x[0, 1], x[1, 0, 77], x[1, 1] = NAN, INF, -INF
    upstream = {name: torch.where(kept > 0, g, NAN) for name, g in upstream.items()}
    options = {}
    match kind:
        case "ignore_index":
            target = torch.where(kept > 0, target, -100)
        case "own ignore_index":
            target, options = torch.where(kept > 0, target, 5), {"ignore_index": 5}
            target[0, 0] = 6
            expected = run(impl, torch.where(kept[..., None] > 0, x, 0), target, upstream)
        case _:
            target = torch.where(kept > 0, target, 10**9)
            dtype = {"bool": torch.bool, "int": torch.int64, "float": torch.float32}[kind]
            options = {"mask": kept.to(dtype)}
    stats, grad = run(impl, x, target, upstream, **options)
    out, live = kept == 0, kept > 0
    for name, value in stats.items():
        assert (value[out] == 0).all(), name
        assert same_bits(value[live], expected[0][name][live]), name
    assert (grad[out] == 0).all()
    assert same_bits(grad[live], expected[1][live])


def test_all_rows_left_out(impl, device):
    x = torch.full((4, 100), NAN, device=device)
    mask = torch.zeros(4, device=device)
    stats, grad = run(impl, x, random_target(4, vocab=100, device=device), mask=mask)
    assert all((value == 0).all() for value in stats.values())
    assert (grad == 0).all()


def test_the_temperature_of_a_left_out_row_is_not_looked_at(impl, device):
    x = random_logits(3, 100, device=device)
    mask = torch.tensor([True, False, True], device=device)
    temperature = torch.tensor([0.7, 0.0, 1.3], device=device)
    stats, grad = run(impl, x, mask=mask, temperature=temperature)
    assert stats["entropy"][1] == 0 and (stats["entropy"][[0, 2]] > 0).all()
    assert (grad[1] == 0).all() and grad.isfinite().all()


# Sizes


@pytest.mark.parametrize("shape", ((0, 50), (0, 3, 50), (3, 0, 50)))
def test_no_rows(impl, device, shape):
    x = torch.empty(shape, device=device)
    stats, grad = run(impl, x, torch.empty(shape[:-1], dtype=torch.int64, device=device))
    assert all(value.shape == shape[:-1] for value in stats.values())
    assert grad.shape == shape
    assert entropy_loss(x.requires_grad_(), impl=impl).item() == 0


def test_vocabulary_of_one(impl, device):
    x = torch.tensor([[-5.0], [0.0], [1e4]], device=device)
    stats, _grad = run(impl, x, torch.zeros(3, dtype=torch.int64, device=device))
    assert (stats["entropy"] == 0).all() and (stats["logprob"] == 0).all()
    assert torch.equal(stats["lse"], x[:, 0]) and (stats["is_top1"] == 1).all()
    upstream = {"logprob": torch.ones(3, device=device), "entropy": torch.ones(3, device=device)}
    leaf = x.requires_grad_()
    both = softmax_stats(leaf, torch.zeros(3, dtype=torch.int64, device=device), impl=impl)
    assert (gradient(both._asdict(), upstream, leaf)[0] == 0).all()


@pytest.mark.parametrize("valid", (1, 100, 4097))
def test_padded_vocabulary_is_not_read_and_gets_no_gradient(impl, device, valid):
    x = random_logits(3, VOCAB, device=device)
    target, upstream = random_target(3, vocab=valid, device=device), random_upstream(3)
    upstream = {name: value.to(device) for name, value in upstream.items()}
    expected = run(impl, x[:, :valid], target, upstream)
    x[:, valid:] = NAN
    stats, grad = run(impl, x, target, upstream, valid_vocab=valid)
    check_same((stats, grad[:, :valid]), expected)
    assert (grad[:, valid:] == 0).all()


def test_more_than_65535_rows(impl, device):
    if impl == "triton" and SLOW_INTERPRETER:
        pytest.skip("the interpreter takes minutes; the launch grid has its own test")
    rows = 65536 + 3
    x = random_logits(rows, 2, device=device)
    target = random_target(rows, vocab=2, device=device)
    upstream = random_upstream(rows, device=device)
    stats, grad = run(impl, x, target, upstream)
    exact = x.double().requires_grad_()
    expected = truth(exact, target)
    assert error(stats["entropy"], expected["entropy"]) < 1e-6
    assert error(stats["logprob"], expected["logprob"]) < 1e-6
    assert error(grad, gradient(expected, upstream, exact)[0]) < 1e-6


def far_apart(first, device):
    """Rows more than 2^31 elements apart; untouched pages of a CPU tensor take no memory."""
    gap = 2**31 + 1024
    storage = torch.empty(gap + first.shape[1], dtype=first.dtype, device=device)
    rows = storage.as_strided(first.shape, (gap, 1))
    rows.copy_(first)
    return rows


def test_rows_more_than_2_to_the_31_elements_apart(impl, device):
    compact = random_logits(2, 300, dtype=torch.bfloat16, device=device)
    module, spec = backend(impl, torch.device(device)), RowSpec(valid_vocab=300)
    upstream = Upstream(entropy=torch.randn(2, device=device))
    out = torch.empty_like(compact)
    rows = module.loss(as_rows(compact), spec, upstream, ("entropy",), as_rows(out))
    far_out = far_apart(torch.full_like(compact, NAN), device)
    far_rows = module.loss(
        as_rows(far_apart(compact, device)), spec, upstream, ("entropy",), as_rows(far_out)
    )
    assert all(same_bits(a, b) for a, b in zip(far_rows, rows))
    assert same_bits(far_out, out)


@pytest.mark.skipif(
    os.environ.get("EM_KERNELS_BIG_TESTS") != "1",
    reason="needs 9 GB; EM_KERNELS_BIG_TESTS=1 runs it",
)
def test_more_than_2_to_the_31_logits(impl, device):
    if impl == "reference" or (impl == "triton" and SLOW_INTERPRETER):
        pytest.skip("the reference needs 5 times the memory, the interpreter hours")
    vocab = 151936
    x = torch.zeros(2**31 // vocab + 2, vocab, dtype=torch.bfloat16, device=device)
    x[-1].copy_(random_logits(vocab))
    x.requires_grad_()
    entropy = softmax_stats(x, outputs=("entropy",), impl=impl).entropy
    assert error(entropy[-1], truth(x.detach()[-1])["entropy"]) < 1e-5
    assert error(entropy[:-1], torch.full((len(x) - 1,), math.log(vocab))) < 1e-5
    (grad,) = torch.autograd.grad(entropy[-1], x)
    assert (grad[:-1] == 0).all() and grad[-1].abs().sum() > 0


# Ranges


# Every element written


# Same inputs, same bits


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("vocab", (VOCAB, 150001))
def test_the_bits_of_a_row_do_not_depend_on_the_other_rows(
    impl, device, two_threads, threads, vocab
):
    if impl == "triton" and SLOW_INTERPRETER and vocab > VOCAB:
        pytest.skip("the interpreter is slow, and blocks are the same at the smaller size")
    if impl not in ROWWISE_IMPLS:
        pytest.skip("not promised by the reference")
    x = random_logits(9, vocab, device=device)
    target, upstream = random_target(9, vocab=vocab, device=device), random_upstream(9)
    upstream = {name: value.to(device) for name, value in upstream.items()}
    stats, grad = run(impl, x, target, upstream)
    torch.set_num_threads(threads)
    for rows in (slice(4, 5), slice(3, 6), slice(0, 0)):
        some = {name: value[rows] for name, value in upstream.items()}
        expected = {name: value[rows] for name, value in stats.items()}, grad[rows]
        check_same(run(impl, x[rows], target[rows], some), expected)
