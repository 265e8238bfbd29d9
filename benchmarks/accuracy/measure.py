"""Errors of one contender on the rows of one cell, and what rounding alone would cost there."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.accuracy.contenders import Contender, contenders, level_of
from benchmarks.accuracy.inputs import HIDDEN, LOGITS, LOSS_SCALE, Cell, Rows, make_rows, truth
from benchmarks.accuracy.rows import LARGEST, WEIGHT
from benchmarks.accuracy.verdicts import INTERPRETED, LIMITS
from benchmarks.common import what_failed

ROUNDED = LIMITS[0]
LIKELIEST, SECOND = 0, 1  # ranks of the tokens whose logprob is asked for


class Results(NamedTuple):
    """One number a row, and gradients of the sums over rows, in the order of the leaves."""

    entropy: Tensor
    logprob: Tensor
    grad_entropy: tuple[Tensor, ...]
    grad_logprob: tuple[Tensor, ...]


def measured(
    cell: Cell, device: str = "cpu", done: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, Tensor] | str]]:
    """(name, its errors or why there are none): what rounding alone costs, then each contender;
    those that are `done` are left out."""
    runs = {x: y for x, y in contenders(cell, device)[0].items() if x not in done}
    limits = [x for x in LIMITS[: 1 if cell.source == LOGITS else 2] if x not in done]
    if not runs and not limits:
        return
    rows = make_rows(cell)
    targets = [rows.logits.topk(2).indices[:, rank] for rank in (LIKELIEST, SECOND)]
    exact = [exact_results(cell, rows, rows.logits, target) for target in targets]
    for name in limits:
        yield name, errors([limit(cell, rows, name, target) for target in targets], exact)
    for name, run in runs.items():
        asked = targets[: 1 if INTERPRETED in name else 2]  # the interpreter is slow
        with level_of(name):
            try:
                found = [results(cell, rows, run, target, device) for target in asked]
            except Exception as reason:
                yield name, what_failed(reason)
                continue
        yield name, errors(found, exact)


def limit(cell: Cell, rows: Rows, name: str, target: Tensor) -> Results:
    """Exact arithmetic whose results are rounded, and where it says so the logits before."""
    if name == ROUNDED:
        return rounded(cell, exact_results(cell, rows, rows.logits, target))
    logits = rows.logits.to(cell.dtype if cell.source == HIDDEN else torch.float32).double()
    return rounded(cell, exact_results(cell, rows, logits, target, cell.dtype))


def results(cell: Cell, rows: Rows, run: Contender, target: Tensor, device: str) -> Results:
    leaves = tuple(x.detach().to(device).requires_grad_() for x in rows.leaves)
    logprob, entropy = run(leaves, target.to(device), cell.temperature)
    scale = LOSS_SCALE.get(cell.dtype, 1.0)
    grads = [
        torch.autograd.grad(x, leaves, torch.full_like(x, scale), retain_graph=True)
        for x in (entropy, logprob)
    ]
    found = Results(entropy.detach(), logprob.detach(), *grads)
    return Results(*(_on_cpu(x) for x in found))


def _on_cpu(x):
    return x.cpu().double() if isinstance(x, Tensor) else tuple(map(_on_cpu, x))


def exact_results(
    cell: Cell, rows: Rows, logits: Tensor, target: Tensor, dtype: torch.dtype = torch.float64
) -> Results:
    """The truth for these float64 logits, in float64; their gradient is rounded to `dtype`."""
    of = truth(logits, target, cell.temperature)
    scale = LOSS_SCALE.get(cell.dtype, 1.0)
    grads = [(scale * of.grad_entropy,), (scale * of.grad_logprob,)]
    if cell.source != LOGITS:
        hidden, weight = (x.double() for x in rows.leaves)
        given = [grad.to(dtype).double() for (grad,) in grads]
        grads = [(grad @ weight, grad.T @ hidden) for grad in given]
    return Results(of.entropy, of.logprob, *grads)


def rounded(cell: Cell, exact: Results) -> Results:
    """In the dtypes of an operator's results."""
    grads = [tuple(x.to(cell.dtype).double() for x in part) for part in exact[2:]]
    return Results(*(x.float().double() for x in exact[:2]), *grads)


def errors(found: list[Results], exact: list[Results]) -> dict[str, Tensor]:
    """Name of a quantity -> its relative error in every row (one for a weight's gradient)."""
    named = {"H": relative(found[0].entropy, exact[0].entropy)}
    pairs = {"dH": (found[0].grad_entropy, exact[0].grad_entropy)}
    for name, ours, true in zip(("logprob", "second"), found, exact):  # the second may be missing
        named[name] = relative(ours.logprob, true.logprob)
        pairs[f"d{name}"] = (ours.grad_logprob, true.grad_logprob)
    for name, (made, true) in pairs.items():
        named[name] = norm_wise(made[0], true[0])
        named[name + LARGEST] = largest(made[0], true[0])
        if len(made) > 1:
            named[name + WEIGHT] = norm_wise(made[1].view(1, -1), true[1].view(1, -1))
    return named


def relative(found: Tensor, exact: Tensor) -> Tensor:
    return (found - exact).abs() / exact.abs()


def norm_wise(found: Tensor, exact: Tensor) -> Tensor:
    """||error|| / ||gradient||, a number a row."""
    return (found - exact).norm(dim=-1) / exact.norm(dim=-1)


def largest(found: Tensor, exact: Tensor) -> Tensor:
    """The largest error of an entry over the largest entry, a number a row."""
    return (found - exact).abs().amax(-1) / exact.abs().amax(-1)
