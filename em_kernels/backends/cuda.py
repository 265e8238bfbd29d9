"""The CUDA backend: `stats`, `grad` and `loss` of `em_kernels.backends.reference` for NVIDIA GPUs.

Here tensors become addresses; the kernels, `csrc/cuda`, know nothing of torch. `grad` and `loss`
take an `out` of the logits' dtype, which may be the logits themselves, and for float32 logits also
one of bfloat16 or float16, whose rows may begin where those of the logits do (`narrows`).

Kernels run on torch's current stream of the tensors' device, and nothing waits for them. The first
call on a device loads all kernels for it and asks for its limits; later calls only launch, so they
can be captured in a CUDA graph. The first call is meant to be fit for capture too; what else is in
the captured region (cuBLAS, the allocator, autograd) wants torch's usual warm-up, a run of it on a
side stream before the capture.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from em_kernels import _cuda
from em_kernels.backends.interface import OUTPUTS, RowSpec, Saved, Upstream, accumulate_dtype

narrows = True

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # as csrc/problem.h
_NAMES = (*Saved._fields, *OUTPUTS)  # as Output of csrc/softmax_moments.h


def stats(logits: Tensor, spec: RowSpec, outputs: tuple[str, ...]) -> list[Tensor]:
    """[max, log1p_r, mean_d, *outputs], each (N,), of logits (outer, inner, V)."""
    rows = _empty_rows(logits, outputs)
    _run(_cuda.Operation.statistics, logits, spec, rows=rows)
    return list(rows.values())


def grad(logits: Tensor, spec: RowSpec, saved: Saved, upstream: Upstream, out: Tensor) -> None:
    """Write d loss / d logits into `out`, which has the shape of `logits` and may be `logits`."""
    _run(_cuda.Operation.gradient, logits, spec, saved=saved, upstream=upstream, out=out)


def loss(
    logits: Tensor, spec: RowSpec, upstream: Upstream, outputs: tuple[str, ...], out: Tensor
) -> list[Tensor]:
    """`stats`, then `grad` of the loss whose per-row weights are `upstream`, into `out`.

    From compute capability 9.0 on the logits are read once, where there is no bias, no softcap and
    no output beyond logprob, entropy, lse and max_prob.
    """
    rows = _empty_rows(logits, outputs)
    _run(_cuda.Operation.loss, logits, spec, rows=rows, upstream=upstream, out=out)
    return list(rows.values())


def _empty_rows(logits: Tensor, outputs: tuple[str, ...]) -> dict[str, Tensor]:
    count, dtype = logits.shape[0] * logits.shape[1], accumulate_dtype(logits.dtype)
    names = (*Saved._fields, *outputs)
    return {name: torch.empty(count, dtype=dtype, device=logits.device) for name in names}


def _run(
    operation,
    logits: Tensor,
    spec: RowSpec,
    rows: dict[str, Tensor] | None = None,
    saved: Saved | None = None,
    upstream: Upstream | None = None,
    out: Tensor | None = None,
) -> None:
    _check_view("logits", logits)
    if logits.numel() == 0:
        return
    kept: list[Tensor] = []  # what the kernel reads must outlive the launch
    problem = _problem(logits, spec, kept)
    results = _cuda.Results([] if rows is None else [_address(rows.get(name)) for name in _NAMES])
    gradient = _cuda.Gradient() if out is None else _gradient(logits, saved, upstream, out, kept)
    with torch.cuda.device_of(logits):
        _cuda.run(operation, problem, results, gradient, *_where(logits.device))


def _where(device: torch.device) -> tuple:
    """The limits of the device, and the stream that torch is using on it."""
    return _limits(device.index), torch.cuda.current_stream(device).cuda_stream


@cache
def _limits(index: int):
    """Of the current device, which is `index`: loads the kernels for it."""
    return _cuda.device(index)


def _problem(logits: Tensor, spec: RowSpec, kept: list[Tensor]):
    wide = accumulate_dtype(logits.dtype)
    outer, inner, vocab = logits.shape
    count = outer * inner
    bias = spec.bias if spec.bias is None else spec.bias[: spec.valid_vocab]
    return _cuda.Problem(
        dtype=DTYPES.index(logits.dtype),
        logits=logits.data_ptr(),
        rows=count,
        inner=inner,
        outer_stride=logits.stride(0),
        inner_stride=logits.stride(1),
        vocab=vocab,
        valid_vocab=spec.valid_vocab,
        bias=_keep("bias", bias, wide, spec.valid_vocab, logits, kept),
        target=_keep("target", spec.target, torch.int64, count, logits, kept),
        mask=_keep("mask", spec.mask, torch.bool, count, logits, kept),
        temperature_rows=_keep("temperature", spec.temperature_rows, wide, count, logits, kept),
        temperature=spec.temperature,
        softcap=spec.softcap,
        logit_scale=spec.logit_scale,
    )


def _gradient(
    logits: Tensor, saved: Saved | None, upstream: Upstream, out: Tensor, kept: list[Tensor]
):
    _check_view("out", out)
    narrow = logits.dtype == torch.float32 and out.dtype in (torch.bfloat16, torch.float16)
    if out.shape != logits.shape or (out.dtype != logits.dtype and not narrow):
        raise ValueError(
            "out must have the shape and dtype of logits, or be of 16 bits where logits is "
            f"float32, got {tuple(out.shape)} {out.dtype} for {tuple(logits.shape)} {logits.dtype}"
        )
    wide, count = accumulate_dtype(logits.dtype), logits.shape[0] * logits.shape[1]
    fields = {f"g_{name}": g for name, g in upstream._asdict().items()}
    fields |= saved._asdict() if saved is not None else {}
    return _cuda.Gradient(
        **{name: _keep(name, x, wide, count, logits, kept) for name, x in fields.items()},
        out=out.data_ptr(),
        outer_stride=out.stride(0),
        inner_stride=out.stride(1),
        out_dtype=DTYPES.index(out.dtype),
    )


def _keep(
    name: str, x: Tensor | None, dtype: torch.dtype, size: int, like: Tensor, kept: list[Tensor]
) -> int:
    """The address of `x` as a contiguous (size,) of `dtype`, kept alive by `kept`; 0 if None."""
    if x is None:
        return 0
    if x.numel() != size or x.device != like.device:
        raise ValueError(
            f"{name} must have {size} entries on {like.device}, got {tuple(x.shape)} on {x.device}"
        )
    kept.append(x.to(dtype).contiguous())
    return kept[-1].data_ptr()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _check_view(name: str, x: Tensor) -> None:
    if x.dim() != 3 or (x.stride(2) != 1 and x.shape[2] > 1) or x.dtype not in DTYPES:
        raise ValueError(
            f"{name} must be (outer, inner, V) with unit last stride and of a dtype in {DTYPES}, "
            f"got shape {tuple(x.shape)}, strides {x.stride()}, {x.dtype}"
        )


def build_info() -> dict[str, object]:
    """The CUDA runtime compiled in."""
    version = _cuda.runtime_version()
    return {"runtime": f"{version // 1000}.{version % 1000 // 10}"}
