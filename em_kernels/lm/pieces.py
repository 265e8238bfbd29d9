"""The MLPs of a model over pieces of the sequence, forward and backward.

Between its two or three products an MLP holds several times what it is given: of 32,768 tokens of a
0.5 B model 320 MB each, in bfloat16. It works on every token by itself, so the sequence can go
through it a piece at a time; the backward pass computes each piece again. No code of a model is
copied: which of its modules are such is found by their structure and by a probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from inspect import Parameter, signature
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from em_kernels.lm.heads import causal_lm
from em_kernels.lm.modes import eval_mode

PIECE = 2048  # tokens, of all rows together
_PROBED = 6


def decoder_layers(model) -> list[nn.Module]:
    """The layers of a transformers causal model, from the first to the last."""
    decoder = causal_lm(model).get_decoder()
    lists = [part for part in decoder.children() if isinstance(part, nn.ModuleList)]
    return [layer for layers in lists for layer in layers]


def split_mlps(model) -> list[nn.Module]:
    """Have every MLP compute `PIECE` tokens at a time; returns the layers without one.

    An MLP is a child of a decoder layer with two matrices or more that gives for the pieces of a
    sequence the pieces of what it gives for all of it. So is a mixture of experts that chooses for
    every token by itself; one that chooses tokens for its experts stays whole, and so do layers
    whose products are in no module of their own. Loss and gradient are the same up to rounding,
    those of the weights are summed in float32 or wider.
    """
    known: dict[type, bool] = {}
    left = []
    for layer in decoder_layers(model):
        found = [part for part in layer.children() if _is_mlp(part, model, known)]
        for part in found:
            part.forward = MethodType(_in_pieces, part)
        if not found:
            left.append(layer)
    return left


@contextmanager
def whole_again(model) -> Iterator[None]:
    """Afterwards the MLPs are as they were before `split_mlps`, after an error too."""
    try:
        yield
    finally:
        for module in model.modules():
            if getattr(module.__dict__.get("forward"), "__func__", None) is _in_pieces:
                del module.forward


def _is_mlp(module: nn.Module, model, known: dict[type, bool]) -> bool:
    if "forward" in module.__dict__ or sum(p.dim() > 1 for p in module.parameters()) < 2:
        return False
    if type(module) not in known:
        known[type(module)] = _works_by_token(module, model)
    return known[type(module)]


@torch.no_grad()
def _works_by_token(module: nn.Module, model) -> bool:
    """Whether the module gives a tensor of what it is given, each position from itself alone."""
    parameters = signature(module.forward).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind in _POSITIONAL]
    width = causal_lm(model).config.get_text_config().hidden_size
    probe = torch.arange(_PROBED * width, dtype=torch.float64).sin().view(1, _PROBED, width)
    inputs = [probe.roll(i, 2).to(model.device, model.dtype) for i in range(len(needed))]
    try:
        with eval_mode(module):
            whole = module.forward(*inputs)
            parts = [module.forward(*(x[:, i::2] for x in inputs)) for i in (0, 1)]
        if not isinstance(whole, Tensor) or whole.shape != probe.shape:
            return False
        errors = [(whole[:, i::2] - part).float().norm() for i, part in enumerate(parts)]
    except Exception:  # it takes something else than hidden states
        return False
    return bool(sum(errors) <= 0.01 * whole.float().norm())


_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


def _in_pieces(self: nn.Module, *inputs: Any, **others: Any) -> Tensor:
    """The forward of a module whose MLP is split."""
    whole: Callable[..., Tensor] = type(self).forward
    if others or inputs[0].dim() != 3 or inputs[0].shape[:2].numel() <= PIECE:
        return whole(self, *inputs, **others)
    weights = [p for p in self.parameters() if p.requires_grad]
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in (*inputs, *weights)):
        return torch.cat([whole(self, *part) for part in _cut(*inputs)], 1)
    held = _Hold.apply(*inputs)
    node = next((x.grad_fn for x in held if x.grad_fn is not None), None)
    return _Pieces.apply(self, inputs if node is None else node, weights, *held, *weights)


def _cut(*inputs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Each contiguous, as some modules need it."""
    for parts in zip(*(x.split(max(1, PIECE // len(x)), 1) for x in inputs)):
        yield tuple(part.contiguous() for part in parts)


class _Hold(torch.autograd.Function):
    """The identity, which holds the inputs for the backward pass of `_Pieces`.

    A layer that is checkpointed is computed again up to the last tensor that is held: were it
    `_Pieces` that holds them, the MLP would be computed once more for nothing.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Any:
        ctx.save_for_backward(*inputs)
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return gradients


class _Pieces(torch.autograd.Function):
    """An MLP a piece at a time: only what it is given is kept, each piece is computed again."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, held: Any, weights: list, *tensors: Tensor) -> Tensor:
        ctx.module, ctx.held, ctx.weights = module, held, weights
        inputs = tensors[: len(tensors) - len(weights)]
        ctx.again = _circumstances(module, inputs[0])
        return torch.cat([type(module).forward(module, *part) for part in _cut(*inputs)], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inputs = ctx.held if isinstance(ctx.held, tuple) else ctx.held.saved_tensors
        needed = ctx.needs_input_grad[3 : 3 + len(inputs)]
        found = [torch.empty_like(x) if need else None for x, need in zip(inputs, needed)]
        sums = [torch.zeros_like(p, dtype=_sum_dtype(p)) for p in ctx.weights]
        with ctx.again():
            start = 0
            for *part, above in _cut(*inputs, gradient):
                own, of_weights = _gradients(ctx.module, part, needed, ctx.weights, above)
                for whole, piece in zip(found, own):
                    if whole is not None and piece is not None:
                        whole[:, start : start + piece.shape[1]] = piece
                for total, piece in zip(sums, of_weights):
                    if piece is not None:
                        total += piece
                start += above.shape[1]
        of_all = [total.to(p.dtype) for total, p in zip(sums, ctx.weights)]
        return None, None, None, *found, *of_all


def _gradients(
    module: nn.Module, part: list[Tensor], needed: tuple[bool, ...], weights: list, above: Tensor
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Of the inputs (None where not needed) and of the weights, from one piece."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_(need) for x, need in zip(part, needed)]
        out = type(module).forward(module, *inputs)
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(out, [*wanted, *weights], above, allow_unused=True))
    return [_or_zero(next(found), x) if x.requires_grad else None for x in inputs], list(found)


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _sum_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _circumstances(module: nn.Module, like: Tensor) -> Callable[[], Any]:
    """Autocast as it is now and, where there is dropout, the random numbers that come next."""
    device = like.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    drops = any(isinstance(m, nn.Dropout) and m.p and m.training for m in module.modules())
    random = (torch.get_rng_state(), *get_device_states(like)) if drops else None

    @contextmanager
    def again() -> Iterator[None]:
        devices = random[1] if random is not None else []
        forked = torch.random.fork_rng(devices, device_type=device if devices else "cuda")
        with forked if random is not None else nullcontext():
            if random is not None:
                torch.set_rng_state(random[0])
                set_device_states(*random[1:])
            with torch.autocast(device, dtype, enabled=enabled):
                yield

    return again
