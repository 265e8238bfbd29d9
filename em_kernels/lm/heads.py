"""The head of a transformers causal language model, as the ops take it.

What the head is, is asked at every call: adapters, casts, hooks and quantisation can be put on it
at any time. `head_call.check_head` adds to that, once, a probe of what the model does with its
results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from em_kernels.lm.lora_heads import is_a, is_lora, read_lora, why_not_plain_lora
from em_kernels.ops.arguments import FLOAT_DTYPES
from em_kernels.ops.plain import path_of, why_in_parts, why_not_plain

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names in configs of c in c tanh(logits / c): Gemma; RecurrentGemma; xLSTM."""

FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Names in configs of what logits are multiplied by: Cohere; Falcon-H1; Muse."""

DIVISORS = ("logits_scaling",)
"""Names in configs of what logits are divided by: Granite."""

_POWERS = {"hyperclovax": 1, "minicpm3": 0}
"""Model types that multiply their logits by the divisor, or divide hidden states instead."""

_LINEAR = nn.Linear.forward

STAND_IN = "_em_kernels_stand_in"
"""Attribute of a layer while something of this package's is called in place of its forward."""


class ModelError(ValueError):
    """A model that cannot be loaded, or that this package cannot serve."""


class Head(NamedTuple):
    """logits = softcap(logit_scale * hidden @ weight.T + bias), softcap(u) = c tanh(u / c).

    With `lora`, (A, B, scaling), weight stands for weight + scaling B @ A, which is never made.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    lora: tuple[Tensor, Tensor, float] | None = None

    @property
    def arguments(self) -> dict:
        """All but the weight, by the names that the `linear_*` functions have for it."""
        return {name: value for name, value in self._asdict().items() if name != "weight"}

    def beside(self, other: Head) -> dict:
        """Of two heads, what the `linear_divergence` functions take but the hidden states.

        Of the vocabulary the entries that both have: where two heads are padded to different sizes
        the others are no tokens. The other head is detached. A LoRA is merged here: those functions
        take none.
        """
        rows = min(len(self.weight), len(other.weight))
        own, other = self.first(rows).merged(), other.first(rows).merged()
        found = own._asdict()
        for name, value in other._asdict().items():
            found[f"other_{name}"] = value.detach() if isinstance(value, Tensor) else value
        return {name: value for name, value in found.items() if not name.endswith("lora")}

    def merged(self) -> Head:
        """The same without `lora`, which is in a new weight of the wider dtype."""
        if self.lora is None:
            return self
        a, b, scaling = self.lora
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), self.weight.dtype)
        weight = self.weight.to(dtype) + scaling * b.to(dtype) @ a.to(dtype)
        return self._replace(weight=weight, lora=None)

    def first(self, rows: int) -> Head:
        """The head of the first `rows` entries of the vocabulary."""
        if rows == len(self.weight):
            return self
        bias, lora = None if self.bias is None else self.bias[:rows], self.lora
        if lora is not None:
            lora = lora[0], lora[1][:rows], lora[2]
        return self._replace(weight=self.weight[:rows], bias=bias, lora=lora)

    def transform(self, products: Tensor) -> Tensor:
        """The logits out of what the model's own layer gives, hidden @ weight.T + its bias."""
        logits = self.logit_scale * products
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """All the logits, in float32: for checks on a few tokens."""
        products = hidden.float() @ self.weight.float().T
        if self.lora is not None:
            a, b, scaling = self.lora
            products = products + scaling * (hidden.float() @ a.float().T) @ b.float().T
        if self.bias is not None:
            products = products + self.bias.float() / self.logit_scale
        return self.transform(products)


def causal_lm(model):
    """The transformers model inside a PEFT model or what torch.compile returned."""
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return getattr(model, "_orig_mod", model)


@torch.compiler.disable
def read_head(model) -> Head:
    """The model's head as it is now. A scale is applied after the bias by the models that have one.

    PEFT's wrappers are looked into: the head is the active copy of `modules_to_save`, the weight
    with its trainable tokens, or the layer under adapters that are disabled, merged or not active.
    Active LoRA adapters are the head's `lora`; of several, as one of all their ranks.

    Raises:
        ModelError: the model has no head, or one that is not softcap(scale * (x @ weight.T + bias))
            with a plain weight; says what it is and what to do.
    """
    model = causal_lm(model)
    name = type(model).__name__
    layer: Any = head_layers(model)[-1]
    for hook in layer._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):  # pruning, weight_norm, ...
            hook(layer, ())  # makes the weight
    if is_a(layer, "peft.tuners.trainable_tokens.layer", "TrainableTokensLayer"):
        weight, bias = layer.get_merged_weights(layer.active_adapters), None
    else:
        weight, bias = layer.weight, layer.bias
    _check_weight(name, weight)
    lora = None
    if is_lora(layer):
        lora, bias = read_lora(layer, bias)
        for factor in lora[:2]:
            _check_weight(name, factor)
    softcap, scale = _read_config(model)
    bias = bias if bias is None or scale == 1 else scale * bias
    return Head(weight, bias, softcap, scale, lora)


def _read_config(model) -> tuple[float | None, float]:
    """(softcap, scale) of the logits; a number that the model itself holds comes first."""
    config = model.config.get_text_config()

    def read(name: str) -> float | None:
        values = (getattr(holder, name, None) for holder in (model, config))
        return next((float(v) for v in values if isinstance(v, (int, float)) and v), None)

    softcap = next(filter(None, map(read, SOFTCAPS)), None)
    scale = 1.0
    for name in FACTORS:
        scale *= read(name) or 1.0
    for name in DIVISORS:
        scale *= (read(name) or 1.0) ** _POWERS.get(config.model_type, -1)
    return softcap, scale


# The layer


def head_layers(model) -> list[nn.Module]:
    """The head from the outermost of PEFT's wrappers to the layer that multiplies; checked."""
    name, layer, layers = type(model).__name__, model.get_output_embeddings(), []
    if layer is None:
        raise ModelError(f"{name} has no language-model head")
    while layer is not None:
        _check_own_forward(name, layer)
        _check_one_adapter(name, layer)
        layers.append(layer)
        layer = _inside(layer)
    _check_layer(name, layers[-1])
    return layers


def _inside(layer: Any) -> nn.Module | None:
    """What a wrapper of PEFT calls and adds nothing to, in the state it is in; else None."""
    if is_a(layer, "peft.utils.other", "TrainableTokensWrapper"):
        return layer.token_adapter
    if is_a(layer, "peft.utils.other", "ModulesToSaveWrapper"):
        active = layer.active_adapters
        if layer.disable_adapters or not active or not set(active) <= set(layer.modules_to_save):
            return layer.original_module
        return layer.modules_to_save[active[0]]
    if is_a(layer, "peft.tuners.tuners_utils", "BaseTunerLayer"):
        parts = [getattr(layer, part, ()) for part in layer.adapter_layer_names]
        active = any(adapter in part for part in parts for adapter in layer.active_adapters)
        return layer.base_layer if layer.disable_adapters or layer.merged or not active else None
    return None


def _check_layer(name: str, layer: nn.Module) -> None:
    kind = path_of(type(layer))
    if is_lora(layer):
        base: Any = layer.base_layer
        _check_layer(name, base)
        _check_own_forward(name, base)
        if (reason := why_not_plain_lora(layer)) is not None:
            raise ModelError(f"the head of {name} has a LoRA that is not served: {reason}")
    elif is_a(layer, "peft.tuners.tuners_utils", "BaseTunerLayer"):
        if not is_a(layer, "peft.tuners.trainable_tokens.layer", "TrainableTokensLayer"):
            raise ModelError(
                f"the head of {name} is a {kind}, not a plain nn.Linear: leave it out of "
                'target_modules (modules_to_save=["lm_head"] trains all of it), or merge and unload'
            )
    elif type(layer).forward is not _LINEAR or type(layer).__call__ is not nn.Module.__call__:
        raise ModelError(
            f"the head of {name} is a {kind}, not a plain nn.Linear: leave it out of quantisation "
            '(modules_to_not_convert=["lm_head"]), or put an nn.Linear with its weights there'
        )
    if layer._backward_hooks or layer._backward_pre_hooks:
        raise ModelError(
            f"the head of {name} has backward hooks, which would not be called: remove them, or "
            "register them on its weight"
        )


def _check_own_forward(name: str, layer: nn.Module) -> None:
    """Refuse a forward put on the layer itself, but for accelerate's, which moves its input."""
    if "_orig_mod" in layer._modules:
        raise ModelError(f"the head of {name} is compiled by itself: compile the model instead")
    _check_accelerate(name, layer.__dict__.get("_hf_hook"))
    forward = layer.__dict__.get(forward_slot(layer))
    if forward is None or forward is layer.__dict__.get(STAND_IN):
        return
    if getattr(forward, "__func__", None) is type(layer).forward and forward.__self__ is layer:
        return
    raise ModelError(
        f"the forward of the head of {name} was replaced by {described(forward)}: what it gives "
        "need not be hidden @ weight.T + bias. `del model.get_output_embeddings().forward`; to "
        "multiply in float32, cast the head, and its input in a forward pre-hook on it"
    )


def _check_one_adapter(name: str, layer: nn.Module) -> None:
    """Refuse a call with PEFT's adapter_names, which gives every row a head of its own."""
    hooks = map(described, layer._forward_pre_hooks.values())
    if any(hook.endswith("._adapter_names_pre_forward_hook") for hook in hooks):
        raise ModelError(
            f"the head of {name} has adapters, and adapter_names chooses one for every row: call "
            "the model without adapter_names, once for each adapter, after set_adapter"
        )


def _check_accelerate(name: str, hook: object) -> None:
    """Refuse accelerate's hooks that do more than move the input."""
    for part in getattr(hook, "hooks", [hook] if hook is not None else []):
        kind = path_of(type(part))
        if getattr(part, "offload", False):
            raise ModelError(
                f"the head of {name} is offloaded: keep it (and the embedding that it is tied to) "
                'on a device, as with device_map={"lm_head": 0, ...}'
            )
        if kind not in ("accelerate.hooks.AlignDevicesHook", "accelerate.hooks.CpuOffload"):
            raise ModelError(
                f"the head of {name} has a hook of {kind}, which may change its result: "
                "accelerate.hooks.remove_hook_from_module(model.get_output_embeddings())"
            )


def forward_slot(layer: nn.Module) -> str:
    """The attribute that holds a forward of the layer's own; accelerate's is around it."""
    around = getattr(layer.__dict__.get("forward"), "func", None)
    hooked = getattr(around, "__module__", None) == "accelerate.hooks"
    return "_old_forward" if hooked else "forward"


def described(function: Callable) -> str:
    function = getattr(function, "func", function)
    module = getattr(function, "__module__", type(function).__module__)
    return f"{module}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _check_weight(name: str, weight: object) -> None:
    kind = path_of(type(weight))
    if not isinstance(weight, Tensor):
        raise ModelError(f"the head of {name} has a weight of type {kind}, not a tensor")
    if (reason := why_in_parts(weight)) is not None:
        raise ModelError(f"the weight of the head of {name} {reason}")
    remedy = why_not_plain(weight)
    if remedy is not None or weight.dtype not in FLOAT_DTYPES:
        raise ModelError(
            f"the weight of the head of {name} is a {kind} of {weight.dtype}: leave the head out "
            'of quantisation (modules_to_not_convert=["lm_head"]), or '
            f"{remedy or 'dequantise it'}"
        )
    if weight.device.type == "meta":
        raise ModelError(
            f"the weight of the head of {name} is on the meta device, offloaded or never loaded: "
            'keep it on a device, as with device_map={"lm_head": 0, ...}'
        )
    if weight.dim() != 2:
        raise ModelError(
            f"the weight of the head of {name} has the shape {tuple(weight.shape)}, not (V, D): "
            "FSDP1 and DeepSpeed ZeRO-3 keep it in parts; FSDP2 is served"
        )
