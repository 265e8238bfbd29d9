"""Inputs the tests of the policy losses share."""

import torch


def policy_inputs(shape=(4, 6), seed=0):
    """(logprob with gradient, old_logprob, advantage, mask) in float64; some ratios are clipped."""
    g = torch.Generator().manual_seed(seed)
    draw = dict(generator=g, dtype=torch.float64)
    logprob = -torch.rand(shape, **draw) * 3
    old = logprob + torch.randn(shape, **draw) * 0.3
    advantage = torch.randn(shape, **draw)
    mask = torch.rand(shape, generator=g) > 0.3
    return logprob.requires_grad_(), old, advantage, mask


def poison(x, mask, value=float("nan")):
    """A copy of x with `value` wherever the mask is 0."""
    return torch.where(mask, x.detach(), value).requires_grad_(x.requires_grad)
