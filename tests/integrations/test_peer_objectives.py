"""The policy losses against the functions of TRL, verl and Liger, on the same inputs."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import verl_source

from em_kernels.objectives import (
    aggregate_loss,
    cispo_loss,
    dppo_loss,
    grpo_loss,
    gspo_loss,
    gspo_token_loss,
    kl_penalty,
    sapo_loss,
)
from em_kernels.objectives.aggregation import CONSTANT

LONGEST = 11
LOW, HIGH = 0.2, 0.3


def inputs():
    """(logprob with gradient, old, advantage of each answer, mask) in float64, from a formula."""
    i = torch.arange(40, dtype=torch.float64).view(5, 8)
    logprob = -1.5 + 1.3 * torch.sin(1.7 * i)
    old = logprob + 0.4 * torch.cos(2.3 * i)
    advantage = 1.3 * torch.sin(0.9 + torch.arange(5, dtype=torch.float64))
    mask = torch.arange(8) < torch.tensor([8, 3, 5, 1, 6]).view(5, 1)
    return logprob.requires_grad_(), old, advantage, mask


def agree(ours, theirs, logprob, gradient=True):
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=1e-9)
    if gradient:
        found, expected = (
            torch.autograd.grad(x, logprob, retain_graph=True)[0] for x in (ours, theirs)
        )
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


# TRL: `GRPOTrainer._compute_loss` of a stub that has what it reads

TRL = {
    "grpo": (grpo_loss, dict(mode="sequence_mean"), {}),
    "bnpo": (grpo_loss, dict(mode="token_mean"), {}),
    "dapo": (grpo_loss, dict(mode="token_mean"), {}),
    "dr_grpo": (grpo_loss, dict(mode=CONSTANT, max_length=LONGEST), {}),
    "cispo": (cispo_loss, dict(mode="token_mean"), dict(epsilon_high=1 + HIGH)),
    "sapo": (sapo_loss, dict(mode="sequence_mean"), {}),
    "gspo": (gspo_loss, dict(mode="sequence_mean"), dict(importance_sampling_level="sequence")),
}


def own_options(loss, low=LOW, high=HIGH):
    if loss is sapo_loss:
        return dict(tau_pos=0.9, tau_neg=1.2)
    return dict(clip_low=1.0 if loss is cispo_loss else low, clip_high=high)


def trl_loss(name, logprob, old, advantage, mask, ref, beta, **changes):
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    args = dict(
        delta=None,
        use_bias_correction_kl=False,
        sapo_temperature_pos=0.9,
        sapo_temperature_neg=1.2,
        steps_per_generation=1,
    )
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
    )
    own = dict(
        loss_type="grpo" if name == "gspo" else name,
        importance_sampling_level="token",
        epsilon_low=LOW,
        epsilon_high=HIGH,
        beta=beta,
        max_completion_length=LONGEST,
        args=SimpleNamespace(**args),
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprob, old * 0, None),
    )
    trainer = SimpleNamespace(**{**own, **changes})
    ids = torch.zeros(5, 8, dtype=torch.int64)
    given = dict(
        prompt_ids=ids[:, :0],
        prompt_mask=ids[:, :0],
        completion_ids=ids,
        completion_mask=mask.long(),
        advantages=advantage,
        old_per_token_logps=old,
        ref_per_token_logps=ref,
        num_items_in_batch=mask.sum(),
    )
    return grpo_trainer.GRPOTrainer._compute_loss(trainer, None, given)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("name", TRL)
def test_loss_and_gradient_are_those_of_trl(name, beta):
    """bnpo is named after the batch that TRL divides by: here, as in this test, all there is."""
    logprob, old, advantage, mask = inputs()
    loss, how, changes = TRL[name]
    ref = old - 0.2
    low, high = (0.02, 0.03) if name == "gspo" else (LOW, HIGH)
    if name == "gspo":
        changes = {**changes, "epsilon_low": low, "epsilon_high": high}
    found = loss(logprob, old, advantage, mask, **own_options(loss, low, high))
    found = kl_penalty(found, logprob, mask, kl_coef=beta, ref_logprob=ref)
    theirs = trl_loss(name, logprob, old, advantage, mask, ref, beta, **changes)
    agree(aggregate_loss(found.loss, mask, **how), theirs, logprob)


# Liger: the loss of a chunk, in the function that its fused linear loss calls

LIGER = [name for name in TRL if name != "gspo"]


@pytest.mark.parametrize("name", [*LIGER, "gspo"])
def test_loss_and_gradient_are_those_of_liger(name):
    module = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
    logprob, old, advantage, mask = inputs()
    loss, how, changes = TRL[name]
    low, high = (0.02, 0.03) if name == "gspo" else (LOW, HIGH)
    options = {**dict(epsilon_low=low, epsilon_high=high), **changes}
    theirs = module.LigerFusedLinearGRPOFunction.ppo_loss_fn(
        logprob,
        mask.double(),
        advantage,
        mask.double(),
        old_per_token_logps=old,
        loss_type="grpo" if name == "gspo" else name,
        beta=0.0,
        max_completion_length=LONGEST,
        sapo_temperature_pos=0.9,
        sapo_temperature_neg=1.2,
        **options,
    )[0]
    found = loss(logprob, old, advantage, mask, **own_options(loss, low, high)).loss
    agree(aggregate_loss(found, mask, **how), theirs, logprob)


# verl: the losses that its registry holds

MODES = {
    "token_mean": "token-mean",
    "sequence_mean": "seq-mean-token-mean",
    "sequence_mean_token_sum": "seq-mean-token-sum",
    CONSTANT: "seq-mean-token-sum-norm",
}
VERL = {
    "cispo": (cispo_loss, dict(clip_low=LOW, clip_high=HIGH)),
    "gspo": (gspo_token_loss, dict(clip_low=0.02, clip_high=0.03)),
    "sapo": (sapo_loss, dict(tau_pos=0.9, tau_neg=1.2)),
    "dppo_tv": (dppo_loss, dict(delta_low=0.05, delta_high=0.04, max_ratio=1.2)),
    "dppo_kl": (
        dppo_loss,
        dict(delta_low=0.02, delta_high=0.01, max_ratio=1.2, divergence="binary_kl"),
    ),
}


class ActorOptions(dict):
    """What verl's losses read of an actor's configuration, as attributes and by `get`."""

    def __getattr__(self, name):
        return self[name]


@pytest.mark.parametrize("name", VERL)
def test_loss_and_gradient_are_those_of_verl(name, monkeypatch):
    core_algos = verl_source.load(monkeypatch)["verl.trainer.ppo.core_algos"]
    monkeypatch.setattr(core_algos, "ActorConfig", ActorOptions)
    logprob, old, advantage, mask = inputs()
    loss, options = VERL[name]
    found = loss(logprob, old, advantage, mask, **options)
    clip = [options.get(f"clip_{end}", options.get(f"delta_{end}")) for end in ("low", "high")]
    config = ActorOptions(
        clip_ratio=0.2,
        clip_ratio_low=clip[0],
        clip_ratio_high=clip[1],
        clip_ratio_c=1.2,
        tau_pos=0.9,
        tau_neg=1.2,
        global_batch_info={"loss_scale_factor": LONGEST},
    )
    wide = advantage[:, None].expand_as(old)
    compute = getattr(core_algos, f"compute_policy_loss_{name}")
    for mode, theirs in MODES.items():
        if name == "sapo" and mode != "sequence_mean":
            continue  # the only one that verl has for it
        how = dict(mode=mode, **({"max_length": LONGEST} if mode == CONSTANT else {}))
        expected, metrics = compute(old, logprob, wide, mask.double(), theirs, config)
        agree(aggregate_loss(found.loss, mask, **how), expected, logprob)
    if name != "sapo":
        share = found.metrics["clip_fraction"].item()
        assert share == pytest.approx(metrics["actor/pg_clipfrac"]) and 0 < share < 1


# TRL's DPPO trainer, which some releases have: what 1.2.0 gave for these inputs

RECORDED = {  # tokens dropped, sum of the losses
    "binary_tv": (6, 5.978563321251),
    "binary_kl": (2, 12.761981405546),
    "topk_tv": (13, 2.483596098993),
    "topk_kl": (11, 8.083141769047),
}


def listed(kind):
    """(log p, log mu) at six ids, the first of them sampled; a tenth of the mass is elsewhere."""
    i = torch.arange(5 * 8 * 6, dtype=torch.float64).view(5, 8, 6)
    old = (torch.sin(1.9 * i) * 1.5).log_softmax(-1) - 0.1
    new = torch.sin(1.9 * i) * 1.5 + 0.6 * torch.cos(2.7 * i)
    return new.log_softmax(-1) - 0.1, old


@pytest.mark.parametrize("kind", RECORDED)
def test_what_dppo_drops_is_what_trl_drops(kind):
    _, _, advantage, mask = inputs()
    now, old = listed(kind)
    lists = dict(topk_logprob=now, old_topk_logprob=old) if kind.startswith("topk") else {}
    options = dict(divergence=kind, delta_low=0.03, delta_high=0.05, max_ratio=1.5)
    found = dppo_loss(now[..., 0], old[..., 0], advantage, mask, **options, **lists)
    dropped, total = RECORDED[kind]
    assert (found.loss[mask] == 0).sum() == dropped
    assert found.loss.sum().item() == pytest.approx(total, rel=1e-9)
