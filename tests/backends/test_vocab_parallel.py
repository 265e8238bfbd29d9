"""A vocabulary cut between 2 and 3 gloo processes, against the same calls on all of it."""

import math
import re

import pytest
import torch
from distributed import run_on_ranks
from helpers import ON_CPU, error, same_bits, truth
from vocab_cases import CASES, OTHER_SIZES
from vocab_checks import CHECKS
from vocab_logits_cases import sure_rows
from vocab_shares import WHOLE, draw_head, draw_rows, own_share

from em_kernels import linear_entropy_loss, linear_token_loss, softmax_stats, token_loss

IMPLS = tuple(name for name in ("reference", "cpu") if name in ON_CPU)
WORLDS = (2, 3)
# One case per function with other cuts: a rank with one entry, a rank with none.
RECUT = (
    "stats, float32",
    "stats, sure rows",
    "linear stats, chunks of 4",
    "linear stats, blocks",
    "linear loss",
    "loss",
)
ONCE = ("costs", "opcheck")  # slow, and the same for any number of ranks
SMALL_INTERPRETED = ("stats, bad rows", "linear loss")


def names_for(world):
    names = [f"{case}|{impl}|" for case in CASES for impl in IMPLS if case != "compiled"]
    names += [
        f"{case}|{impl}|{sizes}" for case in RECUT for impl in IMPLS for sizes in OTHER_SIZES[world]
    ]
    names += [name for name in CHECKS if world == 2 or name not in ONCE]
    names += [f"compiled|{IMPLS[-1]}|"] if world == 2 else []
    if "triton" in ON_CPU and world == 2:
        names += [f"{case}|triton|" for case in SMALL_INTERPRETED]
    return names


def run_case(name):
    """In one of the processes."""
    if name in CHECKS:
        return CHECKS[name]()
    case, impl, sizes = name.split("|")
    sizes = tuple(int(size) for size in sizes.strip("()").split(",")) if sizes else None
    return CASES[case](own_share(sizes), impl)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """world -> {name: what each rank returned}."""
    return {
        world: run_on_ranks(world, run_case, names_for(world), tmp_path_factory.mktemp("ranks"))
        for world in WORLDS
    }


PARAMETERS = [
    pytest.param(w, n, id=f"{w}|{n}") for w in WORLDS for n in names_for(w) if n not in CHECKS
]


def results_of(ranks, world, name):
    for result in ranks[world][name]:
        assert not isinstance(result, str) or not result.startswith("Traceback"), result
    return ranks[world][name]


@pytest.mark.parametrize(("world", "name"), PARAMETERS)
def test_equals_the_whole_vocabulary(ranks, world, name):
    results = results_of(ranks, world, name)
    case, impl, _ = name.split("|")
    same, own = CASES[case](WHOLE, impl)
    assert {k for k, v in same.items() if v is not None} == set(results[0][0])
    for key, value in results[0][0].items():
        for other, _ in results[1:]:
            assert same_bits(value, other[key]), key
        check_close(key, value, same[key])
    for key, (value, dim) in own.items():
        joined = torch.cat([parts[key][0] for _, parts in results], dim)
        check_close(key, joined, value)


def check_close(key, got, expected):
    assert got.dtype == expected.dtype and got.shape == expected.shape, key
    if got.dtype in (torch.bool, torch.int64):
        assert torch.equal(got, expected), key
        return
    assert torch.equal(got.isnan(), expected.isnan()), key
    infinite = expected.isinf()
    assert torch.equal(got[infinite], expected[infinite]), key
    kept = ~expected.isnan() & ~infinite
    digits = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3}[got.dtype]
    assert error(got[kept], expected[kept]) < digits, key


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("world", WORLDS)
def test_sure_rows_keep_their_relative_accuracy(ranks, world, impl):
    logits, target, _ = sure_rows()
    expected = truth(logits.double(), target)
    for sizes in ("", *OTHER_SIZES[world]):
        got, _ = ranks[world][f"stats, sure rows|{impl}|{sizes}"][0]
        for name in ("entropy", "logprob", "varentropy", "collision", "self_certainty"):
            worst = (got[name] / expected[name] - 1).abs().max()
            assert worst < 1e-5, (name, sizes)
        assert expected["entropy"].min() < 2e-9 and math.isclose(got["max_prob"].max(), 1)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    ("difference", "text"),
    [
        ("mask", r"ValueError: group: every rank must be given the same mask"),
        ("target", "ValueError: group: every rank must be given the same target"),
        (
            "tokens",
            r"ValueError: group: every rank must be given the same number of tokens.*\[18, 9",
        ),
        ("outputs", "ValueError: group: every rank must be given the same options"),
        ("impl", "the same options"),
        ("dtype", "the same options"),
        ("temperature", "the same options"),
        ("temperatures", "ValueError: group: every rank must be given the same numbers of each"),
        ("top_p", "ValueError: group: every rank must be given the same numbers of each"),
        ("kept", "ValueError: group: every rank must be given the same numbers of each"),
        ("chunk", "the same options"),
        ("frozen", "the same options .*which inputs are frozen"),
        ("frozen weight", "the same options .*which inputs are frozen"),
        ("valid_vocab", r"ValueError: valid_vocab must be in \[1, 63\].*got 64"),
        ("out of range", r"ValueError: target must be in \[0, 63\) .*got 63 at token 17"),
        ("none at all", "ValueError: group: no rank has an entry"),
        ("still in step", "no error"),
    ],
)
def test_a_mismatch_is_an_error_on_every_rank(ranks, world, difference, text):
    if difference == "impl" and len(ON_CPU) == 1:
        pytest.skip("there is one backend only")
    for result in results_of(ranks, world, "called differently"):
        assert re.match(f".*{text}", result[difference]), result[difference]


@pytest.mark.parametrize("world", WORLDS)
def test_groups_that_are_none(ranks, world):
    results = results_of(ranks, world, "groups that are none")
    first, *between, last = (result["entropy"] for result in results)
    logits, target, _ = draw_rows()
    check_close("entropy", first, softmax_stats(logits, target).entropy)
    assert same_bits(first, last)
    for got in between:
        assert got.startswith("TypeError: group must be") and "this rank is not in" in got
    for result in results:
        assert error(result["alone"], softmax_stats(logits, target).entropy) < 1e-7
        assert re.match("TypeError: group must be .* got str", result["text"])
        assert re.match("TypeError: group must be .* got int", result["covariance"])
        assert re.match("TypeError: group must be .* got object", result["weights"])


def test_collectives_and_products_of_a_call(ranks):
    """One exchange of sizes, one of statistics per chunk (of 3), one sum of dX; three products."""
    for result in results_of(ranks, 2, "costs"):
        assert result["loss"] == (4, 1, 3)
        assert result["frozen weight"] == (4, 1, 2)
        assert result["frozen hidden"] == (4, 0, 2)
        # Backward exchanges the sizes again; the logits of a chunk are kept.
        assert result["stats"] == (5, 1, 4 - 1 / 3)
        assert result["from logits"] == (2, 0, 0)


@pytest.mark.parametrize("world", WORLDS)
def test_all_ranks_cut_their_rows_as_the_largest_shard_needs(ranks, world):
    assert results_of(ranks, world, "uneven chunks") == [(1 + 2, 0)] * world


@pytest.mark.parametrize("world", WORLDS)
def test_no_rank_takes_the_memory_of_a_dw_that_none_needs(ranks, world):
    expected = [(1 + 2, 1), (1 + 1, 1), (1 + 1, 1)]
    assert results_of(ranks, world, "frozen chunks") == [expected] * world


def test_opcheck_with_a_group(ranks):
    assert results_of(ranks, 2, "opcheck") == ["passed"] * 2


@pytest.mark.parametrize("world", WORLDS)
def test_dtensors(ranks, world):
    results = results_of(ranks, world, "dtensors")
    head, target = draw_head(WHOLE)
    rows = torch.linspace(0, 1, 18).view(2, 9)
    options = dict(bias=head.bias, entropy_weight=rows, logprob_weight=rows)

    def expect(scale=1.0):
        loss = linear_token_loss(head.hidden * scale, head.weight, target, **options).loss
        grads = torch.autograd.grad(loss, (head.weight, head.bias, head.hidden))
        return [loss.detach(), *grads]

    *of_weight, of_hidden = expect()
    for result in results:
        for name in ("tensor parallel", "group given", "replicated"):
            for got, value in zip(result[name][0], of_weight, strict=True):
                check_close(name, got, value)
            check_close(name, result[name][1], of_hidden)
        check_close("accumulated", result["accumulated"], of_weight[1])
        assert "accumulate_into cannot hold" in result["accumulated, gathered"]
    # Data parallel: every rank its own loss, the gradient of their mean.
    each = [expect(1.0 + rank) for rank in range(world)]
    for rank, result in enumerate(results):
        loss, *grads = result["data parallel"][0]
        check_close("loss", loss, each[rank][0])
        for got, *values in zip(grads, *(e[1:3] for e in each)):
            check_close("data parallel", got, sum(values) / world)
        for got, *values in zip(result["fully_shard"], *(e[1:3] for e in each), strict=True):
            check_close("fully_shard", got, sum(values) / world)
        check_close("dX", result["data parallel"][1] * (1 + rank), each[rank][3])
        assert result["collectives"] == 2 and result["gathered"] == 0


@pytest.mark.parametrize("world", WORLDS)
def test_dtensors_of_logits(ranks, world):
    head, target = draw_head(WHOLE)
    x = (head.hidden @ head.weight.T).detach().requires_grad_()
    stats = softmax_stats(x, target)
    (grad,) = torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), x)
    expected = (stats.logprob.detach(), stats.entropy.detach(), grad)
    rows = torch.linspace(0, 1, 18).view(2, 9)
    loss = token_loss(x, target, entropy_weight=rows).loss
    of_loss = (loss.detach(), *torch.autograd.grad(loss, x))
    whole = linear_entropy_loss(head.hidden, head.weight, bias=head.bias)
    of_hidden = (whole.detach(), *torch.autograd.grad(whole, head.hidden))
    for result in results_of(ranks, world, "dtensors"):
        for name in ("logits", "logits, group given", "logits, replicated"):
            for got, value in zip(result[name], expected, strict=True):
                check_close(name, got, value)
        for got, value in zip(result["loss of logits"], of_loss, strict=True):
            check_close("loss", got, value)
        for got, value in zip(result["sequence parallel"], of_hidden, strict=True):
            check_close("sequence parallel", got, value)
        assert re.match("ValueError: logits must be sharded", result["logits cut elsewhere"])
        assert re.match("ValueError: bias must be sharded as weight", result["other bias"])
        assert re.match("ValueError: group must be the one over which", result["other group"])
