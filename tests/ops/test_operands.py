"""Operands as users have them: dtypes that differ; tensors that are no plain ones, cut ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import each_impl, error, make_linear, random_target, truth
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from em_kernels import (
    backends,
    linear_entropy_loss,
    linear_softmax_stats,
    linear_token_loss,
    softmax_stats,
)
from em_kernels.backends.interface import RowSpec, Saved, Upstream
from em_kernels.backends.reference import Reference
from em_kernels.linear import chunking, chunks, products
from em_kernels.linear.plan import Linear, Needs

N, D, V = 24, 16, 301
UNIT = {
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
    torch.float32: 2**-23,
    torch.float64: 1e-14,
}
PAIRS = [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float32, torch.float16),
    (torch.float64, torch.float32),
    (torch.bfloat16, torch.float64),
]
EACH_PAIR = pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: "-".join(map(str, pair)))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """A weight is cast in three pieces."""
    monkeypatch.setattr(products, "CPU_PIECE_BYTES", 128 * D * 4)


def operands(dtypes):
    hidden, weight = make_linear(N, dim=D, vocab=V, dtype=torch.float64)
    made = [x.detach().to(dtype).requires_grad_() for x, dtype in zip((hidden, weight), dtypes)]
    bias = torch.randn(V, dtype=torch.float64).requires_grad_()
    return *made, bias, random_target(N, vocab=V)


def by_stats(hidden, weight, bias, target, **options):
    stats = linear_softmax_stats(hidden, weight, target, bias=bias, **options)
    return (stats.logprob + 0.3 * stats.entropy).mean()


def by_loss(hidden, weight, bias, target, **options):
    rows = torch.full((N,), 1 / N, dtype=torch.float64)
    given = dict(logprob_weight=rows, entropy_weight=0.3 * rows)
    return linear_token_loss(hidden, weight, target, bias=bias, **given, **options).loss


def exact(hidden, weight, bias, target):
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    values = truth(wide[0] @ wide[1].T + wide[2], target)
    total = (values["logprob"] + 0.3 * values["entropy"]).mean()
    return total, torch.autograd.grad(total, wide)


@EACH_PAIR
@each_impl
@pytest.mark.parametrize("call", (by_stats, by_loss))
@pytest.mark.parametrize("options", ({}, {"chunk_tokens": 7}, {"filter_eps": 1e-9}), ids=str)
def test_the_product_is_in_the_wider_dtype(call, dtypes, impl, options):
    """As exact as that dtype is; every gradient is rounded once, to the dtype of its tensor."""
    given = operands(dtypes)
    total = call(*given, impl=impl, **options)
    total.backward()
    expected, gradients = exact(*given)
    wider = min(UNIT[dtype] for dtype in dtypes)
    assert error(total, expected) < 20 * max(wider, UNIT[torch.float32])
    for x, gradient in zip(given[:3], gradients, strict=True):
        assert x.grad.dtype == x.dtype
        assert error(x.grad, gradient) < UNIT[x.dtype] + 20 * max(wider, UNIT[torch.float32])


@pytest.mark.parametrize("told", (torch.int8, torch.float8_e4m3fn, torch.cfloat, "float32"))
def test_what_is_no_dtype_of_a_product_is_refused(told):
    with pytest.raises(ValueError, match="product_dtype must be the dtype of hidden"):
        linear_softmax_stats(torch.zeros(2, 3), torch.zeros(4, 3), product_dtype=told)


@each_impl
@pytest.mark.parametrize("call", (by_stats, by_loss))
def test_told_dtypes(call, impl):
    """In the narrower one, as where the wider tensor had been cast; in one that holds both."""
    hidden, weight, bias, target = operands((torch.float32, torch.float32))
    narrow = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    options = dict(impl=impl, logits_dtype=torch.float32, chunk_tokens=7)
    expected = call(*narrow, bias, target, **options)
    wanted = torch.autograd.grad(expected, narrow)
    told = call(narrow[0], weight, bias, target, product_dtype=torch.bfloat16, **options)
    assert error(told, expected) < 1e-6
    found = torch.autograd.grad(told, (narrow[0], weight))
    for x, gradient in zip(found, wanted, strict=True):
        assert error(x, gradient) < UNIT[torch.bfloat16]
    wide = call(*narrow, bias, target, product_dtype=torch.float64, impl=impl)
    assert error(wide, exact(*narrow, bias, target)[0]) < 1e-12
    half = weight.detach().half()
    both = call(narrow[0], half, bias, target, product_dtype=torch.float32, impl=impl)
    assert error(both, exact(narrow[0], half, bias, target)[0]) < 1e-5


@EACH_PAIR
@each_impl
def test_frozen_operands_and_blocks_of_the_vocabulary(dtypes, impl, monkeypatch):
    """Memory for a few columns at a time: all orders in which rows and columns are gone through."""
    monkeypatch.setattr(chunking, "CPU_WORKSPACE_BYTES", 12 * 8 * chunking.row_stride(V))
    monkeypatch.setattr(chunking, "LEAST_COLUMNS", 1)
    monkeypatch.setattr(chunking, "COLUMN_TILE", 16)
    for frozen in ((), (0,), (1,), (1, 2)):
        given = operands(dtypes)
        for i in frozen:
            given[i].requires_grad_(False)
        left = [i for i in range(3) if i not in frozen]
        _, gradients = exact(*given)
        stats = linear_softmax_stats(
            *given[:2], given[3], bias=given[2], outputs=("lse",), impl=impl
        )
        for total in (by_stats(*given, impl=impl), by_loss(*given, impl=impl)):
            for i, gradient in zip(left, torch.autograd.grad(total, [given[i] for i in left])):
                limit = UNIT[given[i].dtype] + 20 * max(
                    min(UNIT[d] for d in dtypes), UNIT[torch.float32]
                )
                assert error(gradient, gradients[i]) < limit
        assert error(stats.lse.detach(), truth(logits_of(*given))["lse"]) < 1e-5


def logits_of(hidden, weight, bias, target):
    return hidden.detach().double() @ weight.detach().double().T + bias.detach()


class Sizes(TorchDispatchMode):
    """(entries, dtype) of the memory of what operators make, but for views of those given."""

    def __init__(self, *given):
        super().__init__()
        self.given, self.seen = {x.untyped_storage().data_ptr() for x in given}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(out, torch.Tensor):
                memory = out.untyped_storage()
                if memory.data_ptr() not in self.given:
                    self.seen.append((memory.nbytes() // out.itemsize, out.dtype))
        return result


@pytest.mark.parametrize(
    "dtypes, product",
    [(PAIRS[i], None) for i in (1, 3, 4)] + [((torch.float32,) * 2, torch.bfloat16)],
    ids=str,
)
def test_the_weight_is_never_cast_whole(dtypes, product):
    hidden, weight, _, target = operands(dtypes)
    hidden, weight = hidden.detach(), weight.detach()
    hidden = hidden.to(product or torch.promote_types(*dtypes))
    linear, spec = Linear.of(hidden, weight, 4, None), RowSpec(target=target, valid_vocab=V)
    upstream, rows = Upstream(entropy=torch.ones(N)), torch.zeros(N)
    for needs in (Needs(True, False, True), Needs(True)):
        with Sizes(weight) as sizes:
            chunks.loss(linear, spec, upstream, (), needs, Reference())
            chunks.grad(linear, spec, Saved(rows, rows, rows), upstream, needs, Reference())
        cast, whole = products.cast_pieces(weight, hidden.dtype)[0].stop * D, V * D
        assert (cast, hidden.dtype) in sizes.seen and cast < whole
        assert all(size < whole for size, dtype in sizes.seen)


def test_autocast_casts_both_unless_told():
    hidden, weight, bias, target = operands((torch.bfloat16, torch.float32))
    plain = by_stats(hidden, weight, bias, target)
    with torch.autocast("cpu", torch.bfloat16):
        cast = by_stats(hidden, weight, bias, target)
        told = by_stats(hidden, weight, bias, target, product_dtype=torch.float32)
    assert torch.equal(told, plain)
    assert torch.equal(cast, by_stats(hidden, weight.bfloat16(), bias, target))


def test_second_derivatives_and_compile():
    hidden, weight, bias, target = operands((torch.float32, torch.float64))
    (first,) = torch.autograd.grad(by_stats(hidden, weight, bias, target), weight, None, None, True)
    (second,) = torch.autograd.grad(first.square().sum(), hidden)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    values = truth(wide[0] @ wide[1].T + wide[2], target)
    total = (values["logprob"] + 0.3 * values["entropy"]).mean()
    (first,) = torch.autograd.grad(total, wide[1], create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), wide[0])
    assert second.dtype == torch.float32 and error(second, expected) < 1e-5
    compiled = torch.compile(by_stats, backend="aot_eager", fullgraph=True)
    assert error(compiled(hidden, weight, bias, target), total) < 1e-6


@pytest.mark.skipif(backends()["triton"] != "available", reason="triton is not available")
def test_the_fused_kernel_takes_a_narrower_weight():
    hidden, weight, bias, target = operands((torch.float32, torch.bfloat16))
    with torch.no_grad():
        stats = linear_softmax_stats(hidden, weight, target, bias=bias, fuse_product=True)
        values = truth(logits_of(hidden, weight, bias, target), target)
        assert error(stats.entropy, values["entropy"]) < 1e-5
        with pytest.raises(ValueError, match="product_dtype must not be narrower than weight"):
            linear_softmax_stats(
                hidden.bfloat16(), weight.float(), product_dtype=torch.bfloat16, fuse_product=True
            )


# Tensors that are not plain


class Loud(torch.Tensor):
    """A subclass with numbers of its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


class Quiet(torch.Tensor):
    """One that changes nothing."""


class Params4bit(nn.Parameter):
    """The name is what bitsandbytes's is known by."""


HIDDEN, WEIGHT = torch.randn(4, D), torch.randn(V, D)
REFUSED = {
    "subclass": (WEIGHT.as_subclass(Loud), r"got a test_operands\.Loud of .*full_tensor"),
    "bitsandbytes": (
        Params4bit(torch.zeros(V * D // 2, 1, dtype=torch.uint8), requires_grad=False),
        r"got a test_operands\.Params4bit of torch.uint8: dequantise it",
    ),
    "int8": (WEIGHT.to(torch.int8), "got torch.int8, as of a quantised layer: dequantise it"),
    "float8": (WEIGHT.to(torch.float8_e4m3fn), "got torch.float8_e4m3fn, as .*: dequantise it"),
    "sparse": (WEIGHT.to_sparse(), r"got a torch\.Tensor of .*layout is torch.sparse_coo: .*dense"),
    "nested": (
        torch.nested.nested_tensor([WEIGHT[:3], WEIGHT[3:]], layout=torch.jagged),
        "got a torch.nested.*to_padded_tensor",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tensors_that_are_not_plain_are_refused(name):
    weight, message = REFUSED[name]
    rows = torch.ones(4)
    for call in (
        lambda: linear_softmax_stats(HIDDEN, weight),
        lambda: linear_token_loss(HIDDEN, weight, entropy_weight=rows),
        lambda: linear_entropy_loss(HIDDEN, weight),
    ):
        with pytest.raises(TypeError, match=f"^weight must be .*{message}"):
            call()
    with pytest.raises(TypeError, match=f"^logits must be .*{message}"):
        softmax_stats(weight)


def test_torchao_weights_are_refused():
    quantised = pytest.importorskip("torchao.quantization")
    layer = nn.Sequential(nn.Linear(64, 64, bias=False))
    quantised.quantize_(layer, quantised.Int8WeightOnlyConfig())
    with pytest.raises(TypeError, match=r"weight must be .* got a torchao\..*: dequantise it"):
        linear_softmax_stats(torch.randn(4, 64), layer[0].weight)


def test_tensors_that_are_plain_are_served():
    expected = linear_softmax_stats(HIDDEN, WEIGHT).entropy
    for weight in (nn.Parameter(WEIGHT), WEIGHT.as_subclass(Quiet), nn.Buffer(WEIGHT)):
        assert torch.equal(torch.Tensor(linear_softmax_stats(HIDDEN, weight).entropy), expected)
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = linear_softmax_stats(HIDDEN, mode.from_tensor(WEIGHT)).entropy
    assert fake.shape == (4,)


# Parameters of which this rank holds a part


def deepspeed(weight):
    weight.ds_id, weight.ds_status, weight.ds_tensor = 0, SimpleNamespace(), None
    return weight


def fsdp1(weight):
    weight._fsdp_flattened = True
    return weight


CUT = [
    (deepspeed(nn.Parameter(torch.zeros(0))), "DeepSpeed ZeRO-3 .*deepspeed.zero.GatheredParam"),
    (fsdp1(nn.Parameter(torch.zeros(0))), r"FSDP1 .*summon_full_params.*FSDP2"),
    (fsdp1(nn.Parameter(torch.zeros(40))), r"FSDP1 .*summon_full_params.*FSDP2"),
]


@pytest.mark.parametrize("part, message", CUT)
def test_cut_parameters_are_named(part, message):
    with pytest.raises(ValueError, match=rf"^weight, of shape \({part.numel()},\), is .*{message}"):
        linear_softmax_stats(HIDDEN, part)
    with pytest.raises(ValueError, match=rf"^bias, of shape \({part.numel()},\), is .*{message}"):
        linear_softmax_stats(HIDDEN, WEIGHT, bias=part)


def test_gathered_parameters_are_served():
    for mark in (deepspeed, fsdp1):
        weight = mark(nn.Parameter(WEIGHT.clone()))
        linear_softmax_stats(HIDDEN, weight).entropy.sum().backward()
        assert weight.grad.shape == weight.shape
