"""What is measured: our backends, the formulas people write, and the peers, each as it is called.

A contender is a function of (leaves, target, temperature) to (logprob, entropy), where the leaves
are logits, or hidden states and the weight of the head.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.accuracy.inputs import FLOAT32_LOGITS, HIDDEN, LOGITS, Cell
from benchmarks.accuracy.verdicts import GIVEN_FLOAT32, INTERPRETED
from em_kernels import linear_softmax_stats, softmax_stats
from em_kernels.backends.choice import why_not
from em_kernels.backends.cpu import load as cpu

Contender = Callable[[tuple[Tensor, ...], Tensor, float], tuple[Tensor, Tensor]]
IMPLS = ("reference", "cpu", "triton", "cuda")
INTERPRETED_AT = (0.7, 8192)  # a temperature, and the largest vocabulary: the interpreter is slow


def contenders(cell: Cell, device: str) -> tuple[dict[str, Contender], dict[str, str]]:
    """({name: function}, {name: why it is left out})."""
    found, left_out = ours(cell, device)
    found["eager"] = of_logits(cell, peers.eager)
    found["-(p log p)"] = of_logits(cell, textbook)
    for name, load in loaders(cell, device).items():
        try:
            function = load()
        except (ImportError, AttributeError) as reason:
            left_out[name] = str(reason)
            continue
        if cell.source != FLOAT32_LOGITS:
            found[name] = as_given(function)
        if cell.dtype != torch.float32 and cell.source != HIDDEN and load is not trl_kernel:
            found[name + GIVEN_FLOAT32] = widened(function)  # the kernel widens by itself
    return found, left_out


def ours(cell: Cell, device: str) -> tuple[dict[str, Contender], dict[str, str]]:
    """Every backend that can serve the device; from logits the CPU's at each level."""
    found: dict[str, Contender] = {}
    left_out = {}
    for impl in IMPLS:
        function = statistics(cell, impl)
        if (reason := why_not(impl, torch.device(device))) is not None:
            left_out[impl] = reason
        elif impl == "cpu":
            levels = cpu().isa_levels()[: None if cell.source == LOGITS else 1]
            found.update({f"cpu {level}": function for level in levels})
        elif impl == "triton" and device == "cpu":
            if is_interpreted(cell):
                found[impl + INTERPRETED] = function
        else:
            found[impl] = function
    return found, left_out


def is_interpreted(cell: Cell) -> bool:
    """Whether kernels in Triton's interpreter are measured on that cell."""
    temperature, vocab = INTERPRETED_AT
    asked = os.environ.get("TRITON_INTERPRET") == "1"
    return asked and cell.temperature == temperature and cell.vocab <= vocab


def statistics(cell: Cell, impl: str) -> Contender:
    wide = {"logits_dtype": torch.float32} if cell.source == FLOAT32_LOGITS else {}
    function = softmax_stats if cell.source == LOGITS else linear_softmax_stats

    def run(leaves: tuple[Tensor, ...], target: Tensor, temperature: float):
        stats = function(*leaves, target, temperature=temperature, impl=impl, **wide)
        return stats.logprob, stats.entropy

    return run


@contextmanager
def level_of(name: str) -> Iterator[None]:
    """The instructions that a contender of that name takes, forward and backward."""
    if not name.startswith("cpu "):
        yield
        return
    before = cpu().get_isa()
    cpu().set_isa(name.removeprefix("cpu "))
    try:
        yield
    finally:
        cpu().set_isa(before)


def of_logits(cell: Cell, function: peers.Function) -> Contender:
    """What a careful user writes: logits as they come, the rest in float32."""

    def run(leaves: tuple[Tensor, ...], target: Tensor, temperature: float):
        if cell.source == FLOAT32_LOGITS:
            leaves = tuple(x.float() for x in leaves)
        logits = leaves[0] if cell.source == LOGITS else leaves[0] @ leaves[1].T
        return function(logits.float() / temperature, target)

    return run


def textbook(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """-sum p log p as it is defined: NaN where a probability is 0."""
    p = logits.softmax(-1)
    return p.gather(-1, target[:, None])[:, 0].log(), -(p * p.log()).sum(-1)


def as_given(function: peers.Function) -> Contender:
    return lambda leaves, target, temperature: function(*leaves, target, temperature)


def widened(function: peers.Function) -> Contender:
    return lambda leaves, *rest: function(*(x.float() for x in leaves), *rest)


def loaders(cell: Cell, device: str) -> dict[str, Callable[[], peers.Function]]:
    if cell.source != LOGITS:
        return {"TRL": peers.trl_linear, "Liger": peers.liger_linear, "verl": peers.verl_linear}
    found = {"TRL": peers.trl, "verl": verl, "Liger": peers.liger}
    if device == "cpu" and is_interpreted(cell):
        found["TRL's kernel" + INTERPRETED] = trl_kernel  # what TRL takes on a GPU
    return found


def trl_kernel() -> peers.Function:
    return import_module("trl.kernels").selective_log_softmax_and_entropy


def verl() -> peers.Function:
    """Its actors divide the logits by the temperature first."""
    function = peers.verl()
    return lambda logits, target, temperature: function(logits / temperature, target)
