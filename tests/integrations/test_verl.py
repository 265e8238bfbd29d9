"""verl's formulas, taken from its own files, against what stands in their place."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
import verl_source
from helpers import error, make_linear, random_target, truth

from em_kernels.integrations import verl as integration

ALGORITHMS = "verl.trainer.ppo.core_algos"
HEAD = "verl.utils.kernel.linear_cross_entropy"
ENGINE = "verl.workers.engine.fsdp.transformer_impl"
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean")


@pytest.fixture
def verl(monkeypatch):
    yield verl_source.load(monkeypatch)
    integration.remove_from_verl()


class Config(SimpleNamespace):
    """verl's ActorConfig, as far as its losses read it."""

    def get(self, name, default):
        return getattr(self, name, default)


def make_config(**policy):
    settings = dict(clip_cov_ratio=0.9, clip_cov_lb=0.0, clip_cov_ub=50.0)
    settings.update(kl_cov_ratio=0.3, ppo_kl_coef=0.7)
    return Config(
        clip_ratio=0.2,
        clip_ratio_low=0.1,
        clip_ratio_high=None,
        clip_ratio_c=1.5,
        policy_loss=SimpleNamespace(**{**settings, **policy}),
        global_batch_info=dict(dp_size=2, batch_num_tokens=31, global_batch_size=7),
    )


def batch():
    """Off-policy tokens, one answer without any."""
    old = -3 * torch.rand(5, 9, dtype=torch.float64)
    new = (old + 0.4 * torch.randn(5, 9)).requires_grad_()
    advantage = 2 * torch.randn(5, 1, dtype=torch.float64).expand(5, 9).clone()
    mask = torch.arange(9) < torch.tensor([9, 4, 0, 7, 2])[:, None]
    return dict(old_log_prob=old, log_prob=new, advantages=advantage, response_mask=mask)


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", integration.POLICY_LOSSES)
def test_policy_losses_are_verls(name, mode, weighted, verl):
    inputs = batch()
    weights = torch.rand(5, 9, dtype=torch.float64) if weighted else None
    arguments = dict(loss_agg_mode=mode, config=make_config(), rollout_is_weights=weights)
    theirs = verl[ALGORITHMS].get_policy_loss_fn(name)
    expected, expected_metrics = theirs(**inputs, **arguments)
    integration.apply_to_verl()
    ours = verl[ALGORITHMS].get_policy_loss_fn(name)
    assert ours is integration.POLICY_LOSSES[name] is not theirs
    assert inspect.signature(ours).parameters.keys() == inspect.signature(theirs).parameters.keys()
    loss, metrics = ours(**inputs, **arguments)
    assert error(loss, expected) < 1e-7 and loss != 0
    assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-7)
    grads = [torch.autograd.grad(x, inputs["log_prob"])[0] for x in (loss, expected)]
    assert error(*grads) < 1e-6 and grads[1].norm() > 0


def test_the_selections_are_at_work(verl):
    """The losses above would also agree if nothing was selected or clipped."""
    inputs = batch()
    losses = {}
    integration.apply_to_verl()
    for name, settings in (
        ("clip_cov", {}),
        ("clip_cov", dict(clip_cov_lb=40.0)),
        ("kl_cov", {}),
        ("kl_cov", dict(ppo_kl_coef=0.0)),
        ("clip_cov", dict(clip_cov_ratio=None, clip_cov_lb=None, clip_cov_ub=None)),
    ):
        function = verl[ALGORITHMS].get_policy_loss_fn(name)
        loss, metrics = function(**inputs, config=make_config(**settings))
        losses[(name, *settings)] = loss.item()
        if name == "clip_cov":
            assert (metrics["actor/pg_clipfrac"] > 0) == (settings.get("clip_cov_lb", 0.0) != 40.0)
    assert len(set(losses.values())) == len(losses)


def test_values_outside_the_mask_do_not_matter(verl):
    integration.apply_to_verl()
    for function in integration.POLICY_LOSSES.values():
        inputs = batch()
        clean = function(**inputs, config=make_config())[0]
        outside = ~inputs["response_mask"]
        inputs["log_prob"] = inputs["log_prob"].detach().masked_fill(outside, float("nan"))
        inputs["advantages"] = inputs["advantages"].masked_fill(outside, float("inf"))
        weights = torch.ones(5, 9).masked_fill(outside, float("nan"))
        dirty = function(**inputs, config=make_config(), rollout_is_weights=weights)[0]
        assert torch.equal(dirty, clean)


def test_the_head_is_verls(verl):
    hidden, weight = make_linear(2, 6)
    labels = random_target(2, 6, vocab=301)
    upstream = torch.randn(2, 12)
    theirs = verl["verl.utils.experimental.torch_functional"].FusedLinearForPPOFunction
    expected = [x.flatten() for x in theirs.apply(hidden, weight, labels, 0.7, 5)]
    ours = integration.linear_cross_entropy(hidden, weight, labels, 0.7)
    for a, b in zip(ours, expected):
        assert a.shape == (12,) and error(a, b) < 1e-5
    grads = [
        torch.autograd.grad((upstream[0] * x[0] + upstream[1] * x[1]).sum(), (hidden, weight))
        for x in (ours, expected)
    ]
    for a, b in zip(*grads):
        assert error(a, b) < 1e-5


def test_the_signature_of_the_head_is_verls(verl):
    theirs = inspect.signature(verl[HEAD].LinearCrossEntropy.forward).parameters
    ours = inspect.signature(integration.linear_cross_entropy).parameters
    assert list(ours) == list(theirs)[1:]
    assert [p.default for p in ours.values()][3:] == [p.default for p in theirs.values()][4:]


def test_the_switch_reaches_modules_that_have_imported_the_head(verl, monkeypatch):
    fused = type(sys)("verl.models.mcore.model_forward_fused")
    theirs = fused.linear_cross_entropy = verl[HEAD].linear_cross_entropy
    monkeypatch.setitem(sys.modules, fused.__name__, fused)
    losses = dict(verl[ALGORITHMS].POLICY_LOSS_REGISTRY)
    for _ in range(2):
        integration.apply_to_verl()
    assert fused.linear_cross_entropy is integration.linear_cross_entropy
    assert verl[HEAD].linear_cross_entropy is integration.linear_cross_entropy
    for _ in range(2):
        integration.remove_from_verl()
    assert fused.linear_cross_entropy is verl[HEAD].linear_cross_entropy is theirs
    assert losses == verl[ALGORITHMS].POLICY_LOSS_REGISTRY


def test_the_plugin_switches_on_import(verl, monkeypatch):
    monkeypatch.delitem(sys.modules, "em_kernels.integrations.verl_plugin", raising=False)
    import em_kernels.integrations.verl_plugin  # noqa: F401

    monkeypatch.delitem(sys.modules, "em_kernels.integrations.verl_plugin")
    assert verl[HEAD].linear_cross_entropy is integration.linear_cross_entropy


class Data(dict):
    """What a micro-batch says beside its tensors, as verl's TensorDict."""

    def copy(self) -> Data:
        return Data(self)


class Engine:
    """verl's FSDP engine, as far as it lays out what a fused head gives and refuses what not."""

    def forward_step(self, micro_batch, loss_function, forward_only):
        head = sys.modules[HEAD].linear_cross_entropy
        log_probs, entropy = head(*self.tokens, 0.7)
        output = SimpleNamespace(log_probs=log_probs[None], entropy=entropy[None])
        return self.prepare_model_outputs(output, {"pad_size": 2}, micro_batch, loss_function)

    def prepare_model_outputs(self, output, output_args, micro_batch, logits_processor_func):
        if micro_batch.get("calculate_sum_pi_squared") and micro_batch.get("use_fused_kernels"):
            raise NotImplementedError("calculate_sum_pi_squared")
        kept = slice(None, -output_args["pad_size"])
        found = {"log_probs": output.log_probs[0, kept]}
        if micro_batch.get("calculate_entropy"):
            found["entropy"] = output.entropy[0, kept]
        return found


def engine_module():
    module = type(sys)(ENGINE)
    module.FSDPEngineWithLMHead = type("FSDPEngineWithLMHead", (Engine,), dict(vars(Engine)))
    module.tu = SimpleNamespace(
        get_non_tensor_data=lambda data, key, default: data.get(key, default),
        assign_non_tensor=lambda data, **values: data.update(values),
    )
    return module


@pytest.mark.parametrize("loaded", ["before", "after"])
@pytest.mark.parametrize("entropy", [False, True])
def test_the_engine_gives_sums_of_squares(verl, monkeypatch, loaded, entropy):
    """Whether it is loaded before the switch or after: in the layout of the other outputs."""
    module = engine_module()
    loader = SimpleNamespace(create_module=lambda spec: module, exec_module=lambda module: None)
    spec = importlib.util.spec_from_loader(ENGINE, loader)
    finder = SimpleNamespace(find_spec=lambda name, *args: spec if name == ENGINE else None)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    for name in ("verl.workers.engine", "verl.workers.engine.fsdp"):
        package = type(sys)(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    before = list(sys.meta_path)
    monkeypatch.setitem(sys.modules, ENGINE, module)
    if loaded == "after":
        del sys.modules[ENGINE]
    integration.apply_to_verl()
    importlib.import_module(ENGINE)
    hidden, weight = make_linear(6)
    engine = module.FSDPEngineWithLMHead()
    engine.tokens = (hidden, weight, random_target(6, vocab=301))
    asked = Data(use_fused_kernels=True, calculate_sum_pi_squared=True, calculate_entropy=entropy)
    found = engine.forward_step(asked, None, True)
    assert found.keys() == {"log_probs", "sum_pi_squared", *(["entropy"] if entropy else [])}
    p = (hidden @ weight.T).double().div(0.7).softmax(-1)
    assert error(found["sum_pi_squared"], (p * p).sum(-1)[:-2]) < 1e-5
    assert not found["sum_pi_squared"].requires_grad
    plain = engine.forward_step(Data(use_fused_kernels=True), None, True)
    assert plain.keys() == {"log_probs"}
    integration.remove_from_verl()
    with pytest.raises(NotImplementedError, match="calculate_sum_pi_squared"):
        engine.prepare_model_outputs(None, None, asked, None)
    assert sys.meta_path == before


# Without verl


def test_reductions_and_ignored_labels():
    hidden, weight = make_linear(5)
    labels = random_target(5, vocab=301)
    labels[2] = -100
    kept = labels != -100
    expected = truth((hidden @ weight.T)[kept], labels[kept])
    logprob, entropy = integration.linear_cross_entropy(hidden, weight, labels)
    assert error(logprob[kept], expected["logprob"]) < 1e-5
    assert error(entropy[kept], expected["entropy"]) < 1e-5
    assert logprob[2] == entropy[2] == 0
    total, entropies = integration.linear_cross_entropy(hidden, weight, labels, reduction="sum")
    mean, _ = integration.linear_cross_entropy(hidden, weight, labels, 1.0, "mean")
    assert torch.equal(entropies, entropy) and torch.equal(total, logprob.sum())
    assert mean.item() == pytest.approx(total.item() / 5)


def test_labels_outside_the_vocabulary_leave_numbers_to_mask():
    hidden, weight = make_linear(5)
    labels = torch.tensor([-1, 7, 301, -100, 1 << 40])
    outside = torch.tensor([0, 2, 4])
    logprob, entropy = integration.linear_cross_entropy(hidden, weight, labels)
    expected = truth(hidden @ weight.T)
    assert error(logprob[outside], -expected["lse"][outside]) < 1e-5
    assert error(entropy[outside], expected["entropy"][outside]) < 1e-5
    assert logprob[3] == entropy[3] == 0
    mask = torch.tensor([0.0, 1, 0, 0, 0])
    got = torch.autograd.grad((logprob * mask).sum(), (hidden, weight))
    right = truth(hidden[1:2] @ weight.T, labels[1:2])["logprob"].sum()
    for a, b in zip(got, torch.autograd.grad(right, (hidden, weight))):
        assert error(a, b) < 1e-5


def test_bad_arguments_are_named():
    hidden, weight = make_linear(3)
    with pytest.raises(ValueError, match=r"reduction must be one of .* got 'max'"):
        integration.linear_cross_entropy(hidden, weight, random_target(3, vocab=301), 1.0, "max")
    with pytest.raises(ValueError, match="temperature must be positive"):
        integration.linear_cross_entropy(hidden, weight, random_target(3, vocab=301), 0.0)
