"""k1, k2 and k3: values by hand, and what they and their gradients are on average."""

import math

import pytest
import torch

from em_kernels.objectives import kl_estimate


def test_by_hand():
    logprob, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0 - math.log(2), -2.0])
    # d = -log 2 and 0.
    k1, k2, k3 = (kl_estimate(logprob, ref, estimator=k) for k in ("k1", "k2", "k3"))
    torch.testing.assert_close(k1, torch.tensor([math.log(2), 0.0]))
    torch.testing.assert_close(k2, torch.tensor([math.log(2) ** 2 / 2, 0.0]))
    torch.testing.assert_close(k3, torch.tensor([0.5 + math.log(2) - 1, 0.0]))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased(estimator):
    p, q = (torch.randn(9, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    mean = (p.exp() * kl_estimate(p, q, estimator=estimator)).sum()
    torch.testing.assert_close(mean, (p.exp() * (p - q)).sum())


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_mean_gradient_is_that_of(estimator):
    logits = torch.randn(9, dtype=torch.float64, requires_grad=True)
    q, p = torch.randn(9, dtype=torch.float64).log_softmax(-1), logits.log_softmax(-1)
    divergence = {
        "k1": 0 * p.sum(),
        "k2": (p.exp() * (p - q)).sum(),
        "k3": (q.exp() * (q - p)).sum(),
    }[estimator]
    (expected,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    mean = (p.detach().exp() * kl_estimate(p, q, estimator=estimator)).sum()
    (found,) = torch.autograd.grad(mean, logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradcheck_and_no_gradient_to_the_reference(estimator):
    p = torch.randn(5, dtype=torch.float64, requires_grad=True)
    q = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, q.detach(), estimator=estimator), p)
    kl_estimate(p, q, estimator=estimator).sum().backward()
    assert q.grad is None


def test_k3_is_accurate_for_close_policies_and_finite_for_far_ones():
    close = kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.0 + 2**-10]))
    d = 2**-10
    torch.testing.assert_close(close.item(), d * d / 2 + d**3 / 6, rtol=1e-3, atol=0)
    assert kl_estimate(torch.tensor([-200.0, -1.0]), torch.tensor([-1.0, -200.0])).isfinite().all()
    # Only exp(d) for a large d overflows: for a small one nothing is held.
    logprob = torch.tensor([-1.0, -1.0, -0.5, -30.0], requires_grad=True)
    far = kl_estimate(logprob, torch.tensor([-30.0, -25.0, -100.0, -1.0]))
    torch.testing.assert_close(far[:3], torch.tensor([28.0, 23.0, 98.5]))
    far.sum().backward()
    torch.testing.assert_close(logprob.grad, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert kl_estimate(torch.ones(2).bfloat16(), torch.ones(2).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: kl_estimate(x, x, estimator="k4"), ValueError, "estimator must be one of"),
        (lambda x: kl_estimate(x, x[:1]), ValueError, r"ref_logprob must have shape \(2,\)"),
        (lambda x: kl_estimate(1.0, x), TypeError, "logprob must be a tensor, got float"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(2))
