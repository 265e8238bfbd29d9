"""The head over Megatron's tensor parallelism in gloo processes: TP 2 and 4, sequence parallel or
not, against one process, against verl's own kernels and through verl's own callers."""

import functools
import importlib.util
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import verl_source
from distributed import run_on_ranks
from helpers import error
from megatron_mappings import Copy, Gather, Weights, backbone, draw_weights

from em_kernels import linear_entropy_loss, linear_softmax_stats, linear_token_loss
from em_kernels.integrations import verl as integration
from em_kernels.integrations._arguments import HeadSettings

TEMPERATURE = 0.7
TP = (2, 4)
HAS_VERL = importlib.util.find_spec("verl") is not None
needs_verl = pytest.mark.skipif(not HAS_VERL, reason="verl is not installed")
PARTIAL = dict(temperature=TEMPERATURE, allreduce_dgrad=False)


def upstream():
    return torch.linspace(-1, 1, 8, dtype=torch.float64), torch.linspace(1, 2, 8).double()


def weighed(logprob, entropy):
    for_logprob, for_entropy = (g.to(logprob.dtype) for g in upstream())
    return (for_logprob * logprob + for_entropy * entropy).sum()


def by_verl(hidden, weight, labels, group):
    return weighed(
        *integration.linear_cross_entropy(hidden, weight, labels, TEMPERATURE, "none", group)
    )


def by_stats(hidden, weight, labels, group):
    return weighed(*linear_softmax_stats(hidden, weight, labels, group=group, **PARTIAL)[:2])


def by_token_loss(hidden, weight, labels, group):
    for_logprob, for_entropy = upstream()
    weights = dict(logprob_weight=for_logprob, entropy_weight=for_entropy)
    return linear_token_loss(hidden, weight, labels, group=group, **weights, **PARTIAL).loss


def by_entropy_loss(hidden, weight, labels, group):
    return linear_entropy_loss(hidden, weight, group=group, reduction=1.0, **PARTIAL)


def summed(hidden, weight, labels, group):
    return weighed(
        *linear_softmax_stats(hidden, weight, labels, group=group, temperature=TEMPERATURE)[:2]
    )


HEADS = {f.__name__: f for f in (by_verl, by_stats, by_token_loss, by_entropy_loss, summed)}
CELLS = [f"{head}|{tp}|{sp}" for head in HEADS for tp in TP for sp in ("sp", "no sp")]
CALLERS = [f"{name}|{tp}|sp" for name in ("hook", "legacy") for tp in TP] if HAS_VERL else []
ALONE = ("kernels", "collectives", "frozen")
OTHERS = [f"{name}|{tp}|" for name in ALONE for tp in TP]


@functools.cache
def group_of(tp):
    """This rank's tensor-parallel group; every rank must ask for each."""
    groups = [dist.new_group(list(range(i, i + tp))) for i in range(0, dist.get_world_size(), tp)]
    return groups[dist.get_rank() // tp]


def problem():
    torch.manual_seed(0)
    return draw_weights(), torch.randint(0, 256, (8,))


def run_case(name):
    """In one of the processes."""
    head, tp, mode = name.split("|")
    group = group_of(int(tp))
    if head in ("hook", "legacy"):
        return caller_case(head, group)
    if head in ALONE:
        cases = (kernels_case, collectives_case, frozen_case)
        return dict(zip(ALONE, cases, strict=True))[head](group)
    weights, labels = problem()
    sp = mode == "sp"
    own = weights.own(group, sp)
    hidden = backbone(own, group, sp)
    if sp:
        hidden = Gather.apply(hidden, group, head != "summed")
    elif head != "summed":
        hidden = Copy.apply(hidden, group)
    return gradients(HEADS[head](hidden, own.head, labels, group), own, group if sp else None)


def gradients(loss, own, group):
    grads = Weights(*torch.autograd.grad(loss, own))
    if group is not None:  # as Megatron does for the parameters every sequence-parallel rank has
        dist.all_reduce(grads.norm, group=group)
    return loss.detach(), grads


def caller_case(mode, group):
    """verl's two callers, after the switch: with sequence parallelism the whole model; without
    it the caller returns what it is given, so only hidden states."""
    weights, labels = problem()
    with pytest.MonkeyPatch.context() as patch:
        verl_source.load(patch)
        fused = verl_source.load_fused_forward(
            patch, gather=lambda x: Gather.apply(x, group), group=lambda: group
        )
        integration.apply_to_verl()
        try:
            own = weights.own(group, True)
            output = call(fused, mode, backbone(own, group, True), own.head, labels, True)
            whole_model = gradients(weighed(output.log_probs, output.entropy), own, group)
            hidden = backbone(weights).detach().requires_grad_()
            output = call(fused, mode, hidden, own.head, labels, False)
            share = torch.autograd.grad(weighed(output.log_probs, output.entropy), hidden)[0]
            dist.all_reduce(share, group=group)
        finally:
            integration.remove_from_verl()
    return *whole_model, share


def call(fused, mode, hidden, weight, labels, sequence_parallel):
    config = SimpleNamespace(sequence_parallel=sequence_parallel)
    if mode == "hook":
        return fused.fused_output_processor(
            hidden_states=hidden,
            output_layer=None,
            output_weight=weight,
            labels=labels,
            context=fused.FusedOutputProcessorContext(TEMPERATURE),
            config=config,
        )
    model = SimpleNamespace(
        config=config,
        post_process=True,
        output_layer=SimpleNamespace(weight=weight),
        _preprocess=lambda **_: (hidden, None, None, None, None),
        decoder=lambda hidden_states, **_: hidden_states,
    )
    return fused._fused_GPTModel_forward(
        model, None, None, None, labels=labels, temperature=TEMPERATURE
    )


def kernels_case(group):
    """(this package's, verl's) results and gradients of this rank."""
    if not HAS_VERL or dist.get_rank() != dist.get_rank(group):  # one group is enough
        return None
    os.environ["TRITON_INTERPRET"] = "1"
    weights, labels = problem()
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    both = []
    with pytest.MonkeyPatch.context() as patch:
        theirs = verl_source.load_kernels(patch)
        for head in (integration.linear_cross_entropy, theirs):
            hidden = backbone(weights).float().requires_grad_()
            part = weights.head.float().chunk(world)[rank].clone().requires_grad_()
            logprob, entropy = head(hidden, part, labels, TEMPERATURE, "none", group)
            grads = torch.autograd.grad(weighed(logprob, entropy), (hidden, part))
            both.append([logprob.detach(), entropy.detach(), *grads])
    return both


def collectives_case(group):
    """How often a call sums over the ranks, partial and not."""
    weights, labels = problem()
    own = weights.own(group, False)
    hidden, counts = weights.x.clone().requires_grad_(), []
    for head in (by_verl, by_token_loss, summed):
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
            head(hidden, own.head, labels, group).backward()
        counts.append(all_reduce.call_count)
    return counts


def logprob_of_frozen(weight, labels, group):
    """(log-probabilities, gradient of the hidden states), one label outside of the vocabulary."""
    hidden = backbone(problem()[0]).detach().requires_grad_()
    labels[3] = -7
    logprob, _ = integration.linear_cross_entropy(
        hidden, weight.detach(), labels, TEMPERATURE, "none", group
    )
    return logprob.detach(), *torch.autograd.grad(logprob, hidden, upstream()[0])


def frozen_case(group):
    """As with LoRA, and with a number as the entropy; the share of this rank."""
    weights, labels = problem()
    settings = HeadSettings(entropy_requires_grad=False)
    with mock.patch.object(integration, "_settings", settings):
        return logprob_of_frozen(weights.own(group, False).head, labels, group)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_on_ranks(4, run_case, CELLS + CALLERS + OTHERS, tmp_path_factory.mktemp("ranks"))


def results_of(ranks, name):
    for result in ranks[name]:
        assert not isinstance(result, str) or not result.startswith("Traceback"), result
    return ranks[name]


def whole(head=by_stats):
    """(loss, gradients, gradient of the hidden states) in one process."""
    weights, labels = problem()
    own = weights.leaves()
    hidden = backbone(own)
    loss = head(hidden, own.head, labels, None)
    *grads, of_hidden = torch.autograd.grad(loss, (*own, hidden))
    return loss.detach(), Weights(*grads), of_hidden


def check_model(results, tp, sp, expected):
    loss, grads = expected[:2]
    for rank, (got_loss, got, *_) in enumerate(results):
        index = rank % tp
        assert error(got_loss, loss) < 1e-12
        x = grads.x.chunk(tp)[index] if sp else grads.x
        assert error(got.x, x) < 1e-12
        assert error(got.norm, grads.norm) < 1e-12
        assert error(got.up, grads.up.chunk(tp)[index]) < 1e-12
        assert error(got.down, grads.down.chunk(tp, 1)[index]) < 1e-12
        assert error(got.head, grads.head.chunk(tp)[index]) < 1e-12


@pytest.mark.parametrize("name", CELLS)
def test_the_whole_models_gradient_is_that_of_one_process(ranks, name):
    head, tp, mode = name.split("|")
    check_model(results_of(ranks, name), int(tp), mode == "sp", whole(HEADS[head]))


@needs_verl
@pytest.mark.parametrize("name", CALLERS or ["none"])
def test_through_verls_callers(ranks, name):
    results = results_of(ranks, name)
    expected = whole()
    check_model(results, int(name.split("|")[1]), True, expected)
    for *_, total in results:
        assert error(total, expected[2]) < 1e-12


@needs_verl
@pytest.mark.parametrize("tp", TP)
def test_each_ranks_gradients_are_those_of_verls_own_kernels(ranks, tp):
    pytest.importorskip("triton")
    results = results_of(ranks, f"kernels|{tp}|")
    for ours, theirs in results[:tp]:
        for a, b in zip(ours, theirs, strict=True):
            assert error(a, b) < 1e-5
    shares = [ours[2] for ours, _ in results[:tp]]
    assert error(shares[0], shares[1]) > 0.1
    assert error(sum(shares), whole()[2]) < 1e-5


@pytest.mark.parametrize("tp", TP)
def test_a_frozen_head_and_an_entropy_that_is_a_number(ranks, tp):
    weights, labels = problem()
    logprob, grad = logprob_of_frozen(weights.head, labels, None)
    results = results_of(ranks, f"frozen|{tp}|")
    assert all(error(own, logprob) < 1e-12 for own, _ in results)
    assert error(sum(share for _, share in results[:tp]), grad) < 1e-12


@pytest.mark.parametrize("tp", TP)
def test_a_partial_gradient_costs_no_collective(ranks, tp):
    assert results_of(ranks, f"collectives|{tp}|") == [[0, 0, 1]] * 4


@pytest.mark.parametrize("call", (linear_softmax_stats, linear_entropy_loss))
def test_allreduce_dgrad_must_be_a_bool_and_is_nothing_without_a_group(call):
    weights, _ = problem()
    with pytest.raises(TypeError, match="allreduce_dgrad must be a bool, got int"):
        call(weights.x, weights.head, allreduce_dgrad=0)
    plain, partial = (
        call(weights.x, weights.head, **kw) for kw in ({}, PARTIAL | {"temperature": 1.0})
    )
    if call is linear_entropy_loss:
        assert torch.equal(plain, partial)
    else:
        assert torch.equal(plain.entropy, partial.entropy)


def test_a_dtensor_has_its_gradient_summed():
    hidden = torch.randn(2, 3)
    hidden.device_mesh = None  # what a DTensor is known by
    with pytest.raises(ValueError, match=r"allreduce_dgrad must be True for a hidden .* DTensor"):
        linear_token_loss(hidden, torch.randn(5, 3), allreduce_dgrad=False)
