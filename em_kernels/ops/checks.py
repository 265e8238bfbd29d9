"""Checks of single arguments, which name the argument and say what was received.

Only shapes, dtypes, devices and Python numbers are looked at here, so the checks are free and can
be traced by torch.compile; the values of CPU tensors are checked inside the operators.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from em_kernels.ops.masks import nonzero
from em_kernels.ops.plain import path_of, why_in_parts, why_not_plain

MOST = 1 << 63


def check_group(group: Any, name: str = "group") -> str | None:
    """The name torch.distributed knows the group by; TypeError if it is not one of this rank's."""
    if group is None:
        return None
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        outside = dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER
        got = "a group that this rank is not in" if outside else type(group).__name__
        raise TypeError(f"{name} must be a torch.distributed process group or None, got {got}")
    return group.group_name


def check_rows(name: str, rows: Tensor, x: Tensor) -> None:
    """`rows` is a tensor of the leading shape of `x`, on its device."""
    check_tensor(name, rows)
    if rows.shape != x.shape[:-1]:
        raise ValueError(
            f"{name} must have the leading shape {tuple(x.shape[:-1])}, "
            f"got shape {tuple(rows.shape)}"
        )
    check_device(name, rows, x)


def check_real(name: str, value: Tensor) -> None:
    check_tensor(name, value)
    if value.is_complex():
        raise TypeError(f"{name} must be real numbers, got {value.dtype}")


def constant(name: str, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights, checked, of the dtype."""
    check_real(name, weights)
    if weights.requires_grad:
        raise ValueError(f"{name} must not require grad: it is a constant; detach it")
    return weights.to(dtype)


def count_mask(mask: Tensor, like: Tensor | None = None, name: str = "mask") -> Tensor:
    check_tensor(name, mask)
    if like is not None:
        check_shape(name, mask, like)
    return nonzero(name, mask)


def check_floating(name: str, value: Tensor, like: Tensor | None = None) -> None:
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if like is not None:
        check_shape(name, value, like)


def check_integers(name: str, value: Any) -> None:
    check_tensor(name, value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {value.dtype}")


def check_shape(name: str, value: Tensor, like: Tensor) -> None:
    if value.shape != like.shape:
        raise ValueError(
            f"{name} must have shape {tuple(like.shape)}, got shape {tuple(value.shape)}"
        )
    check_device(name, value, like)


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if (remedy := why_not_plain(value)) is not None:
        got = f"{path_of(type(value))} of {value.dtype}"
        raise TypeError(f"{name} must be a plain tensor, got a {got}: {remedy}")


def check_whole(name: str, value: Any) -> None:
    """Refuse a parameter of which this rank holds a part."""
    if isinstance(value, Tensor) and (reason := why_in_parts(value)) is not None:
        raise ValueError(f"{name}, of shape {tuple(value.shape)}, {reason}")


def is_graph_input(value: float) -> bool:
    """Whether the number can change from call to call of the graph that torch.compile is making."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not has_static_value(value)


def shown(value: float) -> str:
    """What an error message says was received; torch.compile cannot print an input of its graph."""
    return "another value" if is_graph_input(value) else repr(value)


ANY = (0.0, sys.float_info.max)
_IN_FLOAT32 = (0.0, torch.finfo(torch.float32).max)
RANGES = {
    dtype: (torch.finfo(dtype).tiny, 1 / torch.finfo(dtype).tiny)
    for dtype in (torch.float32, torch.float64)
}
"""Sizes of which the dtype has a number and one of their inverse, with all digits."""


def check_number(
    name: str,
    value: float,
    good: Callable[[float], bool],
    rule: str,
    sizes: tuple[float, float] = _IN_FLOAT32,
) -> None:
    """`sizes`: the least and the largest; what float32 does not hold makes infinite what it is
    multiplied with."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    # math.isfinite cannot be traced, and torch.compile takes a number to be below infinity.
    if not (good(value) and abs(value) <= sys.float_info.max):
        raise ValueError(f"{name} must be {rule} and finite, got {shown(value)}")
    check_size(name, value, sizes)


def check_size(name: str, value: float, sizes: tuple[float, float]) -> None:
    least, most = sizes
    if not least <= abs(value) <= most:
        raise ValueError(
            f"{name} must be from {least:.3g} to {most:.3g} in size, got {shown(value)}"
        )


def check_bound(name: str, value: float) -> None:
    """A number that may be infinite: no bound."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if value != value:
        raise ValueError(f"{name} must be a number, got {shown(value)}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_int(name: str, value: Any) -> None:
    if not is_int(value):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not is_int(value, -MOST):
        raise ValueError(f"{name} must be an int, got {got_int(value)}")


def is_int(value: Any, least: int | None = None) -> bool:
    """With `least`: from it on, and of 64 bits as all that an operator takes."""
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return least is None or least <= value < MOST


def got_int(value: Any) -> str:
    """What an argument that `is_int` refuses is."""
    if not is_int(value):
        return repr(value)
    return shown(value) if -MOST <= value < MOST else f"{value}, which 64 bits do not hold"


def check_device(name: str, value: Tensor, x: Tensor) -> None:
    if value.device != x.device:
        raise ValueError(f"{name} must be on {x.device}, got {value.device}")
