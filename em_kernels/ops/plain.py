"""Which tensors hold their numbers as a kernel reads them, and what to do with the others.

A kernel reads memory, so a tensor whose numbers are made by a subclass (quantised, nested, sharded)
would be read wrong or fail somewhere inside. Nothing is imported for it: other packages' classes
are known by their names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# DTensor, which is made plain before it is read; what tracing puts in the place of tensors.
_SERVED = ("torch.distributed.", "torch._subclasses.")
_TORCH_FUNCTION: Any = Tensor.__torch_function__
_FUNCTIONS = (_TORCH_FUNCTION.__func__, None)  # None: turned off, as for parameters
_QUANTISED = ("Params4bit", "Int8Params", "GGUF")  # how names of classes begin
_PLAIN = (Tensor, torch.nn.Parameter)  # most tensors, told at once
_DEQUANTISE = "dequantise it, as its .dequantize() may"


def why_not_plain(x: Tensor) -> str | None:
    """What to do with the tensor, where it is not served; None where it is.

    Served are tensors, parameters, DTensors, and subclasses that change nothing of what operators
    do. What torch.compile traces is not asked again.
    """
    if torch.compiler.is_compiling():
        return None
    kind = type(x)
    if kind in _PLAIN and x.layout is torch.strided and not (x.is_nested or x.is_quantized):
        return None
    if x.is_nested:
        return "give x.to_padded_tensor(0) and a mask, or x.values()"
    if any(base.__name__.startswith(_QUANTISED) for base in kind.__mro__) or x.is_quantized:
        return _DEQUANTISE
    if x.layout is not torch.strided:
        return f"its layout is {x.layout}: give x.to_dense()"
    function = getattr(kind.__torch_function__, "__func__", None)
    own = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ or function not in _FUNCTIONS
    if not own or path_of(kind).startswith(_SERVED):
        return None
    if path_of(kind).startswith("torchao."):
        return _DEQUANTISE
    return "give a plain tensor, as its .dequantize(), .full_tensor() or .to_dense() may make"


def why_in_parts(x: Tensor) -> str | None:
    """Of a parameter that this rank holds only a part of: who cut it and how to get it whole."""
    if torch.compiler.is_compiling():
        return None
    if hasattr(x, "ds_id") and x.numel() == 0:
        return (
            "is cut by DeepSpeed ZeRO-3 and not gathered: call this inside "
            "deepspeed.zero.GatheredParameters([weight, ...]) or the module's own forward"
        )
    if type(x).__name__ == "FlatParameter" or (
        getattr(x, "_fsdp_flattened", False) and (x.dim() == 1 or x.numel() == 0)
    ):
        return (
            "is cut by FSDP1 (FullyShardedDataParallel) and not gathered: call this inside the "
            "wrapped module's forward or FullyShardedDataParallel.summon_full_params(module), or "
            "use FSDP2 (fully_shard), whose DTensors are served"
        )
    return None


def path_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
