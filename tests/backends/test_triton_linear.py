"""linear_softmax_stats(..., fuse_product=True): the product and the statistics in one kernel."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend needs triton")
import triton
import triton.language as tl
from helpers import row_arguments
from triton_rows import DEVICE, DTYPES, NAMES, ROUNDINGS, assert_close, double, rounding

from em_kernels import linear_softmax_stats
from em_kernels.backends import reference
from em_kernels.backends.interface import NEEDS_TARGET, ROW_OUTPUTS, RowSpec, accumulate_dtype
from em_kernels.backends.triton import linear
from em_kernels.backends.triton.tiles import assignment

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.usefixtures("small_tiles", "nan_filled_memory"),
]
N, D, V, VALID = 20, 19, 109, 101  # two row blocks, two steps of D, four parts of two tiles
SMALL = linear.Launch(linear.Tile(16, 16, 16, walk=2, group=2, cuts=1), 1, 1)
TRANSFORMS = {
    "plain": {},
    "temperature": dict(temperature=0.7, logit_scale=-1.3),
    "rows": dict(temperature_rows=True),
    "softcap": dict(softcap=9.0),
    "bias": dict(bias=True),
    "everything": dict(
        softcap=9.0, bias=True, logit_scale=1.5, temperature_rows=True, valid=VALID, mask=True
    ),
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Where it is interpreted, tiles small enough for several in every direction."""
    if DEVICE == "cpu":
        monkeypatch.setattr(linear, "plan", lambda dtype, light, shared_memory: SMALL)


def make(dtype=torch.float32, valid=V, exact=False, **options):
    """(hidden, weight, spec): logits of standard deviation about 3.

    `exact` takes multiples of 1/8: products and their sums are exact in any order, so their bits do
    not depend on where in a tile a row stands, which a matrix library is free to let them.
    """
    hidden, weight = torch.randn(N, D), 0.7 * torch.randn(V, D)
    if exact:
        hidden, weight = on_a_grid(hidden), on_a_grid(weight)
    hidden, weight = hidden.to(dtype).to(DEVICE), weight.to(dtype).to(DEVICE)
    target = torch.randint(valid, (N,))
    target[:3] = torch.tensor([valid - 1, 0, int((hidden @ weight.T)[2, :valid].argmax())])
    if options.get("bias"):
        options["bias"] = torch.randn(V).to(dtype).to(DEVICE)
    if options.get("temperature_rows"):
        options["temperature_rows"] = (0.5 + torch.rand(N)).to(accumulate_dtype(dtype)).to(DEVICE)
    if options.get("mask"):
        options["mask"] = (torch.arange(N) % 3 != 1).to(DEVICE)
    return hidden, weight, RowSpec(target=target.to(DEVICE), valid_vocab=valid, **options)


def on_a_grid(x):
    return (8 * x).round() / 8


def fused(hidden, weight, spec, outputs=ROW_OUTPUTS) -> dict:
    rows = linear.linear_stats(hidden, weight, spec, outputs)
    return dict(zip(NAMES[: 3 if not outputs else None], rows))


def truth(hidden, weight, spec) -> dict:
    logits = (hidden.double() @ weight.double().T)[None]
    return dict(zip(NAMES, reference.stats(logits, double(spec), ROW_OUTPUTS)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", TRANSFORMS)
def test_every_output(dtype, options):
    hidden, weight, spec = make(dtype, **TRANSFORMS[options])
    got, want = fused(hidden, weight, spec), truth(hidden, weight, spec)
    for name in NAMES:
        assert got[name].dtype == accumulate_dtype(dtype) and got[name].shape == (N,)
        assert_close(got[name], want[name], ROUNDINGS * rounding(got[name].dtype), name)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 40, 3), (16, 16, 16), (17, 33, 31), (33, 5, 257)])
def test_shapes(shape):
    rows, depth, vocab = shape
    hidden, weight = torch.randn(rows, depth, device=DEVICE), torch.randn(vocab, depth).to(DEVICE)
    spec = RowSpec(target=torch.randint(vocab, (rows,)).to(DEVICE), valid_vocab=vocab)
    got, want = fused(hidden, weight, spec), truth(hidden, weight, spec)
    for name in NAMES:
        assert_close(got[name], want[name], 2 * ROUNDINGS * rounding(torch.float32), name)


def test_no_rows_and_no_counted_rows():
    hidden, weight, spec = make()
    empty = spec._replace(target=spec.target[:0])
    assert [r.shape for r in fused(hidden[:0], weight, empty).values()] == [(0,)] * len(NAMES)
    masked = spec._replace(mask=torch.zeros(N, dtype=torch.bool, device=DEVICE))
    assert all(row.eq(0).all() for row in fused(hidden, weight, masked).values())


def test_masked_rows_are_zero_and_not_read():
    hidden, weight, spec = make(exact=True)
    mask = torch.arange(N, device=DEVICE) % 4 != 2
    clean = fused(hidden, weight, spec)
    hidden[~mask] = math.nan
    spec = spec._replace(mask=mask, target=torch.where(mask, spec.target, -100))
    for name, row in fused(hidden, weight, spec).items():
        assert row[~mask].eq(0).all() and torch.equal(row[mask], clean[name][mask]), name


def test_padded_vocabulary_is_not_read():
    hidden, weight, spec = make(exact=True, valid=VALID, bias=True)
    clean = fused(hidden, weight, spec)
    weight[VALID:], spec.bias[VALID:] = math.nan, math.nan
    for name, row in fused(hidden, weight, spec).items():
        assert torch.equal(row, clean[name]), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_is_nan_and_alone(bad):
    hidden, weight, spec = make(exact=True)
    clean = fused(hidden, weight, spec)
    hidden[5, 3] = bad
    others = torch.arange(N, device=DEVICE) != 5
    for name, row in fused(hidden, weight, spec).items():
        assert row[5].isnan() and torch.equal(row[others], clean[name][others]), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 40, V - 1])
def test_a_bad_entry_of_the_vocabulary_makes_every_row_nan(bad, where):
    hidden, weight, spec = make(bias=True)
    spec.bias[where] = bad
    assert all(row.isnan().all() for row in fused(hidden, weight, spec).values())


@pytest.mark.parametrize("softcap", [0.0, 9.0])
def test_minus_infinity_has_probability_zero(softcap):
    hidden, weight, spec = make(bias=True, softcap=softcap)
    spec.bias[:70] = -math.inf  # two parts of the vocabulary and a tile of the third
    got, want = fused(hidden, weight, spec), truth(hidden, weight, spec)
    assert got["logprob"].eq(-math.inf).any() and got["logprob"].isfinite().any()
    for name in NAMES:
        assert_close(got[name], want[name], 1e-5, name)
    spec.bias[:] = -math.inf
    assert all(row.isnan().all() for row in fused(hidden, weight, spec).values())


def test_ties_count_and_the_first_is_the_argmax():
    hidden, weight = torch.ones(4, D, device=DEVICE), torch.zeros(V, D, device=DEVICE)
    leaders = [21, 22, 40, 100]  # in one tile, in another of the same part, in another part
    weight[leaders] = 0.5
    spec = RowSpec(target=torch.tensor(leaders, device=DEVICE), valid_vocab=V)
    got, want = fused(hidden, weight, spec), truth(hidden, weight, spec)
    assert got["is_top1"].tolist() == [1, 0, 0, 0]
    for name in NAMES:
        assert_close(got[name], want[name], 1e-6, name)


def test_relative_accuracy_when_nearly_certain():
    hidden, weight, spec = make()
    gaps = torch.linspace(0, 30, N, device=DEVICE)
    weight[55, 0], hidden[:, 0], weight[:, 0] = 1.0, 0.0, 0.0
    leaders = (hidden @ weight.T).amax(-1)
    hidden[:, 0] = leaders - hidden @ weight[55] + gaps
    weight[55, 0] = 1.0
    spec = spec._replace(target=torch.full((N,), 55, device=DEVICE))
    got, want = fused(hidden, weight, spec), truth(hidden, weight, spec)
    assert want["entropy"].min() < 1e-10 and want["entropy"].max() > 1
    for name in ("entropy", "logprob", "varentropy"):
        error = (got[name].double() / want[name].to(DEVICE) - 1).abs().max().item()
        assert error < 5e-5, f"{name}: {error:.3g}"


@pytest.mark.parametrize("bad", [-1, V, 2**40])
def test_target_out_of_range_is_nan_in_its_row(bad):
    hidden, weight, spec = make()
    spec.target[2] = bad
    others = torch.arange(N, device=DEVICE) != 2
    for name, row in fused(hidden, weight, spec).items():
        assert row[2].isnan() and not row[others].isnan().any(), name


def test_a_row_does_not_depend_on_the_others():
    hidden, weight, spec = make(exact=True, temperature_rows=True)
    together = fused(hidden, weight, spec)
    rows = slice(15, 18)
    part = spec._replace(
        target=spec.target[rows], temperature_rows=spec.temperature_rows[rows].contiguous()
    )
    alone = fused(hidden[rows], weight, part)
    assert all(torch.equal(alone[name], together[name][rows]) for name in NAMES)


def test_any_strides():
    hidden, weight, spec = make(exact=True)
    want = fused(hidden, weight, spec)
    wide = torch.randn(N, 2 * D, device=DEVICE)
    wide[:, ::2] = hidden
    got = fused(wide[:, ::2], weight.T.contiguous().T, spec)
    assert all(torch.equal(got[name], want[name]) for name in NAMES)


def rows_at(x, room):
    """x with `room` entries between the beginnings of its rows."""
    out = torch.zeros(len(x), room, dtype=x.dtype, device=DEVICE)[:, : x.shape[1]]
    return out.copy_(x)


@pytest.fixture
def tiles(monkeypatch):
    """The tiles of the launches made."""
    seen = []
    plain = linear.Tile._replace
    monkeypatch.setattr(linear.Tile, "_replace", lambda *a, **k: seen.append(k) or plain(*a, **k))
    return seen


@pytest.mark.parametrize(
    "dtype, options", [*zip(DTYPES, ("plain", "everything", "plain", "everything"))]
)
def test_blocks_and_pointers_give_the_same_bits(tiles, dtype, options):
    """Rows of 24 entries begin at 16 bytes and can be copied in blocks; rows of 19 or 25 cannot."""
    hidden, weight, spec = make(dtype, exact=True, **TRANSFORMS[options])
    want = fused(hidden, weight, spec)
    assert not tiles
    for i, (room, other) in enumerate(((24, 19), (24, 24), (25, 24))):
        got = fused(rows_at(hidden, room), rows_at(weight, other), spec)
        assert all(torch.equal(got[name], want[name]) for name in NAMES)
        assert DEVICE != "cpu" or tiles == i * [{"bulk": True}]


@pytest.mark.parametrize(
    "dtype, shape", [*zip(DTYPES, [(1, 8, 3), (17, 32, 31), (33, 8, 257), (16, 48, 16)])]
)
def test_shapes_in_blocks(dtype, shape):
    rows, depth, vocab = shape
    hidden, weight = torch.randn(rows, depth).to(dtype), torch.randn(vocab, depth).to(dtype)
    assert linear.describable(hidden) and linear.describable(weight)
    hidden, weight = hidden.to(DEVICE), weight.to(DEVICE)
    spec = RowSpec(target=torch.randint(vocab, (rows,)).to(DEVICE), valid_vocab=vocab)
    got, want = fused(hidden, weight, spec), truth(hidden, weight, spec)
    for name in NAMES:
        assert_close(got[name], want[name], 2 * ROUNDINGS * rounding(got[name].dtype), name)


def test_what_a_descriptor_cannot_describe():
    x = torch.zeros(4, 16, dtype=torch.bfloat16, device=DEVICE)
    assert linear.describable(x) and linear.describable(x[:, :9])
    for view in (x[:, 1:9], x.T, x[:, ::2], x[:1].expand(4, 16), x.flatten()[:44].view(4, 11)):
        assert not linear.describable(view)
        assert linear.describable(linear.aligned(view)) and linear.aligned(view).equal(view)


def test_padding_beyond_the_rows_of_a_block_is_not_read():
    """Columns beside the matrix and words beyond `valid_vocab`, in blocks."""
    hidden, weight, spec = make(exact=True, valid=VALID)
    want = fused(hidden, weight, spec)
    wide = [torch.full((len(x), 24), math.nan, device=DEVICE) for x in (hidden, weight)]
    hidden, weight = wide[0][:, :D].copy_(hidden), wide[1][:, :D].copy_(weight)
    weight[VALID:] = math.nan
    got = fused(hidden, weight, spec)
    assert all(torch.equal(got[name], want[name]) for name in NAMES)


def test_one_output_needs_no_more_memory_than_its_own(monkeypatch):
    hidden, weight, spec = make()
    seen = []
    parts = linear._parts
    monkeypatch.setattr(linear, "_parts", lambda *args: seen.append(parts(*args)) or seen[-1])
    for outputs in (("entropy",), ("is_top1",), ("collision",), ("logit_var",), ROW_OUTPUTS):
        linear.linear_stats(hidden, weight, spec, outputs)
    assert [sum(p is not None for p in part) for part in seen] == [3, 4, 6, 9, 13]
    (shape,) = {p.shape for part in seen for p in part if p is not None}
    assert shape[0] == N and (DEVICE != "cpu" or shape[1] == 4)


@triton.jit
def count_assignments(counts, row_blocks, splits, group):
    block, split = assignment(tl.program_id(0), row_blocks, splits, group)
    tl.atomic_add(counts + block * splits + split, 1)


@pytest.mark.parametrize("sizes", [(1, 1, 16), (5, 3, 16), (16, 4, 16), (33, 5, 16), (7, 6, 2)])
def test_every_tile_is_assigned_once(sizes):
    row_blocks, splits, group = sizes
    counts = torch.zeros(row_blocks, splits, dtype=torch.int32, device=DEVICE)
    count_assignments[(row_blocks * splits,)](counts, row_blocks, splits, group)
    assert counts.eq(1).all()


# The public function


def public(hidden, weight, target, **kwargs):
    return linear_softmax_stats(hidden, weight, target, outputs=ROW_OUTPUTS, **kwargs)


def test_public_function_agrees_with_the_chunks():
    hidden, weight, spec = make(bias=True)
    arguments = dict(bias=spec.bias, softcap=8.0, temperature=0.9, logit_scale=1.1)
    arguments["mask"] = torch.arange(N, device=DEVICE) % 5 != 0
    arguments["valid_vocab"] = V
    got = public(hidden, weight, spec.target, fuse_product=True, **arguments)
    want = public(hidden.double(), weight.double(), spec.target, impl="reference", **arguments)
    for name in ROW_OUTPUTS:
        ours, theirs = getattr(got, name), getattr(want, name)
        assert ours.shape == (N,) and ours.is_floating_point() == (name != "is_top1")
        assert_close(ours, theirs.double(), 5e-6, name)


def test_leading_shape_and_no_target():
    hidden, weight, _ = make(exact=True)
    outputs = tuple(name for name in ROW_OUTPUTS if name not in NEEDS_TARGET)
    cube = hidden[:18].view(2, 9, D)
    got = linear_softmax_stats(cube, weight, outputs=outputs, fuse_product=True)
    want = linear_softmax_stats(hidden[:18], weight, outputs=outputs, fuse_product=True)
    for name in outputs:
        assert torch.equal(getattr(got, name), getattr(want, name).view(2, 9)), name


def test_opcheck():
    hidden, weight, spec = make()
    arguments = (hidden, weight, *row_arguments(spec), ["logprob", "is_top1"])
    torch.library.opcheck(torch.ops.em_kernels.linear_stats_fused.default, arguments)


@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_is_refused(which):
    operands = list(make()[:2])
    operands[which] = operands[which].requires_grad_()
    name = ("hidden", "weight")[which]
    with pytest.raises(ValueError, match=f"fuse_product=True has no gradient, got {name}"):
        linear_softmax_stats(*operands, fuse_product=True)
    with torch.no_grad():
        assert linear_softmax_stats(*operands, fuse_product=True).entropy.isfinite().all()


@pytest.mark.parametrize(
    "arguments, pattern",
    [
        (dict(chunk_tokens=8), "chunk_tokens must be .* with fuse_product, got 8"),
        (dict(impl="reference"), "impl must be .* with fuse_product, got 'reference'"),
        (dict(logits_dtype=torch.bfloat16), "logits_dtype must be .*float32.*, got torch.bfloat16"),
        (dict(group=object()), "group must be .* with fuse_product"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, pattern):
    hidden, weight, _ = make(torch.bfloat16)
    with pytest.raises(ValueError, match=pattern):
        linear_softmax_stats(hidden, weight, fuse_product=True, **arguments)


def test_without_triton_it_says_so(monkeypatch):
    hidden, weight, _ = make()
    monkeypatch.setattr(
        "em_kernels.backends.choice.why_not", lambda impl, device: "there is none; install it"
    )
    with pytest.raises(ValueError, match="fuse_product=True needs the Triton backend: there is"):
        linear_softmax_stats(hidden, weight, fuse_product=True)
