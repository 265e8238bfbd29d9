"""Other implementations of entropy and log-probability, and the float64 truth they are held to.

Each peer is a function of tensors, and of a temperature where it takes one, to (logprob, entropy);
`peers` gives those that can be imported here and the reason why one cannot.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, Tensor]]
TRL_VOCABULARY_CHUNK = 32768  # what TRL's trainers pass


def eager(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """What a careful user writes without a library: in float32 (float64 stays)."""
    return eager_as_is(logits if logits.dtype == torch.float64 else logits.float(), target)


def eager_as_is(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The same in the dtype of the logits."""
    log_p = torch.log_softmax(logits, -1)
    logprob = log_p.gather(-1, target[..., None])[..., 0]
    return logprob, -(log_p.exp() * log_p).sum(-1)


def eager_linear(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return eager(hidden @ weight.T, target)


def eager_linear_as_is(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return eager_as_is(hidden @ weight.T, target)


def trl() -> Function:
    try:
        module = import_module("trl.trainer.utils")
    except ImportError:  # it needs datasets and more; the kernel it takes on a GPU does not
        module = import_module("trl.kernels")
    function = module.selective_log_softmax_and_entropy
    # Trainers hold (batch, sequence, V); the function loops over the batch.
    return lambda logits, target, temperature=1.0: tuple(
        x[0] for x in function(logits[None], target[None], temperature=temperature)
    )


def trl_linear() -> Function:
    function = import_module("trl.kernels").ChunkedLogProbFunction

    def run(hidden, weight, target, temperature=1.0):
        outputs = (target, temperature, TRL_VOCABULARY_CHUNK, None, 1.0, ("entropy",))
        return function.apply(hidden, weight, None, *outputs)[:2]

    return run


def liger() -> Function:
    raise ImportError("Liger has no operator that gives entropy from logits")


def liger_linear() -> Function:
    module = import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    function = module.LigerFusedLinearScaledCrossEntropyFunction

    def run(hidden, weight, target, temperature=1.0):
        loss, entropy = function.apply(hidden, weight, target, temperature, -100, 1, True)
        return -loss, entropy

    return run


def verl() -> Function:
    module = verl_module("verl.utils.torch_functional")
    return lambda logits, target: (
        module.logprobs_from_logits(logits, target),
        module.entropy_from_logits(logits),
    )


def verl_linear() -> Function:
    function = verl_module("verl.utils.experimental.torch_functional").FusedLinearForPPO()
    return lambda hidden, weight, target, temperature=1.0: function(
        hidden, weight, target, temperature
    )


def verl_module(name: str) -> ModuleType:
    """The module of that name; where verl cannot be imported as a whole (it needs ray and more),
    by itself, its packages' own code not run and nothing of them left behind. tensordict, of which
    it takes a name for other functions' sake, may be missing too."""
    try:
        return import_module(name)
    except ImportError:
        spec = find_spec("verl")
        if spec is None or not spec.submodule_search_locations:
            raise
        folder, before = Path(next(iter(spec.submodule_search_locations))), set(sys.modules)
    try:
        for package in ("verl", "verl.utils"):
            bare = sys.modules[package] = ModuleType(package)
            bare.__path__ = [str(folder.joinpath(*package.split(".")[1:]))]
        if find_spec("tensordict") is None:
            sys.modules["tensordict"] = stand_in = ModuleType("tensordict")
            stand_in.TensorDict = object
        return import_module(name)
    finally:
        for left in [x for x in sys.modules if x.partition(".")[0] in ("verl", "tensordict")]:
            if left not in before:
                del sys.modules[left]


def peers(
    linear: bool, compiled: bool, dtype: torch.dtype
) -> tuple[dict[str, Function], dict[str, str]]:
    """({name: function}, {name: why it is left out}), eager PyTorch first."""
    plain = eager_linear if linear else eager
    found, left_out = {"eager": plain}, {}
    if dtype.itemsize == 2:
        found["eager, 16-bit"] = eager_linear_as_is if linear else eager_as_is
    others = (trl_linear, liger_linear, verl_linear) if linear else (trl, liger, verl)
    for name, load in zip(("TRL", "Liger", "verl"), others, strict=True):
        try:
            found[name] = load()
        except (ImportError, AttributeError) as reason:
            left_out[name] = str(reason)
    if compiled:
        torch.compiler.reset()
        found["torch.compile"] = torch.compile(plain)
    else:
        left_out["torch.compile"] = "--quick"
    return found, left_out


def sample(size: int, count: int = 8, device: str = "cpu") -> Tensor:
    """`count` indices spread evenly over `size`."""
    return torch.linspace(0, size - 1, min(size, count), device=device).long()


def moments(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log p, logprob, entropy) in float64."""
    log_p = torch.log_softmax(logits.double(), -1)
    logprob = log_p.gather(-1, target[:, None])[:, 0]
    return log_p, logprob, -(log_p.exp() * log_p).sum(-1)


def logits_gradient(logits: Tensor, target: Tensor, g_logprob: Tensor, g_entropy: Tensor) -> Tensor:
    """d(sum g_logprob logprob + g_entropy H) / d logits in float64."""
    log_p, _, entropy = moments(logits, target)
    p = log_p.exp()
    grad = -p * (log_p + entropy[:, None]) * g_entropy.double()[:, None]
    grad -= p * g_logprob.double()[:, None]
    return grad.scatter_add_(1, target[:, None], g_logprob.double()[:, None])


def linear_truth(
    hidden: Tensor, weight: Tensor, target: Tensor, g_logprob: Tensor, g_entropy: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Every row's statistics and the sampled rows of both gradients, 64 tokens at a time."""
    n, v = len(hidden), len(weight)
    rows, words = sample(n, device=hidden.device), sample(v, 64, device=hidden.device)
    wide = weight.double()
    parts, grad_weight = [], torch.zeros(len(words), weight.shape[1]).double().to(hidden.device)
    for part in torch.arange(n, device=hidden.device).split(64):
        x = hidden[part].double()
        logits = x @ wide.T
        parts.append(moments(logits, target[part])[1:])
        grad = logits_gradient(logits, target[part], g_logprob[part], g_entropy[part])
        grad_weight += grad[:, words].T @ x
    x = hidden[rows].double()
    grad = logits_gradient(x @ wide.T, target[rows], g_logprob[rows], g_entropy[rows])
    every = torch.arange(n, device=hidden.device)
    logprob, entropy = (torch.cat(column) for column in zip(*parts))
    return {
        "logprob": (every, logprob),
        "entropy": (every, entropy),
        "grad_hidden": (rows, grad @ wide),
        "grad_weight": (words, grad_weight),
    }
