"""What the methods minimise: short functions of tensors, free of any trainer."""

from em_kernels.objectives._inputs import PolicyLoss
from em_kernels.objectives.advantages import group_advantage
from em_kernels.objectives.aggregation import (
    aggregate_loss,
    aggregation_denominator,
    aggregation_weight,
)
from em_kernels.objectives.bonus import active_entropy_coef, entropy_bonus, next_entropy_coef
from em_kernels.objectives.cispo import cispo_loss
from em_kernels.objectives.clip_cov import clip_cov_loss, clip_cov_selection
from em_kernels.objectives.dppo import dppo_loss
from em_kernels.objectives.eaft import eaft_loss, eaft_weight, linear_eaft_loss
from em_kernels.objectives.em import (
    micro_batch_mean_weights,
    sequence_mean_weights,
    token_mean_weights,
)
from em_kernels.objectives.empo import answer_clusters, empo_mask, empo_reward, semantic_entropy
from em_kernels.objectives.entropy_shaping import entropy_advantage
from em_kernels.objectives.grpo import clipped_surrogate, grpo_loss
from em_kernels.objectives.grpo_plus_plus import dynamic_sampling_mask, grpo_plus_plus_loss
from em_kernels.objectives.gspo import gspo_loss, gspo_token_loss
from em_kernels.objectives.high_entropy import high_entropy_loss
from em_kernels.objectives.kl import kl_estimate, kl_penalty
from em_kernels.objectives.kl_cov import kl_cov_loss, kl_cov_selection
from em_kernels.objectives.l_grpo import l_grpo_reward
from em_kernels.objectives.opd import opd_weight
from em_kernels.objectives.ppl import (
    PreferenceLoss,
    label_kl,
    linear_label_kl,
    logprob_at,
    ppl_loss,
    pseudo_label_kl,
    segment_regret,
    token_regret,
    topk_label_kl,
)
from em_kernels.objectives.repo import next_zeta, repo_advantage
from em_kernels.objectives.rewards import (
    format_reward,
    length_reward,
    majority_reward,
    negative_entropy_reward,
    random_reward,
    self_certainty_reward,
    verified_reward,
)
from em_kernels.objectives.rollout_correction import (
    RolloutWeight,
    rollout_difference,
    rollout_weight,
)
from em_kernels.objectives.sapo import sapo_loss

__all__ = [
    "PolicyLoss",
    "PreferenceLoss",
    "RolloutWeight",
    "active_entropy_coef",
    "aggregate_loss",
    "aggregation_denominator",
    "aggregation_weight",
    "answer_clusters",
    "cispo_loss",
    "clip_cov_loss",
    "clip_cov_selection",
    "clipped_surrogate",
    "dppo_loss",
    "dynamic_sampling_mask",
    "eaft_loss",
    "eaft_weight",
    "empo_mask",
    "empo_reward",
    "entropy_advantage",
    "entropy_bonus",
    "format_reward",
    "group_advantage",
    "grpo_loss",
    "grpo_plus_plus_loss",
    "gspo_loss",
    "gspo_token_loss",
    "high_entropy_loss",
    "kl_cov_loss",
    "kl_cov_selection",
    "kl_estimate",
    "kl_penalty",
    "l_grpo_reward",
    "label_kl",
    "length_reward",
    "linear_eaft_loss",
    "linear_label_kl",
    "logprob_at",
    "majority_reward",
    "micro_batch_mean_weights",
    "negative_entropy_reward",
    "next_entropy_coef",
    "next_zeta",
    "opd_weight",
    "ppl_loss",
    "pseudo_label_kl",
    "random_reward",
    "repo_advantage",
    "rollout_difference",
    "rollout_weight",
    "sapo_loss",
    "segment_regret",
    "self_certainty_reward",
    "semantic_entropy",
    "sequence_mean_weights",
    "token_mean_weights",
    "token_regret",
    "topk_label_kl",
    "verified_reward",
]
