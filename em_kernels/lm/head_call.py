"""Calls of a model with something in place of its head: what that is given, what comes of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from em_kernels.lm.heads import (
    STAND_IN,
    Head,
    ModelError,
    causal_lm,
    described,
    forward_slot,
    head_layers,
    read_head,
)
from em_kernels.lm.modes import eval_mode
from em_kernels.lm.weights import check_finite

_REMEDY = "em_kernels.softmax_stats(logits) takes the logits of any model"


class Taken:
    """In place of the head's forward: keeps what it is called with and gives no logits."""

    hidden: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.hidden is not None:
            self.hidden = None
            raise ModelError(
                f"the model calls its head more than once in a forward pass: {_REMEDY}"
            )
        self.hidden = hidden
        return hidden[..., :0]

    def take(self) -> Tensor:
        """What the head was called with; forgets it."""
        hidden, self.hidden = self.hidden, None
        if hidden is None:
            raise ModelError(
                "the model's forward did not call its head: it was replaced by one that computes "
                "the loss itself (Liger's fused_linear_cross_entropy?); undo that"
            )
        return hidden


# One for each model: torch.compile recompiles for another.
_TAKEN: weakref.WeakKeyDictionary[nn.Module, Taken] = weakref.WeakKeyDictionary()


def taken_of(model) -> Taken:
    """The model's own `Taken`."""
    return _TAKEN.setdefault(causal_lm(model), Taken())


def head_input(model, **inputs) -> Tensor:
    """What the head multiplies when the model is called with `inputs`: (B, T, D)."""
    taken = taken_of(model)
    with head_replaced(model, taken):
        model(**inputs)
    return taken.take()


@contextmanager
def head_replaced(model, forward: Callable) -> Iterator[None]:
    """In the block, `forward` is called in place of the product with the head's weight.

    Wrappers, casts and pre-hooks of the head run as always.

    Raises:
        ModelError: as `read_head`; or a forward hook on the head changes its result.
    """
    model = causal_lm(model)
    layers = head_layers(model)
    if isinstance(forward, Taken):
        forward.hidden = None  # a call that failed has left it
    slot = forward_slot(layers[-1])
    with (
        _result_watched(type(model).__name__, layers, forward) as forward,
        _attributes(layers[-1], {slot: forward, STAND_IN: forward}),
    ):
        yield


@torch.compiler.disable
def is_replaced(model) -> bool:
    """Whether this is inside a `head_replaced` of the model."""
    return STAND_IN in head_layers(causal_lm(model))[-1].__dict__


@contextmanager
def _attributes(layer: nn.Module, values: dict) -> Iterator[None]:
    """In the block, the layer's own attributes are `values`; then what they were, or none."""
    before = {name: layer.__dict__[name] for name in values if name in layer.__dict__}
    layer.__dict__.update(values)
    try:
        yield
    finally:
        for name in values:
            del layer.__dict__[name]
        layer.__dict__.update(before)


@contextmanager
def _result_watched(name: str, layers: list[nn.Module], forward: Callable) -> Iterator[Callable]:
    """`forward`, or where there are forward hooks one that makes sure that they change nothing."""
    hooks = [*nn.modules.module._global_forward_hooks.values()]
    hooks += [hook for layer in layers for hook in layer._forward_hooks.values()]
    named = [hook for hook in map(described, hooks) if not hook.startswith("torch.distributed.")]
    if not named:
        yield forward
        return
    watched = _Watched(forward, name, named)
    handle = layers[0].register_forward_hook(watched.check)
    try:
        yield watched
    except Exception as error:
        if watched.result is not None:  # a hook failed on a result of width 0
            raise watched.refused() from error
        raise
    finally:
        handle.remove()


class _Watched:
    """`forward`, and the last of the forward hooks, which finds its result as it was."""

    def __init__(self, forward: Callable, name: str, hooks: list[str]):
        self.forward, self.name, self.hooks = forward, name, hooks
        self.result: Tensor | None = None
        self.version = 0

    def __call__(self, hidden: Tensor) -> Tensor:
        result = self.forward(hidden)
        if result.is_inference():  # does not count its changes
            with torch.inference_mode(False):
                result = torch.empty(result.shape, dtype=result.dtype, device=result.device)
        self.result, self.version = result, result._version
        return result

    def check(self, module: nn.Module, args: tuple, output: object) -> None:
        result, self.result = self.result, None
        if result is None:
            return
        moved = isinstance(output, Tensor) and output.device != result.device  # by accelerate
        if not (output is result or moved) or result._version != self.version:
            raise self.refused()

    def refused(self) -> ModelError:
        return ModelError(
            f"the logits of {self.name} are not softcap(scale * (hidden @ weight.T + bias)): a "
            f"forward hook on the head ({', '.join(self.hooks)}) changes its result; such a head "
            "is not supported: remove the hook"
        )


def check_head(model, head: Head | None = None) -> Head:
    """The head, after making sure that scale and softcap, and nothing else, make logits of it.

    The model is called once, with two tokens and with known numbers in place of what its head
    gives: what comes out must be `Head.transform` of them to rounding.

    Raises:
        ModelError: as `read_head`; or something else lies between the head and the logits.
    """
    model = causal_lm(model)
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{name} has an encoder; only causal language models are supported")
    head = head or read_head(model)
    probe = torch.randn(1, 2, head.weight.shape[0], generator=torch.Generator().manual_seed(0))
    probe = (probe * torch.tensor([[1.0], [1000.0]])).bfloat16().float()  # exact in every dtype
    try:
        logits, eps = _logits_of(model, head, probe)
    except (ModelError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError) as reason:
        raise ModelError(
            f"{name} cannot be called with two tokens: {reason}; {_REMEDY}"
        ) from reason
    if logits.shape != probe.shape:
        raise ModelError(
            f"{name} gives logits of shape {tuple(logits.shape)} for two tokens and a head of "
            f"{tuple(head.weight.shape)}; such a head is not supported: {_REMEDY}"
        )
    expected = head.transform(probe.to(logits.device))
    error = (logits.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    if not (error <= 2 * eps + 1e-6).all():
        check_finite(model)
        raise ModelError(
            f"the logits of {name} are not softcap(scale * (hidden @ weight.T + bias)) with "
            f"softcap {head.softcap} and scale {head.logit_scale:g} from its config; such a head "
            f"is not supported: {_REMEDY}"
        )
    return head


@torch.no_grad()
def _logits_of(model, head: Head, probe: Tensor) -> tuple[Tensor, float]:
    """(the logits that the model makes out of `probe` as its head's result, rounding unit)."""
    units = []

    def answer(hidden: Tensor) -> Tensor:
        check_dtypes(head, hidden)
        units.append(max(torch.finfo(dtype).eps for dtype in (hidden.dtype, probe.dtype)))
        return probe.to(hidden)

    return call_probed(model, answer).logits, units[0]


def call_probed(model, answer: Callable[[Tensor], Tensor], labelled: bool = False):
    """What the model returns for two tokens, with `answer` in place of its head; hooks run."""
    inputs = {"input_ids": torch.tensor([[0, 1]], device=model.device)}
    if labelled:
        inputs["labels"] = inputs["input_ids"]
    with eval_mode(model), head_replaced(model, answer):
        return model._call_impl(**inputs, use_cache=False, return_dict=True)


def check_dtypes(head: Head, hidden: Tensor) -> None:
    """Refuse a product that the model itself cannot make.

    Raises:
        ModelError: hidden and weight have different dtypes outside of autocast.
    """
    if hidden.dtype != head.weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ModelError(
            f"the head multiplies {hidden.dtype} by a weight of {head.weight.dtype}, which the "
            "model's own forward cannot: cast the head's input (a forward pre-hook on it), or the "
            "weight"
        )
