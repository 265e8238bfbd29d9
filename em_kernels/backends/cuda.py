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

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from em_kernels.backends import availability
from em_kernels.backends.interface import (
    ROW_OUTPUTS,
    Backend,
    RowSpec,
    Saved,
    Upstream,
    accumulate_dtype,
    empty_rows,
)

if TYPE_CHECKING:
    from em_kernels import _cuda

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # as csrc/problem.h
_NAMES = (*Saved._fields, *ROW_OUTPUTS)  # as Output of csrc/softmax_moments.h


def why_not(device: torch.device | None) -> str | None:
    module = availability.load("the CUDA part", "em_kernels._cuda", "install the CUDA toolkit")
    if isinstance(module, str):
        return module
    said = availability.why_no_gpu()
    if said is not None or torch.version.cuda is None:
        return f"no NVIDIA GPU is visible to torch{said or ''}"
    if device is not None and device.type != "cuda":
        return f"its tensors must be on a GPU, not on {device.type}"
    refusal = module.why_no_driver()
    if refusal:
        return f"CUDA refuses it ({refusal}); update the driver or reinstall with an older toolkit"
    built, capability = module.architectures, torch.cuda.get_device_capability(device)
    if not _runs_on(built, capability):
        number = "{}.{}".format(*capability)
        remedy = f"reinstall with TORCH_CUDA_ARCH_LIST={number}"
        return f"it is built for {built}, and this GPU has compute capability {number}; " + (
            remedy if capability >= (8, 0) else "8.0 is the least it can serve"
        )
    return None


def _runs_on(built: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU has code among `built`, such as "sm_80 sm_90a compute_100": machine code serves
    its major version from its minor one on, that of an "a" exactly one, PTX all that are newer."""
    for kind, major, minor, only in re.findall(r"(sm|compute)_(\d+)(\d)([af]?)", built):
        least = (int(major), int(minor))
        same = capability == least if only == "a" else capability[0] == least[0]
        if least <= capability and (same or (kind == "compute" and not only)):
            return True
    return False


class Cuda(Backend):
    """The compiled part, `em_kernels._cuda`; ImportError where that is not built."""

    name = "cuda"
    narrows = True

    def __init__(self) -> None:
        from em_kernels import _cuda

        self._compiled = _cuda
        self._limits: dict[int | None, _cuda.Device] = {}  # by the index of a device

    def stats(self, logits: Tensor, spec: RowSpec, outputs: tuple[str, ...]) -> list[Tensor]:
        rows = empty_rows(logits, outputs)
        self._run(self._compiled.Operation.statistics, logits, spec, rows=rows)
        return list(rows.values())

    def grad(
        self, logits: Tensor, spec: RowSpec, saved: Saved, upstream: Upstream, out: Tensor
    ) -> None:
        operation = self._compiled.Operation.gradient
        self._run(operation, logits, spec, saved=saved, upstream=upstream, out=out)

    def loss(
        self,
        logits: Tensor,
        spec: RowSpec,
        upstream: Upstream,
        outputs: tuple[str, ...],
        out: Tensor,
    ) -> list[Tensor]:
        """`stats`, then `grad` of the loss whose per-row weights are `upstream`, into `out`.

        From compute capability 9.0 on the logits are read once, where there is no bias, no softcap
        and no output beyond logprob, entropy, lse and max_prob.
        """
        rows, operation = empty_rows(logits, outputs), self._compiled.Operation.loss
        self._run(operation, logits, spec, rows=rows, upstream=upstream, out=out)
        return list(rows.values())

    def build_info(self) -> dict[str, object]:
        """The CUDA runtime compiled in."""
        version = self._compiled.runtime_version()
        return {"runtime": f"{version // 1000}.{version % 1000 // 10}"}

    def _run(
        self,
        operation: _cuda.Operation,
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
        problem = self._problem(logits, spec, kept)
        columns = [] if rows is None else [_address(rows.get(name)) for name in _NAMES]
        gradient = self._compiled.Gradient()
        if out is not None and upstream is not None:
            gradient = self._gradient(logits, saved, upstream, out, kept)
        with torch.cuda.device_of(logits):
            results, where = self._compiled.Results(columns), self._where(logits.device)
            self._compiled.run(operation, problem, results, gradient, *where)

    def _where(self, device: torch.device) -> tuple[_cuda.Device, int]:
        """The limits of the device, and the stream that torch is using on it."""
        if device.index not in self._limits:  # loads the kernels for the current device
            self._limits[device.index] = self._compiled.device(device.index)
        return self._limits[device.index], torch.cuda.current_stream(device).cuda_stream

    def _problem(self, logits: Tensor, spec: RowSpec, kept: list[Tensor]) -> _cuda.Problem:
        wide = accumulate_dtype(logits.dtype)
        outer, inner, vocab = logits.shape
        count = outer * inner
        bias = spec.bias if spec.bias is None else spec.bias[: spec.valid_vocab]
        return self._compiled.Problem(
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
        self,
        logits: Tensor,
        saved: Saved | None,
        upstream: Upstream,
        out: Tensor,
        kept: list[Tensor],
    ) -> _cuda.Gradient:
        _check_view("out", out)
        narrow = logits.dtype == torch.float32 and out.dtype in (torch.bfloat16, torch.float16)
        if out.shape != logits.shape or (out.dtype != logits.dtype and not narrow):
            raise ValueError(
                "out must have the shape and dtype of logits, or be of 16 bits where logits is "
                f"float32, got {tuple(out.shape)} {out.dtype} for {tuple(logits.shape)} "
                f"{logits.dtype}"
            )
        wide, count = accumulate_dtype(logits.dtype), logits.shape[0] * logits.shape[1]
        fields = {f"g_{name}": g for name, g in upstream._asdict().items()}
        fields |= saved._asdict() if saved is not None else {}
        return self._compiled.Gradient(
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


def load() -> Cuda:
    return Cuda()
