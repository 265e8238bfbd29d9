"""A backend as the contract sees it, and what the cases of the contract share."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from helpers import random_logits, random_target, same_bits
from torch import Tensor

from contract.closeness import check_gradient, check_rows, outputs_of, true_gradient, true_rows
from em_kernels.backends.interface import RowSpec, Saved, Upstream, accumulate_dtype

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
FIRST_ORDER = ("logprob", "entropy", "lse", "max_prob")  # what fast kernels give
LOSS = ("logprob", "entropy")


class Subject(NamedTuple):
    """A backend as it is tested, and what it promises beyond closeness."""

    backend: Any  # with `stats`, `grad` and `loss`
    device: str = "cpu"
    fused: bool = False  # `loss` has the bits of `stats` and of `grad`
    rowwise: bool = True  # the bits of a row depend on nothing but its logits and options
    on_gpu: bool = True  # its rows of a bad target or temperature are NaN; elsewhere refused before
    bfloat16: float = 4e-3  # of its gradients: see closeness.GRADIENT
    denormal16: bool = True  # it reads denormal numbers of bfloat16
    condition: dict | None = None  # where its sums lose more than closeness.CONDITION
    size: float = 0.0  # of z, where that is what rounding counts by: u of a bias or a softcap

    def make(self, rows: int, vocab: int, dtype=torch.float32, **options):
        """(logits (1, rows, vocab), spec, upstream) of random numbers"""
        x = random_logits(1, rows, vocab, dtype=dtype)
        target = random_target(rows, vocab=options.get("valid_vocab", vocab))
        spec = RowSpec(**{"target": target, "valid_vocab": vocab} | options)
        wide = accumulate_dtype(dtype)
        upstream = Upstream(*(torch.randn(rows).to(wide) for _ in range(3)))
        return x.to(self.device), self.place(spec), self.place(upstream)

    def place(self, values):
        """The same NamedTuple with its tensors on the device."""
        placed = (v.to(self.device) if torch.is_tensor(v) else v for v in values)
        return type(values)(*placed)

    def stats(self, x: Tensor, spec: RowSpec, outputs: tuple[str, ...] | None = None) -> dict:
        outputs = outputs_of(spec) if outputs is None else outputs
        rows = self.backend.stats(x, spec, outputs)
        return dict(zip((*Saved._fields, *outputs), rows, strict=True))

    def grad(self, x: Tensor, spec: RowSpec, upstream: Upstream, out: Tensor | None = None):
        out = torch.full_like(x, NAN) if out is None else out
        self.backend.grad(x, spec, Saved(*self.backend.stats(x, spec, ())), upstream, out)
        return out

    def loss(self, x, spec, upstream, outputs=LOSS, out=None) -> tuple[dict, Tensor]:
        out = torch.full_like(x, NAN) if out is None else out
        rows = self.backend.loss(x, spec, upstream, outputs, out)
        return dict(zip((*Saved._fields, *outputs), rows, strict=True)), out

    def run(self, x, spec, upstream) -> list[Tensor]:
        """All there is to compare bit for bit."""
        rows, out = self.loss(x, spec, upstream, FIRST_ORDER)
        every = self.stats(x, spec).values()
        return [*rows.values(), *every, self.grad(x, spec, upstream)[0], out[0]]

    def check(self, x: Tensor, spec: RowSpec, upstream: Upstream) -> None:
        """Everything that a backend makes of these rows, and in place the same."""
        want, outputs = true_rows(x, spec), outputs_of(spec)
        first = tuple(name for name in FIRST_ORDER if name in outputs)
        every, grad = self.stats(x, spec), self.grad(x, spec, upstream)
        some, fused = self.loss(x, spec, upstream, first)
        for rows in (every, self.stats(x, spec, first), some):
            check_rows(rows, want, x.dtype, self.condition, self.size)
        for out in (grad, fused):
            self.check_gradient(out, true_gradient(x, spec, upstream))
        given = x.clone()
        self.loss(given, spec, upstream, first, given)
        assert same_bits(given, fused)
        rows, out = self.loss(x, spec, upstream, outputs)
        check_rows(rows, want, x.dtype, self.condition, self.size)
        self.check_gradient(out, true_gradient(x, spec, upstream))
        if self.fused:
            assert all(same_bits(rows[name], every[name]) for name in rows)
            assert same_bits(out, grad) and same_bits(fused, grad)

    def check_gradient(self, out: Tensor, want: Tensor) -> None:
        limit = self.bfloat16 if out.dtype == torch.bfloat16 else None
        check_gradient(out, want, limit, self.size)


def pick(values, rows):
    """The same spec or upstream of some of the rows."""
    of_rows = {name: v for name, v in values._asdict().items() if name != "bias"}
    picked = {name: v[rows].contiguous() for name, v in of_rows.items() if torch.is_tensor(v)}
    return values._replace(**picked)


def misaligned(x: Tensor, by: int) -> Tensor:
    """A copy of `x` whose rows begin `by` entries past a multiple of 64 bytes, NaN between them."""
    outer, inner, vocab = x.shape
    pitch = (vocab + by + 15) // 8 * 8
    storage = torch.full((outer * inner * pitch + by + 64,), NAN, dtype=x.dtype, device=x.device)
    skip = -storage.data_ptr() % 64 // x.itemsize + by
    view = storage.as_strided(x.shape, (inner * pitch, pitch, 1), skip)
    view.copy_(x)
    return view


def untouched(view: Tensor) -> bool:
    """Whether what lies between the rows of a `misaligned` tensor is still NaN."""
    pitch, vocab = view.stride(1), view.shape[2]
    between = (*view.shape[:2], pitch - vocab)
    start = view.storage_offset() + vocab
    return bool(view.as_strided(between, view.stride(), start).isnan().all())
