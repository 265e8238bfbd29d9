"""Results can be changed in place, touch no other and hold no other's memory."""

import pytest
import torch
import torch.distributed as dist
from helpers import FAST_IMPLS, IMPLS, random_logits, random_target, same_bits

import em_kernels
from em_kernels import (
    clip_cov_mask,
    high_entropy_mask,
    kl_cov_mask,
    linear_softmax_stats,
    linear_token_covariance,
    linear_token_loss,
    selective_log_softmax_and_entropy,
    softmax_stats,
    token_covariance,
    token_loss,
)
from em_kernels.backends.interface import OUTPUTS, ROW_OUTPUTS
from em_kernels.inference import AdaptiveTemperature, EntropyDescent

VOCAB, DIM = 11, 7
LEADS = ((3,), (1, 2, 2), ())


def inputs(lead, device):
    logits = random_logits(*lead, VOCAB, device=device)
    hidden = random_logits(*lead, DIM, device=device, scale=1.0)
    weight = random_logits(VOCAB, DIM, device=device, scale=1.0)
    return logits, hidden, weight, random_target(*lead, vocab=VOCAB, device=device)


def mask_of(kind, target):
    if kind == "all":
        return None
    mask = torch.zeros_like(target)
    if kind == "some":
        mask.view(-1)[::2] = 1
    return mask


def calls(lead, impl, device, mask="all", group=None):
    """name -> a function that gives {name: result} anew."""
    logits, hidden, weight, target = inputs(lead, device)
    options = dict(
        outputs=OUTPUTS, impl=impl, mask=mask_of(mask, target), group=group, temperature=0.9
    )
    rows = {"entropy_weight": torch.ones(lead, device=device)}
    rows["logprob_weight"] = -rows["entropy_weight"]

    def of_loss(loss):
        return {"loss": loss.loss, **loss.stats._asdict()}

    def grad(x):
        return x.clone().requires_grad_()

    def linear(f, **more):
        return f(grad(hidden), grad(weight), target, **more, **options)

    return {
        "softmax_stats": lambda: softmax_stats(grad(logits), target, **options)._asdict(),
        "no gradient": lambda: softmax_stats(logits, target, **options)._asdict(),
        "token_loss": lambda: of_loss(token_loss(grad(logits), target, **rows, **options)),
        "in place": lambda: of_loss(
            token_loss(grad(logits) * 1, target, inplace=True, **rows, **options)
        ),
        "linear_softmax_stats": lambda: linear(linear_softmax_stats)._asdict(),
        "linear_token_loss": lambda: of_loss(linear(linear_token_loss, **rows)),
    }


def check_own(results, *given):
    """Each result has a storage of its own size, that is no other's and none of `given`."""
    tensors = {name: x for name, x in results.items() if x is not None}
    for name, x in tensors.items():
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size(), name
        assert not x._is_view(), name
    places = [x.untyped_storage().data_ptr() for x in (*tensors.values(), *given)]
    assert len(set(places)) == len(places)


def change(x):
    """In place, whatever the dtype: one entry, then all."""
    if x.dim():
        x[..., -1] = 0
    return x.logical_not_() if x.dtype == torch.bool else x.mul_(2)


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("mask", ("all", "some", "none"))
@pytest.mark.parametrize("impl", IMPLS)
def test_each_result_is_its_own(impl, device, mask, lead):
    for call in calls(lead, impl, device, mask).values():
        check_own(call())


@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_a_change_touches_no_other(impl, device):
    for name, call in calls((2, 3), impl, device).items():
        results, before = call(), call()
        for changed in results:
            change(results[changed])
            for other in results:
                if other == changed:
                    assert not same_bits(results[other].detach(), before[other].detach())
                    before[other] = results[other].clone()
                assert same_bits(results[other].detach(), before[other].detach()), (name, other)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_changed_results(impl, device):
    """As after log_softmax and gather."""
    logits, hidden, weight, target = inputs((5,), device)
    head = weight.clone().requires_grad_()

    def penalty(logprob, entropy):
        logprob[0] = 0.0
        entropy[1:3].clamp_(max=0.1)
        logprob.mul_(entropy.detach())
        return (logprob.square() + entropy).sum()

    def defined(z):
        log_p = z.log_softmax(-1)
        logprob = log_p.gather(-1, target[:, None])[:, 0]
        return penalty(logprob, -(log_p.exp() * log_p).sum(-1))

    def ours(stats):
        return penalty(stats.logprob, stats.entropy)

    def gradient(f, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(f(x), x)[0]

    pairs = (
        (lambda z: ours(softmax_stats(z, target, impl=impl)), defined, logits),
        (lambda z: penalty(*selective_log_softmax_and_entropy(z, target)), defined, logits),
        (
            lambda x: ours(linear_softmax_stats(x, head, target, impl=impl)),
            lambda x: defined(x @ head.T),
            hidden,
        ),
    )
    for f, definition, x in pairs:
        right = gradient(definition, x)
        assert (gradient(f, x) - right).norm() < 1e-5 * right.norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_loss_is_divided_in_place(impl, device):
    """By the steps of gradient accumulation, or added to by `+=`."""
    logits, hidden, weight, _ = inputs((5,), device)
    for f, x in (
        (lambda x: em_kernels.entropy_loss(x, impl=impl), logits),
        (lambda x: em_kernels.linear_entropy_loss(x, weight, impl=impl), hidden),
    ):
        x = x.clone().requires_grad_()
        (whole,) = torch.autograd.grad(f(x), x)
        loss = f(x)
        loss /= 4
        loss += 1.0
        (part,) = torch.autograd.grad(loss, x)
        assert same_bits(part, whole / 4)


@pytest.mark.skipif("triton" not in IMPLS, reason="needs Triton")
@pytest.mark.parametrize("mask", ("all", "some", "none"))
def test_the_fused_product(mask):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, hidden, weight, target = inputs((2, 3), device)
    stats = linear_softmax_stats(
        hidden, weight, target, outputs=ROW_OUTPUTS, mask=mask_of(mask, target), fuse_product=True
    )
    check_own(stats._asdict())
    change(stats.logprob)


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("grouped", (False, True))
def test_covariance_and_selections(grouped, group):
    group = group if grouped else None
    _, hidden, weight, target = inputs((2, 3), "cpu")
    logprob, advantage, mask = torch.randn(2, 3), torch.randn(2, 3), torch.ones(2, 3).bool()
    results = {
        "covariance": token_covariance(logprob, advantage, mask, group=group),
        "linear": linear_token_covariance(hidden, weight, target, advantage, group=group),
        "clip_cov": clip_cov_mask(logprob, mask, lower=-9, upper=9, group=group),
        "kl_cov": kl_cov_mask(logprob, mask, group=group),
        "high_entropy": high_entropy_mask(logprob, mask, group=group),
    }
    check_own(results, logprob, advantage, mask)
    for result in results.values():
        change(result)


def test_over_a_group(group):
    for impl in ("reference", "auto"):
        for mask in ("all", "some", "none"):
            for call in calls((2, 3), impl, "cpu", mask, group).values():
                check_own(call())


def test_processors_of_scores():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        scores = random_logits(3, VOCAB, dtype=dtype)
        for processor in (EntropyDescent(), EntropyDescent(100.0), AdaptiveTemperature(100.0)):
            check_own({"scores": processor(None, scores)}, scores)
