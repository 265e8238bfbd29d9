"""TRL: one line that makes its trainers compute log-probabilities and entropies here.

    from em_kernels.integrations.trl import apply_to_trl
    apply_to_trl()                 # before or after a trainer is built; remove_from_trl() undoes it

    with patched():                # or for the length of a block
        trainer.train()

GRPOTrainer, RLOOTrainer, SFTTrainer and DPOTrainer get their per-token numbers from
`trl.kernels.ChunkedLogProbFunction`, given the hidden states and the head: its `apply` is replaced.
Code that has logits calls `selective_log_softmax`, `entropy_from_logits` or
`selective_log_softmax_and_entropy`: these are replaced wherever a module of TRL has imported them.
The numbers are TRL's up to rounding, in float32, with entropies that stay exact near 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import trl.kernels
import trl.trainer.utils as trl_utils
from torch import Tensor

from em_kernels.integrations._arguments import HeadSettings, head_settings, temperature_of
from em_kernels.integrations._labels import (
    as_number,
    integer_labels,
    is_frozen,
    known_labels,
    stats_of_known,
)
from em_kernels.integrations._rebind import rebind
from em_kernels.ops.arguments import NEVER_IGNORED
from em_kernels.ops.linear_softmax_stats import linear_softmax_stats
from em_kernels.ops.softmax_stats import selective_log_softmax_and_entropy, softmax_stats

if not hasattr(trl.kernels, "ChunkedLogProbFunction"):
    raise ImportError(f"trl must be 1.16 or newer, got {trl.__version__}")

# TRL's name of an optional output -> this package's
OUTPUTS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "collision",
    "mean_logits": "logit_mean",
    "is_top1": "is_top1",
}


_settings = HeadSettings()


def apply_to_trl(
    *, logits_dtype: torch.dtype | None = None, entropy_requires_grad: bool = True
) -> None:
    """Switch TRL over, in this process; a second call changes nothing but the settings.

    Under DeepSpeed ZeRO-3, where TRL's own backward gathers the head's weight, TRL's function goes
    on serving.

    Args:
        logits_dtype: as in `linear_softmax_stats`, for what is computed from hidden states.
        entropy_requires_grad: as in `linear_softmax_stats`, for the same. TRL asks for the entropy
            with gradient always, and does not say that it wants a number; of its own trainers only
            GRPOTrainer with `entropy_coef` or `use_adaptive_entropy` differentiates it. False
            saves a frozen head (LoRA) one of three products; a loss that does differentiate the
            entropy then raises RuntimeError in its backward pass, but for one that is compiled,
            where the gradient of the entropy is missing.

    Raises:
        TypeError, ValueError: `logits_dtype` is none that hidden states can have, or
            `entropy_requires_grad` no bool.
    """
    global _settings
    _settings = head_settings(logits_dtype, entropy_requires_grad)
    if not is_applied():
        _CHUNKED.apply = staticmethod(chunked_log_probs)
        rebind("trl", _REPLACEMENTS)
        if _TRL_USE_TRITON is not None:
            trl_utils._use_triton = _only_scored_positions


def remove_from_trl() -> None:
    """Undo `apply_to_trl`; without it nothing happens."""
    global _settings
    _settings = HeadSettings()
    if is_applied():
        del _CHUNKED.apply  # the inherited one shows again
        rebind("trl", {ours: theirs for theirs, ours in _REPLACEMENTS.items()})
        if _TRL_USE_TRITON is not None:
            trl_utils._use_triton = _TRL_USE_TRITON


def is_applied() -> bool:
    """Whether TRL is switched over now."""
    return "apply" in vars(_CHUNKED)


@contextmanager
def patched(
    *, logits_dtype: torch.dtype | None = None, entropy_requires_grad: bool = True
) -> Iterator[None]:
    """`apply_to_trl(...)` inside the block; afterwards TRL is as it was before."""
    before, settings_before = is_applied(), _settings
    apply_to_trl(logits_dtype=logits_dtype, entropy_requires_grad=entropy_requires_grad)
    try:
        yield
    finally:
        if before:
            apply_to_trl(**settings_before._asdict())
        else:
            remove_from_trl()


def chunked_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = tuple(OUTPUTS),
) -> tuple[Tensor | None, ...]:
    """(log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1), as `ChunkedLogProbFunction`.

    hidden (N, H), weight (V, H), bias (V,) or None, targets (N,); each result (N,), None where it
    is not in `outputs`. The logits are softcap(logit_scale * (hidden @ weight.T + bias)) / T.
    `chunk_size` is TRL's and does not matter: rows are chunked, not the vocabulary. A target
    outside the vocabulary has, as there, log_probs of -log sum exp of its logits, and no top 1.
    """
    if hasattr(weight, "ds_id"):
        arguments = (temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
        return _TRL_APPLY(hidden, weight, bias, targets, *arguments)
    if not torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(hidden.dtype)
    targets, known = known_labels(targets, len(weight), NEVER_IGNORED)
    call = partial(
        linear_softmax_stats,
        hidden,
        weight,
        bias=bias if bias is None else logit_scale * bias,
        temperature=temperature_of(temperature, targets),
        softcap=final_logit_softcapping,
        logit_scale=logit_scale,
        ignore_index=NEVER_IGNORED,
        **_settings._asdict(),
    )
    asked = ("logprob", *(ours for theirs, ours in OUTPUTS.items() if theirs in outputs))
    number = not _settings.entropy_requires_grad
    few = ("entropy" not in asked or number) and is_frozen(hidden, weight, bias)
    stats = stats_of_known(call, targets, known, asked, few)
    entropy = as_number(stats.entropy, stats.logprob) if number else stats.entropy
    collision = None if stats.collision is None else stats.collision.log()
    is_top1 = None if stats.is_top1 is None else stats.is_top1 & known
    return stats.logprob, entropy, collision, stats.logit_mean, is_top1


def _selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    if index.dim() == logits.dim():  # several tokens a row
        return _TRL_SELECTIVE(logits, index, temperature, row_mask)
    stats = softmax_stats(
        logits,
        integer_labels(index),
        outputs=("logprob",),
        temperature=temperature_of(temperature, index),
        mask=row_mask,
        ignore_index=NEVER_IGNORED,
    )
    return stats.logprob


def _entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    return softmax_stats(logits, outputs=("entropy",)).entropy


def _selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    logprob, entropy = selective_log_softmax_and_entropy(
        logits, integer_labels(index), temperature_of(temperature, index), row_mask
    )
    return logprob, entropy if entropy_requires_grad else entropy.detach()


def _only_scored_positions(device: torch.device) -> bool:
    """Take positions without a label out before the head, on CPUs too."""
    return device.type == "cpu" or _TRL_USE_TRITON(device)


_CHUNKED: Any = trl.kernels.ChunkedLogProbFunction
_TRL_APPLY = _CHUNKED.apply
_TRL_SELECTIVE = trl_utils.selective_log_softmax
_TRL_USE_TRITON: Any = getattr(trl_utils, "_use_triton", None)  # only asks that question there
_REPLACEMENTS: dict[Callable, Callable] = {
    trl_utils.selective_log_softmax: _selective_log_softmax,
    trl_utils.entropy_from_logits: _entropy_from_logits,
    trl_utils.selective_log_softmax_and_entropy: _selective_log_softmax_and_entropy,
}
if hasattr(trl.kernels, "selective_log_softmax_and_entropy"):  # where triton is installed
    _REPLACEMENTS[trl.kernels.selective_log_softmax_and_entropy] = selective_log_softmax_and_entropy
