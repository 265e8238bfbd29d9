"""The arguments of the public functions, checked together, and their translation to a `RowSpec`.

As in `checks` no values of tensors are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from em_kernels.backends.choice import IMPLS
from em_kernels.backends.interface import (
    NEEDS_TARGET,
    OUTPUTS,
    PADDING,
    Numbers,
    RowSpec,
)
from em_kernels.backends.row_index import is_exporting
from em_kernels.ops.checks import (
    ANY,
    MOST,
    check_device,
    check_flag,
    check_group,
    check_int,
    check_number,
    check_rows,
    check_shape,
    check_tensor,
    check_whole,
    got_int,
    is_int,
    shown,
)
from em_kernels.ops.dtensor import is_dtensor
from em_kernels.ops.masks import nonzero
from em_kernels.ops.options import DEFAULTS
from em_kernels.ops.transform_numbers import graph_inputs, transform_numbers
from em_kernels.ops.truncate import LIMITS, SAMPLERS, Limit

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEFAULT_OUTPUTS: tuple[str, ...] = DEFAULTS["outputs"]
NEVER_IGNORED = -(1 << 62)  # an `ignore_index` that no target is


def check_logits(logits: Tensor, name: str = "logits", empty: bool = False) -> None:
    """`empty`: a rank of a group may hold no entry of the vocabulary."""
    check_tensor(name, logits)
    if logits.dtype not in FLOAT_DTYPES:
        quantised = ", as of a quantised layer: dequantise it" if logits.dtype.itemsize == 1 else ""
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}{quantised}"
        )
    if logits.dim() == 0 or (logits.shape[-1] == 0 and not empty):
        raise ValueError(f"{name} must be (..., V) with V >= 1, got shape {tuple(logits.shape)}")


def check_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, empty: bool = False, prefix: str = ""
) -> None:
    """`prefix` is that of the caller's names."""
    of_hidden, of_weight, of_bias = (f"{prefix}{name}" for name in ("hidden", "weight", "bias"))
    check_logits(hidden, of_hidden)
    check_whole(of_weight, weight)
    check_logits(weight, of_weight)
    none = weight.shape[:1] == (0,) and not empty
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or none:
        raise ValueError(
            f"{of_weight} must be (V, D) with D = {hidden.shape[-1]} as in {of_hidden} and "
            f"V >= 1, got shape {tuple(weight.shape)}"
        )
    check_device(of_weight, weight, hidden)
    if bias is not None:
        if isinstance(bias, Tensor) and bias.shape != weight.shape[:1]:
            check_whole(of_bias, bias)
        check_logits(bias, of_bias, empty)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{of_bias} must be ({weight.shape[0]},), got shape {tuple(bias.shape)}"
            )
        check_device(of_bias, bias, hidden)


def product_dtype_of(
    hidden: Tensor, weight: Tensor, told: torch.dtype | None = None, prefix: str = ""
) -> torch.dtype:
    """What hidden and weight are multiplied in: the wider of their dtypes unless told; `prefix` is
    that of the caller's names."""
    of_hidden, of_weight = f"{prefix}hidden", f"{prefix}weight"
    given = (hidden.dtype, weight.dtype)
    wider = torch.promote_types(*given)
    if told is None:
        if wider not in given:
            raise TypeError(
                f"{of_weight} and {of_hidden} have dtypes neither of which holds the other, "
                f"{weight.dtype} and {hidden.dtype}: cast one of them, or give "
                f"product_dtype={wider}"
            )
        return wider
    if told not in FLOAT_DTYPES or (told not in given and torch.promote_types(told, wider) != told):
        raise ValueError(
            f"product_dtype must be the dtype of {of_hidden} ({hidden.dtype}) or of {of_weight} "
            f"({weight.dtype}), a float dtype that holds both, or None, got {told!r}"
        )
    return told


def check_chunks(
    chunk_tokens: int | None, logits_dtype: torch.dtype | None, product_dtype: torch.dtype
) -> None:
    if chunk_tokens is not None and not is_int(chunk_tokens, 1):
        raise ValueError(
            f"chunk_tokens must be a positive int or None, got {got_int(chunk_tokens)}"
        )
    if logits_dtype not in (None, torch.float32, product_dtype):
        raise ValueError(
            f"logits_dtype must be torch.float32, the dtype of the product ({product_dtype}) or "
            f"None, got {logits_dtype!r}"
        )


def check_keep_logits(keep_logits: int | None) -> None:
    if keep_logits is not None and not is_int(keep_logits, 0):
        raise ValueError(
            "keep_logits must be a number of bytes, an int from 0 on, or None for as many as a "
            f"chunk takes, got {got_int(keep_logits)}"
        )


def check_impl(impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}")


def check_allreduce_dgrad(allreduce_dgrad: bool, hidden: Tensor) -> None:
    check_flag("allreduce_dgrad", allreduce_dgrad)
    if not allreduce_dgrad and is_exporting():
        raise ValueError("allreduce_dgrad must be True where a program is exported, got False")
    if not allreduce_dgrad and is_dtensor(hidden):
        raise ValueError(
            "allreduce_dgrad must be True for a hidden that is a DTensor, got False: "
            "give hidden.full_tensor(grad_placements=[Partial()])"
        )


def check_accumulate_into(into: Any, weight: Tensor, local: Tensor) -> Tensor:
    """What dW of `local`, this rank's part of `weight`, is added to, as a plain tensor."""
    name = "accumulate_into"
    if torch.compiler.is_compiling() or is_exporting():
        raise ValueError(f"{name} must be None in a compiled or exported program: call it outside")
    into = into.to_local() if is_dtensor(into) else into
    check_tensor(name, into)
    total: Tensor = into
    if not (weight.is_leaf and weight.requires_grad):
        raise ValueError(
            f"{name} needs a weight that is a parameter and requires grad, got one that "
            f"{'is frozen' if weight.is_leaf else 'was computed from others'}"
        )
    own = weight.to_local() if is_dtensor(weight) else weight
    if own.shape != local.shape:
        raise ValueError(f"{name} cannot hold the gradient of a weight that is gathered (FSDP2)")
    check_shape(name, into, local)
    allowed = {weight.dtype, torch.float32, torch.float64}
    if into.dtype not in allowed or torch.promote_types(into.dtype, weight.dtype) != into.dtype:
        raise TypeError(
            f"{name} must be float32, float64 or of the dtype of weight, and hold that "
            f"({weight.dtype}), got {into.dtype}"
        )
    if into.requires_grad or not into.is_contiguous():
        got = "requires grad" if into.requires_grad else f"has strides {into.stride()}"
        raise ValueError(f"{name} must be contiguous and not require grad, got one that {got}")
    return total


def check_filter_eps(eps: float | None) -> None:
    if eps is not None:
        check_number("filter_eps", eps, lambda v: 0 < v < 1, "in (0, 1) or None")


def check_outputs(options: Mapping[str, Any], target: Tensor | None) -> tuple[str, ...]:
    """The `outputs` of the options as `output_names`; not given, the default that there can be."""
    if "outputs" in options:
        return output_names(options["outputs"], target is not None)
    return tuple(n for n in DEFAULT_OUTPUTS if target is not None or n not in NEEDS_TARGET)


def output_names(
    outputs: Iterable[str], has_target: bool, name: str = "outputs", target: str = "a target"
) -> tuple[str, ...]:
    """The outputs in their canonical order, each once; `name` and `target` are what the caller
    calls them."""
    if isinstance(outputs, str):
        raise TypeError(f"{name} must be a tuple of names, got the string {outputs!r}")
    if not isinstance(outputs, Iterable):
        raise TypeError(f"{name} must be a tuple of names, got {type(outputs).__name__}")
    outputs = tuple(outputs)
    for output in outputs:
        if output not in OUTPUTS:
            raise ValueError(f"{name} must be among {OUTPUTS}, got {output!r}")
        if output in NEEDS_TARGET and not has_target:
            got = f"{target.removeprefix('a ')}=None"
            raise ValueError(
                f"{name}: {output!r} needs {target}, got {got}; leave it out or give one"
            )
    return tuple(output for output in OUTPUTS if output in outputs)


def make_spec(
    x: Tensor,
    vocab: int,
    target: Tensor | None,
    options: Mapping[str, Any],
    bias: Tensor | None = None,
    ids: bool = False,
) -> RowSpec:
    """Check the options that every public function shares; `x` gives leading shape and device.

    `ids`: the target may be several ids a row, (..., K), padded with `ignore_index`.
    """
    impl, group = options["impl"], options["group"]
    ignore_index = options["ignore_index"]
    check_impl(impl)
    per_row, numbers = transform_numbers(options, x)
    check_int("ignore_index", ignore_index)
    truncation, (kept_ids, kept_rows) = _truncation(x, options), _kept_sets(x, options)
    row_numbers = graph_inputs(numbers)
    if row_numbers is not None:
        numbers = Numbers()
    target = _target(target, x, ids)
    several = target is not None and target.dim() == x.dim()
    mask = row_mask(x, None if several else target, ignore_index, options["mask"])
    if target is not None and several:
        target = torch.where(target == ignore_index, PADDING, target)
    return RowSpec(
        bias=bias,
        target=target,
        mask=mask,
        temperature_rows=per_row,
        temperature=float(numbers.temperature),
        softcap=float(numbers.softcap),
        logit_scale=float(numbers.logit_scale),
        valid_vocab=_valid_vocab(options["valid_vocab"], vocab, group),
        group=check_group(group),
        numbers=row_numbers,
        # The ranks of a group wait for each other anyway.
        compact=options["mask"] is not None or group is not None,
        truncation=truncation,
        kept_ids=kept_ids,
        kept_rows=kept_rows,
        min_p_first=options["sampler"] == SAMPLERS[1],
    )


def row_mask(
    x: Tensor, target: Tensor | None, ignore_index: int, mask: Tensor | None
) -> Tensor | None:
    """Which rows count: `mask` is not 0 and `target` not `ignore_index`; None means all."""
    if mask is not None:
        check_rows("mask", mask, x)
        mask = nonzero("mask", mask)
    if target is None or ignore_index == NEVER_IGNORED:
        return mask
    counted = target != ignore_index
    return counted if mask is None else mask & counted


def _target(target: Tensor | None, x: Tensor, ids: bool) -> Tensor | None:
    if target is None:
        return None
    check_tensor("target", target)
    if ids and target.dim() == x.dim() and target.shape[:-1] == x.shape[:-1]:
        if target.shape[-1] == 0:
            raise ValueError(
                f"target must have an id in every row, got shape {tuple(target.shape)}; pad rows "
                "of fewer ids with ignore_index"
            )
        check_device("target", target, x)
    else:
        check_rows("target", target, x)
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}")
    return target


def _truncation(x: Tensor, options: Mapping[str, Any]) -> Tensor | None:
    """(..., 3) float64, the limits of every row; None where they are all left out."""
    if options["sampler"] not in SAMPLERS:
        raise ValueError(f"sampler must be one of {SAMPLERS}, got {options['sampler']!r}")
    given = [name for name in LIMITS if options[name] is not None]
    if not given:
        return None
    if options["kept"] is not None:
        raise ValueError(f"kept is what was kept: leave out {given[0]}, or give no kept")
    columns = [_limit(name, options[name], x, limit) for name, limit in LIMITS.items()]
    return torch.stack(columns, -1)


def _limit(name: str, value: Any, x: Tensor, limit: Limit) -> Tensor:
    """A column of `RowSpec.truncation`. Values of a tensor are checked in the operator."""
    if isinstance(value, Tensor):
        check_rows(name, value, x)
        wrong = value.dtype == torch.bool or value.is_complex()
        if wrong or value.is_floating_point() == limit.whole:
            kind = "an integer dtype" if limit.whole else "floating point"
            raise TypeError(f"{name} must have {kind}, got {value.dtype}")
        if value.requires_grad:
            raise ValueError(f"{name} must not require grad: it is treated as a constant")
        return value.to(torch.float64)
    rows = torch.ones(x.shape[:-1], dtype=torch.float64, device=x.device)
    if value is None:
        return rows.mul_(limit.none)
    if limit.whole and not is_int(value):
        raise TypeError(f"{name} must be an int, an int tensor or None, got {_kind(value)}")
    rule = f"{limit.rule} or None, which keeps all,"
    check_number(name, value, limit.holds, rule, ANY)
    return rows.mul_(value if abs(value) < MOST else float(value))


def _kind(value: Any) -> str:
    return repr(value) if isinstance(value, (bool, float)) else type(value).__name__


def _kept_sets(x: Tensor, options: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """(ids, (..., 2) where those of each row begin and end); values are checked in the operator."""
    kept = options["kept"]
    if kept is None:
        return None, None
    if not isinstance(kept, (tuple, list)) or len(kept) != 2:
        raise TypeError(f"kept must be (ids, offsets) or None, got {type(kept).__name__}")
    for name, part in zip(("ids", "offsets"), kept):
        check_tensor(f"kept: {name}", part)
        if part.dtype != torch.int64:
            raise TypeError(f"kept: {name} must be int64, got {part.dtype}")
        if part.dim() != 1:
            raise ValueError(f"kept: {name} must be 1-D, got shape {tuple(part.shape)}")
        check_device(f"kept: {name}", part, x)
    ids, offsets = kept
    if offsets.shape[0] != x.shape[:-1].numel() + 1:
        raise ValueError(
            f"kept: offsets must be one more than the {x.shape[:-1].numel()} rows of the flattened "
            f"leading shape, got {offsets.shape[0]}"
        )
    ends = torch.stack([offsets[:-1], offsets[1:]], -1)
    return ids, ends.view(*x.shape[:-1], 2)


def _valid_vocab(valid_vocab: int | None, vocab: int, group: Any) -> int:
    """With a group the size of the whole vocabulary is only known in the operator; 0 is all."""
    if valid_vocab is None:
        return vocab if group is None else 0
    if not is_int(valid_vocab):
        raise TypeError(f"valid_vocab must be an int or None, got {type(valid_vocab).__name__}")
    if valid_vocab < 1 or (group is None and valid_vocab > vocab):
        rule = "positive" if group is not None else f"in [1, {shown(vocab)}]"
        raise ValueError(f"valid_vocab must be {rule} or None, got {shown(valid_vocab)}")
    return valid_vocab
