"""Divergences of two rows, their sums and gradients; `backends.divergence` has the formulas."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from em_kernels.backends.pair import Divergence, PairOut, PairSaved, PairWeights, Side
from em_kernels.backends.triton.elementary import exp, log1p
from em_kernels.backends.triton.launch import (
    UNFUSED,
    Rows,
    View,
    aligned,
    device_of,
    how_of,
    numbers,
    plan,
    warp_size,
)
from em_kernels.backends.triton.logit_moments import INF
from em_kernels.backends.triton.moments import apart_by, near
from em_kernels.backends.triton.reads import load_u, row_constants, row_of

NEAR = tl.constexpr(0.5)  # |u| below which e^-u - 1 + u is a series
FORWARD, REVERSE = tl.constexpr("forward_kl"), tl.constexpr("reverse_kl")


@triton.jit
def excess(x):
    """e^-x - 1 + x for |x| < 1/2."""
    series = x * 0 + 1.0
    for k in tl.static_range(13):
        series = 1 - x * series * (1.0 / (15 - k))
    return 0.5 * x * x * series


@triton.jit
def excess_of(p, m, u):
    """p (e^-u - 1 + u), with m = p e^-u; u may be anything where p is 0."""
    far = tl.where(p == 0, m, p * (u - 1) + m)
    return tl.where(tl.abs(u) < NEAR, p * excess(u), far)


@triton.jit
def towards(p, u, kl):
    """p (u - kl): 0 where p is, and where the KL is infinite."""
    return tl.where(kl < INF, tl.where(p == 0, 0, p * (u - kl)), 0)


@triton.jit
def ratios(p, q, delta, mixed, kind: tl.constexpr):
    """(log(p / m), log(q / m), m, q - p)"""
    near = tl.abs(delta) < NEAR
    if kind == FORWARD:
        other = -delta
        own = delta * 0
        m = p
        apart = -q * (excess(other) - other)
    elif kind == REVERSE:
        own = delta
        other = delta * 0
        m = q
        apart = p * (excess(delta) - delta)
    else:
        size = tl.abs(delta)
        first = delta > 0  # p is the greater
        weight = tl.where(first, mixed, 1 - mixed)
        ratio = exp(-size)
        lost = tl.where(near, excess(size) - size, ratio - 1)
        less = weight * lost
        far = tl.log(1 - weight + weight * ratio)
        greater = -tl.where(less < -0.5, far, log1p(tl.maximum(less, -0.5)))
        lesser = greater - size
        own = tl.where(first, greater, lesser)
        other = tl.where(first, lesser, greater)
        m = mixed * q + (1 - mixed) * p
        apart = tl.where(first, p * lost, -q * lost)
    return own, other, m, tl.where(near, apart, q - p)


@triton.jit
def load_pair(x, y, rows, other_rows, start, valid, constants, known, how, other_how):
    """(p, q, delta, slopes) of a block. Of rows of one c with near maxima, delta is that of u - w,
    which is exact where p and q are close, and of halves finite."""
    m, log1p_r, other_m, other_log1p_r, gap = known
    u, slope = load_u(x, rows, 0, start, valid - start, constants[0], how)
    w, other_slope = load_u(y, other_rows, 0, start, valid - start, constants[1], other_how)
    c, other_c = constants[0][2], constants[1][2]
    d, other_d = apart_by(u, m, c, how), apart_by(w, other_m, other_c, other_how)
    p = exp(near(d)) * exp(-log1p_r)
    q = exp(near(other_d)) * exp(-other_log1p_r)
    lead = 0.5 * m - 0.5 * other_m
    same = (c == other_c) & (tl.abs(lead * c) <= 0.5)
    delta = tl.where(same, ((0.5 * u - 0.5 * w) - lead) * c * 2, d - other_d)
    return p, q, delta - gap, slope, other_slope


@triton.jit
def load_known(row, saved):
    """Of a row; not NaN, that differences be numbers, and whether it was."""
    m = tl.load(saved.max + row)
    other_m = tl.load(saved.other_max + row)
    bad = (m != m) | (other_m != other_m)
    m, other_m = tl.where(bad, 0, m), tl.where(bad, 0, other_m)
    log1p_r, other_log1p_r = tl.load(saved.log1p_r + row), tl.load(saved.other_log1p_r + row)
    return (m, log1p_r, other_m, other_log1p_r, tl.load(saved.gap + row)), bad


@triton.jit
def pair_sums(
    logits,
    view,
    other_logits,
    other_view,
    rows,
    other_rows,
    saved,
    sums,
    count,
    valid,
    by: tl.float64,
    softcap: tl.float64,
    gain: tl.float64,
    other_by: tl.float64,
    other_softcap: tl.float64,
    other_gain: tl.float64,
    mixed: tl.float64,
    how,
    other_how,
    kind: tl.constexpr,
):
    row = tl.program_id(0)
    wanted = row >= 0
    if rows.mask is not None:
        wanted = tl.load(rows.mask + row) != 0
    own_sum = tl.zeros((how.block,), how.wide)
    other_sum = tl.zeros((how.block,), how.wide)
    difference = tl.zeros((how.block,), how.wide)
    if wanted:
        x = row_of(logits, row, view, how)
        y = row_of(other_logits, row, other_view, other_how)
        own = row_constants(row, rows, by, softcap, gain, how)
        its = row_constants(row, other_rows, other_by, other_softcap, other_gain, other_how)
        known, _unused = load_known(row, saved)
        b = tl.full((), mixed, how.wide)
        for start in range(0, valid, how.block):
            p, q, delta, _slope, _other_slope = load_pair(
                x, y, rows, other_rows, start, valid, (own, its), known, how, other_how
            )
            of_p, of_q, m, apart = ratios(p, q, delta, b, kind)
            if kind != FORWARD:
                own_sum += excess_of(p, m, of_p)
            if kind != REVERSE:
                other_sum += excess_of(q, m, of_q)
            difference += apart
    tl.store(sums + row, tl.sum(own_sum.to(tl.float64), 0))
    tl.store(sums + count + row, tl.sum(other_sum.to(tl.float64), 0))
    tl.store(sums + 2 * count + row, tl.sum(difference.to(tl.float64), 0))


@triton.jit
def store_gradient(out, start, g, vocab, how):
    lanes = start + tl.arange(0, how.block)
    tl.store(out + lanes, g.to(out.dtype.element_ty), mask=lanes < vocab)


@triton.jit
def pair_gradients(
    logits,
    view,
    other_logits,
    other_view,
    out,
    out_view,
    other_out,
    other_out_view,
    rows,
    other_rows,
    saved,
    weights,
    vocab,
    valid,
    by: tl.float64,
    softcap: tl.float64,
    gain: tl.float64,
    other_by: tl.float64,
    other_softcap: tl.float64,
    other_gain: tl.float64,
    mixed: tl.float64,
    how,
    other_how,
    kind: tl.constexpr,
):
    row = tl.program_id(0)
    wanted = row >= 0
    if rows.mask is not None:
        wanted = tl.load(rows.mask + row) != 0
    x = row_of(logits, row, view, how)
    y = row_of(other_logits, row, other_view, other_how)
    own = row_constants(row, rows, by, softcap, gain, how)
    its = row_constants(row, other_rows, other_by, other_softcap, other_gain, other_how)
    known, bad = load_known(row, saved)
    own_kl, other_kl = tl.load(saved.own_kl + row), tl.load(saved.other_kl + row)
    b = tl.full((), mixed, how.wide)
    factor = tl.where(bad, float("nan"), own[0] * own[2])
    other_factor = tl.where(bad, float("nan"), its[0] * its[2])
    if kind != FORWARD and kind != REVERSE:
        factor = factor * (1 - b)
        other_factor = other_factor * b
    if weights.own is not None:
        factor = factor * tl.load(weights.own + row)
        to = row_of(out, row, out_view, how)
    if weights.other is not None:
        other_factor = other_factor * tl.load(weights.other + row)
        other_to = row_of(other_out, row, other_out_view, other_how)
    for start in range(0, vocab, how.block):
        lanes = start + tl.arange(0, how.block)
        p, q, delta, slope, other_slope = load_pair(
            x, y, rows, other_rows, start, valid, (own, its), known, how, other_how
        )
        of_p, of_q, _m, apart = ratios(p, q, delta, b, kind)
        # A narrower gradient lies over logits that other threads read.
        tl.debug_barrier()
        if weights.own is not None:
            g = -apart if kind == FORWARD else towards(p, of_p, own_kl)
            g = tl.where(wanted & (lanes < valid), g * factor * slope, 0)
            store_gradient(to, start, g, vocab, how)
        if weights.other is not None:
            g = apart if kind == REVERSE else towards(q, of_q, other_kl)
            g = tl.where(wanted & (lanes < valid), g * other_factor * other_slope, 0)
            store_gradient(other_to, start, g, vocab, how)


def sums(own: Side, other: Side, saved: PairSaved, divergence: Divergence) -> Tensor:
    """As `Backend.divergence_sums`."""
    count = own.logits.shape[0] * own.logits.shape[1]
    found = torch.empty(3, count, dtype=torch.float64, device=own.logits.device)
    if count:
        given = _arguments(own, other, divergence)
        with device_of(own.logits):
            pair_sums[(count,)](saved=saved, sums=found, count=count, **given)
    return found


def grad(
    own: Side,
    other: Side,
    saved: PairSaved,
    divergence: Divergence,
    weights: PairWeights,
    out: PairOut,
) -> None:
    """As `Backend.divergence_grad`."""
    count = own.logits.shape[0] * own.logits.shape[1]
    if count == 0:
        return
    given = _arguments(own, other, divergence, *(x for x in out if x is not None))
    views = [None if x is None else View.of(x) for x in out]
    with device_of(own.logits):
        pair_gradients[(count,)](
            out=out.own,
            out_view=views[0],
            other_out=out.other,
            other_out_view=views[1],
            saved=saved,
            weights=weights,
            vocab=own.logits.shape[2],
            **given,
        )


def _arguments(own: Side, other: Side, divergence: Divergence, *written: Tensor) -> dict[str, Any]:
    """What both kernels are given."""
    whole = aligned(own.logits, other.logits, *written)
    given: dict[str, Any] = {}
    for prefix, (x, spec) in (("", own), ("other_", other)):
        sizes = plan(spec.valid_vocab, x.dtype, spec.softcap > 0, warp_size())
        given |= {
            f"{prefix}logits": x,
            f"{prefix}view": View.of(x),
            f"{prefix}rows": Rows(spec.bias, None, spec.mask, spec.temperature_rows),
            f"{prefix}how": how_of(x.dtype, spec, (), sizes, whole),
            "num_warps": sizes.num_warps,
        }
        given |= {prefix + name: number for name, number in numbers(spec).items()}
    return given | dict(
        valid=own.spec.valid_vocab, mixed=divergence.mixed, kind=divergence.kind, **UNFUSED
    )
