"""transformers: per-token statistics from a causal language model without its logits.

    apply_em_kernels(model)
    out = model(input_ids, labels=labels, em_outputs=("logprob", "entropy"))
    out.logprob, out.entropy, out.loss

The model's own forward runs, up to its head: what the head would have multiplied is kept, and the
head itself returns nothing. So caches, routers, adapters and hooks of the backbone work as always.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from em_kernels.backends.interface import OUTPUTS, TokenStats
from em_kernels.integrations._arguments import check_none_of_ours
from em_kernels.integrations._deferred import HeadCall, HeadStand, gathered_as
from em_kernels.integrations._loss_functions import (
    IGNORED,
    LossFunction,
    eaft,
    item_count,
    weighted_loss,
)
from em_kernels.integrations._own_loss import adds_to_loss, loss_of_zero
from em_kernels.lm.head_call import (
    Taken,
    check_dtypes,
    check_head,
    head_replaced,
    is_replaced,
    taken_of,
)
from em_kernels.lm.heads import causal_lm, read_head
from em_kernels.objectives.eaft import TOP_K, check_eaft
from em_kernels.ops.arguments import output_names
from em_kernels.ops.checks import check_number
from em_kernels.ops.linear_softmax_stats import linear_softmax_stats
from em_kernels.ops.segments import next_token_targets


@dataclass(init=False)
class TokenStatsOutput(ModelOutput):
    """What a patched model returns in place of logits; None where not asked for.

    loss: -sum logprob / n with n the number of targets (or `num_items_in_batch`), plus what the
    model adds to its own loss (the weighted `aux_loss` of a router); given when there are labels.
    head_call: only for the loss functions of this module. Then the fields of `TokenStats`, each
    (B, T), and under its own names whatever the model returned besides its loss and logits.
    """

    loss: Tensor | None = None
    head_call: tuple[Tensor, HeadCall] | None = None  # logits of width 0, what the head was given
    logprob: Tensor | None = None
    entropy: Tensor | None = None
    lse: Tensor | None = None
    varentropy: Tensor | None = None
    collision: Tensor | None = None
    max_prob: Tensor | None = None
    is_top1: Tensor | None = None
    self_certainty: Tensor | None = None
    logit_mean: Tensor | None = None
    logit_var: Tensor | None = None
    logit_skew: Tensor | None = None
    entropy_slope: Tensor | None = None
    rank: Tensor | None = None
    kept_mass: Tensor | None = None
    is_kept: Tensor | None = None

    def __init__(self, *args, **values):
        names = [f.name for f in fields(self)]
        values = {**dict.fromkeys(names), **dict(zip(names, args)), **values}
        for name, value in values.items():
            setattr(self, name, value)
            if value is not None:
                self[name] = value
        self.__post_init__()

    def __getattr__(self, name: str):
        said = f"; {_NO_LOGITS}" if name == "logits" else ""
        raise AttributeError(f"TokenStatsOutput has no attribute {name!r}{said}")

    def __getitem__(self, key):
        if key == "logits" and key not in self:
            raise KeyError(f"logits; {_NO_LOGITS}")
        return super().__getitem__(key)

    @property
    def em(self) -> TokenStats:
        """The statistics alone."""
        return TokenStats(*(getattr(self, name) for name in OUTPUTS))


_NO_LOGITS = "the logits were not computed: call the model without em_outputs (or in eval mode)"


def apply_em_kernels(model):
    """Teach `model(..., em_outputs=...)` to return per-token statistics instead of logits.

    Position t holds the distribution that predicts token t + 1, as in transformers' logits, and
    every statistic has the shape (B, T) of `input_ids`. With `labels` (aligned with `input_ids`;
    the shift is done here) position t is scored against labels[t + 1]; where that is -100, and at
    the last position, the statistics are exact zeros and cost nothing. `shift_labels`, already
    shifted, take the place of `labels` if given. Without either, `entropy` and whatever needs no
    target is computed at all positions that `attention_mask` keeps. On a GPU looking for the
    positions that count waits for the device, once for forward and backward.

    A patched model takes, by name:
        em_outputs: names of `TokenStats`; None (default) leaves the call as it was before.
        em_temperature: as `temperature` of `softmax_stats`.
        em_entropy_requires_grad: as in `linear_softmax_stats`: False saves a product where the head
            is frozen and the entropy is a number only.
    With them it returns a `TokenStatsOutput`, differentiable in loss, logprob, entropy and lse. No
    cache is built unless `use_cache=True` is given. `logits_to_keep` cannot be combined with them.

    Args:
        model: a transformers causal language model, with its own or a tied head, with bias, scale
            and softcap as Gemma, Granite, Cohere and Phi have them; a PEFT model around one with
            adapters on the backbone, modules_to_save or trainable tokens on the head; or what
            torch.compile made of one. It is patched in place; patching twice changes nothing.

    Returns:
        The model.

    Raises:
        ModelError: its logits are not softcap(scale * (hidden @ weight.T + bias)); says why and
            what to do. The head is asked again at every call, which raises the same for what was
            put on it since: adapters, hooks, another forward, quantised or offloaded weights.
    """
    target = _causal_lm(model)
    if _patch(target) is None:
        check_head(target)
        target._em_kernels = _Patch(target, target.__dict__.get("forward"), adds_to_loss(target))
        target.forward = target._em_kernels
    return model


def remove_em_kernels(model):
    """Undo `apply_em_kernels`; returns the model.

    Raises:
        ValueError: the model is not patched, or something else has patched its forward since.
    """
    target = _causal_lm(model)
    patch = _patch(target)
    if patch is None:
        raise ValueError(f"model is not patched by apply_em_kernels, got {type(model).__name__}")
    forward = target.__dict__.get("forward")
    if getattr(forward, "__func__", forward) is not patch:
        raise ValueError("model.forward was patched again after apply_em_kernels: undo that first")
    del target._em_kernels, target.forward
    if patch.previous is not None:
        target.forward = patch.previous
    return model


def entropy_loss_func(model, *, temperature: float = 1.0) -> LossFunction:
    """`compute_loss_func` of `transformers.Trainer` for entropy minimisation, without logits.

    loss = sum_t H_t / num_items_in_batch over the positions whose next label is not -100: the
    labels say which tokens count, their values do not matter. With gradient accumulation the loss
    of an update does not depend on how its batch is cut.

    Args:
        model: what the Trainer is given. It is patched (`apply_em_kernels`); from then on a call in
            train mode without labels, cache or `logits_to_keep` returns no logits but `head_call`.
            In eval mode it returns logits as before, and the loss is computed from those.
            In several processes call what wraps it (DDP, FSDP2), and count the items and scale the
            loss as the Trainer does: n over all processes, and times their number where gradients
            are averaged.
        temperature: T of softmax(z / T), positive.

    Raises:
        ModelError: as `apply_em_kernels`. ValueError: a batch without labels, or, when called, a
            router's `aux_loss` in the outputs, which this loss would leave out.
    """
    return _with_loss(model, weighted_loss(0.0, 1.0, temperature))


def sft_entropy_loss_func(model, *, entropy_coef: float, temperature: float = 1.0) -> LossFunction:
    """`compute_loss_func` for SFT + lambda H: sum_t (-logprob_t + lambda H_t) / num_items_in_batch.

    entropy_coef = lambda: positive sharpens the model, negative is an entropy bonus, 0 is the plain
    cross entropy. All else as in `entropy_loss_func`.
    """
    check_number("entropy_coef", entropy_coef, lambda v: True, "a number")
    return _with_loss(model, weighted_loss(1.0, entropy_coef, temperature))


def eaft_loss_func(
    model, *, alpha: float = 1.0, k: int = TOP_K, temperature: float = 1.0
) -> LossFunction:
    """`compute_loss_func` for EAFT: sum_t -w_t logprob_t / num_items_in_batch, w_t `eaft_weight`.

    w_t = (H_t / ln k)^alpha with the entropy of the k likeliest tokens, a constant: the model is
    moved less where it is sure of another token than the label. alpha = 0 is plain cross entropy.
    In train mode there are no logits here either, but one more matrix product. All else as in
    `entropy_loss_func`; formula and source in `em_kernels.objectives.eaft_weight`.
    """
    check_eaft(k, alpha)
    return _with_loss(model, eaft(k, alpha, temperature))


def _with_loss(model, loss: LossFunction) -> LossFunction:
    """The loss, and a model that defers its head to it."""
    _patch_of(_causal_lm(apply_em_kernels(model))).deferred = True
    return loss


@dataclass(eq=False, repr=False)
class _Patch:
    """The forward of a patched model. It holds the model, so that a copy of the two, made together
    by deepcopy or pickle, is a patched model of its own."""

    model: PreTrainedModel
    previous: Callable | None  # the forward it had besides its class's
    adds_to_loss: bool  # its own forward, given labels, adds something to its loss
    stand: HeadStand = field(init=False)
    deferred: bool = False  # in train mode return head_call, for a loss function

    def __post_init__(self):
        self.stand = HeadStand(self.model)

    @property
    def __signature__(self) -> inspect.Signature:
        """Of the model's own forward: generate and Trainer look at it."""
        return inspect.signature(functools.partial(type(self.model).forward, self.model))

    def __call__(
        self,
        *args,
        em_outputs=None,
        em_temperature=1.0,
        em_entropy_requires_grad=True,
        **kwargs,
    ):
        options = dict(temperature=em_temperature, entropy_requires_grad=em_entropy_requires_grad)
        model = self.model
        if args and isinstance(args[0], PreTrainedModel):  # accelerate has made a method of this
            model, *args = args
            own = {f"em_{name}": value for name, value in options.items()}
            return _patch_of(model)(*args, em_outputs=em_outputs, **own, **kwargs)
        check_none_of_ours(kwargs)
        if em_outputs is not None:
            return _statistics(model, args, kwargs, em_outputs, options)
        deferred = self.deferred and model.training and not _wants_logits(kwargs)
        if deferred and not is_replaced(model):
            return _deferred(model, args, kwargs)
        return _own_forward(model)(*args, **kwargs)


def _patch(model) -> _Patch | None:
    return model.__dict__.get("_em_kernels")


def _patch_of(model) -> _Patch:
    """That of a model that is patched."""
    return model.__dict__["_em_kernels"]


def _causal_lm(model) -> PreTrainedModel:
    inner = causal_lm(model)
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    return inner


def _own_forward(model: PreTrainedModel) -> Callable:
    return _patch_of(model).previous or functools.partial(type(model).forward, model)


def _wants_logits(kwargs: dict) -> bool:
    names = ("labels", "shift_labels", "past_key_values", "logits_to_keep", "use_cache")
    return any(isinstance(kwargs.get(name), Tensor) or kwargs.get(name) for name in names)


def _statistics(model, args, kwargs, names, options) -> TokenStatsOutput:
    kwargs = dict(kwargs)
    labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    items = kwargs.pop("num_items_in_batch", None)
    target = shifted if labels is None or shifted is not None else next_token_targets(labels)
    names = output_names(names, target is not None, "em_outputs", "labels")
    outputs, hidden = _run_with_labels(model, args, kwargs, shifted if labels is None else labels)
    head = gathered_as(read_head(model), hidden.dtype)
    check_dtypes(head, hidden)
    hidden = hidden.to(head.weight.device)
    target = target if target is None else target.to(hidden.device)
    stats = linear_softmax_stats(
        hidden,
        head.weight,
        target,
        mask=_attended(kwargs, hidden) if target is None else target != IGNORED,
        outputs=names if target is None else (*names, "logprob"),
        ignore_index=IGNORED,
        **options,
        **head.arguments,
    )
    loss = None if target is None else _loss(model, outputs, stats.logprob, target, items)
    values = {name: value for name, value in stats._asdict().items() if name in names}
    return TokenStatsOutput(**{**_other_fields(outputs), "loss": loss, **values})


def _attended(kwargs: dict, hidden: Tensor) -> Tensor | None:
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return mask[:, -hidden.shape[1] :].to(hidden.device)


def _run_with_labels(model, args, kwargs, labels) -> tuple[ModelOutput, Tensor]:
    """`_run_backbone`, the loss being what the model itself adds to a loss."""
    if labels is None or not _patch_of(model).adds_to_loss:
        return _run_backbone(model, args, kwargs)
    with loss_of_zero(model):
        return _run_backbone(model, args, {**kwargs, "labels": labels})


def _loss(model, outputs, logprob: Tensor, target: Tensor, items) -> Tensor:
    """The mean cross entropy, and what the model adds to it."""
    loss = -logprob.sum() / item_count(target, items, logprob.device)
    if _patch_of(model).adds_to_loss:
        return loss + outputs.loss.to(loss.device)
    if outputs.get("aux_loss") is not None:
        raise ValueError(
            f"outputs of {type(model).__name__} have an aux_loss, whose weight in the loss is not "
            "known: set model.config.output_router_logits = False"
        )
    return loss


def _deferred(model, args, kwargs) -> TokenStatsOutput:
    stand = _patch_of(model).stand
    outputs, _ = _run_backbone(model, args, kwargs, stand)
    head_call = (outputs.logits, stand.take_call())
    return TokenStatsOutput(**{**_other_fields(outputs), "head_call": head_call})


def _other_fields(outputs) -> dict:
    """What the model returned besides its loss and logits, by name."""
    declared = [f.name for f in fields(outputs)] if is_dataclass(outputs) else []
    values = {**dict.fromkeys(declared), **outputs}
    return {name: x for name, x in values.items() if name not in ("loss", "logits")}


@functools.partial(torch.compiler.disable, recursive=False)  # compile what is called here
def _run_backbone(model, args, kwargs, stand: Taken | None = None) -> tuple[ModelOutput, Tensor]:
    """(the model's outputs with logits of width 0, what was taken in place of its head)."""
    if len(args) > 1:
        raise TypeError("em_outputs: everything but input_ids must be passed by name")
    if isinstance(kwargs.get("logits_to_keep"), Tensor) or kwargs.get("logits_to_keep"):
        raise ValueError(
            "logits_to_keep cannot be combined with em_outputs: positions with label -100 are not "
            f"computed anyway; got {kwargs['logits_to_keep']!r}"
        )
    kwargs = {"use_cache": False, **kwargs, "return_dict": True}
    taken = stand or taken_of(model)
    with head_replaced(model, taken):
        outputs = _own_forward(model)(*args, **kwargs)
    return outputs, taken.take()
