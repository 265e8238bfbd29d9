"""The verl plugin in verl itself, on the CPU: `make engines ENGINE=verl`.

One process with gloo; verl's TrainingWorker over FSDP2, as a ray actor would hold it, on the
embedded model. Without fused kernels verl's engine makes the logits: that is what is compared with.
"""

from __future__ import annotations

import importlib.util
import os
from functools import partial
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.distributed as dist
from helpers import error
from transformers import Qwen2ForCausalLM

from em_kernels import softmax_stats
from em_kernels.integrations import verl as integration
from em_kernels.tiny_math import model_path
from em_kernels.trainer import load_model

MODULES = "verl_cpu,em_kernels.integrations.verl_plugin"
for name in ("verl", "ray", "tensordict"):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: make engines ENGINE=verl", allow_module_level=True)
if os.environ.setdefault("VERL_USE_EXTERNAL_MODULES", MODULES) != MODULES:
    pytest.skip("VERL_USE_EXTERNAL_MODULES is set to something else", allow_module_level=True)

TEMPERATURE = 0.7
CLOSE = 1e-5
LOSSES = ("vanilla", "clip_cov", "kl_cov")
FORWARD = Qwen2ForCausalLM.forward


@pytest.fixture(scope="module")
def verl():
    """What verl's own registries know after `import verl`, and nothing but that."""
    import verl  # noqa: F401
    from verl.trainer.ppo import core_algos
    from verl.utils.kernel import linear_cross_entropy as head

    at_import = SimpleNamespace(
        losses={name: core_algos.get_policy_loss_fn(name) for name in LOSSES},
        head=head.linear_cross_entropy,
    )
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    register = EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")
    register(FSDPEngineWithLMHead)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    place = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    place.update(MASTER_ADDR="localhost", MASTER_PORT="29500")  # looked at, and not used
    with pytest.MonkeyPatch.context() as patch:
        for name, value in place.items():
            patch.setenv(name, value)
        yield SimpleNamespace(algorithms=core_algos, at_import=at_import)
    dist.destroy_process_group()


@pytest.fixture
def plugin():
    """Switched on, and on again after a test that compares with verl's own."""
    yield integration
    integration.apply_to_verl()


def make_worker(backend: str | None):
    """Of the embedded model; `backend` of the fused kernels, None for the engine's own logits."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.config import TrainingWorkerConfig as WorkerConfig
    from verl.workers.engine_workers import TrainingWorker

    Qwen2ForCausalLM.forward = FORWARD  # fused kernels are put in the class, for all its models
    model = HFModelConfig(
        path=str(model_path()),
        use_fused_kernels=backend is not None,
        fused_kernel_options={"impl_backend": backend},
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "sdpa"},
    )
    precision = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
    engine = FSDPEngineConfig(
        strategy="fsdp2",
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=2,
        infer_micro_batch_size_per_gpu=2,
        mixed_precision=precision,
        model_dtype="fp32",
        use_torch_compile=False,
    )
    steps = dict(total_training_steps=9, lr_warmup_steps=0)
    optimizer = FSDPOptimizerConfig(optimizer="SGD", lr=0.1, weight_decay=0.0, **steps)
    worker = TrainingWorker(
        WorkerConfig(
            model_type="language_model",
            model_config=model,
            engine_config=engine,
            optimizer_config=optimizer,
            checkpoint_config=CheckpointConfig(),
        )
    )
    worker.reset()
    return worker


PROMPT, ANSWER = 6, 7


def padded() -> dict[str, torch.Tensor]:
    """Four rows, prompts padded on the left and answers on the right, as verl's rollouts are."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(4, PROMPT + ANSWER, dtype=torch.long)
    mask[0, :2], mask[1, -3:], mask[2, :1], mask[2, -1:] = 0, 0, 0, 0
    ids = torch.randint(4, 400, mask.shape, generator=generator) * mask
    return dict(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        response_mask=mask[:, PROMPT:],
        responses=ids[:, PROMPT:],
        prompts=ids[:, :PROMPT],
    )


def batch(extra: dict[str, torch.Tensor], **flags):
    """A batch as verl's trainer sends it to its workers."""
    from verl.utils import tensordict_utils
    from verl.workers.utils.padding import left_right_2_no_padding

    tensors = {name: x.clone() for name, x in {**padded(), **extra}.items()}
    data = left_right_2_no_padding(tensordict_utils.get_tensordict(tensors))
    flags = {"temperature": TEMPERATURE, "global_token_num": None, **flags}
    tensordict_utils.assign_non_tensor(data, **flags)
    return data


def inferred(worker, **flags) -> dict[str, torch.Tensor]:
    """(4, 7) of each output of the worker's `infer_batch`, which computes old log-probabilities."""
    from verl.workers.utils.padding import no_padding_2_padding

    data = batch({}, calculate_entropy=True, compute_loss=False, **flags)
    found = worker.infer_batch(data)
    names = {"log_probs", "entropy", "sum_pi_squared"} & set(found.keys())
    return {name: no_padding_2_padding(found[name], data) for name in names}


def test_importing_verl_loads_the_plugin(verl):
    assert verl.at_import.losses == integration.POLICY_LOSSES
    assert verl.at_import.head is integration.linear_cross_entropy


def test_its_fused_head_is_ours(verl, monkeypatch):
    """Log-probabilities, entropies and sums of squares: those of verl's logits, and the truth."""
    calls = []
    head = integration.linear_cross_entropy
    count = lambda *args: calls.append(args) or head(*args)  # noqa: E731
    monkeypatch.setattr("verl.utils.kernel.linear_cross_entropy.linear_cross_entropy", count)
    fused = inferred(make_worker("triton"), calculate_sum_pi_squared=True)
    assert len(calls) == 2  # micro-batches
    theirs = inferred(make_worker(None), calculate_sum_pi_squared=True)
    assert len(calls) == 2
    assert fused.keys() == theirs.keys() == {"log_probs", "entropy", "sum_pi_squared"}
    rows, model = padded(), load_model(str(model_path()), "cpu")[0]
    with torch.no_grad():
        names = ("input_ids", "attention_mask", "position_ids")
        logits = model(**{name: rows[name] for name in names}).logits[:, PROMPT - 1 : -1]
    wanted = ("logprob", "entropy", "collision")
    stats = softmax_stats(
        logits.double(), rows["responses"], temperature=TEMPERATURE, outputs=wanted
    )
    mask = rows["response_mask"]
    for name, output in zip(("log_probs", "entropy", "sum_pi_squared"), wanted):
        assert error(fused[name] * mask, theirs[name] * mask) < CLOSE, name
        assert error(fused[name] * mask, getattr(stats, output) * mask) < CLOSE, name


def plain_head(hidden, weight, labels, temperature, reduction):
    """A head that is neither ours nor verl's."""
    logits = hidden.flatten(0, -2) @ weight.full_tensor().T / temperature
    log_p = logits.log_softmax(-1)
    return log_p.gather(-1, labels.view(-1, 1))[:, 0], -(log_p.exp() * log_p).sum(-1)


def test_the_sums_are_asked_for_alone(verl, monkeypatch):
    """Not asked for, they are not there; another fused head has none: verl refuses as before."""
    worker = make_worker("triton")
    ours = inferred(worker)
    assert ours.keys() == {"log_probs", "entropy"}
    monkeypatch.setattr("verl.utils.kernel.linear_cross_entropy.linear_cross_entropy", plain_head)
    other = inferred(worker)
    assert all(error(ours[name], value) < CLOSE for name, value in other.items())
    with pytest.raises(NotImplementedError, match="calculate_sum_pi_squared"):
        inferred(worker, calculate_sum_pi_squared=True)


def test_without_the_plugin_verl_refuses_the_sums(verl, plugin, monkeypatch):
    plugin.remove_from_verl()
    monkeypatch.setattr("verl.utils.kernel.linear_cross_entropy.linear_cross_entropy", plain_head)
    with pytest.raises(NotImplementedError, match="calculate_sum_pi_squared"):
        inferred(make_worker("triton"), calculate_sum_pi_squared=True)


def test_the_optimal_token_baseline_has_its_sums(verl):
    """Advantages of verl's estimator from what the fused head gives and from verl's logits."""
    estimator = verl.algorithms.get_adv_estimator_fn("optimal_token_baseline")
    mask, generator = padded()["response_mask"], torch.Generator().manual_seed(1)
    rewards = torch.rand(mask.shape, generator=generator) * mask
    given = dict(
        token_level_rewards=rewards, response_mask=mask, index=numpy.array(["a", "a", "b", "b"])
    )
    advantages = []
    for backend in ("triton", None):
        found = inferred(make_worker(backend), calculate_sum_pi_squared=True)
        sums = dict(old_log_probs=found["log_probs"], sum_pi_squared=found["sum_pi_squared"])
        advantages.append(estimator(**given, **sums)[0])
        changed = estimator(**given, **{**sums, "sum_pi_squared": sums["sum_pi_squared"] * 0})[0]
        assert error(changed, advantages[-1]) > 100 * CLOSE
    assert error(*advantages) < CLOSE


def updated(worker, loss: str, old: torch.Tensor) -> tuple[dict, dict]:
    """(metrics, weights) after a step of the worker's `train_batch` with a policy loss."""
    from verl.utils import tensordict_utils
    from verl.workers.config import ActorConfig, PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    selection = dict(clip_cov_ratio=0.9, clip_cov_lb=0.0, clip_cov_ub=50.0, kl_cov_ratio=0.3)
    config = ActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=2,
        entropy_coeff=0.01,
        policy_loss=PolicyLossConfig(loss_mode=loss, ppo_kl_coef=0.7, **selection),
    )
    worker.set_loss_fn(partial(ppo_loss, config))
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(old.shape, generator=generator)
    advantages = torch.randn(4, 1, generator=generator).expand(old.shape).clone()
    extra = dict(old_log_probs=old + 0.3 * noise, advantages=advantages)
    data = batch(extra, calculate_entropy=True, compute_loss=True, global_batch_size=4)
    metrics = tensordict_utils.get(worker.train_batch(data), "metrics")
    weights = {name: x.full_tensor() for name, x in worker.engine.module.state_dict().items()}
    return {name: x for name, x in metrics.items() if not name.startswith("perf/")}, weights


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_on_its_policy_losses_is_verls(verl, plugin, loss):
    """The fused head and the loss of the plugin against verl's logits and verl's loss."""
    old = inferred(make_worker(None))["log_probs"] * padded()["response_mask"]
    ours, our_weights = updated(make_worker("triton"), loss, old)
    plugin.remove_from_verl()
    assert verl.algorithms.get_policy_loss_fn(loss) is not integration.POLICY_LOSSES[loss]
    theirs, their_weights = updated(make_worker(None), loss, old)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert numbers(ours[name]) == pytest.approx(numbers(value), rel=1e-4, abs=1e-6), name
    before = load_model(str(model_path()), "cpu")[0].state_dict()
    for name, value in their_weights.items():
        step, expected = our_weights[name] - before[name], value - before[name]
        assert (step - expected).norm() < 1e-3 * expected.norm(), name


def numbers(metric) -> list[float]:
    """Of a metric, of which verl keeps one number, or one of each micro-batch."""
    if isinstance(metric, list):
        return [number for one in metric for number in numbers(one)]
    return numbers(metric.values) if hasattr(metric, "values") else [float(metric)]
