"""The objectives by name: for each its settings, its loss and what it needs besides.

A new one is a loss in `em_kernels.objectives`, its settings in `objective_settings`, and an entry
here; nothing else in the trainer knows objectives by their names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from em_kernels.backends.interface import TokenStats
from em_kernels.objectives._inputs import PolicyLoss
from em_kernels.objectives.aggregation import CONSTANT
from em_kernels.objectives.cispo import cispo_loss
from em_kernels.objectives.clip_cov import clip_cov_loss, clip_cov_selection
from em_kernels.objectives.dppo import dppo_loss
from em_kernels.objectives.empo import empo_mask, semantic_entropy
from em_kernels.objectives.grpo import grpo_loss
from em_kernels.objectives.gspo import gspo_loss, gspo_token_loss
from em_kernels.objectives.high_entropy import high_entropy_loss
from em_kernels.objectives.kl import kl_penalty
from em_kernels.objectives.kl_cov import kl_cov_loss, kl_cov_selection
from em_kernels.objectives.ppl import ppl_loss, pseudo_label_kl, topk_label_kl
from em_kernels.objectives.sapo import sapo_loss
from em_kernels.ops.covariance import high_entropy_mask
from em_kernels.trainer.batch import Tokens
from em_kernels.trainer.objective_entry import Loss, ObjectiveEntry, OtherPolicy, looks_at

if TYPE_CHECKING:
    from em_kernels.trainer.rewards import Answers
    from em_kernels.trainer.rl_config import RLConfig

WHOLE_LABELS = ("sampler", "reference")  # policies that are there, with all their probabilities
EXACT = "exact"  # the KL itself in place of an estimate of it
CLIP = ("clip_low", "clip_high")
BINARY_REWARDS = ("verified", "majority", "format", "random")


# Losses of a micro-batch


def _inputs(stats: TokenStats, part: Tokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return cast(Tensor, stats.logprob), part.old_logprob, part.advantage, part.loss_mask


def _clip(config: RLConfig, objective: str) -> dict[str, Any]:
    return {name: config.setting(name, objective) for name in CLIP}


def _reference_kl(config: RLConfig, part: Tokens) -> dict[str, Any]:
    given = {"ref_logprob": part.ref_logprob, "ref_kl": part.ref_kl, "kl_coef": config.ref_kl}
    exact = config.kl_estimator == EXACT  # then `ref_kl` is there, and nothing is estimated
    return given if exact else {**given, "kl_estimator": config.kl_estimator}


def _grpo(config: RLConfig, objective: str, stats: TokenStats, part: Tokens) -> PolicyLoss:
    options = {**_reference_kl(config, part), **_clip(config, objective)}
    return grpo_loss(*_inputs(stats, part), **options)


def _penalised(loss: Callable[..., PolicyLoss], *names: str) -> Loss:
    """A loss of log-probabilities with settings of the same names, and the penalty."""

    def compute(config: RLConfig, objective: str, stats: TokenStats, part: Tokens) -> PolicyLoss:
        inputs = _inputs(stats, part)
        found = loss(*inputs, **{name: config.setting(name, objective) for name in names})
        return kl_penalty(found, inputs[0], part.loss_mask, **_reference_kl(config, part))

    return compute


def _dppo(config: RLConfig, objective: str, stats: TokenStats, part: Tokens) -> PolicyLoss:
    listed: dict[str, Any] = {}
    if part.label_current is not None:
        listed = dict(
            topk_logprob=part.label_current,
            old_topk_logprob=part.label_logprob,
            topk_ids=part.label_ids,
            token_ids=part.input_ids.roll(-1, 1),
        )
    inputs = _inputs(stats, part)
    found = dppo_loss(
        *inputs,
        divergence=config.dppo_divergence,
        delta_low=config.dppo_low,
        delta_high=config.dppo_high,
        max_ratio=config.max_ratio,
        **listed,
    )
    return kl_penalty(found, inputs[0], part.loss_mask, **_reference_kl(config, part))


def _clip_cov(config: RLConfig, objective: str, stats: TokenStats, part: Tokens) -> PolicyLoss:
    return clip_cov_loss(*_inputs(stats, part), part.selected, **_clip(config, objective))


def _kl_cov(config: RLConfig, objective: str, stats: TokenStats, part: Tokens) -> PolicyLoss:
    return kl_cov_loss(*_inputs(stats, part), part.selected, kl_coef=config.kl_cov_coef)


def _high_entropy(config: RLConfig, objective: str, stats: TokenStats, part: Tokens) -> PolicyLoss:
    return high_entropy_loss(*_inputs(stats, part), part.selected, **_clip(config, objective))


def _ppl(config: RLConfig, objective: str, stats: TokenStats, part: Tokens) -> PolicyLoss:
    """Rows take turns: chosen, rejected, chosen, ..."""
    logprob, mask, kl = cast(Tensor, stats.logprob), part.loss_mask, part.ref_kl
    if config.ppl_label == "pseudo":
        kl = pseudo_label_kl(logprob)
    elif part.label_current is not None:
        kl = topk_label_kl(part.label_current, cast(Tensor, part.label_logprob))
    options: dict[str, Any] = dict(gamma=config.gamma, alpha=config.alpha, length_normalize=True)
    if kl is not None:
        options |= dict(chosen_kl=kl[0::2], rejected_kl=kl[1::2])
    loss, metrics = ppl_loss(logprob[0::2], logprob[1::2], mask[0::2], mask[1::2], **options)
    return PolicyLoss(loss, {f"pair_{name}": value for name, value in metrics.items()})


# First phases, over all the tokens of a step


def _select_clip_cov(config: RLConfig, objective: str, tokens: Tokens, now: dict) -> Tokens:
    selected = clip_cov_selection(
        now["logprob"],
        tokens.old_logprob,
        tokens.advantage,
        tokens.loss_mask,
        ratio=config.setting("ratio", objective),
        lower=config.cov_lower,
        upper=config.cov_upper,
        **_clip(config, objective),
    )
    return tokens._replace(selected=selected)


def _select_kl_cov(config: RLConfig, objective: str, tokens: Tokens, now: dict) -> Tokens:
    inputs, ratio = (tokens.advantage, tokens.loss_mask), config.setting("ratio", objective)
    return tokens._replace(selected=kl_cov_selection(now["logprob"], *inputs, ratio=ratio))


def _select_high_entropy(config: RLConfig, objective: str, tokens: Tokens, now: dict) -> Tokens:
    inputs, ratio = (now["entropy"], tokens.loss_mask), config.setting("ratio", objective)
    return tokens._replace(selected=high_entropy_mask(*inputs, ratio=ratio))


# Other policies, and answers


def _reference(config: RLConfig) -> OtherPolicy:
    """The initial model, where it has a weight."""
    if config.ref_kl == 0:
        return OtherPolicy()
    return OtherPolicy("ref_kl", "reverse_kl" if config.kl_estimator == EXACT else None)


def _dppo_others(config: RLConfig) -> OtherPolicy:
    stored = config.dppo_k if config.dppo_divergence.startswith("topk") else 0
    return _reference(config)._replace(stored=stored)


def _ppl_label(config: RLConfig) -> OtherPolicy:
    if config.ppl_label in WHOLE_LABELS:
        return OtherPolicy("ppl_label", "forward_kl", config.ppl_label == "sampler")
    return OtherPolicy(stored=config.ppl_label_k if config.ppl_label == "topk" else 0)


def _uncertain(config: RLConfig, answers: Answers) -> Tensor:
    entropy = semantic_entropy(answers.cluster, answers.group)
    return empo_mask(entropy, low=config.empo_low, high=config.empo_high)


# The table

_SAMPLED = looks_at(
    "sampling_temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "sampler",
    "sample_batch",
    "vllm_memory",
)
_PROMPTED = {**_SAMPLED, **looks_at("prompts", reduction="token_mean")}
_DEMONSTRATED = looks_at(reduction="token_mean")
_REWARDED = _SAMPLED | looks_at(
    "group_size",
    "reward",
    "judge",
    "epochs",
    "minibatches",
    "max_length",
    "measure_change",
    "predict_change",
    "entropy_target",
    "entropy_step",
    normalize_std=True,
    entropy_coef=0.0,
)
_SHAPED = looks_at(
    "repo_zeta",
    "repo_zeta_min",
    "repo_zeta_max",
    "repo_adaptive",
    "shaping_alpha",
    "shaping_kappa",
    advantage_shaping="none",
)
_SAMPLER = looks_at("rollout_support", "rollout_correction", "rollout_cap", "rollout_floor")
_POLICY = {**_REWARDED, **looks_at(reduction="token_mean"), **_SHAPED, **_SAMPLER}
_PENALISED = {**_POLICY, **looks_at("ref_kl", "kl_estimator")}
_GRPO = {**_PENALISED, **looks_at(clip_low=0.2, clip_high=0.2)}
_HIGHER = looks_at(clip_low=0.2, clip_high=0.28)
_SEQUENCE = {
    **_PENALISED,
    **looks_at(clip_low=3e-4, clip_high=4e-4, reduction="sequence_mean"),
}
# One ratio an answer has one advantage; gspo_token has one a token.
_SEQUENCE_ALONE = {name: own for name, own in _SEQUENCE.items() if name not in _SHAPED}

TABLE = {
    "em": ObjectiveEntry(_PROMPTED),
    "opd": ObjectiveEntry(
        {**_PROMPTED, **looks_at("teacher", "opd_kind", "opd_beta", "opd_weight")}
    ),
    "sft": ObjectiveEntry(_DEMONSTRATED),
    "eaft": ObjectiveEntry({**_DEMONSTRATED, **looks_at("eaft_k", "eaft_alpha")}),
    "grpo": ObjectiveEntry(_GRPO, _grpo, other=_reference),
    "dr_grpo": ObjectiveEntry(
        {**_GRPO, **looks_at(normalize_std=False, reduction=CONSTANT)}, _grpo, other=_reference
    ),
    "bnpo": ObjectiveEntry(_GRPO, _grpo, other=_reference),
    "cispo": ObjectiveEntry(
        {**_PENALISED, **looks_at(clip_low=1.0, clip_high=4.0)},
        _penalised(cispo_loss, *CLIP),
        other=_reference,
    ),
    "gspo": ObjectiveEntry(_SEQUENCE_ALONE, _penalised(gspo_loss, *CLIP), other=_reference),
    "gspo_token": ObjectiveEntry(_SEQUENCE, _penalised(gspo_token_loss, *CLIP), other=_reference),
    "sapo": ObjectiveEntry(
        {**_PENALISED, **looks_at("tau_pos", "tau_neg", reduction="sequence_mean")},
        _penalised(sapo_loss, "tau_pos", "tau_neg"),
        other=_reference,
    ),
    "dppo": ObjectiveEntry(
        {
            **_PENALISED,
            **looks_at("dppo_divergence", "dppo_low", "dppo_high", "dppo_k", "max_ratio"),
        },
        _dppo,
        other=_dppo_others,
    ),
    "grpo++": ObjectiveEntry(
        {**_GRPO, **_HIGHER, **looks_at("sampling_rounds", entropy_coef=1e-3)},
        _grpo,
        resamples=True,
        other=_reference,
    ),
    "l-grpo": ObjectiveEntry({**_GRPO, **_HIGHER}, _grpo, reward="l-grpo", other=_reference),
    "clip_cov": ObjectiveEntry(
        {
            **_POLICY,
            **looks_at("cov_lower", "cov_upper", clip_low=1.0, clip_high=1.0, ratio=2e-4),
        },
        _clip_cov,
        select=_select_clip_cov,
    ),
    "kl_cov": ObjectiveEntry(
        {**_POLICY, **looks_at("kl_cov_coef", ratio=2e-3)}, _kl_cov, select=_select_kl_cov
    ),
    "high_entropy": ObjectiveEntry(
        {**_POLICY, **_HIGHER, **looks_at(ratio=0.2)}, _high_entropy, select=_select_high_entropy
    ),
    "entropy_bonus": ObjectiveEntry(
        {**_GRPO, **looks_at(entropy_coef=1e-2)}, _grpo, other=_reference
    ),
    "repo": ObjectiveEntry(
        {**_GRPO, **looks_at(advantage_shaping="repo")}, _grpo, other=_reference
    ),
    "entropy_advantage": ObjectiveEntry(
        {**_GRPO, **looks_at(advantage_shaping="entropy")}, _grpo, other=_reference
    ),
    "empo": ObjectiveEntry(
        {**_GRPO, **looks_at("empo_low", "empo_high")},
        _grpo,
        reward="empo",
        keeps=_uncertain,
        other=_reference,
    ),
    "ppl": ObjectiveEntry(
        {**_REWARDED, **looks_at("gamma", "alpha", "ppl_label", "ppl_label_k")},
        _ppl,
        pairs=True,
        other=_ppl_label,
    ),
}
OBJECTIVES = tuple(TABLE)
