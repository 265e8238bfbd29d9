"""The contract of a backend: logits of any size. Their maximum is taken off before the product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from contract.closeness import check_gradient, true_gradient, true_rows
from contract.subject import INF, Subject
from em_kernels.backends.interface import RowSpec, Upstream, accumulate_dtype

# z of most of them lies outside of float32; c (u - max u) does not where it matters.
TRANSFORMS = {
    "hot": dict(temperature=0.5),
    "rounded": dict(temperature=0.7),
    "cold": dict(temperature=1e34),
    "scaled": dict(logit_scale=2.0),
    "negative": dict(logit_scale=-3.0, temperature=0.7),
    "rows": dict(temperature_rows=True),
    "capped": dict(softcap=30.0, temperature=0.7),
    "biased": dict(bias=True, temperature=0.5),
}
MOMENTS = ("logit_var", "logit_skew")
TO_ONE = ("self_certainty", "logit_skew", "entropy_slope", "log1p_r", "mean_d")  # or absolute
SMALL = 1e-5  # relative, of an entropy of 1e-10 too, whose d is rounded to 23 * 2^-23


def rows_of_any_size(vocab: int, dtype: torch.dtype, options: dict) -> Tensor:
    """(1, 14, vocab): at either end of the dtype's range, and both in one row."""
    cold, scale = options.get("temperature", 1) > 1, options.get("logit_scale", 1)
    kind = torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype)
    most = (0.45 if cold else 0.9) * kind.max  # differences of more are infinite
    normal, place = torch.randn(vocab, dtype=torch.float64), torch.arange(vocab).double()
    x = torch.zeros(14, vocab, dtype=torch.float64)
    x[0] = most
    x[1], x[1, vocab // 2] = 1, most
    x[2] = most * (place % 2 * 2 - 1)
    x[3] = normal.clamp(-4, 4) * (most / 5)
    x[4], x[4, ::7] = -most, most
    x[5], x[5, ::3] = most, -INF * scale
    x[6], x[6, 1] = normal, -most
    x[7], x[7, vocab - 1] = normal, kind.max**0.52
    x[8] = normal if "bias" in options else 1e6 + normal
    x[9] = most * (1 - 4 * kind.eps * place)
    x[10] = normal * kind.tiny / 500
    x[11] = normal * kind.max**0.52
    x[12], x[12, :2] = -most, -most * (0.25 + place[:2] / 4)
    x[13] = normal * 1e-3
    return x.to(dtype)[None]


def spec_of(options: dict, subject: Subject, vocab: int, rows: int, wide: torch.dtype) -> RowSpec:
    options = dict(options)
    if options.pop("bias", False):
        options["bias"] = torch.randn(vocab).to(wide)
    if options.pop("temperature_rows", False):
        options["temperature_rows"] = torch.logspace(-1, 1, rows).to(wide)
    target = torch.arange(rows) % vocab
    return subject.place(RowSpec(target=target, valid_vocab=vocab, **options))


def sizes_of(want: dict) -> dict:
    """The terms of which results are differences."""
    lse = want["lse"].abs() + want["logit_mean"].abs()
    return {"lse": lse, "logit_mean": lse, "varentropy": want["mean_d"] ** 2}


def check(got: Tensor, want: Tensor, name: str, sizes: dict) -> None:
    """Infinite where no float of the dtype holds the truth."""
    kind, got, want = torch.finfo(got.dtype), got.double().cpu(), want.double().cpu()
    want = torch.where(want.abs() > kind.max, want.sign() * INF, want)
    assert torch.equal(got.isfinite(), want.isfinite()), f"{name}: {got.tolist()}"
    assert torch.equal(got[~want.isfinite()], want[~want.isfinite()]), name
    scale = sizes.get(name, torch.full_like(want, name in TO_ONE)).double().cpu()
    limit = 1e-3 if name in MOMENTS else SMALL
    if name == "self_certainty" and kind.bits == 64:
        limit = 1e-2  # a mean of logits that are a few eps apart is rounded to their eps
    excess = (got - want).abs() - limit * torch.maximum(want.abs(), scale) - kind.tiny
    assert (excess[want.isfinite()] <= 0).all(), f"{name}: {got.tolist()} for {want.tolist()}"


class Sizes:
    @pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
    def test_logits_of_any_size(self, subject, dtype, options):
        if dtype == torch.float16:
            pytest.skip("no z of it is too large")
        wide = accumulate_dtype(dtype)
        for vocab in (40, self.LONG) if dtype == torch.float32 else (40,):
            x = rows_of_any_size(vocab, dtype, options).to(subject.device)
            if dtype == torch.bfloat16 and not subject.denormal16:
                x[0, 10] = 0
            rows = x.shape[1]
            spec = spec_of(options, subject, vocab, rows, wide)
            upstream = subject.place(Upstream(*(torch.randn(rows).to(wide) for _ in range(3))))
            want, (some, out) = true_rows(x, spec), subject.loss(x, spec, upstream)
            sizes = sizes_of(want)
            for got in (subject.stats(x, spec), some):
                for name, row in got.items():
                    check(row, want[name], name, sizes)
            truth = true_gradient(x, spec, upstream)
            limit = subject.bfloat16 if dtype == torch.bfloat16 else SMALL
            for gradient in (out, subject.grad(x, spec, upstream)):
                check_gradient(gradient, truth, limit)
