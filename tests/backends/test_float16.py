"""float16: gradients of losses whose weights, 1 / N, are near the smallest number it holds."""

import pytest
import torch
from gpu_products import block_small_vocabularies, play_gpu
from helpers import ON_CPU, error, random_target

from em_kernels import (
    entropy_loss,
    linear_entropy_loss,
    linear_softmax_stats,
    linear_token_loss,
    token_loss,
)
from em_kernels.backends.interface import RowSpec, Upstream
from em_kernels.linear import products, vocab_blocks
from em_kernels.linear.half import power_of_two, upstream_scale

N, D, V = 32768, 8, 64
SCALE = 65536.0  # GradScaler's first; no float16 holds it
LIMIT = 1e-3
COMPILED = [name for name in ON_CPU if name != "triton"]  # its interpreter is slow


def drawn(rows=N, weight_scale=1.0):
    """float16 operands and targets, and their leaves in float64."""
    hidden = torch.randn(rows, D).half()
    weight = (weight_scale * torch.randn(V, D)).half()
    bias = torch.randn(V).half()
    half = [x.requires_grad_() for x in (hidden, weight, bias)]
    return half, [x.detach().double().requires_grad_() for x in half], random_target(rows, vocab=V)


def terms(z, target):
    """(logprob, entropy) by their textbook formulas."""
    log_p = torch.log_softmax(z, -1)
    return log_p.gather(-1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def mean_losses(name, half, wide, target, **options):
    """(ours, in float64): the mean of the entropy, or of it and the negative log-likelihood."""
    (x, w, b), (wide_x, wide_w, wide_b), count = half, wide, len(target)
    scale, temperature = options.get("logit_scale", 1.0), options.get("temperature", 1.0)
    logprob, entropy = terms((scale * wide_x @ wide_w.T + wide_b) / temperature, target)
    each = torch.full((count,), 1.0 / count)
    match name:
        case "linear_entropy_loss":
            return linear_entropy_loss(x, w, bias=b, **options), entropy.mean()
        case "linear_token_loss":
            weights = dict(entropy_weight=0.1 * each, logprob_weight=-each)
            ours = linear_token_loss(x, w, target, bias=b, **weights, **options).loss
        case "linear_softmax_stats":
            stats = linear_softmax_stats(x, w, target, bias=b, **options)
            ours = (0.1 * stats.entropy - stats.logprob).mean()
    return ours, (0.1 * entropy - logprob).mean()


def check_scaled(ours, half, truth, wide, factor=SCALE):
    """Gradients of factor * ours, divided by it in float64, against those of truth."""
    grads = torch.autograd.grad(factor * ours, half)
    for grad, exact in zip(grads, torch.autograd.grad(truth, wide), strict=True):
        assert grad.dtype == torch.float16
        assert error(grad.double() / factor, exact) < LIMIT


@pytest.mark.parametrize("chunk_tokens", (None, 10000), ids=("one", "chunks"))
@pytest.mark.parametrize(
    "name", ("linear_entropy_loss", "linear_token_loss", "linear_softmax_stats")
)
@pytest.mark.parametrize("impl", COMPILED)
def test_a_mean_over_many_tokens(impl, name, chunk_tokens):
    half, wide, target = drawn()
    ours, truth = mean_losses(name, half, wide, target, impl=impl, chunk_tokens=chunk_tokens)
    check_scaled(ours, half, truth, wide)


@pytest.mark.parametrize("impl", COMPILED)
@pytest.mark.parametrize("temperature, logit_scale", ((0.02, 1.0), (1.0, 30.0), (50.0, 0.1)))
def test_steep_and_flat_logits(impl, temperature, logit_scale):
    """The gradient by the logits is as steep as logit_scale / T."""
    half, wide, target = drawn(2048, weight_scale=temperature / logit_scale)
    half[2].data.zero_()
    wide[2].data.zero_()
    options = dict(impl=impl, temperature=temperature, logit_scale=logit_scale)
    ours, truth = mean_losses("linear_token_loss", half, wide, target, **options)
    check_scaled(ours, half, truth, wide, 256.0)


@pytest.mark.parametrize("of_gpu", (False, True), ids=("cpu", "gpu"))
@pytest.mark.parametrize("chunk_tokens", (None, 1000))
def test_sums_that_float16_does_not_hold(monkeypatch, of_gpu, chunk_tokens):
    """Scaled to 1024 and times hidden states of 8, a column of dW adds up to millions."""
    if of_gpu:
        play_gpu(monkeypatch)
    half, wide, target = drawn(4096)
    half[0].data.add_(8.0)
    wide[0].data.copy_(half[0])
    options = dict(impl="reference", chunk_tokens=chunk_tokens, logits_dtype=torch.float32)
    ours, truth = mean_losses("linear_token_loss", half, wide, target, **options)
    check_scaled(ours, half, truth, wide, 256.0)


@pytest.mark.parametrize("name", ("linear_entropy_loss", "linear_token_loss"))
def test_without_a_loss_scale_what_float16_holds_is_right(name):
    half, wide, target = drawn(512)
    ours, truth = mean_losses(name, half, wide, target, impl="reference")
    grads = torch.autograd.grad(ours, half[1:])
    for grad, exact in zip(grads, torch.autograd.grad(truth, wide[1:]), strict=True):
        assert error(grad, exact) < LIMIT


@pytest.mark.parametrize("inplace", (False, True), ids=("", "inplace"))
@pytest.mark.parametrize("impl", COMPILED)
def test_logits(impl, inplace):
    """The gradient stays scaled in 16 bits until the loss scale arrives."""
    logits = torch.randn(N, V).half()
    exact, target = logits.double().requires_grad_(), random_target(N, vocab=V)
    logprob, entropy = terms(exact, target)
    each = torch.full((N,), 1.0 / N)
    leaf = logits.requires_grad_()
    weights = dict(entropy_weight=0.1 * each, logprob_weight=-each)
    x = leaf * 1 if inplace else leaf
    ours = token_loss(x, target, inplace=inplace, impl=impl, **weights).loss
    check_scaled(ours, (leaf,), (0.1 * entropy - logprob).mean(), (exact,))
    ours = entropy_loss(logits.detach().requires_grad_(), impl=impl)
    assert error(ours, entropy.mean()) < 1e-6


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_a_retained_graph_takes_any_loss_scale(dtype):
    """A factor is not rounded to 16 bits: 65536 is infinite in float16, and 1/3 is in neither."""
    x = torch.randn(64, V).to(dtype).requires_grad_()
    weight = torch.randn(V, V).to(dtype).requires_grad_()
    for loss, leaf in ((entropy_loss(x), x), (linear_entropy_loss(x, weight), weight)):
        (unit,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        for factor in (SCALE, 1 / 3):
            first, again = (
                torch.autograd.grad(factor * loss, leaf, retain_graph=True)[0] for _ in range(2)
            )
            (last,) = torch.autograd.grad(loss * factor, leaf, retain_graph=True)
            assert torch.equal(first, again) and torch.equal(first, last)
            assert error(first, factor * unit.double()) < torch.finfo(dtype).eps


def test_a_grad_scaler():
    """The whole way of mixed precision: autocast, a scaled loss, float32 gradients unscaled."""
    hidden, weight = torch.randn(N, D), torch.randn(V, D)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    optimizer = torch.optim.SGD(leaves, lr=1.0)
    with torch.autocast("cpu", torch.float16):
        loss = linear_entropy_loss(*leaves)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    exact = [x.half().double().requires_grad_() for x in (hidden, weight)]
    z = exact[0] @ exact[1].T
    truth = terms(z, torch.zeros(N, dtype=torch.int64))[1].mean()
    for x, grad in zip(leaves, torch.autograd.grad(truth, exact)):
        assert x.grad.dtype == torch.float32 and error(x.grad, grad) < LIMIT


def test_compiled():
    half, _, target = drawn(4096)
    logits = torch.randn(4096, V).half().requires_grad_()
    each = torch.full((4096,), 1 / 4096)

    def function(x, w, logits):
        loss = linear_token_loss(x, w, target, logprob_weight=-each, impl="reference").loss
        return loss + token_loss(logits, target, logprob_weight=-each, impl="reference").loss

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    inputs = (*half[:2], logits)
    ours = torch.autograd.grad(SCALE * compiled(*inputs), inputs)
    theirs = torch.autograd.grad(SCALE * function(*inputs), inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype == torch.float16 and error(a, b) < LIMIT
    exact = logits.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(-terms(exact, target)[0].mean(), exact)
    assert error(ours[2].double() / SCALE, truth) < LIMIT


def test_second_derivatives():
    half, wide, _ = drawn(256)
    upstream = torch.randn(V, D).double()

    def second(x, w, loss):
        (grad,) = torch.autograd.grad(loss, w, create_graph=True)
        return torch.autograd.grad((grad.double() * upstream).sum(), (x, w))

    ours = second(*half[:2], 64.0 * linear_entropy_loss(*half[:2], impl="reference"))
    z = wide[0] @ wide[1].T
    truth = second(*wide[:2], 64.0 * terms(z, torch.zeros(256, dtype=torch.int64))[1].mean())
    for a, b in zip(ours, truth, strict=True):
        assert error(a, b) < 2e-3


def test_rows_that_do_not_count_have_no_part_in_the_scale():
    half, _, target = drawn(4096)
    weights, mask = torch.full((4096,), 1.0 / 4096), torch.arange(4096) % 2 > 0
    weights[::2] = 1e30
    weights[2::4] = torch.nan
    ours = linear_token_loss(
        *half[:2], target, logprob_weight=-weights, mask=mask, outputs=(), impl="reference"
    )
    plain = linear_token_loss(
        half[0][1::2], half[1], target[1::2], logprob_weight=-weights[1::2], impl="reference"
    )
    for a, b in zip(*(torch.autograd.grad(x.loss * SCALE, half[:2]) for x in (ours, plain))):
        assert a.isfinite().all() and error(a, b) < 1e-6


def test_the_scale_is_a_power_of_two():
    tiny = torch.finfo(torch.float32).tiny
    for size in (1.0, 0.75, 1 / 32768, 3e30, tiny, 1e-45):
        scale = power_of_two(torch.tensor(size)).item()
        assert scale.hex().startswith("0x1.0000000000000p")
        assert size < tiny or 2**10 <= size * scale < 2**11 or scale in (2.0**126, 2.0**-126)
    assert power_of_two(torch.tensor(0.0)) == 1
    spec = RowSpec(mask=torch.tensor([True, True, True, False]), temperature=0.5)
    weights = torch.tensor([torch.nan, torch.inf, -0.125, 8.0])
    assert upstream_scale(Upstream(weights), spec, torch.float16, 1) == 2.0**12
    assert upstream_scale(Upstream(weights[:0]), RowSpec(), torch.float16, 1) == 1
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert upstream_scale(Upstream(weights), spec, dtype, 1) is None


@pytest.fixture
def refusing(monkeypatch):
    def mm(a, b, *, out_dtype=None, out=None):
        if out_dtype is not None:
            raise RuntimeError("out_dtype is not supported")
        return plain(a, b, out=out)

    plain = torch.mm
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(products, "is_gpu", lambda x: True)
    monkeypatch.setattr(products, "BLOCK", 40)
    for probe in (products.multiplies_to_float32, products.adds_to_float32):
        probe.cache_clear()
    yield
    for probe in (products.multiplies_to_float32, products.adds_to_float32):
        probe.cache_clear()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("shape", ((3, 130, 5), (130, 7, 5), (3, 7, 130)))
def test_products_that_refuse_to_widen_are_made_of_casts(refusing, dtype, shape):
    rows, inner, columns = shape
    a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
    out = torch.full((rows, columns), torch.nan)
    products.mm_wide(a, b, out)
    assert error(out, a.double() @ b.double()) < 1e-6


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_losses_where_products_refuse_to_widen(refusing, dtype):
    x, weight = torch.randn(100, D).to(dtype), torch.randn(V, D).to(dtype)
    leaves = [t.requires_grad_() for t in (x, weight)]
    loss = linear_entropy_loss(*leaves, impl="reference", chunk_tokens=30)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    truth = terms(exact[0] @ exact[1].T, torch.zeros(100, dtype=torch.int64))[1].mean()
    assert error(loss, truth) < 1e-5
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, exact)):
        assert error(a, b) < {torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]


def test_what_products_can_do_is_tried_anew_with_another_setting(monkeypatch):
    settings = torch.backends.cuda.matmul
    tried = products.TriedOnce(lambda total, operand: seen.append(operand.dtype))
    seen, arguments = [], (torch.device("cpu"), torch.float16)
    assert tried(*arguments) and tried(*arguments) and len(seen) == 1
    before = settings.allow_fp16_accumulation
    try:
        settings.allow_fp16_accumulation = not before
        assert tried(*arguments) and len(seen) == 2
    finally:
        settings.allow_fp16_accumulation = before


@pytest.mark.parametrize("masked", (False, True), ids=("", "masked"))
def test_blocks_of_the_vocabulary(monkeypatch, masked):
    """Where they are outermost: a block of dW adds up to more than float16 holds, scaled."""
    block_small_vocabularies(monkeypatch)
    play_gpu(monkeypatch)
    rows, vocab = 96, 301
    x = (torch.randn(rows, D) + 100.0).half().requires_grad_()
    w = (0.01 * torch.randn(vocab, D)).half().requires_grad_()
    target, mask = torch.zeros(rows, dtype=torch.int64), torch.arange(rows) % 3 > 0
    each = torch.full((rows,), 2.0**-18)
    upstream = torch.where(mask, each, torch.nan if masked else 2.0**-18)
    given = dict(mask=mask) if masked else {}
    seen = []
    grad = vocab_blocks.grad
    monkeypatch.setattr(vocab_blocks, "grad", lambda *args: seen.append(1) or grad(*args))
    stats = linear_softmax_stats(x, w, target, impl="reference", chunk_tokens=40, **given)
    ours = torch.autograd.grad(stats.logprob, (x, w), upstream)
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    logprob, _ = terms(exact[0] @ exact[1].T, target)
    truth = (2.0**-18 * logprob * (mask if masked else 1)).sum()
    refs = torch.autograd.grad(truth, exact)
    assert seen == [1]
    for out, ref in zip(ours, refs, strict=True):
        # Entries below 6e-5 have fewer digits in the results themselves.
        assert out.isfinite().all() and (out - ref).abs().max() < 2.0**-24 + 1e-3 * ref.abs().max()


@pytest.mark.parametrize("of_gpu", (False, True), ids=("cpu", "gpu"))
def test_columns_that_are_left_out(monkeypatch, of_gpu):
    """The threshold of `filter_eps` is relative to the weights, whatever their scale."""
    if of_gpu:
        play_gpu(monkeypatch)
    half, _, target = drawn(2048, weight_scale=6.0)
    each = torch.full((2048,), 1.0 / 2048)
    options = dict(filter_eps=0.02, chunk_tokens=8, outputs=(), impl="reference")
    grads = []
    for factor in (1.0, 2.0**-14):
        loss = linear_token_loss(*half[:2], target, entropy_weight=factor * each, **options).loss
        grads.append(torch.autograd.grad(64.0 / factor * loss, half[:2]))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b) and (a != 0).any()
