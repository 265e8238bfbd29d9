"""verl's policy losses where log-ratios are extreme and masked tokens are anything, and what its
head is given besides the usual, against verl's functions; `logits_dtype` through the switch."""

import sys

import pytest
import torch
import verl_source
from helpers import error, make_linear, random_target, truth
from test_verl import ALGORITHMS, MODES, batch, make_config

from em_kernels.integrations import verl as integration

ALL_MODES = (*MODES, "seq-mean-token-sum-norm")
LOG_RATIOS = (-50.0, -30.0, -20.5, -19.5, -1.0, 0.0, 1.0, 19.5, 20.5, 30.0, 50.0)
CONFIGS = {
    "dual clip": {},
    "default dual clip": dict(clip_ratio_c=None),
    "dual clip beyond the clamp": dict(clip_ratio_c=1e12),
    "wide clip": dict(clip_ratio_low=0.9, clip_ratio_high=1e12),
}


@pytest.fixture
def verl(monkeypatch):
    yield verl_source.load(monkeypatch)
    integration.remove_from_verl()


def config_of(name):
    config = make_config(clip_cov_ub=1e9)
    vars(config).update(CONFIGS[name])
    if config.clip_ratio_c is None:
        del config.clip_ratio_c
    return config


def extreme_batch(dtype):
    """Every log-ratio with advantages of both signs; the last tokens of each answer masked."""
    change = torch.tensor(LOG_RATIOS, dtype=dtype).repeat(6, 1)
    old = -60 - torch.rand(change.shape, dtype=dtype)
    advantage = torch.tensor([-2.0, 1.5, -0.1, 0.3, 4.0, -1.0], dtype=dtype)[:, None]
    mask = torch.arange(len(LOG_RATIOS)) < torch.tensor([11, 11, 9, 7, 11, 0])[:, None]
    return dict(
        old_log_prob=old,
        log_prob=(old + change).requires_grad_(),
        advantages=advantage.expand(change.shape).clone(),
        response_mask=mask,
    )


def agree(function, inputs, theirs, their_inputs, **arguments):
    """Loss, gradient and metrics of both; the gradient of masked tokens is 0 here."""
    expected, expected_metrics = theirs(**their_inputs, **arguments)
    loss, metrics = function(**inputs, **arguments)
    digits = 1e-6 if inputs["advantages"].dtype == torch.float64 else 1e-4
    assert loss.item() == pytest.approx(expected.item(), rel=digits)
    assert metrics == pytest.approx(expected_metrics, rel=digits, abs=1e-7)
    (grad,) = torch.autograd.grad(loss, inputs["log_prob"])
    (expected_grad,) = torch.autograd.grad(expected, their_inputs["log_prob"])
    torch.testing.assert_close(grad, expected_grad, rtol=digits, atol=1e-8)
    assert (grad[~inputs["response_mask"]] == 0).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", integration.POLICY_LOSSES)
def test_extreme_log_ratios(name, config, dtype, verl):
    theirs, inputs = verl[ALGORITHMS].get_policy_loss_fn(name), extreme_batch(dtype)
    for mode in ALL_MODES:
        for weights in (None, torch.rand(6, len(LOG_RATIOS), dtype=dtype)):
            agree(
                integration.POLICY_LOSSES[name],
                inputs,
                theirs,
                inputs,
                loss_agg_mode=mode,
                config=config_of(config),
                rollout_is_weights=weights,
            )


@pytest.mark.parametrize("value", (float("nan"), float("-inf"), float("inf")))
@pytest.mark.parametrize("name", integration.POLICY_LOSSES)
def test_what_is_masked_does_not_matter(name, value, verl):
    theirs, clean = verl[ALGORITHMS].get_policy_loss_fn(name), extreme_batch(torch.float64)
    outside = ~clean["response_mask"]
    dirty = {
        key: x.detach().masked_fill(outside, value) if x.is_floating_point() else x
        for key, x in clean.items()
    }
    dirty["log_prob"].requires_grad_()
    for mode in ALL_MODES:
        arguments = dict(loss_agg_mode=mode, config=make_config())
        agree(integration.POLICY_LOSSES[name], dirty, theirs, clean, **arguments)


@pytest.mark.parametrize("name", integration.POLICY_LOSSES)
@pytest.mark.parametrize("kind", (torch.bool, torch.int64, torch.float32))
def test_masks_of_any_dtype_and_none_that_counts(name, kind, verl):
    theirs, inputs = verl[ALGORITHMS].get_policy_loss_fn(name), batch()
    inputs["response_mask"] = inputs["response_mask"].to(kind)
    ours = integration.POLICY_LOSSES[name]
    expected, expected_metrics = theirs(**inputs, config=make_config())
    loss, metrics = ours(**inputs, config=make_config())
    assert error(loss, expected) < 1e-7
    assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-7)
    inputs["response_mask"] = torch.zeros_like(inputs["response_mask"])
    loss, metrics = ours(**inputs, config=make_config())
    assert loss == theirs(**inputs, config=make_config())[0] == 0
    assert set(metrics) == set(expected_metrics) and not any(metrics.values())


def test_overflow_is_held_where_verl_has_nan(verl):
    """exp(89) is infinite in float32, and 0 times its gradient NaN."""
    inputs = extreme_batch(torch.float32)
    inputs["log_prob"] = (inputs["old_log_prob"] + 100).requires_grad_()
    for name in ("clip_cov", "kl_cov"):
        loss, _ = integration.POLICY_LOSSES[name](**inputs, config=make_config())
        loss.backward()
        assert loss.isfinite() and inputs["log_prob"].grad.isfinite().all()


@pytest.mark.parametrize(("value", "kind"), ((None, TypeError), (1.0, ValueError)))
def test_a_bad_dual_clip_is_named(value, kind, verl):
    config = make_config()
    config.clip_ratio_c = value
    with pytest.raises(kind, match="clip_ratio_c must be"):
        integration.policy_loss_vanilla(**batch(), config=config)


# The head


def head_and_labels(*shape, vocab=301):
    return *make_linear(*shape), random_target(*shape, vocab=vocab)


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int32, torch.int16, torch.int64))
def test_labels_of_any_integer_dtype(dtype):
    hidden, weight, labels = head_and_labels(2, 3)
    labels %= 256
    expected = integration.linear_cross_entropy(hidden, weight, labels)
    got = integration.linear_cross_entropy(hidden, weight, labels.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
    with pytest.raises(TypeError, match=r"target must be int64, got torch.float32"):
        integration.linear_cross_entropy(hidden, weight, labels.float())
    with pytest.raises(TypeError, match=r"target must be int64, got torch.bool"):
        integration.linear_cross_entropy(hidden, weight, labels > 0)


@pytest.mark.parametrize("shape", ((), (1,), (1, 1)))
def test_a_temperature_that_is_a_tensor(shape):
    hidden, weight, labels = head_and_labels(2, 3)
    expected = integration.linear_cross_entropy(hidden, weight, labels, 0.5)
    got = integration.linear_cross_entropy(hidden, weight, labels, torch.full(shape, 0.5))
    assert all(error(a, b) < 1e-6 for a, b in zip(got, expected))


def test_a_temperature_per_token():
    hidden, weight, labels = head_and_labels(2, 3)
    rows = torch.linspace(0.5, 2, 6).view(2, 3)
    logprob, entropy = integration.linear_cross_entropy(hidden, weight, labels, rows)
    expected = truth(hidden @ weight.T / rows[..., None], labels)
    assert error(logprob, expected["logprob"].flatten()) < 1e-5
    assert error(entropy, expected["entropy"].flatten()) < 1e-5
    with pytest.raises(ValueError, match="temperature must have the leading shape"):
        integration.linear_cross_entropy(hidden, weight, labels, rows[0])


@pytest.mark.parametrize("name", ("NONE", "Sum", "mean"))
def test_reductions_in_any_case(name):
    hidden, weight, labels = head_and_labels(4)
    got, _ = integration.linear_cross_entropy(hidden, weight, labels, 1.0, name)
    assert torch.equal(
        got, integration.linear_cross_entropy(hidden, weight, labels, 1.0, name.lower())[0]
    )


@pytest.mark.parametrize("shape", ((0,), (2, 0), (1,), (1, 1)))
def test_no_token_and_one(shape):
    hidden, weight, labels = head_and_labels(*shape)
    results = integration.linear_cross_entropy(hidden, weight, labels)
    assert all(x.shape == (labels.numel(),) for x in results)
    grads = torch.autograd.grad(sum(x.sum() for x in results), (hidden, weight))
    assert [g.shape for g in grads] == [hidden.shape, weight.shape]
    assert (grads[0].norm() > 0) == (labels.numel() > 0)


def test_hidden_states_that_are_not_contiguous():
    hidden, weight, labels = head_and_labels(3, 4)
    expected = integration.linear_cross_entropy(hidden, weight, labels)
    moved = hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    got = integration.linear_cross_entropy(moved, weight, labels.T.contiguous().T)
    for a, b in zip(got, expected):
        assert torch.equal(a, b)
    grads = [torch.autograd.grad(x[0].sum(), h)[0] for x, h in ((got, moved), (expected, hidden))]
    assert error(*grads) < 1e-6


# logits_dtype


def bfloat16_head():
    torch.manual_seed(1)
    hidden = torch.randn(64, 32).bfloat16()
    weight = torch.randn(301, 32).bfloat16()
    labels = random_target(64, vocab=301)
    return hidden, weight, labels, truth(hidden.double() @ weight.double().T, labels)["logprob"]


def test_logits_dtype_reaches_the_head(verl):
    hidden, weight, labels, exact = bfloat16_head()
    errors = {}
    for dtype in (None, torch.float32, None):
        integration.apply_to_verl(logits_dtype=dtype)
        head = verl["verl.utils.kernel.linear_cross_entropy"].linear_cross_entropy
        errors.setdefault(dtype, []).append(error(head(hidden, weight, labels)[0], exact))
    assert errors[torch.float32][0] < 1e-5
    assert errors[None][0] > 1e-4 and errors[None][0] == errors[None][1]
    integration.apply_to_verl(logits_dtype=torch.float32)
    integration.remove_from_verl()
    assert error(integration.linear_cross_entropy(hidden, weight, labels)[0], exact) > 1e-4


def test_a_bad_logits_dtype_raises_at_the_switch(verl):
    with pytest.raises(TypeError, match=r"logits_dtype must be a torch.dtype or None, got str"):
        integration.apply_to_verl(logits_dtype="float32")
    with pytest.raises(ValueError, match=r"logits_dtype must be one of .*got torch.int64"):
        integration.apply_to_verl(logits_dtype=torch.int64)
    ours = integration.linear_cross_entropy
    assert verl["verl.utils.kernel.linear_cross_entropy"].linear_cross_entropy is not ours


@pytest.mark.parametrize(
    ("text", "expected"), ((None, None), ("", None), ("float32", torch.float32))
)
def test_the_plugin_reads_the_environment(text, expected, monkeypatch):
    assert plugged_in(text, monkeypatch) == [dict(logits_dtype=expected)]


def test_the_plugin_refuses_what_is_no_dtype(monkeypatch):
    with pytest.raises(ValueError, match=r"EM_KERNELS_LOGITS_DTYPE must be one of .*got 'fp32'"):
        plugged_in("fp32", monkeypatch)


def test_the_plugin_hands_over_that_the_entropy_is_a_number(monkeypatch):
    monkeypatch.setenv("EM_KERNELS_ENTROPY_REQUIRES_GRAD", "0")
    expected = dict(logits_dtype=None, entropy_requires_grad=False)
    assert plugged_in(None, monkeypatch) == [expected]
    monkeypatch.setenv("EM_KERNELS_ENTROPY_REQUIRES_GRAD", "none")
    with pytest.raises(ValueError, match=r"EM_KERNELS_ENTROPY_REQUIRES_GRAD must be one of"):
        plugged_in(None, monkeypatch)


def plugged_in(text, monkeypatch):
    """What importing the plugin calls `apply_to_verl` with."""
    seen = []
    monkeypatch.setattr(integration, "apply_to_verl", lambda **kwargs: seen.append(kwargs))
    monkeypatch.delenv("EM_KERNELS_LOGITS_DTYPE", raising=False)
    if text is not None:
        monkeypatch.setenv("EM_KERNELS_LOGITS_DTYPE", text)
    monkeypatch.delitem(sys.modules, "em_kernels.integrations.verl_plugin", raising=False)
    import em_kernels.integrations.verl_plugin  # noqa: F401

    monkeypatch.delitem(sys.modules, "em_kernels.integrations.verl_plugin")
    return seen
