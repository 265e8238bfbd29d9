"""On a CPU db and the gradients of low-rank factors are sums of terms as wide as the logits."""

import pytest
import torch
from helpers import ON_CPU, error

from em_kernels import linear_divergence_loss, linear_token_loss

N, D, V, R = 24, 16, 301, 3


def leaves(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def gradients(loss_of, factors, impl=None):
    """Those of the float32 factors; the head is bfloat16, or float64 where `impl` is None."""
    torch.manual_seed(1)
    dtype = torch.float64 if impl is None else torch.bfloat16
    hidden, weight = (torch.randn(n, D).bfloat16().to(dtype) for n in (N, V))
    given = [x.detach().to(torch.promote_types(x.dtype, dtype)).requires_grad_() for x in factors]
    options = {} if impl is None else dict(impl=impl, logits_dtype=torch.float32)
    loss_of(hidden, weight, given, options).backward()
    return [x.grad for x in given]


def each(bias):
    """The weight of every token in their mean."""
    return torch.full((N,), 1 / N, dtype=bias.dtype)


def of_tokens(hidden, weight, given, options):
    bias, a, b = given
    target = torch.arange(N) * 7 % V
    return linear_token_loss(
        hidden, weight, target, bias=bias, lora=(a, b, 0.5), logprob_weight=-each(bias), **options
    )[0]


def of_a_divergence(hidden, weight, given, options):
    bias, other_bias = given
    other = hidden.roll(1, 0), weight.roll(1, 0)
    found = linear_divergence_loss(
        hidden, weight, *other, bias=bias, other_bias=other_bias, token_weight=each(bias), **options
    )
    return found.loss


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize(
    "loss_of, shapes", ((of_tokens, ((V,), (R, D), (V, R))), (of_a_divergence, ((V,), (V,))))
)
def test_they_are_as_accurate_as_the_logits(impl, loss_of, shapes):
    factors = leaves(*shapes)
    truth = gradients(loss_of, factors)
    for own, want in zip(gradients(loss_of, factors, impl), truth, strict=True):
        assert own.dtype == torch.float32
        assert error(own, want) < 2e-5  # of terms of 16 bits 5e-4
