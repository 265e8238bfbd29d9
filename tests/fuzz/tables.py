"""Every argument of every public function of `em_kernels`, with what it may be.

`FUNCTIONS` holds a `Function` for each; test_arguments.py fails where a function or a parameter of
one has none. How to add one: a `Kind` in its table, by its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import hypothesis.strategies as st
import torch
from helpers import FAST_IMPLS

import em_kernels as em
from em_kernels.backends.interface import NEEDS_TARGET, OUTPUTS
from em_kernels.inference import AdaptiveTemperature, EntropyDescent
from fuzz import kinds
from fuzz.kinds import FLAG, INF, NAN, Kind, Place, choices, numbers, tensors, wholes

GROUP = Kind(lambda place: None, lambda _: ["tp", 1, object(), torch.ones(1)])
"""Groups are drawn by tests/backends/test_vocab_parallel.py and its like: they take processes."""


FIRST = ("ignore_index", "valid_vocab")
"""Drawn before the others, which look at them."""


class Function(NamedTuple):
    """A public function as it is called with drawn arguments.

    function: whose parameters are meant. kinds: by name. needed: those always given. fit: mends
    what of the arguments drawn does not go together. call: in place of `function`. alike: what the
    message may say in place of a parameter's name.
    """

    function: Callable[..., Any]
    kinds: Mapping[str, Kind]
    needed: tuple[str, ...]
    fit: Callable[[Place, dict[str, Any]], None] = lambda place, given: None
    call: Callable[..., Any] | None = None
    alike: Mapping[str, tuple[str, ...]] = {}

    @property
    def name(self) -> str:
        return self.function.__qualname__

    def __repr__(self) -> str:
        return self.name

    def run(self, **given: Any) -> Any:
        return (self.call or self.function)(**given)

    def parameters(self) -> list[str]:
        parameters = inspect.signature(self.function).parameters
        return [name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD]

    def draw(self, place: Place, every: bool = True) -> dict[str, Any]:
        """Arguments that go together: those needed and, of the others, some."""
        names = list(self.needed)
        if every:
            others = [name for name in self.kinds if name not in self.needed]
            if others:
                names += place.draw(st.lists(st.sampled_from(others), unique=True, max_size=6))
        for name in sorted(names, key=lambda name: (name not in FIRST, name != "target", name)):
            place.given[name] = self.kinds[name].good(place)
        self.fit(place, place.given)
        return dict(place.given)


def outputs(place: Place) -> tuple[str, ...]:
    names = [n for n in OUTPUTS if place.given.get("target") is not None or n not in NEEDS_TARGET]
    return tuple(place.draw(st.lists(st.sampled_from(names), max_size=4)))


OUTPUT_NAMES = Kind(
    outputs, lambda _: [None, 3, "entropy", ("nothing",), (1,), ("entropy", None), [[]]]
)
ROWS = tensors(kinds.rows, kinds.complex_of, kinds.requiring)
BEYOND = (lambda x: x.abs() + (1 << 40), lambda x: -x.abs() - (1 << 40))
TARGET = tensors(kinds.target, torch.Tensor.int, torch.Tensor.float, values=BEYOND)
INDEX = tensors(
    lambda place: kinds.target(place, 0.0),
    *(torch.Tensor.int, torch.Tensor.float, lambda x: x[..., None, None]),
    values=BEYOND,
    fits=False,
)
IDS = tensors(
    kinds.ids,
    *(torch.Tensor.int, torch.Tensor.float, lambda x: x[..., None, None]),
    values=BEYOND,
    fits=False,
)
IDS_ALONE = Kind(kinds.target, IDS.bad)
WEIGHING = (lambda x: x * 0.5 + 0.25, lambda x: x * NAN, lambda x: x + 0.25j)
MASK = tensors(kinds.mask, values=WEIGHING)
OF_LOGITS = tensors(
    kinds.logits,
    *(torch.Tensor.long, kinds.complex_of, torch.Tensor.bool, lambda x: x[..., :0]),
    fits=False,
)
OF_HIDDEN = tensors(
    kinds.hidden, *(torch.Tensor.long, kinds.complex_of, lambda x: x[..., :0]), fits=False
)
WEIGHT = tensors(kinds.weight, torch.Tensor.long, kinds.complex_of, lambda x: x[:0], lambda x: x[0])
BIAS = tensors(kinds.bias, torch.Tensor.long, kinds.complex_of).or_none()
TEMPERATURE = Kind(kinds.temperature, kinds.bad_temperature)
SOFTCAP = numbers(0.5, 50, 0, 0.0, -1.0).or_none()
SCALE = numbers(0.25, 3, 0, 0.0)
PRODUCT = {
    "allreduce_dgrad": FLAG,
    "chunk_tokens": wholes(1, 9, 0, -1).or_none(),
    "logits_dtype": Kind(
        lambda place: place.pick((None, torch.float32)),
        lambda _: ["float32", torch.int32, 32, torch.complex64],
    ),
    "product_dtype": Kind(
        lambda place: None, lambda _: ["float32", torch.int32, 32, torch.complex64, float]
    ),
}
FILTER = {"filter_eps": numbers(1e-6, 0.5, 0, 1, 0.0, 1.0, -0.1).or_none()}
SUM = {"accumulate_into": Kind(lambda place: None, lambda place: bad_sums(place))}
LORA = {"lora": Kind(kinds.lora, kinds.bad_lora).or_none()}
SUPPORT = {
    "top_k": kinds.limit(1, 50, True, 0, -1, 1.5),
    "top_p": kinds.limit(0.0625, 1, False, 0, -1.0, 1.5),
    "min_p": kinds.limit(0.0, 1, False, -1.0, 1.5),
    "sampler": choices(("transformers", "vllm")),
    "kept": Kind(kinds.kept, kinds.bad_kept).or_none(),
}
LOGITS = {
    "temperature": TEMPERATURE,
    "softcap": SOFTCAP,
    "logit_scale": SCALE,
    "ignore_index": Kind(lambda place: place.pick((-100, -1, 10**9)), lambda _: kinds.NO_INTS),
    "valid_vocab": wholes(1, "vocab", 0, -1, 10**9).or_none(),
    "group": GROUP,
    "impl": choices(("auto", *FAST_IMPLS)),
}
ROW = {**LOGITS, **SUPPORT, "outputs": OUTPUT_NAMES, "mask": MASK.or_none()}
GRAD = {"entropy_requires_grad": FLAG}
WEIGHTS = {"entropy_weight": ROWS, "logprob_weight": ROWS.or_none()}
REDUCTION = {
    "reduction": Kind(
        lambda place: place.pick(("token_mean", "sequence_mean", "sum", 3.0, 2)),
        lambda _: ["mean", None, 0, -1.0, NAN, INF, True, [], 10**400],
    ),
    "segment_ids": tensors(
        lambda place: torch.randint(-1, 3, place.lead),
        torch.Tensor.float,
        torch.Tensor.bool,
        kinds.complex_of,
    ).or_none(),
    "token_group": GROUP,
    "target": IDS.or_none(),
    "logprob_weight": ROWS.or_none(),
    "mask": MASK.or_none(),
}
HEAD = {"hidden": OF_HIDDEN, "weight": WEIGHT, "bias": BIAS}
COVARIANCE = {
    "keep_logits": wholes(0, 10**6, -1).or_none(),
    "fuse_product": Kind(lambda place: False, lambda _: [None, 1, "yes", []]),
    **GRAD,
}
ANY_BUT_HIDDEN = {"hidden": ("weight", "hidden")}


def bad_sums(place: Place) -> list[Any]:
    x = kinds.accumulate_into(place)
    return [1.0, "x", [1.0], *kinds.other_shapes(x), x.long(), kinds.complex_of(x), x.to("meta")]


def fit_rows(place: Place, given: dict[str, Any]) -> None:
    """A target is there where something needs it, of one id a row where that is wanted."""
    if given.get("kept") is not None:
        for name in ("top_k", "top_p", "min_p"):
            given.pop(name, None)
    truncated = any(given.get(name) is not None for name in ("top_k", "top_p", "min_p", "kept"))
    several = given.get("target") is not None and given["target"].dim() > len(place.lead)
    of_one = {"entropy_slope", "is_kept"} & set(given.get("outputs", ()))
    if several and (truncated or of_one):
        given["target"] = given["target"][..., 0].contiguous()
    if given.get("logprob_weight") is not None:
        if given.get("target") is None:
            given["target"] = kinds.target(place)
        given["logprob_weight"] = torch.ones(given["target"].shape, dtype=place.wide)
    if given.get("target") is None and "outputs" in given:
        given["outputs"] = tuple(n for n in given["outputs"] if n not in NEEDS_TARGET)


def fit_divergence(place: Place, given: dict[str, Any]) -> None:
    fit_rows(place, given)
    if given.get("target") is None and "other_outputs" in given:
        names = given["other_outputs"]
        given["other_outputs"] = tuple(n for n in names if n not in NEEDS_TARGET)
    for name in ("logits", "hidden"):
        if name in given and given.get("token_weight") is not None:
            given[name].requires_grad_()


def row_outputs(place: Place) -> tuple[str, ...]:
    names = [n for n in OUTPUTS if place.given.get("target") is not None or n not in NEEDS_TARGET]
    return tuple(place.draw(st.lists(st.sampled_from(names), max_size=3)))


DIVERGENCE = {
    **{name: LOGITS[name] for name in LOGITS},
    "kind": choices(("forward_kl", "reverse_kl", "js")),
    "beta": numbers(0, 1, -0.1, 1.1),
    "target": TARGET.or_none(),
    "mask": MASK.or_none(),
    "other_temperature": Kind(
        kinds.temperature, lambda place: [x for x in kinds.bad_temperature(place) if x is not None]
    ),
    "other_softcap": SOFTCAP,
    "other_logit_scale": SCALE,
}
ROW_NAMES = Kind(row_outputs, OUTPUT_NAMES.bad)
PAIR_OUTPUTS = {"outputs": ROW_NAMES, "other_outputs": ROW_NAMES}
PAIR = {
    "logits": OF_LOGITS,
    "other_logits": tensors(kinds.logits, torch.Tensor.long, kinds.complex_of),
}
HEADS = {
    **HEAD,
    "other_hidden": OF_HIDDEN,
    "other_weight": WEIGHT,
    "other_bias": BIAS,
    **PRODUCT,
}
TWO_LOGITS = ("logits", "other_logits")
TWO_HEADS = ("hidden", "weight", "other_hidden", "other_weight")
OTHER_NAMES = {
    "hidden": ("weight", "hidden", "other_hidden"),
    "weight": ("weight", "other_weight"),
    "other_hidden": ("other_weight", "other_hidden"),
}
K = wholes(1, "vocab", 0, -1, 10**9)


def fit_top(place: Place, given: dict[str, Any]) -> None:
    given["k"] = min(given["k"], given.get("valid_vocab") or place.vocab)


def module(cls: type) -> Callable[..., Any]:
    """Made with its options, then called with its tensors."""
    inputs = ("logits", "hidden", "weight", "mask", "bias", "segment_ids")

    def call(**given: Any) -> Any:
        options = {name: x for name, x in given.items() if name not in inputs}
        return cls(**options)(**{name: x for name, x in given.items() if name in inputs})

    return call


def free(fits: bool = True) -> Kind:
    """Numbers a token; the first of them says the shape of the others."""
    make = lambda place: place.normal(*place.lead)  # noqa: E731
    return tensors(make, torch.Tensor.long, kinds.complex_of, fits=fits)


BOOLS = MASK.or_none()
GENERATOR = Kind(lambda place: torch.Generator().manual_seed(1), lambda _: [1, "x", object()])
RATIO = numbers(0.01, 1, 0, -0.5, 1.5)
WHOLE_IDS = (torch.Tensor.float, torch.Tensor.bool, kinds.complex_of)


def offsets(place: Place) -> torch.Tensor:
    return torch.tensor([0, *place.draw(st.lists(st.integers(0, 4), max_size=5))]).cumsum(0)


def positions(place: Place) -> torch.Tensor:
    return torch.randint(0, 3, (*place.lead, place.vocab))


def fit_offsets(place: Place, given: dict[str, Any]) -> None:
    if given.get("num_tokens") is not None:
        given["num_tokens"] += int(given["cu_seqlens"][-1])


def fit_next(place: Place, given: dict[str, Any]) -> None:
    if given.get("layout") == "packed_zigzag" or given.get("layout") == "zigzag":
        given["layout"] = "contiguous"
    if "segment_ids" in given:
        given["segment_ids"] = torch.zeros_like(given["ids"])


def scores(place: Place) -> torch.Tensor:
    return place.normal(*place.lead, place.vocab, scale=place.number(0, 8))


def processor(cls: type) -> Callable[..., Any]:
    def call(scores: torch.Tensor, **given: Any) -> Any:
        return cls(**given)(None, scores)

    return call


SCORES = {"scores": OF_LOGITS, "impl": LOGITS["impl"]}
THRESHOLD = numbers(0, 3, -0.1)


def of(function: Callable[..., Any], needed: tuple[str, ...], *tables: Mapping[str, Kind], **more):
    every: dict[str, Kind] = {}
    for table in tables:
        every |= table
    return Function(function, every, needed, **more)


FUNCTIONS = [
    of(em.softmax_stats, ("logits",), ROW, GRAD, {"logits": OF_LOGITS, "target": IDS.or_none()},
       fit=fit_rows),
    of(em.token_loss, ("logits", "entropy_weight"), ROW, WEIGHTS,
       {"logits": OF_LOGITS, "target": IDS.or_none(), "inplace": FLAG}, fit=fit_rows),
    of(em.entropy_from_logits, ("logits",), {"logits": OF_LOGITS}),
    of(em.selective_log_softmax_and_entropy, ("logits", "index"),
       {"logits": OF_LOGITS, "index": INDEX, "temperature": TEMPERATURE,
        "row_mask": MASK.or_none()},
       alike={"index": ("index", "target"), "row_mask": ("row_mask", "mask")}),
    of(em.entropy_loss, ("logits",), LOGITS, SUPPORT, REDUCTION,
       {"logits": OF_LOGITS, "inplace": FLAG}, fit=fit_rows),
    of(em.EntropyLoss, ("logits",), LOGITS, SUPPORT, REDUCTION,
       {"logits": OF_LOGITS, "inplace": FLAG}, fit=fit_rows, call=module(em.EntropyLoss)),
    of(em.linear_softmax_stats, ("hidden", "weight"), ROW, HEAD, PRODUCT, FILTER, SUM, LORA,
       COVARIANCE, {"target": IDS.or_none()}, fit=fit_rows, alike=ANY_BUT_HIDDEN),
    of(em.linear_token_loss, ("hidden", "weight", "entropy_weight"), ROW, HEAD, PRODUCT, FILTER,
       SUM, LORA, WEIGHTS, {"target": IDS.or_none()}, fit=fit_rows, alike=ANY_BUT_HIDDEN),
    of(em.linear_entropy_loss, ("hidden", "weight"), LOGITS, SUPPORT, REDUCTION, HEAD, PRODUCT,
       FILTER, SUM, LORA, fit=fit_rows, alike=ANY_BUT_HIDDEN),
    of(em.LinearEntropyLoss, ("hidden", "weight"), LOGITS, SUPPORT, REDUCTION, HEAD, PRODUCT,
       FILTER, SUM, LORA, fit=fit_rows, alike=ANY_BUT_HIDDEN, call=module(em.LinearEntropyLoss)),
    of(em.top_logprobs, ("logits", "k"), LOGITS, {"logits": OF_LOGITS, "k": K,
       "mask": MASK.or_none()}, fit=fit_top),
    of(em.linear_top_logprobs, ("hidden", "weight", "k"), LOGITS, HEAD, LORA,
       {n: PRODUCT[n] for n in PRODUCT if n != "allreduce_dgrad"},
       {"k": K, "mask": MASK.or_none()}, fit=fit_top, alike=ANY_BUT_HIDDEN),
    of(em.divergence, TWO_LOGITS, DIVERGENCE, PAIR, fit=fit_divergence),
    of(em.divergence_stats, TWO_LOGITS, DIVERGENCE, PAIR, PAIR_OUTPUTS, fit=fit_divergence),
    of(em.divergence_loss, (*TWO_LOGITS, "token_weight"), DIVERGENCE, PAIR, PAIR_OUTPUTS,
       {"token_weight": ROWS}, fit=fit_divergence),
    of(em.linear_divergence, TWO_HEADS, DIVERGENCE, HEADS, fit=fit_divergence,
       alike=OTHER_NAMES),
    of(em.linear_divergence_stats, TWO_HEADS, DIVERGENCE, HEADS, PAIR_OUTPUTS, fit=fit_divergence,
       alike=OTHER_NAMES),
    of(em.linear_divergence_loss, (*TWO_HEADS, "token_weight"), DIVERGENCE, HEADS, PAIR_OUTPUTS,
       {"token_weight": ROWS}, fit=fit_divergence,
       alike=OTHER_NAMES),
    of(em.token_covariance, ("logprob", "advantage"),
       {"logprob": free(False), "advantage": free(), "mask": BOOLS, "group": GROUP},
       alike={"logprob": ("logprob", "advantage", "mask")}),
    of(em.linear_token_covariance, ("hidden", "weight", "target", "advantage"), LOGITS, SUPPORT,
       PRODUCT, FILTER, LORA, COVARIANCE, HEAD,
       {"target": IDS_ALONE, "advantage": free(), "mask": MASK.or_none(), "vocab_group": GROUP},
       fit=fit_rows, alike={**ANY_BUT_HIDDEN, "vocab_group": ("group", "vocab_group")}),
    of(em.clip_cov_mask, ("cov",),
       {"cov": free(False), "mask": BOOLS, "exclude": BOOLS, "ratio": RATIO,
       "lower": numbers(-2, 0, 9.5, bounded=False),
       "upper": numbers(1.5, 9, -3, bounded=False), "generator": GENERATOR.or_none(),
       "group": GROUP}, alike={"cov": ("cov", "mask", "exclude")}),
    of(em.kl_cov_mask, ("cov",),
       {"cov": free(False), "mask": BOOLS, "ratio": RATIO, "group": GROUP},
       alike={"cov": ("cov", "mask")}),
    of(em.high_entropy_mask, ("entropy",), {"entropy": free(False), "mask": BOOLS, "ratio": RATIO,
       "group": GROUP}, alike={"entropy": ("entropy", "mask")}),
    of(em.segment_ids_from_cu_seqlens, ("cu_seqlens",),
       {"cu_seqlens": tensors(offsets, *WHOLE_IDS, lambda x: x + 1, lambda x: x - 1,
           fits=False),
        "num_tokens": wholes(0, 5, -1).or_none(), "first_id": wholes(0, 99, -1)}, fit=fit_offsets),
    of(em.segment_ids_from_position_ids, ("position_ids",),
       {"position_ids": tensors(positions, *WHOLE_IDS, fits=False),
        "first_id": wholes(0, 99, -1)}),
    of(em.next_token_targets, ("ids",),
       {"ids": tensors(positions, *WHOLE_IDS, fits=False),
        "segment_ids": tensors(positions, *WHOLE_IDS).or_none(),
        "ignore_index": LOGITS["ignore_index"], "context_group": GROUP,
        "layout": choices(("contiguous", "zigzag", "packed_zigzag"))}, fit=fit_next,
       alike={"ids": ("ids", "segment_ids")}),
    of(EntropyDescent, ("scores",), SCORES, {"threshold": THRESHOLD, "steps": wholes(1, 4, 0, -1),
       "learning_rate": numbers(0.1, 3, 0, -1.0)}, call=processor(EntropyDescent)),
    of(AdaptiveTemperature, ("scores",), SCORES, {"threshold": THRESHOLD,
       "ratio": numbers(0, 0.9, 1, -0.1), "minimum": numbers(0.05, 0.9, 0, 1),
       "iterations": wholes(1, 6, 0, -1)}, call=processor(AdaptiveTemperature)),
]  # fmt: skip
RESULTS = (
    *("TokenDivergence", "TokenLoss", "TokenStats", "TopLogprobs", "WeightedDivergence"),
    "backends",
)
"""Of `em_kernels.__all__`: what is returned, and what takes no argument."""
