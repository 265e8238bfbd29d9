"""The definition of the divergences of two softmax rows, in plain PyTorch, and who makes them.

With z and w the logits of the two rows as `reference` has them, p = softmax(z), q = softmax(w), and
m = b q + (1 - b) p their mixture:

    forward KL  KL(q || p)    m = p, b = 0
    reverse KL  KL(p || q)    m = q, b = 1
    JS          b KL(q || m) + (1 - b) KL(p || m)

The terms of sum p (log p - log q) have both signs, and where the rows are nearly alike their sum
has no correct digit left. Since sum p = sum q = sum m = 1,

    KL(p || m) = sum_v p_v (e^-u - 1 + u)       u_v = log(p_v / m_v)

has terms that are all >= 0, and so KL(q || m). With z = c u and w = c' y in the units of either row
(`units`), m and m' their maxima,

    delta_v = log(p_v / q_v) = c (u_v - m) - c' (y_v - m') - gap      gap = log1p(r_z) - log1p(r_w)
                             = 2 c ((u_v / 2 - y_v / 2) - (m / 2 - m' / 2)) - gap

of which the second is nearly exact where the rows are alike, so it is taken where c = c' and
c |m - m'| <= 1; rows further apart would lose the lesser of u_v and y_v in it. Then

    log(p / m) = -log1p(b expm1(-delta)) = log(q / m) + delta        log(q / m) likewise

of which the one with the greater of p and q is taken, and the other from it.
An error e of the gap adds e^2 / 2 to a KL of b 0 or 1, but e p_v to a gradient of
the size of p_v delta_v. It is found by sum p expm1(-delta) = sum q - sum p = expm1(-e), whose terms
are small where delta is, and taken off the gap.

    forward KL  dz: p - q = -p expm1(-delta)           dw: q (log(q / p) - KL(q || p))
    reverse KL  dz: p (log(p / q) - KL(p || q))        dw: q - p
    JS          dz: (1 - b) p (log(p / m) - KL(p || m))    dw: b q (log(q / m) - KL(q || m))

An entry with p = 0 adds q to KL(p || q); one with q = 0 < p makes it infinite, and the gradients in
which it stands, all but q - p, are 0 then. Rows that are NaN or masked are so as in `reference`.

Sources: Kullback and Leibler (1951); Lin, "Divergence measures based on the Shannon entropy"
(1991); Agarwal et al., "On-Policy Distillation of Language Models" (2024), arXiv:2306.13649, for
the JS with b.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels.backends import reference
from em_kernels.backends.choice import serving
from em_kernels.backends.interface import Backend, RowSpec, Saved
from em_kernels.backends.pair import Divergence, PairOut, PairSaved, PairWeights, Side
from em_kernels.backends.specs import select_rows
from em_kernels.backends.units import column, distance, inverse_temperature, slope, units

_BLOCK_ENTRIES = 1 << 20  # of each of the copies that the definition makes
_NEAR = 0.5  # |u| below which e^-u - 1 + u is a series
_TERMS = 15  # of it, to the digits of float64


def stats(
    backend: Backend,
    own: Side,
    other: Side,
    divergence: Divergence,
    outputs: tuple[str, ...] = (),
    other_outputs: tuple[str, ...] = (),
) -> list[Tensor]:
    """[*`PairSaved`, *outputs of the first row, *outputs of the other], each (N,)."""
    nothing = PairWeights(None, None), PairOut(None, None)
    rows = backend.divergence_loss(own, other, divergence, *nothing, outputs, other_outputs)
    if rows is not None:
        return rows
    mine = backend.stats(own.logits, own.spec, outputs)
    theirs = backend.stats(other.logits, other.spec, other_outputs)
    rough = _rough(Saved(*mine[:3]), Saved(*theirs[:3]))
    found = sums(backend, own, other, rough, divergence)
    saved = _settled(rough, found, divergence, own.spec)
    return [*saved, *mine[3:], *theirs[3:]]


def grad(
    backend: Backend,
    own: Side,
    other: Side,
    saved: PairSaved,
    divergence: Divergence,
    weights: PairWeights,
    out: PairOut,
) -> None:
    """Write the gradient of sum_i weight_i D_i in either row's logits where `weights` has any.

    Entries from `valid_vocab` on get 0.
    """
    for able in _able(backend, own.logits):
        if able.divergence_grad(own, other, saved, divergence, weights, out):
            return
    define_grad(own, other, saved, divergence, weights, out)


def loss(
    backend: Backend,
    own: Side,
    other: Side,
    divergence: Divergence,
    weights: PairWeights,
    out: PairOut,
    outputs: tuple[str, ...] = (),
    other_outputs: tuple[str, ...] = (),
) -> list[Tensor]:
    """`stats`, then `grad`."""
    rows = backend.divergence_loss(own, other, divergence, weights, out, outputs, other_outputs)
    if rows is None:
        rows = stats(backend, own, other, divergence, outputs, other_outputs)
        saved = PairSaved(*rows[: len(PairSaved._fields)])
        grad(backend, own, other, saved, divergence, weights, out)
    return rows


def _able(backend: Backend, logits: Tensor) -> tuple[Backend, ...]:
    """The backend, and on a GPU those that may have what it has not."""
    return (backend, *(serving(logits.device) if logits.device.type != "cpu" else ()))


def sums(
    backend: Backend, own: Side, other: Side, saved: PairSaved, divergence: Divergence
) -> Tensor:
    """`define_sums`, by whoever can."""
    for able in _able(backend, own.logits):
        if (found := able.divergence_sums(own, other, saved, divergence)) is not None:
            return found
    return define_sums(own, other, saved, divergence)


def _rough(own: Saved, other: Saved) -> PairSaved:
    gap = own.log1p_r - other.log1p_r
    return PairSaved(own.max, own.log1p_r, other.max, other.log1p_r, gap, gap, gap)


def _settled(saved: PairSaved, found: Tensor, divergence: Divergence, spec: RowSpec) -> PairSaved:
    """With the gap corrected, and its error taken off the sums."""
    own, other, rest = found.to(torch.float64)
    error = -torch.log1p(rest)
    excess, mixed = error * error / 2, divergence.mixed
    gap = saved.gap + error
    own = (own - mixed**2 * excess).clamp(min=0)
    other = (other - (1 - mixed) ** 2 * excess).clamp(min=0)
    bad = saved.max.isnan() | saved.other_max.isnan()
    dtype, rows = saved.gap.dtype, []
    for row in (gap, own, other):
        row = row.masked_fill(bad, math.nan)
        rows.append((row if spec.mask is None else row.masked_fill(~spec.mask, 0)).to(dtype))
    return saved._replace(gap=rows[0], own_kl=rows[1], other_kl=rows[2])


class _Entries(NamedTuple):
    """Of some pairs of rows, (N, valid_vocab) each."""

    u: Tensor
    y: Tensor
    p: Tensor
    q: Tensor
    delta: Tensor  # infinite where one of p and q is 0, and 0 where both are

    @classmethod
    def of(cls, own: Side, other: Side, saved: PairSaved) -> _Entries:
        u, y = (units(*side) for side in (own, other))
        c, other_c = (inverse_temperature(side.spec, u.dtype) for side in (own, other))
        d, other_d = distance(u, saved.max, c), distance(y, saved.other_max, other_c)
        p = (d - saved.log1p_r[:, None]).exp()
        q = (other_d - saved.other_log1p_r[:, None]).exp()
        lead = saved.max / 2 - saved.other_max / 2
        halves = (u / 2 - y / 2) - lead[:, None]
        same = torch.as_tensor(c == other_c, device=u.device) & ((lead * c).abs() <= 0.5)
        delta = torch.where(same[:, None], halves * column(c) * 2, d - other_d)
        nowhere = ((p == 0) & (q == 0)) | ((u == -math.inf) & (y == -math.inf))
        return cls(u, y, p, q, (delta - saved.gap[:, None]).masked_fill(nowhere, 0))

    def ratios(self, mixed: float) -> tuple[Tensor, Tensor, Tensor]:
        """(m, log(p / m), log(q / m))"""
        delta = self.delta
        if mixed == 0:
            return self.p, torch.zeros_like(delta), -delta
        if mixed == 1:
            return self.q, delta, torch.zeros_like(delta)
        size, first = delta.abs(), delta > 0
        b = torch.full_like(delta, mixed)
        weight = torch.where(first, b, 1 - b)  # of the lesser of p and q in m
        less = weight * torch.expm1(-size)  # m over the greater, less 1
        ratio = torch.where(less < -0.5, 1 - weight + weight * torch.exp(-size), 1)
        greater = -torch.where(less < -0.5, ratio.log(), torch.log1p(less.clamp(min=-0.5)))
        lesser = greater - size
        of_p, of_q = torch.where(first, greater, lesser), torch.where(first, lesser, greater)
        return torch.lerp(self.p, self.q, mixed), of_p, of_q

    def difference(self) -> Tensor:
        """q - p."""
        near = self.delta.abs() < _NEAR
        safe = self.delta.masked_fill(~near, 0)
        return torch.where(near, self.p * torch.expm1(-safe), self.q - self.p)


def _excess(p: Tensor, m: Tensor, u: Tensor) -> Tensor:
    """p (e^-u - 1 + u), with m = p e^-u."""
    near = u.abs() < _NEAR
    x = u.masked_fill(~near, 0)
    series = torch.full_like(x, 1 / math.factorial(_TERMS))
    for k in range(_TERMS - 1, 1, -1):
        series = 1 / math.factorial(k) - x * series
    far = u.masked_fill(near | (p == 0), 0)
    return torch.where(near, p * x * x * series, torch.where(p > 0, p * (far - 1), 0) + m)


def _kls(entries: _Entries, mixed: float) -> tuple[Tensor, Tensor]:
    """(KL(p || m), KL(q || m))"""
    m, of_p, of_q = entries.ratios(mixed)
    own = _excess(entries.p, m, of_p) if mixed > 0 else entries.p * 0
    other = _excess(entries.q, m, of_q) if mixed < 1 else entries.q * 0
    return own.sum(-1), other.sum(-1)


def define_sums(own: Side, other: Side, saved: PairSaved, divergence: Divergence) -> Tensor:
    """[sum p (e^-u - 1 + u) over m, the same of q, sum q - sum p], (3, N), of the entries here."""
    count = own.logits.shape[:-1].numel()
    total = torch.zeros(3, count, dtype=saved.gap.dtype, device=own.logits.device)
    for rows, mine, theirs, known in _blocks(own, other, saved):
        entries = _Entries.of(mine, theirs, known)
        total[:2, rows] = torch.stack(_kls(entries, divergence.mixed))
        total[2, rows] = entries.difference().sum(-1)
    return total if own.spec.mask is None else total.masked_fill(~own.spec.mask, 0)


def define_grad(
    own: Side,
    other: Side,
    saved: PairSaved,
    divergence: Divergence,
    weights: PairWeights,
    out: PairOut,
) -> None:
    """`grad` by the definition."""
    inner = own.logits.shape[1]
    for rows, mine, theirs, known in _blocks(own, other, saved):
        entries = _Entries.of(mine, theirs, known)
        found = _gradients(entries, known, divergence)
        bad = known.max.isnan() | known.other_max.isnan()
        sides = zip(found, (mine, theirs), (entries.u, entries.y), weights, out, strict=True)
        for gradient, side, u, weight, place in sides:
            if weight is None or place is None:
                continue
            g = gradient * weight[rows, None]
            g = g * slope(u, side.spec)
            g = g.masked_fill(bad[:, None], math.nan)
            if side.spec.mask is not None:
                g = g.masked_fill(~side.spec.mask[:, None], 0)
            full = g.new_zeros(g.shape[0], place.shape[-1])
            full[:, : side.spec.valid_vocab] = g
            place[rows // inner, rows % inner] = full.to(place.dtype)


def _gradients(
    entries: _Entries, saved: PairSaved, divergence: Divergence
) -> tuple[Tensor, Tensor]:
    """In z and in w."""
    (of_own, of_other), kind = divergence.weights, divergence.kind
    _, of_p, of_q = entries.ratios(divergence.mixed)
    if kind == "forward_kl":
        return -entries.difference(), _towards(entries.q, of_q, saved.other_kl)
    if kind == "reverse_kl":
        return _towards(entries.p, of_p, saved.own_kl), entries.difference()
    own = of_own * _towards(entries.p, of_p, saved.own_kl)
    return own, of_other * _towards(entries.q, of_q, saved.other_kl)


def _towards(p: Tensor, u: Tensor, kl: Tensor) -> Tensor:
    """p (u - kl): 0 where p is, and where the KL is infinite."""
    nothing = (p == 0) | (kl == math.inf)[:, None]
    return torch.where(nothing, 0, p * (u - kl[:, None]).masked_fill(nothing, 0))


def _blocks(
    own: Side, other: Side, saved: PairSaved
) -> Iterator[tuple[Tensor, Side, Side, PairSaved]]:
    """(row numbers, both sides of them, copied, and what is known of them)."""
    _, inner, vocab = own.logits.shape
    count = own.logits.shape[:-1].numel()
    every = torch.arange(count, device=own.logits.device)
    for rows in every.split(max(1, _BLOCK_ENTRIES // max(1, vocab))):
        sides = (
            Side(side.logits[rows // inner, rows % inner], select_rows(side.spec, rows))
            for side in (own, other)
        )
        yield rows, *sides, PairSaved(*(row[rows] for row in saved))


def values(own: Side, other: Side, divergence: Divergence) -> Tensor:
    """The divergence of each pair of rows, (N,), differentiable any number of times."""
    mine, theirs = (Saved(*reference.stats(*side, ())) for side in (own, other))
    saved = _rough(mine, theirs)
    of_p, of_q = _kls(_Entries.of(own, other, saved), divergence.mixed)
    value = saved._replace(own_kl=of_p, other_kl=of_q).value(divergence)
    value = value.masked_fill(mine.max.isnan() | theirs.max.isnan(), math.nan)
    return value if own.spec.mask is None else value.masked_fill(~own.spec.mask, 0)
