"""The fused linear losses of Liger and PyTorch, where they overlap with this package's."""

from __future__ import annotations

import pytest
import torch
from helpers import error, make_linear, random_target
from torch.nn import functional

from em_kernels import linear_softmax_stats, linear_token_loss
from em_kernels.objectives import aggregate_loss, grpo_loss

N, V, D = 24, 301, 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cross_entropy(hidden, weight, target, **arguments):
    """The mean negative log-probability over the targets, its gradient made in the forward."""
    counted = target != -100
    return linear_token_loss(
        hidden, weight, target, logprob_weight=-counted.float() / counted.sum(), **arguments
    ).loss


@pytest.fixture
def inputs():
    """(hidden, weight, bias, target with some of it ignored), on the GPU if there is one."""
    hidden, weight = (x.detach().to(DEVICE).requires_grad_() for x in make_linear(N))
    bias = torch.randn(V, device=DEVICE, requires_grad=True)
    target = random_target(N, vocab=V, device=DEVICE)
    target[::5] = -100
    return hidden, weight, bias, target


def check(ours, theirs, *parameters):
    assert error(ours, theirs) < 1e-5
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in (ours, theirs))):
        assert error(a, b) < 1e-5


# PyTorch


def torch_options():
    """None for the plain path of torch's function, then its chunked one."""
    if not hasattr(functional, "linear_cross_entropy"):
        return [None]
    return [None, torch.nn.LinearCrossEntropyOptions(batch_chunk_size=7)]


@pytest.mark.parametrize("options", torch_options(), ids=lambda x: "chunked" if x else "plain")
@pytest.mark.parametrize("biased", (False, True))
def test_torch_linear_cross_entropy(options, biased, inputs):
    if not hasattr(functional, "linear_cross_entropy"):
        pytest.skip("torch has no linear_cross_entropy (it came with 2.13)")
    hidden, weight, bias, target = inputs
    bias = bias if biased else None
    theirs = functional.linear_cross_entropy(
        hidden, weight, target, linear_bias=bias, options=options
    )
    ours = cross_entropy(hidden, weight, target, bias=bias)
    check(ours, theirs, hidden, weight, *([bias] if biased else []))


# Liger


@pytest.mark.parametrize("biased, softcap", ((False, None), (True, None), (True, 5.0)))
def test_ligers_fused_linear_cross_entropy(biased, softcap, inputs):
    liger = pytest.importorskip("liger_kernel.transformers", exc_type=ImportError)
    if softcap and DEVICE == "cpu":
        pytest.skip("Triton's interpreter does not run Liger's softcap")
    hidden, weight, bias, target = inputs
    bias = bias if biased else None
    theirs = liger.LigerFusedLinearCrossEntropyLoss(softcap=softcap)(weight, hidden, target, bias)
    ours = cross_entropy(hidden, weight, target, bias=bias, softcap=softcap)
    check(ours, theirs, hidden, weight, *([bias] if biased else []))


@pytest.mark.parametrize("mode, name", (("token_mean", "bnpo"), ("sequence_mean", "grpo")))
def test_ligers_fused_linear_grpo(mode, name, inputs):
    liger = pytest.importorskip("liger_kernel.chunked_loss", exc_type=ImportError)
    hidden, weight, bias, _ = inputs
    hidden = hidden.detach().view(4, 6, D).requires_grad_()
    tokens = random_target(4, 6, vocab=V, device=DEVICE)
    mask = (torch.arange(6) < torch.tensor([[6], [3], [5], [1]])).to(DEVICE)
    advantage = torch.randn(4, device=DEVICE)
    stats = linear_softmax_stats(
        hidden, weight, tokens, bias=bias, outputs=("logprob",), temperature=0.8
    )
    old, ref = (stats.logprob.detach() + 0.3 * torch.randn_like(stats.logprob) for _ in range(2))
    theirs, _ = liger.LigerFusedLinearGRPOLoss(
        beta=0.04, loss_type=name, temperature=0.8, compiled=False
    )(
        hidden,
        weight,
        tokens,
        mask.float(),
        advantage,
        bias,
        ref_per_token_logps=ref,
        old_per_token_logps=old,
    )
    loss = grpo_loss(stats.logprob, old, advantage, mask, ref_logprob=ref, kl_coef=0.04).loss
    check(aggregate_loss(loss, mask, mode=mode), theirs, hidden, weight, bias)
