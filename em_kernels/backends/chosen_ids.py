"""Chosen ids of a row: their log-probabilities, their ranks, and the gradient, around any backend.

With u and c of the row kernels, m = max u, d_k = c (u_{id_k} - m) and l_k = d_k - log1p(r), which
is exact to rounding in relative terms where one id has nearly all the mass (d = 0, l = -log1p(r)):

    logprob_k = l_k        rank_k = |{v: u_v > u_k}|
    is_top1_k = (no v has u_v > u_k, or u_v = u_k with v < id_k)

For upstream gradients g_k, G_y = sum of g_k over id_k = y (an id may be there twice), and those of
the entropy and of lse, g_H and g_lse,

    dL/dz_v = [v chosen] G_v - p_v sum_k g_k + g_H p_v (E - d_v) + g_lse p_v
            = G_y (1 - p_y) - p_y (sum_k g_k - G_y) + ...          at a chosen y, 1 - p_y by expm1

So the backend makes the gradient in which lse has g_lse - sum_k g_k, and the entries at the ids are
written over, repeated ids with the same number: nothing is added atomically.

The logits of the ids are read from the rows that are in memory, whichever product made them: a
product of the ids' rows of a weight alone would have other bits than that of all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from em_kernels.backends.above import above, counting
from em_kernels.backends.around import Around
from em_kernels.backends.interface import (
    OF_IDS,
    PADDING,
    Backend,
    RowSpec,
    Saved,
    Upstream,
    accumulate_dtype,
    has_ids,
    where_rows,
)
from em_kernels.backends.specs import as_ids, spec_of_slice, upstream_of_slice
from em_kernels.backends.units import distance, inverse_temperature


class ChosenIds(Around):
    """A backend that also makes `rank`, and takes a target of (N, K), around another.

    A row is left out by `mask` alone. An id that is PADDING has logprob 0, rank 0, is not the first
    and brings no gradient; one that is out of range, where that is not refused, is NaN by itself.
    """

    @property
    def local(self) -> Backend:
        return self if self._inner.local is self._inner else ChosenIds(self._inner.local)

    def stats(self, logits: Tensor, spec: RowSpec, outputs: tuple[str, ...]) -> list[Tensor]:
        target = _first_id(spec)
        left = OF_IDS if target is None else {"rank"}
        own = tuple(name for name in outputs if name not in left)
        made = self._inner.stats(logits, spec._replace(target=target), own)
        rows = dict(zip((*Saved._fields, *own), made, strict=True))
        if target is not None and spec.target is not None and has_ids(spec):
            nan = (rows["max"] - rows["max"])[:, None]  # or 0
            for name in OF_IDS.intersection(own):
                rows[name] = torch.where(spec.target == PADDING, nan, rows[name][:, None])
        rows |= self._of_ids(logits, spec, set(outputs).difference(own), rows)
        return [rows[name] for name in (*Saved._fields, *outputs)]

    def grad(
        self, logits: Tensor, spec: RowSpec, saved: Saved, upstream: Upstream, out: Tensor
    ) -> None:
        target, given = _first_id(spec), upstream.logprob
        if given is not None and spec.target is not None and has_ids(spec):
            given = torch.where(spec.target == PADDING, 0, given)
            upstream = upstream._replace(logprob=given if target is None else given[:, 0])
        if given is None or target is not None:
            self._inner.grad(logits, spec._replace(target=target), saved, upstream, out)
        elif spec.valid_vocab == 0:
            out.zero_()
        elif self.local is not self:
            size = spec.valid_vocab
            upstream = upstream_of_slice(spec, upstream, self.first_entry, size)
            self.local.grad(
                logits, spec_of_slice(spec, self.first_entry, size), saved, upstream, out
            )
        else:
            self._grad_of_ids(logits, spec, saved, upstream, out)

    def _of_ids(
        self, logits: Tensor, spec: RowSpec, names: set[str], rows: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the inner backend has not made, of the shape of the target."""
        if not names or spec.target is None:
            return {}
        ids = as_ids(spec.target)
        values, own = {}, self._inner.local
        able = counting(own, logits.device)
        u = _u_at(own, self._inner, logits, spec, ids) if "logprob" in names else None
        if u is not None:
            d = _away(u, rows["max"], spec)
            values["logprob"] = (d - rows["log1p_r"][:, None].double()).to(u.dtype)
        if names != {"logprob"}:
            level = u if able is own else None
            level = _u_at(able, self._inner, logits, spec, ids) if level is None else level
            values |= self._places(logits, spec, level, names)
        nan = (rows["max"] - rows["max"])[:, None]  # or 0
        shaped = {}
        for name, value in values.items():
            value = torch.where(ids == PADDING, 0, value) + nan
            value = value if spec.mask is None else where_rows(spec.mask, value)
            shaped[name] = value.view(spec.target.shape)
        return shaped

    def _places(
        self, logits: Tensor, spec: RowSpec, level: Tensor, names: set[str]
    ) -> dict[str, Tensor]:
        """`rank` and `is_top1`, NaN where an id is out of range."""
        assert spec.target is not None
        ids, plain, values = as_ids(spec.target), spec._replace(target=None), {}
        if "rank" in names:
            values["rank"] = above(self._inner, logits, plain, level)[0].to(level.dtype)
        if "is_top1" in names:
            before, _ = above(self._inner, logits, plain, level, ids=ids)
            values["is_top1"] = (before == 0).to(level.dtype)
        return {name: value.masked_fill(level.isnan(), torch.nan) for name, value in values.items()}

    def _grad_of_ids(
        self, logits: Tensor, spec: RowSpec, saved: Saved, upstream: Upstream, out: Tensor
    ) -> None:
        assert spec.target is not None and upstream.logprob is not None
        given = upstream.logprob.double()
        inside = (spec.target >= 0) & (spec.target < spec.valid_vocab)
        ids = torch.where(inside, spec.target, 0)
        x = _x_at(logits, ids)  # `out` may be the logits
        same, others = _same_and_others(ids, torch.where(inside, given, 0))
        plain = spec._replace(target=None)
        lse = -given.sum(1)
        total = lse if upstream.lse is None else upstream.lse.double() + lse
        wide = accumulate_dtype(logits.dtype)
        self._inner.grad(
            logits, plain, saved, upstream._replace(logprob=None, lse=total.to(wide)), out
        )
        u, slope = _entries(self._inner, x, plain, ids)
        d = _away(u, saved.max, spec)
        log_p = d - saved.log1p_r[:, None].double()
        p = log_p.exp()
        own = -same * torch.expm1(log_p)
        rest = -others
        if upstream.lse is not None:
            rest = rest + upstream.lse[:, None].double()
        if upstream.entropy is not None:
            away = saved.mean_d[:, None].double() - d
            rest = rest + upstream.entropy[:, None].double() * away
        value = (own + torch.where(p == 0, 0, p * rest)) * slope
        if spec.mask is not None:
            value = where_rows(spec.mask, value)
        inner = logits.shape[1]
        row = torch.arange(len(ids), device=ids.device)[:, None]
        out[row // inner, row % inner, ids] = value.to(out.dtype)


def _first_id(spec: RowSpec) -> Tensor | None:
    """The target as kernels take it, where there is one id; any entry in the place of padding."""
    if spec.target is None or not has_ids(spec):
        return spec.target
    if spec.target.shape[1] > 1:
        return None
    return torch.where(spec.target == PADDING, 0, spec.target)[:, 0]


def _same_and_others(ids: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """Of each id, the sum of what is given to its equals in the row, and to all others; (N, K)."""
    same, others = torch.zeros_like(given), torch.zeros_like(given)
    for id_j, given_j in zip(ids.split(1, 1), given.split(1, 1)):
        equal = ids == id_j
        same += torch.where(equal, given_j, 0)
        others += torch.where(equal, 0, given_j)
    return same, others


def _away(u: Tensor, top: Tensor, spec: RowSpec) -> Tensor:
    """d of entries (N, K), float64."""
    return distance(u.double(), top.double(), inverse_temperature(spec, u.dtype))


def _u_at(able: Backend, whole: Backend, logits: Tensor, spec: RowSpec, ids: Tensor) -> Tensor:
    """u at ids (N, K) as `able` has it, of the rows of `whole`; NaN where no entry is."""
    own = ids - whole.first_entry
    here = (own >= 0) & (own < spec.valid_vocab)
    u = torch.zeros(ids.shape, dtype=accumulate_dtype(logits.dtype), device=logits.device)
    if spec.valid_vocab:
        u = torch.where(here, u_of_entries(able, logits, spec, torch.where(here, own, 0)), 0)
    both = whole.total(torch.stack([u, here.to(u.dtype)]))
    return both[0].masked_fill(both[1] == 0, torch.nan)


def u_of_entries(backend: Backend, logits: Tensor, spec: RowSpec, ids: Tensor) -> Tensor:
    """u at ids (N, K), with the very bits of a backend's kernels; -inf where there is none, and
    where it is NaN or +inf."""
    return _entries(backend, _x_at(logits, ids), spec, ids, slopes=False)[0]


def _x_at(logits: Tensor, ids: Tensor) -> Tensor:
    inner = logits.shape[1]
    row = torch.arange(len(ids), device=ids.device)[:, None]
    x = logits[row // inner, row % inner, ids]
    return x.to(accumulate_dtype(x.dtype))


def _entries(
    backend: Backend, x: Tensor, spec: RowSpec, ids: Tensor, slopes: bool = True
) -> tuple[Tensor, Tensor]:
    """u and dz/dx of the logits x (N, K), as of rows of one entry: whose maximum is u, and whose
    gradient of lse is dz/dx where e^d is 1."""
    one, scale = RowSpec(temperature=spec.temperature, softcap=spec.softcap, valid_vocab=1), 1.0
    if spec.bias is None:
        one = one._replace(logit_scale=spec.logit_scale)
    else:  # as the kernels do it, rounded twice
        scale = spec.logit_scale
        x = x * scale + spec.bias[ids].to(x.dtype)
    if spec.temperature_rows is not None:
        one = one._replace(temperature_rows=spec.temperature_rows.repeat_interleave(x.shape[1]))
    rows = x.reshape(1, -1, 1)
    u: Tensor = backend.stats(rows, one, ())[0]
    if not slopes:
        return u.nan_to_num(nan=-torch.inf).view(x.shape), u
    least = torch.finfo(x.dtype).max ** 0.5  # of -inf, and finite over any temperature
    rows = rows.nan_to_num(-least).clamp(min=-least, max=least)
    saved, slope = Saved(*backend.stats(rows, one, ())), torch.empty_like(rows)
    backend.grad(rows, one, saved, Upstream(lse=torch.ones_like(saved.max)), slope)
    return u.nan_to_num(nan=-torch.inf).view(x.shape), slope.view(x.shape).double() * scale
