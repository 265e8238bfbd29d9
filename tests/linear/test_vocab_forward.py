"""The forward pass with the vocabulary outermost, where the backend goes through rows in parts."""

from itertools import pairwise

import pytest
import torch
from helpers import (
    error,
    gradient,
    make_linear,
    product_flops,
    random_target,
    random_upstream,
    rows_of_entropy,
    same_bits,
    truth,
)

from em_kernels import linear_softmax_stats, linear_token_loss
from em_kernels.backends.choice import backend
from em_kernels.backends.interface import ROW_OUTPUTS, RowSpec, Upstream
from em_kernels.linear import chunking, chunks, products
from em_kernels.linear.plan import Linear, Needs

pytest.importorskip("em_kernels._C")
pytestmark = pytest.mark.usefixtures("nan_filled_memory")
N, D, V = 13, 16, 301
CHUNK = 3  # rows of logits that the memory holds: 69 columns of all rows, or blocks of 64
PRODUCT = 2 * N * D * V
WIDE = (torch.float32, torch.float64)
TRANSFORMS = {
    "plain": {},
    "softcap": dict(softcap=4.0, logit_scale=0.7),
    "temperatures": dict(temperature=torch.linspace(0.5, 2, N)),
    "valid_vocab": dict(valid_vocab=V - 40, temperature=0.7),
}


@pytest.fixture
def cpu():
    """The one that calls are served by now: tests of the choice have it loaded anew."""
    return backend("cpu", torch.device("cpu"))


@pytest.fixture
def parts(cpu, monkeypatch):
    """Blocks of multiples of 8 columns; the shapes of the products of logits that were run."""
    monkeypatch.setattr(cpu, "part_entries", 8)
    shapes, multiply = [], products.multiply

    def seen(x, weight, out, backend):
        shapes.append((len(x), len(weight)))
        multiply(x, weight, out, backend)

    monkeypatch.setattr(products, "multiply", seen)
    return shapes


def leaves(dtype=torch.float32, n=N):
    hidden, weight = make_linear(n, dim=D, vocab=V, dtype=dtype)
    return hidden, weight, torch.randn(V).to(dtype).requires_grad_()


def stats_of(hidden, weight, target=None, **options):
    return linear_softmax_stats(
        hidden, weight, target, **{"chunk_tokens": CHUNK, "impl": "cpu", **options}
    )


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("masked", (False, True), ids=("", "masked"))
def test_statistics_and_gradients(parts, dtype, transform, masked):
    transform = TRANSFORMS[transform]
    valid = transform.get("valid_vocab", V)
    *inputs, bias = leaves(dtype)
    target, upstream = random_target(N, vocab=valid), random_upstream(N, dtype=dtype)
    mask = torch.arange(N) % 4 > 0 if masked else torch.ones(N, dtype=torch.bool)
    stats = stats_of(*inputs, target, bias=bias, outputs=ROW_OUTPUTS, mask=mask, **transform)
    wide = [x.detach().double().requires_grad_() for x in (*inputs, bias)]
    exact = truth(wide[0] @ wide[1].T, target, bias=wide[2], **transform)
    slack = 1e-6 if dtype == torch.float32 else 1e-13
    for name, want in ((name, exact[name]) for name in ROW_OUTPUTS):
        got = getattr(stats, name)
        assert error(got, torch.where(mask, want, 0)) < slack, name
        assert (got[~mask] == 0).all()
    given = {name: torch.where(mask, g, 0) for name, g in upstream.items()}
    grads = gradient(stats._asdict(), given, *inputs, bias)
    refs = gradient(exact, given, *wide)
    rows = int(mask.sum())
    assert set(parts) == {(rows, columns) for _, columns in parts} and len(parts) > 2
    for out, ref in zip(grads, refs, strict=True):
        assert out.dtype == dtype and out.is_contiguous()
        assert error(out, ref) < 5 * slack
    assert (grads[1][valid:] == 0).all() and (grads[0][~mask] == 0).all()


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("dtype", WIDE)
def test_the_bits_are_those_of_whole_rows(cpu, dtype, threads):
    """Blocks begin where the kernel's own do, and these products are exact."""
    torch.manual_seed(1)
    vocab, rows = 3 * cpu.part_entries + 77, 5
    hidden = torch.randint(-4, 5, (rows, 4)).to(dtype)
    weight = torch.randint(-4, 5, (vocab, 4)).to(dtype) / 8
    weight[torch.tensor([9, 5000, vocab - 1])] = 2  # one maximum, in three blocks
    target = torch.tensor([5000, 9, 0, vocab - 1, 8191])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = stats_of(hidden, weight, target, outputs=ROW_OUTPUTS, chunk_tokens=rows)
        for chunk in (2, 3, 4):
            blocks = stats_of(hidden, weight, target, outputs=ROW_OUTPUTS, chunk_tokens=chunk)
            made = len(ROW_OUTPUTS)
            assert all(map(same_bits, blocks[:made], whole[:made])), chunk
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("masked", (False, True), ids=("", "masked"))
@pytest.mark.parametrize("needs", ("both", "hidden", "weight"))
@pytest.mark.parametrize("n, chunk", ((N, CHUNK), (40, 1)))
def test_whatever_is_kept_the_bits_are_the_same(parts, masked, needs, n, chunk):
    hidden, weight, bias = leaves(n=n)
    target, mask = random_target(n, vocab=V), torch.arange(n) % 4 > 0 if masked else None
    inputs = {"both": (hidden, weight), "hidden": (hidden,), "weight": (weight,)}[needs]
    arguments = [x if any(x is y for y in inputs) else x.detach() for x in (hidden, weight)]

    def results(keep):
        options = dict(mask=mask, keep_logits=keep, chunk_tokens=chunk)
        stats = stats_of(*arguments, target, bias=bias.detach(), **options)
        total = (stats.entropy + 2 * stats.logprob).sum()
        again = [torch.autograd.grad(total, inputs, retain_graph=True) for _ in range(2)]
        return stats.entropy.detach(), *again[0], *again[1]

    want = results(0)
    forward, backward = parts[: len(parts) // 3], parts[len(parts) // 3 :]
    assert forward * 2 == backward and len(forward) >= 4
    for keep in (None, 1, 6 * V * 4, n * V * 4, 1 << 40):
        assert all(map(same_bits, results(keep), want)), keep


@pytest.mark.parametrize("rows, columns", ((0, 0), (2, 0), (3, 64), (6, 120), (12, 240), (N, V)))
def test_columns_that_are_kept_cost_no_product_again(parts, rows, columns):
    """As many whole blocks of all rows as there is room for: 64, 56, 64, 56 and 61 columns."""
    hidden, weight, _ = leaves()

    def run():
        stats_of(
            hidden, weight, keep_logits=rows * 304 * 4, outputs=("entropy",)
        ).entropy.sum().backward()

    assert product_flops(run) == 4 * PRODUCT - 2 * N * D * columns


def test_a_block_is_kept_by_default(parts, monkeypatch):
    """Also where it takes the last byte of the memory of a chunk, which no whole row does."""
    monkeypatch.setattr(chunking, "CPU_WORKSPACE_BYTES", 4 * N * 64 + 4)
    monkeypatch.setattr(chunking, "CPU_TILE_ROWS", 1)
    hidden, weight, _ = leaves()

    def run():
        stats = stats_of(hidden, weight, outputs=("entropy",), chunk_tokens=None)
        stats.entropy.sum().backward()

    assert product_flops(run) == 4 * PRODUCT - 2 * N * D * 64
    assert {rows for rows, _ in parts} == {N}


SOURCES = {
    "logprob": dict(outputs=("max_prob", "logprob")),
    "lse": dict(outputs=("lse", "collision")),
    "entropy as a number": dict(entropy_requires_grad=False),
}


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("masked", (False, True), ids=("", "masked"))
def test_a_frozen_head(parts, dtype, source, transform, masked):
    """Two products, in blocks of all rows, and the gradient of four."""
    options, transform = SOURCES[source], TRANSFORMS[transform]
    name = "lse" if source == "lse" else "logprob"
    hidden, weight, bias = leaves(dtype)
    weight, bias = weight.detach(), bias.detach()
    target = random_target(N, vocab=transform.get("valid_vocab", V))
    mask = torch.arange(N) % 4 > 0 if masked else torch.ones(N, dtype=torch.bool)
    upstream = {name: torch.where(mask, random_upstream(N, dtype=dtype)[name], 0)}
    options = dict(options, bias=bias, mask=mask, **transform)
    got = []

    def run():
        stats = stats_of(hidden, weight, target, **options)
        got.append((stats, *gradient(stats._asdict(), upstream, hidden)))

    flops = product_flops(run)
    rows, columns = int(mask.sum()), transform.get("valid_vocab", V)
    assert flops == 2 * 2 * rows * D * columns
    assert len(parts) > 2 and {count for count, _ in parts} == {rows}
    wide = hidden.detach().double().requires_grad_()
    exact = truth(wide @ weight.double().T, target, bias=bias.double(), **transform)
    ((stats, out),) = got
    slack = 1e-6 if dtype == torch.float32 else 1e-13
    assert error(getattr(stats, name), torch.where(mask, exact[name], 0)) < slack
    assert out.dtype == dtype
    assert error(out, *gradient(exact, upstream, wide)) < 5 * slack
    assert (out[~mask] == 0).all()


@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_a_nearly_certain_target_keeps_its_digits(parts, temperature):
    """dX is (1 - p_y) times a difference of rows of the weight, row by row."""
    entropies = torch.logspace(-9, 0, N)
    logits = rows_of_entropy(entropies, V)
    hidden = torch.eye(N).requires_grad_()
    weight, target = logits.T.contiguous(), logits.argmax(1)
    stats = stats_of(
        hidden,
        weight,
        target,
        outputs=("logprob",),
        temperature=temperature,
        logit_scale=temperature,
    )
    (got,) = torch.autograd.grad(stats.logprob.sum(), hidden)
    wide = torch.eye(N).double().requires_grad_()
    exact = truth(wide @ weight.double().T, target)["logprob"]
    (want,) = torch.autograd.grad(exact.sum(), wide)
    for i in range(N):
        assert error(got[i], want[i]) < 1e-5, entropies[i]
        assert error(stats.logprob[i], exact[i]) < 2e-6, entropies[i]


@pytest.mark.parametrize("source", ("logprob", "lse"))
def test_rows_that_begin_without_a_finite_logit(parts, source):
    """-inf has probability 0 in any block; NaN and +inf make the row NaN, and no other."""
    torch.manual_seed(2)
    logits = 50 * torch.randn(6, V)
    logits[0, :100] = -torch.inf
    logits[1, 100:] = -torch.inf
    logits[2] = -torch.inf
    logits[3, 7], logits[4, 250] = torch.nan, torch.inf
    bias_rows = logits.T.contiguous()
    target = torch.tensor([200, 3, 5, 5, 5, 300])
    options = dict(outputs=(source,), impl="cpu")

    def run(i, chunk):
        """Row i of the logits, in the bias; two rows of hidden, for a chunk of one."""
        hidden = torch.randn(3, D, generator=torch.Generator().manual_seed(i)).requires_grad_()
        weight = torch.randn(V, D, generator=torch.Generator().manual_seed(9))
        labels = target[i].repeat(3)
        stats = linear_softmax_stats(
            hidden, weight, labels, bias=bias_rows[:, i], chunk_tokens=chunk, **options
        )
        value = getattr(stats, source)
        return value.detach(), torch.autograd.grad(value.sum(), hidden)[0]

    for i in range(6):
        parts.clear()
        got, want = run(i, 1), run(i, 3)
        assert len(parts) > 4
        for a, b in zip(got, want):
            assert torch.equal(a.isnan(), b.isnan()) and b.isnan().any() == (i in (2, 3, 4))
            assert error(a.nan_to_num(), b.nan_to_num()) < 1e-5


@pytest.mark.parametrize("softcap", (None, 4.0))
@pytest.mark.parametrize("temperature", (1.0, 0.7, 1e-3))
def test_a_target_that_is_excluded(parts, temperature, softcap):
    """Its logprob is -inf; the gradient is what it is of whole rows: that of the target's x, and
    less a mean."""
    hidden, weight, bias = leaves(torch.float64)
    target, bias = random_target(N, vocab=V), bias.detach()
    bias[target[0]] = -torch.inf
    options = dict(bias=bias, outputs=("logprob",), temperature=temperature, softcap=softcap)

    def run(chunk):
        stats = stats_of(hidden, weight.detach(), target, chunk_tokens=chunk, **options)
        assert stats.logprob[0] == -torch.inf
        return torch.autograd.grad(stats.logprob, hidden, torch.ones_like(stats.logprob))[0]

    want, got = run(N), run(CHUNK)
    assert want.isfinite().all() and len(parts) > 2
    assert error(got, want) < 1e-9


def test_a_loss_without_a_gradient_makes_none(cpu, parts):
    hidden, weight, _ = (x.detach() for x in leaves())
    linear, spec = Linear.of(hidden, weight, CHUNK, None), RowSpec(valid_vocab=V)
    *rows, grad, _, _ = chunks.loss(linear, spec, Upstream(lse=torch.ones(N)), (), Needs(), cpu)
    assert grad.numel() == 0 and all(len(row) == N for row in rows)


def test_a_vocabulary_of_a_single_block_is_cut_into_chunks_of_rows(cpu, parts, monkeypatch):
    """As many as are asked for, where blocks of two tiles would hold fewer."""
    monkeypatch.setattr(cpu, "part_entries", 256)
    hidden, weight, _ = leaves(n=250)
    stats_of(hidden, weight, outputs=("entropy",), chunk_tokens=100).entropy.sum().backward()
    assert set(parts) == {(100, V), (50, V)}


@pytest.mark.parametrize(
    "tile, keep", ((16, 0), (16, 6 * V * 4), (16, 1 << 40), (1 << 20, 0), (1 << 20, 1 << 40))
)
def test_rows_of_logits_begin_with_a_cache_line(cpu, monkeypatch, tile, keep):
    """Or a product, of a weight (V, D) stored as (D, V), could have other bits in backward."""
    monkeypatch.setattr(cpu, "part_entries", tile)
    places, multiply = [], products.multiply

    def seen(x, weight, out, backend):
        places.append(out.data_ptr() % 64 + out.stride(0) * out.itemsize % 64)
        multiply(x, weight, out, backend)

    monkeypatch.setattr(products, "multiply", seen)
    hidden, weight, _ = leaves()
    stats_of(hidden, weight, outputs=("entropy",), keep_logits=keep).entropy.sum().backward()
    assert len(places) > 3 and not any(places)


@pytest.mark.parametrize("frozen", (False, True))
@pytest.mark.parametrize("masked", (False, True), ids=("", "masked"))
def test_rows_too_many_for_wide_blocks_are_cut_into_chunks(parts, frozen, masked):
    """Of 16 rows: each goes through all blocks, and dW is summed over them."""
    n, outputs = 40, ("logprob",) if frozen else ("logprob", "entropy")
    hidden, weight, bias = leaves(n=n)
    target = random_target(n, vocab=V)
    mask = torch.arange(n) % 8 > 0 if masked else torch.ones(n, dtype=torch.bool)
    inputs = (hidden,) if frozen else (hidden, weight, bias)
    head = [x.detach() if frozen else x for x in (weight, bias)]
    options = dict(outputs=outputs, mask=mask, chunk_tokens=1)
    stats = stats_of(hidden, head[0], target, bias=head[1], **options)
    assert {count for count, _ in parts} == ({16, 3} if masked else {16, 8})
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    exact = truth(wide[0] @ wide[1].T, target, bias=wide[2])
    given = {name: torch.where(mask, torch.randn(n), 0) for name in outputs}
    for name in outputs:
        assert error(getattr(stats, name), torch.where(mask, exact[name], 0)) < 1e-6
    grads = gradient(stats._asdict(), given, *inputs)
    for got, want in zip(grads, gradient(exact, given, *wide[: len(inputs)]), strict=True):
        assert error(got, want) < 5e-6


def test_losses_with_a_frozen_head(parts):
    """A weight of logprob alone is enough; one of the entropy needs the row first."""
    hidden, weight, _ = leaves()
    weight, target = weight.detach(), random_target(N, vocab=V)
    target[2] = -100
    given = torch.rand(N)

    def value(**weights):
        options = dict(chunk_tokens=CHUNK, impl="cpu", **weights)
        return linear_token_loss(hidden, weight, target, **options).loss

    (got,) = torch.autograd.grad(value(logprob_weight=given), hidden)
    assert {columns for _, columns in parts} == {64, 56, 61}
    wide = hidden.detach().double().requires_grad_()
    exact = truth(wide @ weight.double().T, target.clamp(min=0))
    counted = torch.where(target == -100, 0, given)
    want = gradient(exact, {"logprob": counted}, wide)[0]
    assert error(got, want) < 1e-6
    parts.clear()
    value(logprob_weight=given, entropy_weight=given)
    assert {columns for _, columns in parts} == {V}


def test_parts_of_rows(cpu):
    """The kernel itself: any cuts, the target in any part, a tie between parts."""
    logits = torch.randn(2, 3, 100)
    logits[0, 0, [4, 50, 99]] = 9
    spec = RowSpec(target=torch.tensor([50, 4, 0, 99, 10, 33]), valid_vocab=100)
    whole = cpu.stats(logits, spec, ROW_OUTPUTS)
    for ends in ((0, 100), (0, 1, 100), (0, 10, 20, 50, 99, 100)):
        parts = cpu.new_parts(6)
        for start, stop in pairwise(ends):
            own = spec._replace(valid_vocab=stop - start)
            rows = cpu.part_stats(logits[..., start:stop], own, ROW_OUTPUTS, parts, start)
        for name, got, want in zip(("max", "log1p_r", "mean_d", *ROW_OUTPUTS), rows, whole):
            assert error(got, want) < 1e-6, name
    with pytest.raises(ValueError, match=r"parts must be those of new_parts\(6\)"):
        cpu.part_stats(logits, spec, (), cpu.new_parts(5), 0)


@pytest.mark.parametrize("vocab", (4096, 4097, 50257, 151936))
@pytest.mark.parametrize("size", (4, 8))
@pytest.mark.parametrize("memory", (chunking.CPU_WORKSPACE_BYTES, 1 << 21, 1 << 18))
def test_blocks_of_many_rows_fit_the_memory(vocab, size, memory):
    for count in (1, 100, 1024, 5000, 10_000, 32_768):
        made = chunking.block_columns(count, vocab, size, memory, 4096)
        if memory < 16 * size * 2 * 4096:
            assert made is None
            continue
        widths = [
            chunking.width_of(block)
            for block in chunking.column_blocks(vocab, made.blocks, made.tile)
        ]
        assert max(widths) * size * made.chunk <= memory and sum(widths) == vocab
        assert all(width % 4096 == 0 for width in widths[:-1])
        most = memory // (size * 2 * 4096) // 16 * 16
        assert made.chunk == count or -(-count // made.chunk) == -(-count // most)
