"""A frozen head in the integrations: two products where the entropy is wanted as a number only."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import error, product_flops, random_target, truth

from em_kernels.integrations import _labels, verl
from em_kernels.integrations._arguments import HeadSettings, flag_named
from em_kernels.ops.linear_softmax_stats import linear_softmax_stats

N, D, V = 11, 16, 301
PRODUCT = 2 * N * D * V
REFUSED = "the loss differentiates the entropy, which entropy_requires_grad=False"


def operands(dtype=torch.float64):
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
    return hidden, torch.randn(V, D, dtype=dtype), random_target(N, vocab=V)


@pytest.fixture
def trl(monkeypatch):
    pytest.importorskip("trl", minversion="1.16", exc_type=ImportError)
    module = pytest.importorskip("em_kernels.integrations.trl", exc_type=ImportError)
    monkeypatch.setattr(module, "linear_softmax_stats", nothing_kept)
    yield module
    module.remove_from_trl()


nothing_kept = partial(linear_softmax_stats, keep_logits=0)


def trl_call(*operands, outputs=("entropy",), bias=None):
    """As TRL's fused head calls it: (log_probs, entropy)."""
    import trl.kernels

    hidden, weight, target = operands
    apply = trl.kernels.ChunkedLogProbFunction.apply
    return apply(hidden, weight, bias, target, 0.8, 20, 5.0, 0.5, outputs)[:2]


def verl_call(hidden, weight, target):
    return verl.linear_cross_entropy(hidden, weight, target, 0.8)


# outputs of TRL's call, the setting -> the products of all, with a head that is frozen and learned
TRL_CASES = {
    "log_probs": (("log_probs",), True, 2, 4),
    "log_probs and is_top1": (("log_probs", "is_top1"), True, 2, 4),
    "entropy": (("log_probs", "entropy"), True, 3, 4),
    "entropy as a number": (("log_probs", "entropy"), False, 2, 4),
    "all, entropy as a number": (
        ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
        False,
        *(2, 4),
    ),
}


@pytest.mark.parametrize("case", TRL_CASES)
def test_products_of_trls_head(case, trl):
    outputs, requires_grad, frozen, learned = TRL_CASES[case]
    trl.apply_to_trl(entropy_requires_grad=requires_grad)
    hidden, weight, target = operands()
    run = lambda w, **kw: trl_call(hidden, w, target, outputs=outputs, **kw)[0].sum().backward()  # noqa: E731
    assert product_flops(lambda: run(weight)) == frozen * PRODUCT
    assert product_flops(lambda: run(weight.clone().requires_grad_())) == learned * PRODUCT
    bias = torch.zeros(V, dtype=torch.float64)
    assert product_flops(lambda: run(weight, bias=bias)) == frozen * PRODUCT
    # The gradient of a bias needs the logits again, though neither dX nor dW more.
    assert product_flops(lambda: run(weight, bias=bias.requires_grad_())) == 3 * PRODUCT
    with torch.no_grad():
        logprobs = lambda: trl_call(hidden, weight, target, outputs=outputs)  # noqa: E731
        assert product_flops(logprobs) == PRODUCT


@pytest.mark.parametrize("requires_grad, products", ((True, 3), (False, 2)))
def test_products_of_verls_head(requires_grad, products, monkeypatch):
    monkeypatch.setattr(verl, "linear_softmax_stats", nothing_kept)
    monkeypatch.setattr(verl, "_settings", HeadSettings(entropy_requires_grad=requires_grad))
    hidden, weight, target = operands()
    run = lambda w: verl_call(hidden, w, target)[0].sum().backward()  # noqa: E731
    assert product_flops(lambda: run(weight)) == products * PRODUCT
    assert product_flops(lambda: run(weight.clone().requires_grad_())) == 4 * PRODUCT


def check_values(call, transform, ignored=None):
    """Labels in and outside of the vocabulary, -log sum exp z there, and the gradient of both."""
    hidden, weight, target = operands()
    target[1], target[4], target[7] = -3, V, 1 << 40
    if ignored is not None:
        target[9] = ignored
    known = (target >= 0) & (target < V)
    counted = known | (target != ignored) if ignored is not None else torch.ones_like(known)
    exact_hidden = hidden.detach().clone().requires_grad_()
    exact = truth(exact_hidden @ weight.T, target.where(known, 0), **transform)
    wanted = torch.where(known, exact["logprob"], -exact["lse"]) * counted
    logprob, entropy = call(hidden, weight, target)
    assert error(logprob, wanted) < 1e-12 and error(entropy, exact["entropy"] * counted) < 1e-12
    upstream = torch.randn(N, dtype=torch.float64)
    grads = [
        torch.autograd.grad(x, h, upstream)[0]
        for x, h in ((logprob, hidden), (wanted, exact_hidden))
    ]
    assert error(*grads) < 1e-12


def test_labels_outside_the_vocabulary(trl, monkeypatch):
    trl.apply_to_trl(entropy_requires_grad=False)
    check_values(trl_call, dict(temperature=0.8, softcap=5.0, logit_scale=0.5))
    monkeypatch.setattr(verl, "_settings", HeadSettings(entropy_requires_grad=False))
    check_values(verl_call, dict(temperature=0.8), ignored=-100)


@pytest.mark.parametrize("unknown", (False, True))
def test_labels_that_cannot_be_looked_at(unknown, trl, monkeypatch):
    """As in a captured CUDA graph: the same numbers, whether there is an unknown one or not."""
    trl.apply_to_trl(entropy_requires_grad=False)
    hidden, weight, target = operands()
    target[3] = V if unknown else 3

    def run():
        logprob, _ = trl_call(hidden, weight, target)
        return logprob.detach(), torch.autograd.grad(logprob.sum(), hidden)[0]

    seen = run()
    monkeypatch.setattr(_labels, "can_look", lambda x: False)
    assert all(map(torch.equal, seen, run()))


def test_no_token_and_one_token(trl):
    trl.apply_to_trl(entropy_requires_grad=False)
    for n in (0, 1):
        hidden, weight, target = operands()
        logprob, entropy = trl_call(hidden[:n], weight, target[:n])
        (grad,) = torch.autograd.grad(logprob.sum(), hidden)
        assert logprob.shape == entropy.shape == (n,) and grad[:n].any() == bool(n)


def test_a_loss_that_differentiates_the_number_is_refused(trl, monkeypatch):
    """But for a weight of 0, as losses have it whose coefficient is 0."""
    trl.apply_to_trl(entropy_requires_grad=False)
    monkeypatch.setattr(verl, "_settings", HeadSettings(entropy_requires_grad=False))
    for call in (trl_call, verl_call):
        for learned in (False, True):
            hidden, weight, target = operands()
            logprob, entropy = call(hidden, weight.requires_grad_(learned), target)
            (logprob.sum() + 0 * entropy.sum()).backward(retain_graph=True)
            assert hidden.grad.any()
            with pytest.raises(RuntimeError, match=REFUSED):
                (logprob - 0.01 * entropy).sum().backward()
        with torch.no_grad():
            assert not call(hidden, weight, target)[1].requires_grad


def test_the_setting_is_what_it_was_after_a_block(trl):
    trl.apply_to_trl(entropy_requires_grad=False)
    with trl.patched():
        assert trl._settings == HeadSettings()
    assert trl._settings == HeadSettings(entropy_requires_grad=False)
    trl.remove_from_trl()
    assert trl._settings == HeadSettings()
    for switch in (trl.apply_to_trl, verl.apply_to_verl):
        with pytest.raises(TypeError, match="entropy_requires_grad must be a bool, got int"):
            switch(entropy_requires_grad=0)
    assert not trl.is_applied()


def test_flags_of_the_environment():
    assert [flag_named(text, "NAME") for text in ("0", "False", "1", "TRUE")] == [False] * 2 + [
        True
    ] * 2
    with pytest.raises(ValueError, match=r"NAME must be one of .* or empty, got 'no'"):
        flag_named("no", "NAME")


def test_trls_own_trainer_gets_there(trl, tmp_path, monkeypatch):
    """GRPO without an entropy bonus: the same numbers, and no loss asks for more than one output
    with a gradient; with a bonus the setting is refused."""
    pytest.importorskip("datasets")
    from test_trl import grpo

    from em_kernels import tiny_math
    from em_kernels.trainer import load_model

    asked = []

    def spy(*args, outputs, **kwargs):
        if torch.is_grad_enabled():
            asked.append((outputs, kwargs["entropy_requires_grad"]))
        return linear_softmax_stats(*args, outputs=outputs, **kwargs)

    monkeypatch.setattr(trl, "linear_softmax_stats", spy)

    def train(**settings):
        model, tokenizer = load_model(str(tiny_math.model_path()), "cpu")
        model.get_output_embeddings().weight.requires_grad_(False)
        trainer = grpo(model, tokenizer, str(tmp_path), max_steps=2, **settings)
        trainer.train()
        return [line for line in trainer.state.log_history if "loss" in line]

    theirs = train()
    with trl.patched(entropy_requires_grad=False):
        ours = train()
        assert {*asked} == {(("logprob", "entropy"), False)}
        with pytest.raises(RuntimeError, match=REFUSED):
            train(entropy_coef=0.01)
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("loss", "entropy", "grad_norm", "reward"):
            assert mine[name] == pytest.approx(other[name], rel=2e-4, abs=2e-4), name


def test_a_patched_model(monkeypatch):
    transformers = pytest.importorskip("em_kernels.integrations.transformers", exc_type=ImportError)
    from tiny_qwen2 import make_model

    monkeypatch.setattr(transformers, "linear_softmax_stats", nothing_kept)
    model = transformers.apply_em_kernels(make_model())
    model.get_output_embeddings().weight.requires_grad_(False)
    ids = random_target(2, 7, vocab=model.config.vocab_size)

    def run(**options):
        model.zero_grad()
        out = model(ids, labels=ids, em_outputs=("logprob", "entropy"), **options)
        out.loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return out, grads

    (full, grads), (number, same) = run(), run(em_entropy_requires_grad=False)
    assert full.entropy.requires_grad and not number.entropy.requires_grad
    assert torch.equal(full.entropy, number.entropy) and torch.equal(full.loss, number.loss)
    assert grads and all(error(a, b) < 1e-5 for a, b in zip(same, grads, strict=True))
    rows = 2 * 6  # the last position of an answer predicts nothing
    saved = product_flops(run) - product_flops(lambda: run(em_entropy_requires_grad=False))
    assert saved == 2 * rows * model.config.hidden_size * model.config.vocab_size
