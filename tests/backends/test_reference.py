"""The reference against textbook formulas in float64, and its closed-form gradients."""

import pytest
import torch
from contract import Contract, Subject
from helpers import (
    DIFFERENTIABLE,
    error,
    gradient,
    random_logits,
    random_target,
    random_upstream,
    rows_of_entropy,
    truth,
)

from em_kernels.backends import reference
from em_kernels.backends.interface import OUTPUTS, ROW_OUTPUTS, RowSpec, Saved, Upstream

TRANSFORMS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 5.0, "logit_scale": 1.5},
    "padded": {"valid_vocab": 11},
    "everything": {"temperature": 2.0, "softcap": 8.0, "logit_scale": -0.5, "valid_vocab": 12},
}


def spec_of(x, target=None, *, temperature=1.0, softcap=None, logit_scale=1.0, valid_vocab=None):
    return RowSpec(
        target=target,
        temperature=temperature,
        softcap=softcap or 0.0,
        logit_scale=logit_scale,
        valid_vocab=valid_vocab or x.shape[-1],
    )


class TestReference(Contract):
    """In each dtype against itself in float64."""

    IMPLS, LENGTHS, LONG, PLACES = ("reference",), (1, 2, 13, 100), 1000, (0, 500, 999)
    test_entropy_slope_of_the_likeliest_token = None  # its sums cancel

    @pytest.fixture
    def subject(self, impl):
        return Subject(reference, rowwise=False, condition={"self_certainty": 5})


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_output_equals_the_textbook_formula(name):
    transform = TRANSFORMS[name]
    x = random_logits(50, 13, dtype=torch.float64)
    target = random_target(50, vocab=transform.get("valid_vocab", 13))
    rows = reference.stats(x, spec_of(x, target, **transform), ROW_OUTPUTS)
    expected = truth(x, target, **transform)
    assert tuple(expected) == OUTPUTS
    for output, row in zip(ROW_OUTPUTS, rows[3:]):
        assert error(row, expected[output].double()) < 1e-12, output


@pytest.mark.parametrize("name", TRANSFORMS)
def test_closed_form_gradient_equals_autograd_through_stats(name):
    transform = TRANSFORMS[name]
    x = random_logits(20, 13, dtype=torch.float64).requires_grad_()
    spec = spec_of(x, random_target(20, vocab=transform.get("valid_vocab", 13)), **transform)
    rows = reference.stats(x, spec, DIFFERENTIABLE)
    upstream = random_upstream(20, dtype=torch.float64)
    (by_autograd,) = gradient(dict(zip(DIFFERENTIABLE, rows[3:])), upstream, x)
    out = torch.full_like(x, torch.nan)
    saved = Saved(*(row.detach() for row in rows[:3]))
    reference.grad(x.detach(), spec, saved, Upstream(**upstream), out)
    assert error(out, by_autograd) < 1e-13


@pytest.mark.parametrize("output", DIFFERENTIABLE)
def test_gradcheck_of_stats(output):
    x = random_logits(4, 7, dtype=torch.float64).requires_grad_()
    spec = spec_of(x, random_target(4, vocab=7), temperature=0.9, softcap=6.0)

    def row(logits):
        return reference.stats(logits, spec, (output,))[3]

    assert torch.autograd.gradcheck(row, x)


@pytest.mark.parametrize("output", ("logprob", "entropy"))
def test_gradient_sums_to_zero_over_the_vocabulary(output):
    x = random_logits(30, 999, dtype=torch.float64)
    spec = spec_of(x, random_target(30, vocab=999))
    saved = Saved(*reference.stats(x, spec, ()))
    out = torch.empty_like(x)
    reference.grad(x, spec, saved, Upstream(**{output: torch.ones(30).double()}), out)
    assert out.abs().sum(-1).min() > 1e-3
    assert out.sum(-1).abs().max() < 1e-14


def test_entropy_slope_is_the_change_of_entropy_in_a_policy_gradient_step():
    x = random_logits(8, 20, dtype=torch.float64, scale=1.0)
    target, step = random_target(8, vocab=20), 1e-6
    moved = x - step * torch.softmax(x, -1)
    moved[torch.arange(8), target] += step
    change = (truth(moved)["entropy"] - truth(x)["entropy"]) / step
    (slope,) = reference.stats(x, spec_of(x, target), ("entropy_slope",))[3:]
    assert error(slope, change) < 1e-5


def test_textbook_entropy_in_float32_loses_what_the_reference_keeps():
    """The reason for leaving the maximum out of r."""
    x = rows_of_entropy(torch.logspace(-9, -5, 20), 1000)
    expected = truth(x)["entropy"]
    log_p = torch.log_softmax(x, -1)
    textbook = torch.logsumexp(x, -1) - (log_p.exp() * x).sum(-1)
    entropy = reference.stats(x, spec_of(x), ("entropy",))[3]
    assert ((textbook - expected) / expected).abs().max() > 0.1
    assert ((entropy - expected) / expected).abs().max() < 1e-5


def test_only_what_is_asked_for_is_returned():
    x = random_logits(3, 5)
    assert len(reference.stats(x, spec_of(x), ())) == 3
    assert len(reference.stats(x, spec_of(x), ("entropy", "lse"))) == 5
