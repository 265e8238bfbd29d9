"""verl: its fused head and its policy losses, computed here.

    from em_kernels.integrations.verl import apply_to_verl
    apply_to_verl()

in every process, or for all of a run's workers, without a line of code:

    export VERL_USE_EXTERNAL_MODULES=em_kernels.integrations.verl_plugin
    export EM_KERNELS_LOGITS_DTYPE=float32    # if wanted: apply_to_verl(logits_dtype=torch.float32)
    export EM_KERNELS_ENTROPY_REQUIRES_GRAD=0     # or (entropy_requires_grad=False)

Then `use_fused_kernels` with the "triton" backend calls `linear_cross_entropy` of this module, on
any device, and the policy losses "vanilla", "clip_cov" and "kl_cov" are those of
`em_kernels.objectives`, read from the same settings and logged under the same names. Log-ratios
are held where verl holds them: in "vanilla" to [-20, 20], loss and actor/ppo_kl alike, in
"clip_cov" and "kl_cov" nowhere (but at 80, where exp would overflow). With that head verl's FSDP
engine also gives sum_pi_squared, which the optimal-token baseline needs (calculate_sum_pi_squared);
verl refuses it with fused kernels, and still does over Megatron.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
import torch.distributed as dist
from torch import Tensor

from em_kernels.integrations._arguments import HeadSettings, head_settings, temperature_of
from em_kernels.integrations._labels import as_number, is_frozen, known_labels, stats_of_known
from em_kernels.integrations._rebind import rebind
from em_kernels.integrations._verl_collision import SumsOfSquares, found_so_far
from em_kernels.objectives import (
    clip_cov_loss,
    clip_cov_selection,
    grpo_loss,
    kl_cov_loss,
    kl_cov_selection,
)
from em_kernels.objectives._inputs import MAX_LOG_RATIO, masked_mean
from em_kernels.ops.checks import check_number, check_tensor
from em_kernels.ops.linear_softmax_stats import linear_softmax_stats
from em_kernels.ops.options import IGNORED

REDUCTIONS = ("none", "sum", "mean")
_HEAD = "verl.utils.kernel.linear_cross_entropy"
_ALGORITHMS = "verl.trainer.ppo.core_algos"


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """(log p_label, H) of softmax(hidden @ weight.T / temperature), as verl's function of the name.

    Args:
        hidden: (..., D), flattened to N tokens. weight: (V, D). labels: (...) integers; a token
            with label -100 gives zeros. Any other label outside the vocabulary gives, as verl's
            kernel over a group does, -log sum exp of the logits, and the entropy; over a group
            a label beyond the vocabulary is the error of `softmax_stats`.
        temperature: positive; a float, or a tensor of one number or of one for each label.
        reduction: of the log-probabilities: "none" for (N,), "sum" or "mean" (over all N tokens)
            for a scalar. The entropies are (N,) in any case.
        dist_process_group: tensor-parallel group over which the vocabulary of `weight` is sharded.
            The gradient of `hidden` is then partial, as verl's: this rank's share, to be summed
            over the group by the backward of what made `hidden`. Under sequence parallelism, verl's
            default, gather_from_sequence_parallel_region does; without it verl's callers do
            nothing, and the backbone's gradient is as incomplete as with verl's own head: leave
            `sequence_parallel` on, or put copy_to_tensor_model_parallel_region before.

    Returns:
        float32 (float64 for float64) tensors, differentiable in hidden and weight.

    Raises:
        TypeError, ValueError: naming the argument and what was received.
    """
    reduction = reduction.lower() if isinstance(reduction, str) else reduction
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    check_tensor("labels", labels)
    sharded = dist_process_group is not None and dist.get_world_size(dist_process_group) > 1
    # Over a group only the operator learns how large the whole vocabulary is.
    vocab = sys.maxsize if sharded else len(weight)
    labels, known = known_labels(labels.reshape(-1), vocab, IGNORED)
    call = partial(
        linear_softmax_stats,
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        temperature=temperature_of(temperature, labels),
        ignore_index=IGNORED,
        group=dist_process_group if sharded else None,
        allreduce_dgrad=False,
        **_settings._asdict(),
    )
    number = not _settings.entropy_requires_grad
    few = number and is_frozen(hidden, weight)
    squares = found_so_far()
    outputs = ("logprob", "entropy", *(() if squares is None else ("collision",)))
    stats = stats_of_known(call, labels, known, outputs, few)
    logprob = stats.logprob
    if squares is not None:
        squares.append(stats.collision)
    entropy = as_number(stats.entropy, logprob) if number else stats.entropy
    if reduction != "none":
        logprob = logprob.sum() if reduction == "sum" else logprob.mean()
    return logprob, entropy


def policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config=None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """`grpo_loss` with verl's dual clip: where A < 0 the loss is at most -A clip_ratio_c.

    All tensors (B, T). `config` is verl's ActorConfig: clip_ratio, clip_ratio_low, clip_ratio_high,
    clip_ratio_c (3 where it is missing), global_batch_info. `rollout_is_weights` multiply the
    losses of the tokens. The log-ratio is held to [-20, 20], as verl's.

    Returns:
        (loss aggregated by verl's `agg_loss`, metrics actor/pg_clipfrac, actor/ppo_kl and
        actor/pg_clipfrac_lower).

    Raises:
        TypeError, ValueError: naming the argument and what was received.

    Source of the dual clip: Ye et al., "Mastering Complex Control in MOBA Games with Deep
    Reinforcement Learning" (2020).
    """
    low, high = _clip_bounds(config)
    dual_clip = config.get("clip_ratio_c", 3.0)
    check_number("clip_ratio_c", dual_clip, lambda v: v > 1, "more than 1")
    change = (log_prob - old_log_prob.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    tokens = (change, torch.zeros_like(change), advantages, response_mask)
    result = grpo_loss(*tokens, clip_low=low, clip_high=high)
    limit = -advantages * dual_clip
    lowered = (advantages < 0) & (result.loss > limit) & (response_mask != 0)
    loss = torch.where(lowered, limit, result.loss)
    metrics = {
        "actor/pg_clipfrac": result.metrics["clip_fraction"],
        "actor/ppo_kl": _masked_mean(-change, response_mask),
        "actor/pg_clipfrac_lower": _masked_mean(lowered, response_mask),
    }
    return _aggregate(loss, response_mask, loss_agg_mode, config, rollout_is_weights, metrics)


def policy_loss_clip_cov(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config=None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """`clip_cov_loss`; arguments and results as `policy_loss_vanilla`.

    The selection is made over the tokens of this call, as in verl: over a micro-batch, where verl
    cuts its batch. Of `config` also policy_loss.clip_cov_ratio, clip_cov_lb and clip_cov_ub.
    """
    low, high = _clip_bounds(config)
    settings = config.policy_loss
    tokens = (log_prob, old_log_prob, advantages, response_mask)
    selected = clip_cov_selection(
        *tokens,
        ratio=_default(settings.clip_cov_ratio, 2e-4),
        lower=_default(settings.clip_cov_lb, 1.0),
        upper=_default(settings.clip_cov_ub, 5.0),
        clip_low=low,
        clip_high=high,
    )
    result = clip_cov_loss(*tokens, selected, clip_low=low, clip_high=high)
    metrics = {
        "actor/pg_clipfrac": result.metrics["selected_fraction"],
        "actor/ppo_kl": _masked_mean(old_log_prob - log_prob, response_mask),
    }
    return _aggregate(
        result.loss, response_mask, loss_agg_mode, config, rollout_is_weights, metrics
    )


def policy_loss_kl_cov(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config=None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """`kl_cov_loss`; arguments and results as `policy_loss_vanilla`.

    The selection is made over the tokens of this call, as in verl. Of `config`
    policy_loss.kl_cov_ratio, policy_loss.ppo_kl_coef and global_batch_info.
    """
    settings = config.policy_loss
    ratio = _default(settings.kl_cov_ratio, 2e-4)
    selected = kl_cov_selection(log_prob, advantages, response_mask, ratio=ratio)
    result = kl_cov_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        selected,
        kl_coef=_default(settings.ppo_kl_coef, 1.0),
    )
    metrics = {"actor/ppo_kl": result.metrics["abs_log_ratio"]}
    return _aggregate(
        result.loss, response_mask, loss_agg_mode, config, rollout_is_weights, metrics
    )


POLICY_LOSSES: dict[str, Callable] = {
    "vanilla": policy_loss_vanilla,
    "clip_cov": policy_loss_clip_cov,
    "kl_cov": policy_loss_kl_cov,
}
_replaced: dict[str, Callable] = {}  # verl's own, while this package's are in their place
_settings = HeadSettings()
_sums_of_squares = SumsOfSquares()


def apply_to_verl(
    *, logits_dtype: torch.dtype | None = None, entropy_requires_grad: bool = True
) -> None:
    """Switch verl over, in this process; a second call changes nothing but the settings.

    Args:
        logits_dtype: as in `linear_softmax_stats`, for the fused head.
        entropy_requires_grad: as in `linear_softmax_stats`, for the same. verl's calls of its head
            do not say what the entropy is for; it is differentiated where `entropy_coeff` is not 0.
            False saves a frozen head (LoRA) one of three products; a loss that does differentiate
            the entropy then raises RuntimeError in its backward pass, but for one that is compiled,
            where the gradient of the entropy is missing.

    Raises:
        ImportError: verl, or one of its dependencies, is missing.
        TypeError, ValueError: `logits_dtype` is none that hidden states can have, or
            `entropy_requires_grad` no bool.
    """
    global _settings
    settings = head_settings(logits_dtype, entropy_requires_grad)
    if not _replaced:
        _switch_over()
    _settings = settings


def _switch_over() -> None:
    head, algorithms = import_module(_HEAD), import_module(_ALGORITHMS)
    _replaced.update({name: algorithms.get_policy_loss_fn(name) for name in POLICY_LOSSES})
    _replaced["linear_cross_entropy"] = head.linear_cross_entropy
    for name, loss in POLICY_LOSSES.items():
        algorithms.register_policy_loss(name)(loss)
    rebind("verl", {head.linear_cross_entropy: linear_cross_entropy})
    _sums_of_squares.switch_on()


def remove_from_verl() -> None:
    """Undo `apply_to_verl`; without it nothing happens."""
    global _settings
    _settings = HeadSettings()
    if not _replaced:
        return
    _sums_of_squares.switch_off()
    rebind("verl", {linear_cross_entropy: _replaced.pop("linear_cross_entropy")})
    for name, loss in _replaced.items():
        import_module(_ALGORITHMS).register_policy_loss(name)(loss)
    _replaced.clear()


def _clip_bounds(config) -> tuple[float, float]:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return _default(low, config.clip_ratio), _default(high, config.clip_ratio)


def _default(value: float | None, default: float) -> float:
    return default if value is None else value


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(x.float(), mask != 0)


def _aggregate(
    loss: Tensor, mask: Tensor, mode: str, config, rollout_is_weights: Tensor | None, metrics: dict
) -> tuple[Tensor, dict[str, float]]:
    if rollout_is_weights is not None:
        loss = torch.where(mask != 0, loss * rollout_is_weights, 0)
    agg_loss = import_module(_ALGORITHMS).agg_loss
    total = agg_loss(loss_mat=loss, loss_mask=mask, loss_agg_mode=mode, **config.global_batch_info)
    return total, {name: value.item() for name, value in metrics.items()}
