"""Tokens that lie on several gloo processes: losses and gradients are those of one process."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from distributed import run_on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from em_kernels import entropy_loss, linear_entropy_loss, linear_token_loss, next_token_targets
from em_kernels.objectives import aggregate_loss, aggregation_denominator, aggregation_weight

DIM, VOCAB, TOKENS = 5, 12, 11
CUT = 7  # rank 0 has so many tokens, in the middle of the third sequence
IDS = torch.tensor([4, 4, 4, 0, 0, 9, 9, 9, 9, 2, -1])
MASK = torch.tensor([1, 0, 1, 1, 1, 1, 1, 0, 1, 0, 1])
MODES = ("token_mean", "sequence_mean", "sequence_mean_token_sum")
REDUCTIONS = ("token_mean", "sequence_mean", "sum", 3.0)
CUTS = {"uneven": CUT, "a rank without tokens": 0, "a rank with all": TOKENS}


def draw():
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(TOKENS, DIM, dtype=torch.float64, generator=generator)
    weight = torch.randn(VOCAB, DIM, dtype=torch.float64, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_()


def mine(cut, rank=None):
    rank = dist.get_rank() if rank is None else rank
    return slice(0, cut) if rank == 0 else slice(cut, None)


def of_loss(loss, *leaves):
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def entropy_losses(part, group, reduction, ids, vocab_group=None, rows=slice(None)):
    """[loss, dX, dW] of both functions; a loss of two functions is differentiated once."""
    hidden, weight = draw()
    ids = ids if ids is None else ids[part]
    options = dict(reduction=reduction, segment_ids=ids, token_group=group, group=vocab_group)
    x, own = hidden[part], weight[rows]
    losses = [
        linear_entropy_loss(x, own, MASK[part], **options),
        entropy_loss(x @ own.T, MASK[part], **options),
    ]
    return [of_loss(loss, hidden, weight) for loss in losses]


def aggregated(part, group, mode, ids, denominator=None):
    hidden, _ = draw()
    ids = ids if ids is None else ids[part]
    options = dict(mode=mode, segment_ids=ids, token_group=group)
    given = aggregation_denominator(MASK[part], **options)
    if denominator == "given":
        denominator = given
    loss = aggregate_loss(hidden[part].sin().sum(1), MASK[part], denominator=denominator, **options)
    return [*of_loss(loss, hidden), given.double()]


def rows_of(cut):
    """Two batches of rows (3, 5), each on its rank; without ids each row is a sequence."""
    x = torch.linspace(0, 3, 6 * 5 * VOCAB, dtype=torch.float64).sin().view(6, 5, VOCAB)
    mask = (torch.arange(30).view(6, 5) % 4 > 0) & (torch.arange(6)[:, None] != 1)
    return x[cut].requires_grad_(), mask[cut]


def loss_of_rows(cut, group, reduction):
    x, mask = rows_of(cut)
    return of_loss(entropy_loss(x, mask, reduction=reduction, token_group=group), x)


def recipe(part, group, head_group=None, rows=slice(None), layout="contiguous", order=None):
    """As docs/guide/parallel.md has it: an embedding and a head, SFT + lambda H, (loss, gradients).

    Tokens in between have no part in each other, so a cut leaves out nothing but the shift.
    """
    torch.manual_seed(8)
    embedding, weight = nn.Embedding(VOCAB, DIM), torch.randn(VOCAB, DIM, requires_grad=True)
    ids = torch.arange(16).mul(7) % VOCAB
    segments = torch.tensor([0] * 5 + [1] * 7 + [-1] + [2] * 3)
    if order is not None:
        ids, segments = ids[order], segments[order]
    ids, segments = ids[part][None], segments[part][None]
    target = next_token_targets(ids, segments, context_group=group, layout=layout)
    share = aggregation_weight(
        target != -100, mode="sequence_mean", segment_ids=segments, token_group=group
    )
    loss = linear_token_loss(
        embedding(ids),
        weight[rows],
        target,
        logprob_weight=-share,
        entropy_weight=0.1 * share,
        group=head_group,
    ).loss
    return [*of_loss(loss, embedding.weight, weight), target]


ZIGZAG = (torch.cat([torch.arange(4), torch.arange(12, 16)]), torch.arange(4, 12))


def by_sequence(world=2):
    """The places of each rank's tokens where every sequence is cut by itself; the padding too."""
    places = [[] for _ in range(world)]
    for start, stop in ((0, 4), (4, 12), (12, 16)):
        chunks = torch.arange(start, stop).chunk(2 * world)
        for rank in range(world):
            places[rank] += [chunks[rank], chunks[2 * world - 1 - rank]]
    return [torch.cat(own) for own in places]


def of_packed_zigzag():
    """Sequences of 4 and 8 tokens, and 4 of padding."""
    own = by_sequence()[dist.get_rank()]
    segments = torch.tensor([6] * 4 + [2] * 8 + [-1] * 4)
    options = dict(context_group=dist.group.WORLD, layout="packed_zigzag")
    rows = torch.arange(32).view(2, 16)
    return next_token_targets(rows[:, own], segments[own].expand(2, -1), **options)


def of_zigzag():
    return recipe(slice(None), dist.group.WORLD, layout="zigzag", order=ZIGZAG[dist.get_rank()])


def averaged_by_ddp():
    """DDP averages: the part times the number of ranks."""
    hidden, _ = draw()
    part = mine(CUT)
    torch.manual_seed(8)
    head = DistributedDataParallel(nn.Linear(DIM, VOCAB, dtype=torch.float64))
    options = dict(segment_ids=IDS[part], token_group=dist.group.WORLD)
    loss = entropy_loss(head(hidden[part]), MASK[part], reduction="sequence_mean", **options)
    (dist.get_world_size() * loss).backward()
    return [p.grad for p in head.parameters()]


def targets(ids, segments, cut, **options):
    part = mine(cut)
    segments = segments if segments is None else segments[..., part]
    return next_token_targets(ids[..., part], segments, context_group=dist.group.WORLD, **options)


def errors():
    """What each rank is told where the ranks were called differently."""
    rank, world = dist.get_rank(), dist.group.WORLD
    x, ids = torch.zeros(2, 4, VOCAB), torch.zeros(2, 4, dtype=torch.int64)
    calls = [
        lambda: entropy_loss(x, reduction=MODES[rank], token_group=world),
        lambda: entropy_loss(x, segment_ids=ids if rank else None, token_group=world),
        lambda: next_token_targets(ids[: rank + 1], context_group=world),
        lambda: next_token_targets(ids, ids if rank else None, context_group=world),
        lambda: next_token_targets(ids, layout=("zigzag", "contiguous")[rank], context_group=world),
        lambda: next_token_targets(ids[:, :0], context_group=world),
        lambda: next_token_targets(
            ids[:, : 2 * rank + 2],
            ids[:, : 2 * rank + 2],
            context_group=world,
            layout="packed_zigzag",
        ),
    ]
    said = []
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        said.append(str(error.value))
    return said


def compiled():
    part, world = mine(CUT), dist.group.WORLD

    def loss(hidden, weight, mask, ids):
        target = next_token_targets(ids.clamp(min=0), ids, context_group=world)
        means = entropy_loss(
            hidden @ weight.T,
            mask,
            reduction="sequence_mean",
            segment_ids=ids,
            token_group=world,
        )
        return means + linear_token_loss(hidden, weight, target, logprob_weight=mask.double()).loss

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        hidden, weight = (x.detach().requires_grad_() for x in draw())
        x = hidden[part]
        results.append(of_loss(function(x, weight, MASK[part], IDS[part]), hidden, weight))
    return results


def opchecks():
    name, part = dist.group.WORLD.group_name, mine(CUT)
    operators = torch.ops.em_kernels
    for ids in (IDS[part], None):
        arguments = (MASK[part] > 0, ids, "sequence_mean", name)
        torch.library.opcheck(operators.count_tokens.default, arguments)
    torch.library.opcheck(operators.gather_alike.default, (IDS[None, :1], name, "contiguous"))
    return "passed"


ROWS = torch.arange(24).view(2, 12) + 30
SEGMENTS = torch.tensor([[0] * 5 + [1] * 7, [2] * 8 + [-1] * 4])
CASES = {
    **{
        f"entropy|{name}|{reduction}|{ids is not None}": (
            lambda cut=cut, reduction=reduction, ids=ids: entropy_losses(
                mine(cut), dist.group.WORLD, reduction, ids
            )
        )
        for name, cut in CUTS.items()
        for reduction in REDUCTIONS
        for ids in (IDS, None)
        if ids is not None or reduction != "sequence_mean"  # a cut row without ids is two
    },
    **{
        f"aggregate|{mode}|{given}": (
            lambda mode=mode, given=given: aggregated(
                mine(CUT), dist.group.WORLD, mode, IDS, given or None
            )
        )
        for mode in MODES
        for given in ("", "given")
    },
    **{
        f"rows|{reduction}": (
            lambda reduction=reduction: loss_of_rows(mine(2), dist.group.WORLD, reduction)
        )
        for reduction in REDUCTIONS
    },
    "recipe|contiguous": lambda: recipe(mine(6), dist.group.WORLD),
    "recipe|zigzag": of_zigzag,
    "packed zigzag": of_packed_zigzag,
    "targets|contiguous": lambda: targets(ROWS, SEGMENTS, 5),
    "targets|a cut within": lambda: targets(ROWS, SEGMENTS, 7),
    "targets|no segments": lambda: targets(ROWS, None, 7, ignore_index=-1),
    "ddp": averaged_by_ddp,
    "errors": errors,
    "compiled": compiled,
    "opcheck": opchecks,
}


def run_case(name):
    """In one of the processes."""
    return CASES[name]()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """name -> what each of two processes returned."""
    return run_on_ranks(2, run_case, list(CASES), tmp_path_factory.mktemp("ranks"))


def summed(results):
    """[a, b] of each rank, summed over the ranks."""
    for result in results:
        assert not isinstance(result, str), result
    return [sum(values) for values in zip(*results)]


def close(got, want):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def cases(kind):
    return [name for name in CASES if name.split("|")[0] == kind]


@pytest.mark.parametrize("name", cases("entropy"))
def test_parts_of_a_reduction_add_up(ranks, name):
    _, _, reduction, has_ids = name.split("|")
    reduction = reduction if reduction in REDUCTIONS else float(reduction)
    ids = IDS if has_ids == "True" else None
    want = entropy_losses(slice(None), None, reduction, ids)
    for function, whole in enumerate(want):
        close(summed([result[function] for result in ranks[name]]), whole)


@pytest.mark.parametrize("name", cases("aggregate"))
def test_parts_of_an_aggregate_add_up(ranks, name):
    want = aggregated(slice(None), None, name.split("|")[1], IDS)
    *got, numbers = summed(ranks[name])
    close([*got, numbers / 2], want)  # every rank has the denominator of all


@pytest.mark.parametrize("name", cases("rows"))
def test_rows_of_other_ranks_are_other_sequences(ranks, name):
    reduction = name.split("|")[1]
    reduction = reduction if reduction in REDUCTIONS else float(reduction)
    loss, gradient = loss_of_rows(slice(None), None, reduction)
    (first, left), (second, right) = ranks[name]
    close([first + second, torch.cat([left, right])], [loss, gradient])


@pytest.mark.parametrize("name", cases("recipe"))
def test_a_sequence_cut_over_ranks_has_the_loss_and_gradients_of_one(ranks, name):
    *want, target = recipe(slice(None), None)
    *got, _ = summed([[*r[:-1], torch.zeros(())] for r in ranks[name]])
    close(got, want)
    parts = [result[-1] for result in ranks[name]]
    joined = torch.cat(parts, -1)
    if "zigzag" in name:
        joined = joined[:, torch.cat(ZIGZAG).argsort()]
    assert torch.equal(joined, target) and (target != -100).sum() == 4 + 6 + 2


@pytest.mark.parametrize("name", cases("targets"))
def test_targets_across_a_cut(ranks, name):
    rows = ROWS.roll(-1, -1)
    if "no segments" in name:
        rows[:, -1] = -1
    else:
        ends = SEGMENTS.roll(-1, -1) != SEGMENTS
        rows = rows.masked_fill(ends | (SEGMENTS < 0), -100)
        assert rows[0, 4] == rows[0, 11] == -100
    assert torch.equal(torch.cat(ranks[name], -1), rows)


def test_targets_where_every_sequence_is_cut_by_itself(ranks):
    want = torch.arange(32).view(2, 16) + 1
    want[:, [3, 11, 12, 13, 14, 15]] = -100
    got = torch.cat(ranks["packed zigzag"], -1)[:, torch.cat(by_sequence()).argsort()]
    assert torch.equal(got, want)


def test_ddp_averages_what_was_multiplied_by_the_ranks(ranks):
    hidden, _ = draw()
    torch.manual_seed(8)
    head = nn.Linear(DIM, VOCAB, dtype=torch.float64)
    entropy_loss(head(hidden), MASK, reduction="sequence_mean", segment_ids=IDS).backward()
    for got in ranks["ddp"]:
        close(got, [p.grad for p in head.parameters()])


def test_ranks_that_were_called_differently_get_an_error(ranks):
    words = (
        "token_group.*reduction",
        "token_group.*segment_ids",
        *["context_group"] * 3,
        "ids",
        "context_group",
    )
    for said in ranks["errors"]:
        assert isinstance(said, list), said
        for text, word in zip(said, words, strict=True):
            assert re.match(word, text), text


def test_compiled_is_eager(ranks):
    for eager, graph in ranks["compiled"]:
        close(graph, eager)


def test_the_operators_pass_opcheck(ranks):
    assert ranks["opcheck"] == ["passed"] * 2


def over_both(name):
    """In one of four processes: ranks 0, 1 have the first tokens, and each a half of the vocabulary
    with rank 2, 3."""
    rank = dist.get_rank()
    vocab_groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    token_groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    vocab, tokens = vocab_groups[rank // 2], token_groups[rank % 2]
    rows = slice(0, 5) if rank % 2 == 0 else slice(5, None)
    part = mine(CUT, rank // 2)
    if name == "entropy":
        return entropy_losses(part, tokens, "sequence_mean", IDS, vocab, rows)
    return recipe(mine(6, rank // 2), tokens, vocab, rows)[:-1]


def test_vocabulary_and_tokens_are_cut_at_once(tmp_path):
    ranks = run_on_ranks(4, over_both, ["entropy", "recipe"], tmp_path)
    linear, _ = entropy_losses(slice(None), None, "sequence_mean", IDS)
    want = {"entropy": linear, "recipe": recipe(slice(None), None)[:-1]}
    for name, results in ranks.items():
        results = [r[0] if name == "entropy" else r for r in results if not isinstance(r, str)]
        assert len(results) == 4, ranks[name]
        of_tokens = [results[0], results[2]]
        losses, gradients = summed([r[:2] for r in of_tokens])
        weights = sum(r[2] for r in results)  # each rank has its rows of it, from its tokens
        close([losses, gradients, weights], want[name])
    # from logits the gradient of hidden is this rank's share
    shares = summed([r[1] for r in ranks["entropy"]])
    close([shares[1], shares[2]], linear[1:])
