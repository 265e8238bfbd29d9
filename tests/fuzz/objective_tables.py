"""Every argument of every public function of `em_kernels.objectives`, with what it may be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from em_kernels import objectives as ob
from em_kernels.objectives.aggregation import AGGREGATIONS
from em_kernels.objectives.dppo import DIVERGENCES
from em_kernels.objectives.kl import KL_ESTIMATORS
from em_kernels.objectives.rollout_correction import CORRECTIONS
from fuzz import kinds, tables
from fuzz.kinds import FLAG, INF, NAN, Kind, Place, choices, numbers, tensors, wholes
from fuzz.tables import GENERATOR, GROUP, IDS, LOGITS, LORA, MASK, RATIO, ROWS, of

WRONG = (torch.Tensor.long, kinds.complex_of)


def logprobs(place: Place) -> Tensor:
    return -place.normal(*place.lead, scale=2.0).abs()


def answers(place: Place) -> Tensor:
    return place.normal(*place.lead[:1])


def prompts(place: Place) -> Tensor:
    return torch.randint(0, 2, place.lead[:1])


def clusters(place: Place) -> Tensor:
    return torch.randint(-1, 3, place.lead[:1])


def right(place: Place) -> Tensor:
    return torch.randint(0, 2, place.lead[:1]).to(place.pick((torch.bool, torch.int64)))


def listed(place: Place) -> Tensor:
    return place.normal(*place.lead, 3).log_softmax(-1)


def listed_ids(place: Place) -> Tensor:
    return torch.randint(0, 9, (*place.lead, 3))


# The first tensor says the shape of the others; a message may name any of them.
FIRST = tensors(logprobs, *WRONG, fits=False)
LIKE = tensors(logprobs, *WRONG)
COUNTED = tensors(kinds.mask, values=tables.WEIGHING)
ADVANTAGE = tensors(lambda place: place.normal(*place.lead), *WRONG)
POLICY = {"logprob": FIRST, "old_logprob": LIKE, "advantage": ADVANTAGE, "mask": COUNTED}
NEEDED = tuple(POLICY)
CLIP = {"clip_low": numbers(0, 1, -0.1), "clip_high": numbers(0, 2, -0.1)}
SELECTED = {"selected": COUNTED}
ENTROPY = {"entropy": tensors(lambda place: place.normal(*place.lead).abs(), *WRONG)}
REWARD = tensors(answers, *WRONG, fits=False)
PROMPT = tensors(prompts, torch.Tensor.float)
CLUSTER = tensors(clusters, torch.Tensor.float, kinds.complex_of, fits=False)
RIGHT = tensors(right, fits=False)
DIVISOR = {
    "mode": choices(AGGREGATIONS),
    "denominator": Kind(
        lambda place: place.pick((3, 2.5, torch.tensor(4.0))),
        lambda _: ["3", True, 0, -1.0, NAN, INF, torch.ones(2), 1j, [3]],
    ).or_none(),
    "max_length": wholes(1, 9, 0, -1).or_none(),
    "segment_ids": tensors(
        lambda place: torch.randint(-1, 3, place.lead), torch.Tensor.float, kinds.complex_of
    ).or_none(),
    "token_group": GROUP,
}
COEF = numbers(-2, 2)
AT_LEAST_0 = numbers(0, 2, -0.1)
POSITIVE = numbers(0.1, 3, 0, -1.0)
REFERENCE = {
    "ref_logprob": LIKE.or_none(),
    "ref_kl": ADVANTAGE.or_none(),
    "kl_coef": AT_LEAST_0,
    "kl_estimator": choices(KL_ESTIMATORS),
}
REGRET = {"gamma": numbers(0.1, 1, 0, 1.5, -0.1), "alpha": POSITIVE}
TEXTS = ("no text", "\\boxed{3}", "#### 12", "it is \\boxed{x^2}", "")


def texts(place: Place) -> list[str]:
    return [place.pick(TEXTS) for _ in range(place.lead[0])]


TEXT_LIST = Kind(texts, lambda place: [None, 3, [1, None, 2], object(), [b"3"], "one text"])
OTHER_LIST = Kind(texts, lambda place: [*TEXT_LIST.bad(place), ["x"] * (place.lead[0] + 1)])
FUNCTION = Kind(lambda place: lambda a, b: a == b, lambda _: [3, "exact", object()]).or_none()
BOUND = numbers(0, 1, -0.1).or_none()


def fit_length(place: Place, given: dict[str, Any]) -> None:
    """max_length belongs to one of the modes, where there is no denominator."""
    constant = given.get("mode") == AGGREGATIONS[-1]
    if not constant:
        given.pop("max_length", None)
    elif given.get("denominator") is None:
        given["max_length"] = 7


def fit_reference(place: Place, given: dict[str, Any]) -> None:
    if given.get("ref_kl") is not None:
        given.pop("ref_logprob", None)
    elif given.get("ref_logprob") is None:
        given["kl_coef"] = 0.0


def fit_listed(place: Place, given: dict[str, Any]) -> None:
    names = ("topk_logprob", "old_topk_logprob", "topk_ids", "token_ids")
    if given.get("divergence", "binary_tv").startswith("topk"):
        for name, make in zip(names, (listed, listed, listed_ids), strict=False):
            given[name] = make(place)
        given["token_ids"] = given["topk_ids"][..., 0].contiguous()
    else:
        for name in names:
            given.pop(name, None)


def fit_labels(place: Place, given: dict[str, Any]) -> None:
    if (given.get("chosen_kl") is None) != (given.get("rejected_kl") is None):
        given.pop("chosen_kl", None), given.pop("rejected_kl", None)


def fit_order(place: Place, given: dict[str, Any]) -> None:
    if "minimum" in given or "maximum" in given:
        given["minimum"], given["maximum"] = 1e-3, 0.5


def fit_cap(place: Place, given: dict[str, Any]) -> None:
    if "floor" in given or "cap" in given:
        given["floor"], given["cap"] = 0.25, 2.0


def fit_weight(place: Place, given: dict[str, Any]) -> None:
    fit_length(place, given)
    if given.get("mean_entropy") is not None and given.get("teacher_entropy") is None:
        given.pop("mean_entropy")


def fit_eaft(place: Place, given: dict[str, Any]) -> None:
    tables.fit_rows(place, given)
    most = given.get("valid_vocab") or place.vocab
    given["k"] = min(given.get("k", 2), most)
    if most < 2:  # of two tokens or more the entropy is taken
        given["k"] = 2
        given.pop("valid_vocab")


def fit_same(place: Place, given: dict[str, Any]) -> None:
    if given.get("same") is not None:
        given.pop("judge", None)
    given["prompt"] = torch.zeros(len(given["responses"]), dtype=torch.int64)


EAFT = {
    "target": IDS, "token_weight": ROWS.or_none(), "k": wholes(2, 5, 0, 1, -1, 10**9),
    "alpha": AT_LEAST_0, "mask": MASK.or_none(),
}  # fmt: skip
EAFT_TARGET = {"target": tensors(kinds.target, torch.Tensor.int, values=tables.BEYOND)}
REST = {
    **{n: kind for n, kind in LOGITS.items()},
    "outputs": tables.OUTPUT_NAMES,
}
HEAD = tables.HEAD
ANY = {"logprob": ("logprob", "old_logprob", "advantage", "mask", "ref_logprob", "label_logprob")}

FUNCTIONS = [
    of(ob.active_entropy_coef, ("coef", "entropy", "target"),
       {"coef": COEF, "entropy": AT_LEAST_0, "target": AT_LEAST_0}),
    of(ob.aggregate_loss, ("loss", "mask"), DIVISOR, {"loss": FIRST, "mask": COUNTED},
       fit=fit_length, alike={"loss": ("loss", "mask")}),
    of(ob.aggregation_weight, ("mask",), DIVISOR,
       {"mask": tensors(kinds.mask, values=tables.WEIGHING, fits=False)}, fit=fit_length),
    of(ob.aggregation_denominator, ("mask",),
       {n: k for n, k in DIVISOR.items() if n != "denominator"},
       {"mask": tensors(kinds.mask, values=tables.WEIGHING, fits=False)}, fit=fit_length),
    of(ob.answer_clusters, ("responses", "prompt"),
       {"responses": TEXT_LIST, "prompt": Kind(prompts, lambda place: [None, 3, object()]),
        "same": FUNCTION, "judge": FUNCTION}, fit=fit_same,
       alike={"responses": ("responses", "prompt")}),
    of(ob.cispo_loss, NEEDED, POLICY, CLIP, alike=ANY),
    of(ob.clip_cov_loss, (*NEEDED, "selected"), POLICY, SELECTED, CLIP, alike=ANY),
    of(ob.clip_cov_selection, NEEDED, POLICY, CLIP,
       {"ratio": RATIO, "lower": numbers(-2, 0, 9.5, bounded=False),
        "upper": numbers(1.5, 9, -3, bounded=False), "generator": GENERATOR.or_none(),
        "group": GROUP}, alike=ANY),
    of(ob.clipped_surrogate, ("ratio", "advantage", "clip_low", "clip_high"), CLIP,
       {"ratio": FIRST, "advantage": LIKE}, alike={"ratio": ("ratio", "advantage")}),
    of(ob.dppo_loss, NEEDED, POLICY,
       {"divergence": choices(DIVERGENCES), "delta_low": AT_LEAST_0.or_none(),
        "delta_high": AT_LEAST_0.or_none(), "max_ratio": POSITIVE,
        "topk_logprob": tensors(listed, *WRONG).or_none(),
        "old_topk_logprob": tensors(listed, *WRONG).or_none(),
        "topk_ids": tensors(listed_ids, torch.Tensor.float).or_none(),
        "token_ids": tensors(lambda place: listed_ids(place)[..., 0].contiguous(),
                             torch.Tensor.float).or_none()},
       fit=fit_listed, alike=ANY),
    of(ob.dynamic_sampling_mask, ("correct", "prompt"), {"correct": RIGHT, "prompt": PROMPT},
       alike={"correct": ("correct", "prompt")}),
    of(ob.eaft_loss, ("logits", "target", "k"), REST, EAFT, EAFT_TARGET,
       {"logits": tables.OF_LOGITS}, fit=fit_eaft),
    of(ob.linear_eaft_loss, ("hidden", "weight", "target", "k"), REST, EAFT, EAFT_TARGET,
       HEAD, tables.PRODUCT, tables.FILTER, tables.SUM, LORA, fit=fit_eaft,
       alike=tables.ANY_BUT_HIDDEN),
    of(ob.eaft_weight, ("top_logprob", "mask"),
       {"top_logprob": tensors(listed, *WRONG, lambda x: x[..., :1], fits=False), "mask": COUNTED,
        "alpha": AT_LEAST_0}, alike={"top_logprob": ("top_logprob", "mask")}),
    of(ob.empo_mask, ("entropy", "low", "high"),
       {"entropy": REWARD, "low": numbers(-1, 0), "high": numbers(0.5, 1, -3)},
       alike={"low": ("low", "high")}),
    *(of(f, ("cluster", "prompt"), {"cluster": CLUSTER, "prompt": PROMPT},
         alike={"cluster": ("cluster", "prompt")})
      for f in (ob.empo_reward, ob.semantic_entropy, ob.majority_reward)),
    of(ob.entropy_advantage, ("entropy", "advantage", "mask"),
       {"entropy": FIRST, "advantage": ADVANTAGE, "mask": COUNTED, "alpha": AT_LEAST_0,
        "kappa": numbers(1.1, 4, 1, 0)}, alike={"entropy": ("entropy", "mask", "advantage")}),
    of(ob.entropy_bonus, ("loss", "entropy", "mask", "coef"), ENTROPY,
       {"loss": FIRST, "mask": COUNTED, "coef": COEF}, alike={"loss": ("loss", "entropy")}),
    of(ob.format_reward, ("responses",), {"responses": TEXT_LIST}),
    of(ob.group_advantage, ("reward", "prompt"),
       {"reward": REWARD, "prompt": PROMPT, "normalize_std": FLAG, "eps": AT_LEAST_0,
        "correction": Kind(lambda place: place.whole(0, 1), lambda _: [2, -1, "1", None, 0.5])},
       alike={"reward": ("reward", "prompt")}),
    of(ob.grpo_loss, NEEDED, POLICY, CLIP, REFERENCE, fit=fit_reference,
       alike={**ANY, "kl_coef": ("kl_coef",)}),
    of(ob.grpo_plus_plus_loss, (*NEEDED, "entropy"), POLICY, CLIP, ENTROPY,
       {"entropy_coef": COEF}, alike={**ANY, "entropy_coef": ("coef", "entropy_coef")}),
    of(ob.gspo_loss, NEEDED, POLICY, CLIP, alike=ANY),
    of(ob.gspo_token_loss, NEEDED, POLICY, CLIP, alike=ANY),
    of(ob.high_entropy_loss, (*NEEDED, "selected"), POLICY, CLIP, SELECTED, alike=ANY),
    of(ob.kl_cov_loss, (*NEEDED, "selected"), POLICY, SELECTED, {"kl_coef": AT_LEAST_0},
       alike=ANY),
    of(ob.kl_cov_selection, ("logprob", "advantage", "mask"),
       {"logprob": FIRST, "advantage": ADVANTAGE, "mask": COUNTED, "ratio": RATIO,
        "group": GROUP}, alike=ANY),
    of(ob.kl_estimate, ("logprob", "ref_logprob"),
       {"logprob": FIRST, "ref_logprob": LIKE, "estimator": choices(KL_ESTIMATORS)}, alike=ANY),
    of(ob.kl_penalty, ("policy", "logprob", "mask", "kl_coef"), REFERENCE,
       {"policy": Kind(lambda place: ob.PolicyLoss(torch.zeros(place.lead), {}),
                       lambda place: [None, 3, torch.zeros(place.lead), object()]),
        "logprob": FIRST, "mask": COUNTED}, fit=fit_reference, alike=ANY),
    of(ob.l_grpo_reward, ("correct", "length", "prompt", "max_length"),
       {"correct": RIGHT, "length": tensors(answers, kinds.complex_of), "prompt": PROMPT,
        "max_length": POSITIVE}, alike={"correct": ("correct", "prompt")}),
    of(ob.label_kl, ("logprob", "label_logprob"),
       {"logprob": tensors(listed, *WRONG, fits=False), "label_logprob": tensors(listed, *WRONG)},
       alike=ANY),
    of(ob.topk_label_kl, ("logprob", "label_logprob"),
       {"logprob": tensors(listed, *WRONG, fits=False), "label_logprob": tensors(listed, *WRONG)},
       alike=ANY),
    of(ob.pseudo_label_kl, ("logprob",), {"logprob": FIRST}),
    of(ob.length_reward, ("length", "max_length"),
       {"length": tensors(answers, kinds.complex_of, fits=False), "max_length": POSITIVE}),
    of(ob.linear_label_kl, ("hidden", "weight", "label_hidden", "label_weight"),
       {"hidden": tables.OF_HIDDEN, "weight": tables.WEIGHT, "label_hidden": tables.OF_HIDDEN,
        "label_weight": tables.WEIGHT},
       alike={"hidden": ("weight", "hidden", "other_hidden"),
              "weight": ("weight", "other_weight"),
              "label_hidden": ("other_weight", "other_hidden", "label_hidden"),
              "label_weight": ("other_weight", "label_weight")}),
    of(ob.logprob_at, ("logits", "index"),
       {"logits": tables.OF_LOGITS, "temperature": tables.TEMPERATURE,
        "index": tensors(lambda place: torch.randint(0, place.vocab, (*place.lead, 2)),
                         torch.Tensor.int, lambda x: x[..., None], values=tables.BEYOND,
                         fits=False)}, alike={"index": ("index", "target")}),
    *(of(f, ("mask",), {"mask": tensors(kinds.mask, values=tables.WEIGHING, fits=False)})
      for f in (ob.token_mean_weights, ob.sequence_mean_weights)),
    of(ob.micro_batch_mean_weights, ("mask", "micro_batch"),
       {"mask": tensors(kinds.mask, values=tables.WEIGHING, fits=False),
        "micro_batch": wholes(1, 4, 0, -1)}),
    of(ob.negative_entropy_reward, ("entropy", "mask"), {"entropy": FIRST, "mask": COUNTED},
       alike={"entropy": ("entropy", "mask")}),
    of(ob.self_certainty_reward, ("self_certainty", "mask"),
       {"self_certainty": FIRST, "mask": COUNTED},
       alike={"self_certainty": ("self_certainty", "mask")}),
    of(ob.next_entropy_coef, ("coef", "entropy", "target"),
       {"coef": COEF, "entropy": AT_LEAST_0, "target": AT_LEAST_0, "step": POSITIVE,
        "minimum": numbers(-2, 0, bounded=False),
        "maximum": numbers(0.5, 1, -99, bounded=False)}, fit=fit_order),
    of(ob.next_zeta, ("zeta", "entropy", "target"),
       {"zeta": COEF, "entropy": AT_LEAST_0, "target": AT_LEAST_0,
        "minimum": numbers(1e-4, 1e-3, 0, 9.0), "maximum": numbers(0.1, 1, 0, 1e-9)},
       fit=fit_order),
    of(ob.opd_weight, ("mask",), DIVISOR,
       {"mask": tensors(kinds.mask, values=tables.WEIGHING, fits=False),
        "teacher_entropy": tensors(lambda place: place.normal(*place.lead).abs(),
                                   *WRONG).or_none(),
        "mean_entropy": Kind(lambda place: place.pick((0.5, torch.tensor(1.5))),
                             lambda _: ["1", True, -1.0, NAN, torch.ones(2), [1.0]]).or_none()},
       fit=fit_weight),
    of(ob.ppl_loss, ("chosen_logprob", "rejected_logprob", "chosen_mask", "rejected_mask", "gamma"),
       REGRET, {"chosen_logprob": FIRST, "rejected_logprob": FIRST, "chosen_mask": COUNTED,
                "rejected_mask": COUNTED, "chosen_kl": ADVANTAGE.or_none(),
                "rejected_kl": ADVANTAGE.or_none(), "length_normalize": FLAG}, fit=fit_labels,
       alike={n: ("logprob", "mask", "kl", n)
              for n in ("chosen_logprob", "rejected_logprob", "chosen_mask", "rejected_mask")}),
    of(ob.segment_regret, ("logprob", "kl", "mask", "gamma"), REGRET,
       {"logprob": FIRST, "kl": ADVANTAGE.or_none(), "mask": COUNTED, "length_normalize": FLAG},
       alike={"logprob": ("logprob", "mask", "kl")}),
    of(ob.token_regret, ("logprob", "kl", "mask", "gamma"), REGRET,
       {"logprob": FIRST, "kl": ADVANTAGE.or_none(), "mask": COUNTED},
       alike={"logprob": ("logprob", "mask", "kl")}),
    of(ob.random_reward, ("like",),
       {"like": tensors(answers, fits=False), "probability": numbers(0, 1, -0.1, 1.1),
        "generator": GENERATOR.or_none()}),
    of(ob.repo_advantage, ("logprob", "advantage", "mask", "zeta"), ENTROPY,
       {"logprob": FIRST, "advantage": ADVANTAGE, "mask": COUNTED, "zeta": COEF,
        "entropy": ENTROPY["entropy"].or_none()}, alike=ANY),
    of(ob.rollout_difference, ("old_logprob", "rollout_logprob", "mask"),
       {"old_logprob": FIRST, "rollout_logprob": LIKE, "mask": COUNTED},
       alike={"old_logprob": ("old_logprob", "rollout_logprob")}),
    of(ob.rollout_weight, ("old_logprob", "rollout_logprob", "mask"),
       {"old_logprob": FIRST, "rollout_logprob": LIKE, "mask": COUNTED,
        "mode": choices(tuple(CORRECTIONS)), "floor": BOUND,
        "cap": numbers(1.5, 9, 0, -1.0).or_none()}, fit=fit_cap,
       alike={"old_logprob": ("old_logprob", "rollout_logprob")}),
    of(ob.sapo_loss, NEEDED, POLICY, {"tau_pos": POSITIVE, "tau_neg": POSITIVE}, alike=ANY),
    of(ob.verified_reward, ("responses", "answers"),
       {"responses": TEXT_LIST, "answers": OTHER_LIST, "judge": FUNCTION},
       alike={"responses": ("responses", "answers")}),
]  # fmt: skip
RESULTS = ("PolicyLoss", "PreferenceLoss", "RolloutWeight")
