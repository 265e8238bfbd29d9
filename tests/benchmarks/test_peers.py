"""TRL and Liger, where they agree with the maths: same numbers, same gradients, same signatures."""

import inspect

import pytest
import torch
from helpers import (
    FAST_IMPLS,
    SLOW_INTERPRETER,
    error,
    gradient,
    random_logits,
    random_target,
    random_upstream,
    truth,
)

import em_kernels
from em_kernels import linear_softmax_stats, softmax_stats

N, V, D = 7, 1031, 16
DEVICE = "cpu" if SLOW_INTERPRETER else "cuda"
EACH_IMPL = pytest.mark.parametrize("impl", FAST_IMPLS)


def peer(module, name):
    """The function of a peer, or a skip that says which package is missing."""
    return getattr(pytest.importorskip(module, exc_type=ImportError), name)


@pytest.fixture
def batch():
    """(logits (2, N, V), index, upstream of logprob and entropy)."""
    x = random_logits(2, N, V, device=DEVICE).requires_grad_()
    upstream = random_upstream(2, N, device=DEVICE)
    return x, random_target(2, N, vocab=V, device=DEVICE), upstream


@pytest.fixture
def linear_batch():
    hidden = random_logits(N, D, scale=1.0, device=DEVICE).requires_grad_()
    weight = random_logits(V, D, scale=0.7, device=DEVICE).requires_grad_()
    return (
        hidden,
        weight,
        random_target(N, vocab=V, device=DEVICE),
        random_upstream(N, device=DEVICE),
    )


def pair(logprob, entropy):
    return {"logprob": logprob, "entropy": entropy}


def both(upstream):
    return pair(upstream["logprob"], upstream["entropy"])


def check_pair(ours, theirs, upstream, *inputs, tolerance=1e-5):
    for name in ("logprob", "entropy"):
        assert error(ours[name], theirs[name]) < tolerance, name
    grads = gradient(ours, both(upstream), *inputs), gradient(theirs, both(upstream), *inputs)
    for a, b in zip(*grads, strict=True):
        assert error(a, b) < tolerance


# TRL


def test_signature_is_that_of_trl():
    theirs = peer("trl.kernels", "selective_log_softmax_and_entropy")
    names = list(inspect.signature(theirs).parameters)
    ours = inspect.signature(em_kernels.selective_log_softmax_and_entropy)
    assert list(ours.parameters) == names == ["logits", "index", "temperature", "row_mask"]
    assert [p.default for p in ours.parameters.values()][2:] == [1.0, None]
    assert (
        "logits" in inspect.signature(peer("trl.trainer.utils", "entropy_from_logits")).parameters
    )
    assert list(inspect.signature(em_kernels.entropy_from_logits).parameters) == ["logits"]


def test_selective_log_softmax_and_entropy_is_trls(batch):
    x, index, upstream = batch
    theirs = peer("trl.trainer.utils", "selective_log_softmax_and_entropy")
    mask = torch.rand(2, N, device=DEVICE) > 0.3
    expected = pair(*theirs(x, index, temperature=0.7, row_mask=mask))
    got = pair(*em_kernels.selective_log_softmax_and_entropy(x, index, 0.7, mask))
    check_pair(got, expected, upstream, x)
    assert (got["entropy"][~mask] == 0).all()


def test_trls_triton_kernel(batch):
    x, index, upstream = batch
    theirs = peer("trl.kernels", "selective_log_softmax_and_entropy")
    x = x.detach()[:1, :3].requires_grad_()
    index, upstream = index[:1, :3], {name: g[:1, :3] for name, g in upstream.items()}
    try:
        expected = pair(*theirs(x, index, 0.7))
    except Exception as reason:
        pytest.skip(f"TRL's Triton kernel does not run here: {reason}")
    got = pair(*em_kernels.selective_log_softmax_and_entropy(x, index, 0.7))
    check_pair(got, expected, upstream, x)


def test_entropy_from_logits_is_trls(batch):
    x = batch[0]
    theirs = peer("trl.trainer.utils", "entropy_from_logits")(x)
    ours = em_kernels.entropy_from_logits(x)
    assert error(ours, theirs) < 1e-5
    grads = [torch.autograd.grad(value.sum(), x)[0] for value in (ours, theirs)]
    assert error(*grads) < 1e-5


def test_where_trl_loses_a_nearly_certain_row_this_library_does_not():
    theirs = peer("trl.trainer.utils", "entropy_from_logits")
    x = torch.tensor([[25.0, 0.0, 0.0, 0.0], [18.0, 0.0, 0.0, 0.0]], device=DEVICE)
    exact = truth(x)["entropy"]
    assert error(theirs(x), exact) > 0.02
    assert error(em_kernels.entropy_from_logits(x), exact) < 1e-6


@EACH_IMPL
@pytest.mark.parametrize("softcap", (None, 5.0))
def test_trls_chunked_function(impl, linear_batch, softcap):
    hidden, weight, target, upstream = linear_batch
    if impl == "cpu" and DEVICE != "cpu":
        pytest.skip("the tensors are on the GPU")
    theirs = peer("trl.kernels", "ChunkedLogProbFunction")
    logprob, entropy, log_square, mean, top = theirs.apply(
        hidden, weight, None, target, 0.8, 300, softcap, 1.2
    )
    ours = linear_softmax_stats(
        hidden,
        weight,
        target,
        temperature=0.8,
        softcap=softcap,
        logit_scale=1.2,
        outputs=("logprob", "entropy", "collision", "logit_mean", "is_top1"),
        impl=impl,
    )
    check_pair(ours._asdict(), pair(logprob, entropy), upstream, hidden, weight)
    assert error(ours.collision.log(), log_square) < 1e-5
    assert error(ours.logit_mean, mean) < 1e-4
    assert torch.equal(ours.is_top1, top)


# Liger


@EACH_IMPL
def test_ligers_fused_linear_scaled_cross_entropy(impl, linear_batch):
    hidden, weight, target, upstream = linear_batch
    if impl == "cpu" and DEVICE != "cpu":
        pytest.skip("the tensors are on the GPU")
    theirs = peer(
        "liger_kernel.ops.fused_linear_scaled_cross_entropy",
        "LigerFusedLinearScaledCrossEntropyFunction",
    )
    target = target.clone()
    target[2] = -100
    loss, entropy = theirs.apply(hidden, weight, target, 0.8, -100, 1, True)
    ours = linear_softmax_stats(hidden, weight, target, temperature=0.8, impl=impl)
    check_pair(ours._asdict(), pair(-loss, entropy), upstream, hidden, weight)
    assert ours.entropy[2] == ours.logprob[2] == 0


# transformers and plain PyTorch, which everybody has


@EACH_IMPL
def test_torch_cross_entropy(impl, batch):
    x, target, _ = batch
    if impl == "cpu" and DEVICE != "cpu":
        pytest.skip("the tensors are on the GPU")
    target[0, 3] = -100
    theirs = torch.nn.functional.cross_entropy(x.flatten(0, 1), target.flatten(), reduction="sum")
    ours = -softmax_stats(x, target, outputs=("logprob",), impl=impl).logprob.sum()
    assert error(ours, theirs) < 1e-6
    grads = [torch.autograd.grad(value, x)[0] for value in (ours, theirs)]
    assert error(*grads) < 1e-6


@EACH_IMPL
def test_torch_categorical(impl, batch):
    x, target, _ = batch
    if impl == "cpu" and DEVICE != "cpu":
        pytest.skip("the tensors are on the GPU")
    theirs = torch.distributions.Categorical(logits=x)
    ours = softmax_stats(x, target, impl=impl)
    assert error(ours.entropy, theirs.entropy()) < 1e-5
    assert error(ours.logprob, theirs.log_prob(target)) < 1e-5
