"""The definition: every statistic and gradient of a row of logits, in plain PyTorch.

Per row, with everything after loading in float32 (float64 inputs stay float64):

    z   = softcap(logit_scale * x + bias) / T        softcap(y) = s * tanh(y / s)
        = c u                                        u and c as `units` has them
    m   = max_v u_v        a = first argmax          d_v = c (u_v - m)
    r   = sum_{v != a} exp(d_v)                      q = sum_{v != a} exp(d_v) d_v
    lse = c m + log1p(r)                             E = q / (1 + r)
    entropy H = log1p(r) - E                         logprob_y = d_y - log1p(r)
    dH/dz_v = p_v (E - d_v)    dlogprob_y/dz_v = 1[v=y] - p_v    dlse/dz_v = p_v

The maximum is taken off before the one product: finite logits whose z no float holds have the
softmax that they have, and d is 0 at the maximum whatever T.

Leaving the maximum out of `r` keeps relative accuracy when the model is nearly certain: at
H = 1e-9 the textbook `lse - sum_v p_v z_v` has no correct digit left in float32.

A -inf logit has probability 0 and adds 0 to every sum; a row holding NaN or +inf, or no finite
logit, is NaN in all its outputs; a row that is masked is exactly 0 in all of them. What a sampler
left out (`truncation`) has u = -inf, and all that follows from it; the logprob of a target that is
left out is -inf, a constant.

`stats` is differentiable by autograd (that is how the closed forms in `grad` are tested); `stats`,
`grad` and `loss` together are what every other backend provides too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from em_kernels.backends.interface import (
    NEEDS_LOGIT_MOMENTS,
    NEEDS_SECOND_ORDER,
    PADDING,
    Backend,
    RowSpec,
    Saved,
    Upstream,
    has_ids,
    where_rows,
)
from em_kernels.backends.moments import moments
from em_kernels.backends.specs import as_ids, has_support, select_rows
from em_kernels.backends.truncation import Border, Limits, find_border, is_in_set, is_outside
from em_kernels.backends.units import column, distance, inverse_temperature, is_good, slope, units

_BLOCK_ENTRIES = 1 << 22  # of the copies of rows that `above` makes


def transform(logits: Tensor, spec: RowSpec) -> Tensor:
    """z = softcap(logit_scale * x + bias) / T over the valid vocabulary: (N, valid_vocab)."""
    u = units(logits, spec)
    return u * column(inverse_temperature(spec, u.dtype))


def kept(u: Tensor, spec: RowSpec) -> Tensor:
    """u, -inf outside of what a sampler kept."""
    if spec.kept_rows is not None and spec.kept_ids is not None:
        return u.masked_fill(~is_in_set(u.detach(), spec.kept_ids, spec.kept_rows), -math.inf)
    if spec.border is not None:
        level, first, _ = spec.border.unbind(-1)
        return u.masked_fill(is_outside(u.detach(), Border(level.to(u.dtype), first)), -math.inf)
    if spec.truncation is None:
        return u
    border = find_border(u, spec.truncation, spec.min_p_first, inverse_temperature(spec, u.dtype))
    return u.masked_fill(is_outside(u.detach(), border), -math.inf)


def stats(logits: Tensor, spec: RowSpec, outputs: tuple[str, ...]) -> list[Tensor]:
    """[max, log1p_r, mean_d, *outputs], each (N,); see the module's docstring."""
    whole = units(logits, spec)
    u = kept(whole, spec)
    c = inverse_temperature(spec, u.dtype)
    usable = torch.isfinite(u.detach().amax(-1)) & ~u.detach().isnan().any(-1)
    usable = usable & _good_arguments(spec, c, u.dtype)
    u = torch.where(usable[:, None], u, 0)
    c = torch.where(usable, c, 1) if isinstance(c, Tensor) else c
    argmax = u.argmax(-1, keepdim=True)
    m = u.gather(1, argmax)
    m = m[:, 0]
    away = distance(u, m, c)
    nothing = away.detach().exp() == 0
    d = away.masked_fill(nothing, 0)
    e = d.exp().masked_fill(nothing, 0)
    others = e.scatter(1, argmax, 0)
    r = others.sum(-1)
    log1p_r = torch.log1p(r)
    mean_d = (others * d).sum(-1) / (1 + r)

    values = {"entropy": log1p_r - mean_d, "lse": m * c + log1p_r, "max_prob": 1 / (1 + r)}
    if spec.target is not None:
        away = away.masked_fill(u == -math.inf, -math.inf)
        values.update(_of_ids(spec, away, log1p_r, argmax))
    if "kept_mass" in outputs:
        whole = torch.where(usable[:, None], whole.detach(), 0)
        values["kept_mass"] = _kept_mass(whole, m, c, log1p_r)
    if NEEDS_SECOND_ORDER.intersection(outputs):
        values.update(_second_order(e / (1 + r)[:, None], d, log1p_r, mean_d, values))
    if NEEDS_LOGIT_MOMENTS.intersection(outputs):
        values.update(_logit_moments(u, m, c, log1p_r))

    rows = [m, log1p_r, mean_d, *(values[name] for name in outputs)]
    return [_apply_row_rules(row, usable, spec.mask) for row in rows]


def _of_ids(spec: RowSpec, d: Tensor, log1p_r: Tensor, argmax: Tensor) -> dict[str, Tensor]:
    """logprob_y = d_y - log1p(r) of one target a row or of K ids, of which one that is out of range
    is NaN by itself, and padding 0."""
    assert spec.target is not None
    ids = as_ids(spec.target)
    safe = _safe_target(ids, spec)
    logprob, is_top1 = d.gather(1, safe) - log1p_r[:, None], (safe == argmax).to(d.dtype)
    if has_support(spec):
        logprob = torch.where(logprob == -math.inf, -math.inf, logprob)
    is_kept = (logprob > -math.inf).to(d.dtype)
    if not has_ids(spec):
        return {"logprob": logprob[:, 0], "is_top1": is_top1[:, 0], "is_kept": is_kept[:, 0]}
    logprob = torch.where(_in_range(ids, spec), logprob, math.nan)
    values = {"logprob": logprob, "is_top1": is_top1}
    return {name: torch.where(ids == PADDING, 0, value) for name, value in values.items()}


def _kept_mass(whole: Tensor, m: Tensor, c: float | Tensor, log1p_r: Tensor) -> Tensor:
    """1 + r of what is kept over that of the whole row."""
    top = whole.amax(-1)
    total = distance(whole, top, c).exp().sum(-1)
    return ((m - top) * c + log1p_r).exp() / total


def _second_order(
    p: Tensor, d: Tensor, log1p_r: Tensor, mean_d: Tensor, values: dict[str, Tensor]
) -> dict[str, Tensor]:
    """varentropy = sum p l^2 - H^2; collision = sum p^2; entropy_slope (see `softmax_stats`)."""
    away = d - mean_d[:, None]
    collision = (p * p).sum(-1)
    out = {"varentropy": (p * away * away).sum(-1), "collision": collision}
    if "logprob" in values and values["logprob"].dim() == 1:
        logprob, entropy = values["logprob"], values["entropy"]
        p_target = logprob.exp()
        own = torch.where(p_target > 0, p_target * (logprob + entropy), 0)
        mean_square = (p * p * (d - log1p_r[:, None])).sum(-1)
        out["entropy_slope"] = -(own - (mean_square + entropy * collision))
    return out


def _logit_moments(u: Tensor, m: Tensor, c: float | Tensor, log1p_r: Tensor) -> dict[str, Tensor]:
    """Population mean, variance and skewness of the finite logits, and KL(uniform || p)."""
    found = moments(u, m)
    return {
        "logit_mean": found.mean_units(m) * c,
        "logit_var": found.in_units(found.root, c) ** 2,
        "logit_skew": found.skew,
        "self_certainty": log1p_r - found.in_units(found.mean, c) - found.number.log(),
    }


def grad(logits: Tensor, spec: RowSpec, saved: Saved, upstream: Upstream, out: Tensor) -> None:
    """Write d loss / d logits into `out`, which has the shape of `logits` and may be their memory.

    `out` may be narrower than `logits`; row i of both may then begin at the same byte.
    """
    u = kept(units(logits, spec), spec)
    d = distance(u, saved.max, inverse_temperature(spec, u.dtype))
    p = (d - saved.log1p_r[:, None]).exp()
    gz = torch.zeros_like(u)
    if upstream.entropy is not None:
        away = (saved.mean_d[:, None] - d).masked_fill(p == 0, 0)
        gz += upstream.entropy[:, None] * p * away
    if upstream.lse is not None:
        gz += upstream.lse[:, None] * p
    if upstream.logprob is not None and spec.target is not None:
        target = _safe_target(spec.target, spec)
        g = _kept_logprob(upstream.logprob, u == -math.inf, target, spec)
        gz += g[:, None] * _logprob_grad(p, d, target, saved)
    gx = gz * slope(u, spec)
    # 0 * NaN would leak a masked row's NaN, and exp() forgets that a saved maximum was NaN.
    gx = torch.where(saved.max.isnan()[:, None], math.nan, gx)
    if spec.mask is not None:
        gx = torch.where(spec.mask[:, None], gx, 0)
    full = torch.zeros(gx.shape[0], logits.shape[-1], dtype=gx.dtype, device=gx.device)
    full[:, : spec.valid_vocab] = gx
    out.copy_(full.view(out.shape))


def loss(
    logits: Tensor, spec: RowSpec, upstream: Upstream, outputs: tuple[str, ...], out: Tensor
) -> list[Tensor]:
    """`stats`, then `grad` of the loss whose per-row weights are `upstream`, into `out`."""
    rows = stats(logits, spec, outputs)
    grad(logits, spec, Saved(*rows[:3]), upstream, out)
    return rows


def _logprob_grad(p: Tensor, d: Tensor, target: Tensor, saved: Saved) -> Tensor:
    """1[v=y] - p_v, with 1 - p_y taken as -expm1(log p_y): exact as p_y -> 1."""
    own = target[:, None]
    log_p = d.gather(1, own) - saved.log1p_r[:, None]
    return (-p).scatter(1, own, -torch.expm1(log_p))


def _kept_logprob(g: Tensor, excluded: Tensor, target: Tensor, spec: RowSpec) -> Tensor:
    """The upstream gradient of logprob, 0 where a sampler left the target out."""
    if not has_support(spec):
        return g
    return g.masked_fill(excluded.gather(1, target[:, None])[:, 0], 0)


def _safe_target(target: Tensor, spec: RowSpec) -> Tensor:
    """Targets out of range, as those of rows that are not computed may be, read index 0."""
    return torch.where(_in_range(target, spec), target, 0)


def _in_range(target: Tensor, spec: RowSpec) -> Tensor:
    return (target >= 0) & (target < spec.valid_vocab)


def _good_arguments(spec: RowSpec, c: float | Tensor, dtype: torch.dtype) -> Tensor | bool:
    """False in rows of a target out of range, or a temperature that leaves no c."""
    good = is_good(c, dtype)
    if spec.target is not None and not has_ids(spec):
        good = good & _in_range(spec.target, spec)
    if spec.truncation is not None:
        good = good & Limits.of(spec.truncation).good()
    return good


def _apply_row_rules(row: Tensor, usable: Tensor, mask: Tensor | None) -> Tensor:
    row = torch.where(usable.view(-1, *[1] * (row.dim() - 1)), row, math.nan)
    return row if mask is None else where_rows(mask, row)


def above(
    logits: Tensor, spec: RowSpec, levels: Tensor, top: Tensor | None, ids: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """As `Backend.above`; some rows at a time, to bound the copies."""
    rows, (inner, vocab) = len(levels), logits.shape[1:]
    counts = torch.zeros_like(levels, dtype=torch.int64)
    sums = None if top is None else torch.zeros_like(levels, dtype=torch.float64)
    step = max(1, _BLOCK_ENTRIES // max(1, vocab))
    for part in (slice(begin, begin + step) for begin in range(0, rows, step)):
        at = torch.arange(rows, device=logits.device)[part]
        picked = select_rows(spec, part)
        u = units(logits[at // inner, at % inner], picked)
        e = None if top is None else _mass(u, top[part], picked)
        for k, level in enumerate(levels[part].unbind(1)):
            found = _is_above(u, level[:, None], None if ids is None else ids[part, k, None])
            if spec.mask is not None:
                found &= spec.mask[part, None]
            counts[part, k] = found.sum(-1)
            if sums is not None and e is not None:
                sums[part, k] = torch.where(found, e, 0).sum(-1)
    return counts, sums


def _mass(u: Tensor, top: Tensor, spec: RowSpec) -> Tensor:
    return distance(u.double(), top.double(), inverse_temperature(spec, u.dtype)).exp()


def _is_above(u: Tensor, level: Tensor, before: Tensor | None) -> Tensor:
    if before is None:
        return u > level
    return (u > level) | ((u == level) & (torch.arange(u.shape[-1], device=u.device) < before))


class Reference(Backend):
    """The functions above, for any device."""

    name = "reference"
    narrows = True
    counts = True

    def stats(self, logits: Tensor, spec: RowSpec, outputs: tuple[str, ...]) -> list[Tensor]:
        return stats(logits, spec, outputs)

    def grad(
        self, logits: Tensor, spec: RowSpec, saved: Saved, upstream: Upstream, out: Tensor
    ) -> None:
        grad(logits, spec, saved, upstream, out)

    def loss(
        self,
        logits: Tensor,
        spec: RowSpec,
        upstream: Upstream,
        outputs: tuple[str, ...],
        out: Tensor,
    ) -> list[Tensor]:
        return loss(logits, spec, upstream, outputs, out)

    def above(
        self,
        logits: Tensor,
        spec: RowSpec,
        levels: Tensor,
        top: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        return above(logits, spec, levels, top, ids)
