"""Inputs, float64 truth and the error measure of the tests of the Triton kernels.

Truth is `reference` on the float64 values of the same inputs, so what is measured is the kernels'
arithmetic and not the rounding of the logits.
"""

import math

import torch
import triton

from em_kernels.backends import reference
from em_kernels.backends.interface import ROW_OUTPUTS, RowSpec, Saved, Upstream, accumulate_dtype
from em_kernels.backends.triton import launch
from em_kernels.backends.triton.backend import Triton

backend = Triton()

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONS = {
    "plain": {},
    "temperature": dict(temperature=0.7, logit_scale=-1.3),
    "rows": dict(temperature_rows=torch.tensor([0.5, 1.0, 2.0, 0.9])),
    "softcap": dict(softcap=30.0),
    "everything": dict(softcap=12.0, bias=True, temperature=0.8, logit_scale=1.5),
    "bias": dict(bias=True, temperature=1.7),
}
VOCAB, VALID = 178, 169  # two steps of the small plan, a whole block and a part of one
ROUNDINGS = 40  # of sums and of the exp of a GPU, whose argument is rounded: |d| 2^-24
NAMES = (*Saved._fields, *ROW_OUTPUTS)


def plan_small_steps(vocab, dtype, capped=False, warp=32) -> launch.Plan:
    """Two parts; two steps of two slices, and a whole block and a part of one, in a short row."""
    return launch.Plan(32, 2, 1, part=128)


def make(dtype=torch.float32, rows=4, vocab=VOCAB, valid=VALID, seed=0, **options):
    """(logits (2, rows / 2, V), spec): targets inside, at both ends, at the maximum."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(1, rows, vocab, generator=generator)).to(dtype)
    target = torch.randint(valid, (rows,), generator=generator)
    special = torch.tensor([int(logits[0, 0, :valid].argmax()), valid - 1, 0])
    target[:3] = special[:rows]
    wide = accumulate_dtype(dtype)
    if options.get("bias"):
        options["bias"] = torch.randn(vocab, generator=generator).to(dtype).to(DEVICE)
    if "temperature_rows" in options:
        options["temperature_rows"] = options["temperature_rows"][:rows].to(wide).to(DEVICE)
    spec = RowSpec(target=target.to(DEVICE), valid_vocab=valid, **options)
    return logits.view(2, -1, vocab).to(DEVICE) if rows % 2 == 0 else logits.to(DEVICE), spec


def double(spec: RowSpec) -> RowSpec:
    return spec._replace(
        bias=None if spec.bias is None else spec.bias.double(),
        temperature_rows=None if spec.temperature_rows is None else spec.temperature_rows.double(),
    )


def true_stats(logits, spec, outputs=ROW_OUTPUTS) -> dict:
    rows = reference.stats(logits.double(), double(spec), outputs)
    return dict(zip((*Saved._fields, *outputs), rows))


def true_grad(logits, spec, up) -> torch.Tensor:
    logits, spec = logits.double(), double(spec)
    out = torch.empty_like(logits)
    saved = Saved(*reference.stats(logits, spec, ())[:3])
    up = Upstream(*(None if g is None else g.double() for g in up))
    reference.grad(logits, spec, saved, up, out)
    return out


def stats(logits, spec, outputs=ROW_OUTPUTS) -> dict:
    rows = backend.stats(logits, spec, outputs)
    return dict(zip((*Saved._fields, *outputs), rows, strict=True))


def grad(logits, spec, up, out=None) -> torch.Tensor:
    out = torch.full_like(logits, math.nan) if out is None else out
    saved = Saved(*backend.stats(logits, spec, ())[:3])
    backend.grad(logits, spec, saved, up, out)
    return out


def upstream(logits, logprob=True, entropy=True, lse=True) -> Upstream:
    rows = logits.shape[0] * logits.shape[1]
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(3, rows, generator=generator).to(accumulate_dtype(logits.dtype)).to(DEVICE)
    return Upstream(*(v if on else None for v, on in zip(values, (logprob, entropy, lse))))


def assert_close(got, want, tolerance, what=""):
    """|got - want| <= tolerance * (1 + |want|), with NaN and infinities equal."""
    want = want.to(got.device)
    finite = want.isfinite()
    torch.testing.assert_close(got.double()[~finite], want[~finite], equal_nan=True, rtol=0, atol=0)
    error = ((got.double() - want).abs() / (1 + want.abs()))[finite]
    assert bool((error <= tolerance).all()), f"{what}: {error.max().item():.3g} > {tolerance:.3g}"


def rounding(dtype) -> float:
    return torch.finfo(dtype).eps
