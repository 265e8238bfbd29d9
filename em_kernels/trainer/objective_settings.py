"""Settings of single objectives: their names start with what they are of, or their help does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from em_kernels.backends.pair import KINDS
from em_kernels.lm.settings import (
    at_least,
    finite,
    fraction,
    not_negative,
    path_text,
    positive,
    setting,
    share,
)
from em_kernels.objectives.dppo import DIVERGENCES
from em_kernels.objectives.eaft import TOP_K
from em_kernels.trainer.objective_table import WHOLE_LABELS
from em_kernels.trainer.shared_settings import SharedSettings

own_setting = partial(setting, group="settings of one objective")
PPL_LABELS = ("pseudo", "none", "topk", *WHOLE_LABELS)
OPD_WEIGHTS = ("none", "teacher_entropy")


@dataclass(frozen=True)
class ObjectiveSettings(SharedSettings):
    """The part of `RLConfig` that is of single objectives."""

    cov_lower: float = own_setting(1.0, "clip_cov: least covariance", check=finite)
    cov_upper: float = own_setting(5.0, "clip_cov: largest covariance", check=finite)
    kl_cov_coef: float = own_setting(1.0, "kl_cov: weight of the penalty", check=not_negative)
    empo_low: float = own_setting(
        0.0, "empo: least semantic entropy of a problem that is kept, nats", check=finite
    )
    empo_high: float = own_setting(10.0, "empo: largest, nats", check=finite)
    tau_pos: float = own_setting(
        1.0, "sapo: temperature of the gate where the advantage is positive", check=positive
    )
    tau_neg: float = own_setting(1.05, "sapo: and where it is not", check=positive)
    dppo_divergence: str = own_setting(
        "binary_tv",
        "dppo: how far a distribution has moved: total variation or KL, of the token against all "
        "others or of `dppo_k` tokens against all others",
        choices=DIVERGENCES,
    )
    dppo_low: float | None = own_setting(
        None,
        "dppo: how far it may move where the advantage is not positive",
        check=not_negative,
        shown="0.15, of KL 0.05",
    )
    dppo_high: float | None = own_setting(
        None,
        "dppo: and where it is positive",
        check=not_negative,
        shown="0.15, of KL 0.05",
    )
    dppo_k: int = own_setting(
        20,
        "dppo: how many of the likeliest tokens are stored at every place, with topk_tv or topk_kl",
        check=at_least(1),
    )
    max_ratio: float = own_setting(
        20.0, "dppo: where the importance weight of a token is truncated", check=positive
    )
    sampling_rounds: int = own_setting(
        3,
        "how often grpo++ draws new problems in the place of those whose answers are all right or "
        "all wrong, the first draw included",
        check=at_least(1),
    )
    gamma: float = own_setting(0.9, "ppl: discount", check=fraction)
    alpha: float = own_setting(1.0, "ppl: scale of the regret", check=positive)
    ppl_label: str = own_setting(
        "pseudo",
        "ppl: label of the segments; with the exact KL at every token: sampler, the policy that "
        "drew them, of which a copy is made in every update, or reference, the initial model; "
        "topk, what is stored of the sampler: its `ppl_label_k` likeliest tokens, others as one",
        choices=PPL_LABELS,
    )
    ppl_label_k: int = own_setting(
        20, "ppl: how many tokens at every place are stored as label topk", check=at_least(1)
    )
    eaft_k: int = own_setting(
        TOP_K, "eaft: likeliest tokens whose entropy weighs the cross entropy", check=at_least(2)
    )
    eaft_alpha: float = own_setting(
        1.0, "eaft: exponent of that entropy; 0 is sft", check=not_negative
    )
    teacher: str | None = own_setting(
        None,
        "opd: the model to learn from, a folder or a hub name, of the same vocabulary; every rank "
        "holds it whole, in `dtype`",
        check=path_text,
        metavar="MODEL",
    )
    opd_kind: str = own_setting(
        "reverse_kl",
        "opd: the divergence between the student p and the teacher q: forward_kl is KL(q || p), "
        "reverse_kl KL(p || q), js Jensen-Shannon",
        choices=KINDS,
    )
    opd_beta: float = own_setting(
        0.5, "opd: weight of the teacher in the mixture of js, in [0, 1]", check=share
    )
    opd_weight: str = own_setting(
        "none",
        "opd: weight of every token; teacher_entropy: the entropy of the teacher there over its "
        "mean over the tokens of the update",
        choices=OPD_WEIGHTS,
    )
