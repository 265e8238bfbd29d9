"""K ids a row: a weighted sum of their log-probabilities, forward + backward, and their ranks.

Half of the ids are the likeliest, half are anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from benchmarks.common import Case, Results, Sizes, our_impls
from benchmarks.linear_softmax_stats import bare_products, gradient_bytes, make_hidden
from benchmarks.peers import sample
from benchmarks.softmax_stats import make_logits
from em_kernels import linear_softmax_stats, linear_token_loss, softmax_stats, token_loss

COUNTS, SHARED = (1, 20, 64), 20
WORDS = 64  # rows of the weight whose gradient is looked at
NO_RANKS = "it has no ranks"
Function = Callable[[Tensor, Tensor], Tensor]  # logits (N, V), ids (N, K) -> (N, K)
Truth = dict[str, tuple[Tensor, Tensor]]


def eager(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, ids)


def difference(logits: Tensor, ids: Tensor) -> Tensor:
    """Without the log-probabilities of all the others."""
    logits = logits.float()
    return logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)


def eager_ranks(logits: Tensor, ids: Tensor) -> Tensor:
    """Compared, or for more than one id sorted, which is the faster then."""
    levels = logits.gather(-1, ids)
    if ids.shape[1] == 1:
        return (logits > levels).sum(-1, keepdim=True)
    return sorted_ranks(logits, levels)


def sorted_ranks(logits: Tensor, levels: Tensor) -> Tensor:
    order = logits.sort(-1).values
    return logits.shape[1] - torch.searchsorted(order, levels, right=True)


def compared(logits: Tensor, ids: Tensor) -> Tensor:
    """Ranks for a compiler, which makes nothing of N K V entries of it."""
    return (logits[:, None] > logits.gather(-1, ids)[..., None]).sum(-1)


def liger(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Of the ids of the first row: it takes one set for all rows, beside a target a row."""
    module = import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    function = module.LigerFusedLinearScaledCrossEntropyFunction
    selected = ids[0].contiguous()
    return function.apply(hidden, weight, ids[:, 0], selected_token_ids=selected)[1]


def peers(compiled: bool) -> tuple[dict[str, Function], dict[str, str]]:
    found: dict[str, Function] = {"eager": eager, "eager gather - logsumexp": difference}
    left_out = {}
    try:
        function = import_module("trl.trainer.utils").selective_log_softmax
        # Trainers hold (batch, sequence, V); the function loops over the batch.
        found["TRL"] = lambda logits, ids: function(logits[None], ids[None])[0]
    except (ImportError, AttributeError) as reason:
        left_out["TRL"] = str(reason)
    if compiled:
        torch.compiler.reset()
        found["torch.compile"] = torch.compile(difference, dynamic=False)
    else:
        left_out["torch.compile"] = "--quick"
    return found, left_out


def make_ids(logits: Tensor) -> Tensor:
    """(N, max K): any, and in every other column the likeliest."""
    half = COUNTS[-1] // 2
    top = logits.topk(half).indices
    return torch.stack([torch.randint_like(top, logits.shape[1]), top], -1).flatten(1)


def step(logprob: Callable[..., Tensor], ids: Tensor, given: Tensor, *inputs: Tensor):
    """`given`: the weights of the log-probabilities, (N, K)."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def run() -> Results:
        values = logprob(*leaves, ids)
        return named(values, torch.autograd.grad((given * values).sum(), leaves))

    return run


def loss_step(function: Callable, impl: str, ids: Tensor, given: Tensor, *inputs: Tensor):
    """The same where the weights are known in the forward pass."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def run() -> Results:
        options = dict(logprob_weight=given, outputs=("logprob",), impl=impl)
        loss, stats = function(*leaves, ids, **options)
        return named(stats.logprob, torch.autograd.grad(loss, leaves))

    return run


def named(logprob: Tensor, grads: tuple[Tensor, ...]) -> Results:
    return {"logprob": logprob, **dict(zip(("grad", "grad_weight"), grads))}


def own_steps(
    statistics: Callable, loss: Callable, device: str, ids: Tensor, given: Tensor, *inputs: Tensor
) -> dict[str, Callable[[], Results]]:
    found = {}
    for name, impl in our_impls(device).items():

        def logprob(*operands: Tensor, impl: str = impl) -> Tensor:
            return statistics(*operands, outputs=("logprob",), impl=impl).logprob

        found[name] = loss_step(loss, impl, ids, given, *inputs)
        found[f"{name} statistics"] = step(logprob, ids, given, *inputs)
    return found


def ranks_step(function: Callable[..., Tensor], *inputs: Tensor):
    def run() -> Results:
        with torch.no_grad():
            return {"rank": function(*inputs)}

    return run


def own_ranks(statistics: Callable, device: str) -> dict[str, Callable[..., Tensor]]:
    def ranks(*inputs: Tensor, impl: str) -> Tensor:
        return statistics(*inputs, outputs=("rank",), impl=impl).rank

    return {name: partial(ranks, impl=impl) for name, impl in our_impls(device).items()}


def rank_peers(compiled: bool) -> tuple[dict[str, Function], dict[str, str]]:
    found: dict[str, Function] = {"eager": eager_ranks}
    left_out = dict.fromkeys(("TRL", "Liger"), NO_RANKS)
    if not compiled:
        return found, {**left_out, "torch.compile": "--quick"}
    return {**found, "torch.compile": torch.compile(compared, dynamic=False)}, left_out


def from_hidden(function: Function) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda hidden, weight, ids: function(hidden @ weight.T, ids)


def truth(z: Tensor, ids: Tensor, given: Tensor) -> tuple[Truth, Tensor]:
    """Of logits in float64: `logprob`, and the gradient of all rows to the logits."""
    log_p, given = z.log_softmax(-1), given.double()
    grad = log_p.exp().mul_(-given.sum(-1, keepdim=True)).scatter_add_(1, ids, given)
    return {"logprob": (torch.arange(len(ids), device=ids.device), log_p.gather(-1, ids))}, grad


def true_ranks(z: Tensor, ids: Tensor) -> Truth:
    ranks = sorted_ranks(z, z.gather(-1, ids)).double()
    return {"rank": (torch.arange(len(ids), device=ids.device), ranks)}


def linear_truth(
    hidden: Tensor, weight: Tensor, z: Tensor, ids: Tensor, given: Tensor, wide: Tensor
) -> Truth:
    """`wide`: the weight in float64."""
    found, grad = truth(z, ids, given)
    rows, words = (sample(len(x), n, hidden.device) for x, n in ((hidden, 8), (weight, WORDS)))
    words = torch.cat([words, ids[:, 0]])  # those of the ids have nearly all of the norm
    found["grad"] = rows, grad[rows] @ wide
    found["grad_weight"] = words, grad[:, words].T @ hidden.double()
    return found


def logits_cases(sizes: Sizes, dtype: torch.dtype, device: str, compiled: bool) -> Iterator[Case]:
    logits, _ = make_logits(sizes, dtype, device)
    every = make_ids(logits)
    functions, left_out = peers(compiled)
    ranking, ranks_left_out = rank_peers(compiled)
    copy, size = torch.empty_like(logits), logits.nbytes
    common = dict(sizes=sizes._replace(d=0), dtype=dtype, device=device, floor_bytes=2 * size)
    common["floor"] = ("copy of the logits", lambda: copy.copy_(logits))
    for count in COUNTS:
        ids, rows = every[:, :count].contiguous(), sample(sizes.n, device=device)
        given = torch.randn(ids.shape, device=device)
        found, grad = truth(logits.double(), ids, given)
        own = own_steps(softmax_stats, token_loss, device, ids, given, logits)
        yield Case(
            name=f"log-probability of {count} ids, from logits, forward + backward",
            contenders=own | {n: step(f, ids, given, logits) for n, f in functions.items()},
            truth={**found, "grad": (rows, grad[rows])},
            bytes_moved=2 * size,
            kept_bytes=size,
            left_out={**left_out, "Liger": "it has no operator from logits"},
            **common,
        )
        own = own_ranks(softmax_stats, device)
        yield Case(
            name=f"rank of {count} ids, from logits",
            contenders={n: ranks_step(f, logits, ids) for n, f in {**own, **ranking}.items()},
            truth=true_ranks(logits.double(), ids),
            bytes_moved=size,
            left_out=ranks_left_out,
            **common,
        )


def hidden_cases(sizes: Sizes, dtype: torch.dtype, device: str, compiled: bool) -> Iterator[Case]:
    hidden, weight, _, _ = make_hidden(sizes, dtype, device)
    wide = weight.double()
    z = hidden.double() @ wide.T
    tables = make_tables(make_ids(z))
    givens = {name: torch.randn(ids.shape, device=device) for name, ids in tables.items()}
    truths = {
        name: linear_truth(hidden, weight, z, ids, givens[name], wide)
        for name, ids in tables.items()
    }
    shared = tables[f"{SHARED} ids"]
    ranks = true_ranks(z, shared)
    del wide, z
    common = dict(sizes=sizes, dtype=dtype, device=device)
    for name, ids in tables.items():
        functions, left_out = hidden_peers(compiled, one_set=name.endswith("all rows"))
        inputs = ids, givens[name], hidden, weight
        own = own_steps(linear_softmax_stats, linear_token_loss, device, *inputs)
        yield Case(
            name=f"log-probability of {name}, from hidden states, forward + backward",
            contenders=own | {n: step(f, *inputs) for n, f in functions.items()},
            truth=truths[name],
            kept_bytes=gradient_bytes(hidden, weight),
            left_out=left_out,
            **common,
            **bare_products(3, hidden, weight),
        )
    ranking, left_out = rank_peers(compiled)
    own = own_ranks(linear_softmax_stats, device)
    own |= {n: from_hidden(f) for n, f in ranking.items()}
    yield Case(
        name=f"rank of {SHARED} ids, from hidden states",
        contenders={n: ranks_step(f, hidden, weight, shared) for n, f in own.items()},
        truth=ranks,
        left_out=left_out,
        **common,
        **bare_products(1, hidden, weight),
    )


def make_tables(every: Tensor) -> dict[str, Tensor]:
    """The first of `every` row's ids, and those of the first row for all."""
    tables = {f"{count} ids": every[:, :count].contiguous() for count in COUNTS}
    tables[f"{SHARED} ids of all rows"] = every[:1, :SHARED].expand(len(every), -1).contiguous()
    return tables


def hidden_peers(
    compiled: bool, one_set: bool
) -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    functions, left_out = peers(compiled)
    del functions["eager gather - logsumexp"]  # TRL's
    found: dict[str, Callable[..., Tensor]] = {n: from_hidden(f) for n, f in functions.items()}
    if one_set:
        found["Liger"] = liger
    else:
        left_out["Liger"] = "its selected_token_ids are the same in every row"
    return found, left_out


def cases(sizes: Sizes, dtype: torch.dtype, device: str, compiled: bool) -> Iterator[Case]:
    yield from logits_cases(sizes, dtype, device, compiled)
    yield from hidden_cases(sizes, dtype, device, compiled)
