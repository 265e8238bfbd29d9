"""How far from the truth a backend may be: one table, and the checks that read it.

Truth is `reference` on the float64 values of the same inputs, so what is measured is a backend's
arithmetic and not the rounding of the logits; tests/backends/test_reference.py holds the reference
to textbook formulas.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from em_kernels.backends import reference
from em_kernels.backends.interface import (
    NEEDS_TARGET,
    ROW_OUTPUTS,
    RowSpec,
    Saved,
    Upstream,
    accumulate_dtype,
)

# A per-row result: |error| <= LIMIT * CONDITION * max(|result|, SIZE).
# float32: 16 roundings of 2^-23, in exp, whose argument is rounded to |d| 2^-24, and in sums.
LIMIT = {torch.float32: 2e-6, torch.float64: 1e-13}
# Differences of sums, which lose the digits that the sums have in common.
CONDITION = {"logit_mean": 10, "logit_var": 5, "logit_skew": 30, "entropy_slope": 30}
# The terms of a result that may cancel: what its rounding is measured by.
SIZE = {"max": 1, "lse": 1, "logit_mean": 1, "logit_skew": 1, "entropy_slope": 1e-3}
SIZE["self_certainty"] = 1  # lse - mean z - log n of a row that is nearly uniform
# A row of a gradient: ||error|| <= GRADIENT * ||row||. Half a rounding to 16 bits where the row is
# nearly one entry, 2^-8 and 2^-11; for float32 and float64 the sums, as above.
GRADIENT = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
}
# Entries of a float16 gradient near 0 are rounded to multiples of 2^-24.
SUBNORMAL = {torch.float16: 2.0**-25}
# Relative to results as small as 1e-9, where the textbook formula has no digit left in float32.
NEARLY_CERTAIN = 1e-5
# Results that are one rounding, or two, of sums of whole numbers.
ROUNDED = 2.5e-7


def exact(values):
    """The same NamedTuple with its floating-point tensors in float64."""
    wide = (v.double() if torch.is_tensor(v) and v.is_floating_point() else v for v in values)
    return type(values)(*wide)


def outputs_of(spec: RowSpec) -> tuple[str, ...]:
    """What can be asked for: with a target everything."""
    return tuple(n for n in ROW_OUTPUTS if spec.target is not None or n not in NEEDS_TARGET)


def true_rows(x: Tensor, spec: RowSpec, outputs: tuple[str, ...] | None = None) -> dict:
    outputs = outputs_of(spec) if outputs is None else outputs
    rows = reference.stats(x.double(), exact(spec), outputs)
    return dict(zip((*Saved._fields, *outputs), rows, strict=True))


def true_gradient(x: Tensor, spec: RowSpec, upstream: Upstream) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.float64, device=x.device)
    reference.loss(x.double(), exact(spec), exact(upstream), (), out)
    return out


def check_rows(
    got: dict, want: dict, dtype: torch.dtype, condition: dict | None = None, size: float = 0.0
) -> None:
    """Every row result that there is; NaN and infinities must be the same ones. `size`: of all."""
    condition = {**CONDITION, **(condition or {})}
    for name, row in got.items():
        assert row.dtype == accumulate_dtype(dtype) and row.shape == want[name].shape, name
        limit = LIMIT[row.dtype] * condition.get(name, 1)
        least: float | Tensor = max(size, SIZE.get(name, 0.0))
        if name == "varentropy":  # the mean of d^2 less that of d, squared
            least = want["mean_d"].square().clamp(min=size)
        check_row(row, want[name], limit, least, name)


def check_row(
    got: Tensor, want: Tensor, limit: float, size: float | Tensor = 0.0, name: str = ""
) -> None:
    got, want = got.double().cpu(), want.double().cpu()
    finite = want.isfinite()
    torch.testing.assert_close(got[~finite], want[~finite], rtol=0, atol=0, equal_nan=True)
    least = torch.as_tensor(size, dtype=torch.float64).cpu().expand_as(want)[finite]
    got, want = got[finite], want[finite]
    excess = (got - want).abs() - limit * torch.maximum(want.abs(), least)
    assert bool((excess <= 0).all()), f"{name}: {got.tolist()} for {want.tolist()}"


def check_gradient(
    out: Tensor, want: Tensor, limit: float | None = None, size: float = 0.0
) -> None:
    """Row by row, each of `size` at least; NaN must be where it is in the truth."""
    limit = GRADIENT[out.dtype] if limit is None else limit
    got, want = out.double().cpu().flatten(0, -2), want.double().cpu().flatten(0, -2)
    assert torch.equal(got.isnan(), want.isnan())
    error = (got - want).nan_to_num().norm(dim=-1)
    floor = SUBNORMAL.get(out.dtype, 0.0) * math.sqrt(out.shape[-1])
    excess = error - limit * want.nan_to_num().norm(dim=-1).clamp(min=size) - floor
    assert bool((excess <= 0).all()), f"{error.tolist()}: {excess.amax().item():.3g} too much"
