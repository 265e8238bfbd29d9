"""Divergences with both vocabularies cut between two gloo processes, against the whole."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_on_ranks
from divergences import KINDS, OTHER, OWN, draw_pair, gradients, leaves
from helpers import ON_CPU, random_logits

from em_kernels import (
    divergence,
    divergence_loss,
    linear_divergence,
    linear_divergence_loss,
    linear_divergence_stats,
)

IMPLS = tuple(name for name in ("reference", "cpu") if name in ON_CPU)
N, V, D, OTHER_D = 5, 37, 6, 9
SIZES = ((20, 17), (0, 37), (36, 1))
NAMES = [f"{kind}|{beta}|{impl}|{cut}" for kind, beta in KINDS for impl in IMPLS for cut in (0, 1)]
NAMES += [f"js|0.3|{IMPLS[-1]}|2", "near", "different"]


def cut(sizes, rank, x, dim):
    return x.split(list(sizes), dim)[rank].contiguous()


def draw():
    torch.manual_seed(0)
    x, y = draw_pair(N, V)
    heads = [random_logits(*shape) / 4 for shape in ((N, D), (V, D), (N, OTHER_D), (V, OTHER_D))]
    biases = [random_logits(V) / 2 for _ in range(2)]
    mask, weight = torch.tensor([1, 1, 0, 1, 1]), torch.linspace(0.2, 1, N)
    return x, y, heads, biases, mask, weight


def calls(x, y, heads, biases, mask, weight, kind, beta, impl, group=None):
    """(values, gradients) of the four functions."""
    options = dict(kind=kind, beta=float(beta), impl=impl, group=group, mask=mask)
    options |= OWN | OTHER
    pair, own, mine = leaves(x, y), leaves(*heads), leaves(*biases)
    head_options = options | dict(bias=mine[0], other_bias=mine[1], chunk_tokens=2)
    value = divergence(*pair, valid_vocab=V - 2, **options)
    loss = divergence_loss(*pair, token_weight=weight, **options)
    linear = linear_divergence(*own, **head_options)
    target = torch.arange(0, 7 * N, 7)
    names = dict(outputs=("entropy", "rank"), other_outputs=("lse", "rank"), target=target)
    made = linear_divergence_loss(*own, token_weight=weight, **names, **head_options)
    values = [value, loss.loss, loss.divergence, linear, made.loss, made.divergence]
    values += [made.stats.entropy, made.other_stats.lse]
    values += [stats.rank.double() for stats in (made.stats, made.other_stats)]
    values = [v.detach() for v in values]
    inputs = [*own, *mine]
    found = [*gradients(value, pair, weight), *torch.autograd.grad(loss.loss, pair)]
    found += [*gradients(linear, inputs, weight), *torch.autograd.grad(made.loss, inputs)]
    return values, found


def run_case(name):
    """In one of the processes: the errors of values and gradients."""
    group, rank = dist.group.WORLD, dist.get_rank()
    if name == "near":
        return near(group, rank)
    if name == "different":
        return different(group, rank)
    kind, beta, impl, sizes = name.split("|")
    sizes = SIZES[int(sizes)]
    x, y, heads, biases, mask, weight = draw()

    def part(z, dim):
        return cut(sizes, rank, z, dim)

    shares = [heads[0], part(heads[1], 0), heads[2], part(heads[3], 0)]
    ours = calls(
        *(part(x, 1), part(y, 1), shares, [part(b, 0) for b in biases], mask, weight),
        *(kind, beta, impl, group),
    )
    theirs = calls(x, y, heads, biases, mask, weight, kind, beta, "reference")
    whole, found = theirs[1], []
    dims = [1, 1, 1, 1] + [None, 0, None, 0, 0, 0] * 2
    for gradient, dim in zip(whole, dims, strict=True):
        found.append(gradient if dim is None else part(gradient, dim))
    pairs = [*zip(ours[0], theirs[0], strict=True), *zip(ours[1], found, strict=True)]
    largest = [v.abs().max().clamp(min=1e-3).item() for v in (*theirs[0], *whole)]
    return [
        ((a - b).abs().max() / top).item() if a.numel() else 0.0
        for (a, b), top in zip(pairs, largest, strict=True)
    ]


def near(group, rank):
    """The relative error of a divergence of 1e-9."""
    torch.manual_seed(1)
    x, y = draw_pair(N, V, apart=1e-4)
    p, q = x.double().log_softmax(-1), y.double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    own = leaves(*(cut(SIZES[0], rank, z, 1) for z in (x, y)))
    value = divergence(*own, kind="reverse_kl", group=group)
    return ((value - expected) / expected).abs().max().item()


def different(group, rank):
    """Every rank is told, and none waits."""
    _, _, heads, _, _, _ = draw()
    told = []
    for options in (
        dict(other_temperature=1.0 + rank),
        dict(kind="js", beta=0.1 + rank / 2),
        dict(other_outputs=("entropy",) if rank else ()),
    ):
        try:
            linear_divergence_stats(*heads, group=group, **options)
        except ValueError as error:
            told.append(str(error))
    return told


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_on_ranks(2, run_case, NAMES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", NAMES[:-2])
def test_shards_give_what_the_whole_gives(ranks, name):
    for found in ranks[name]:
        assert isinstance(found, list), found
        assert max(found) < 2e-5


def test_digits_of_rows_that_are_nearly_alike(ranks):
    assert all(isinstance(found, float) and found < 1e-4 for found in ranks["near"]), ranks["near"]


def test_ranks_that_are_called_differently_are_told(ranks):
    for told in ranks["different"]:
        assert len(told) == 3 and all("must be given the same options" in text for text in told)
