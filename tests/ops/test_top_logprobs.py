"""The k likeliest tokens of a row and their log-probabilities, on every backend."""

import pytest
import torch
from helpers import IMPLS, corners_and_sample, error, random_logits, same_bits, transformed
from torch.utils._python_dispatch import TorchDispatchMode

from em_kernels import linear_softmax_stats, linear_top_logprobs, softmax_stats, top_logprobs
from em_kernels.backends import row_index, support

EACH_IMPL = pytest.mark.parametrize("impl", IMPLS)
N, V, D, K = 7, 61, 8, 5
INF = float("inf")
TRANSFORMS = {
    "plain": {},
    "scaled": dict(temperature=0.7),
    "everything": dict(temperature=torch.linspace(0.5, 2, N), softcap=50.0, logit_scale=-0.5),
    "padded": dict(valid_vocab=V - 4),
}


@pytest.fixture(params=("rows looked at", "rows not looked at"))
def looks(request, monkeypatch):
    """As on a CPU, and as on a GPU."""
    if request.param == "rows not looked at":
        monkeypatch.setattr(row_index, "is_free_to_look", lambda x: False)


def exact(z, k):
    """The definition, of z in float64."""
    ids = z.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return ids, torch.log_softmax(z, -1).gather(-1, ids)


CASES = corners_and_sample(
    2,
    IMPLS,
    (torch.float32, torch.bfloat16, torch.float64),
    tuple(TRANSFORMS),
    (1, K, V - 4),
)


@pytest.mark.parametrize("impl, dtype, transform, k", CASES)
def test_equals_the_definition(impl, device, dtype, transform, k):
    # Apart by 1/8, so that no rounding brings two of them in another order; many are equal.
    x = (random_logits(N, V, device=device) * 8 // 1 / 8).to(dtype)
    options = TRANSFORMS[transform].items()
    transform = {n: v.to(device) if torch.is_tensor(v) else v for n, v in options}
    found = top_logprobs(x, k, impl=impl, **transform)
    ids, logprob = exact(transformed(x.double(), **transform), k)
    assert torch.equal(found.ids, ids) and found.ids.dtype == torch.int64
    assert error(found.logprob, logprob) < (1e-12 if dtype == torch.float64 else 2e-6)
    assert found.logprob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (found.logprob.diff(dim=-1) <= 0).all()
    again = softmax_stats(x, found.ids, outputs=("logprob",), impl=impl, **transform)
    assert same_bits(again.logprob, found.logprob)


@EACH_IMPL
def test_the_lower_of_equal_ids_comes_first(impl, device, looks):
    x = torch.zeros(4, V, device=device)
    x[1, 40], x[2, 3:30], x[3] = 1.0, 2.0, -INF
    x[3, 50:53] = 0.0
    found = top_logprobs(x, 4, impl=impl)
    expected = [[0, 1, 2, 3], [40, 0, 1, 2], [3, 4, 5, 6], [50, 51, 52, 0]]
    assert found.ids.tolist() == expected
    assert (found.logprob[3, :3] + torch.log(torch.tensor(3.0))).abs().max() < 1e-6
    assert found.logprob[3, 3] == -INF


@EACH_IMPL
def test_where_the_transform_makes_logits_equal(impl, device):
    """A softcap at which tanh is 1: z are the same though the logits are not."""
    x = torch.linspace(60, 90, V, device=device).expand(2, V)
    found = top_logprobs(x, K, softcap=1.0, impl=impl)
    assert found.ids.tolist() == [list(range(K))] * 2


@EACH_IMPL
@pytest.mark.parametrize("chunk", (None, 3))
@pytest.mark.parametrize("mask", (False, True), ids=("all", "some"))
def test_from_hidden_states(impl, device, chunk, mask):
    hidden = random_logits(2, N, D, scale=1.0, device=device).requires_grad_()
    weight = random_logits(V, D, scale=1.0, device=device).requires_grad_()
    low = [random_logits(*s, scale=0.5, device=device) for s in ((3, D), (V, 3))]
    options = dict(bias=random_logits(V, device=device), softcap=30.0, lora=(*low, 0.5))
    options |= dict(chunk_tokens=chunk, impl=impl, temperature=0.8)
    counted = torch.ones(2, N, dtype=torch.bool, device=device)
    if mask:
        counted[:, ::3] = False
        options["mask"] = counted
    found = linear_top_logprobs(hidden, weight, K, ignore_index=-7, **options)
    assert not found.logprob.requires_grad
    merged = weight.double() + 0.5 * low[1].double() @ low[0].double()
    z = transformed(
        hidden.detach().double() @ merged.detach().T,
        bias=options["bias"].double(),
        softcap=30.0,
        temperature=0.8,
    )
    ids, logprob = exact(z, K)
    assert torch.equal(found.ids, torch.where(counted[..., None], ids, -7))
    assert error(found.logprob, torch.where(counted[..., None], logprob, 0)) < 2e-6
    target = torch.where(counted[..., None], found.ids, -100)
    with torch.no_grad():
        again = linear_softmax_stats(hidden, weight, target, outputs=("logprob",), **options)
    assert same_bits(again.logprob, found.logprob)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_dtypes_of_the_product(dtype):
    hidden, weight = random_logits(N, D), random_logits(V, D, dtype=torch.bfloat16)
    found = linear_top_logprobs(hidden.to(dtype), weight, K, product_dtype=torch.float64)
    ids, logprob = exact(hidden.to(dtype).double() @ weight.double().T, K)
    assert torch.equal(found.ids, ids) and error(found.logprob, logprob) < 1e-12
    coarse = hidden.bfloat16() @ weight.T
    found = linear_top_logprobs(hidden.bfloat16(), weight, K, logits_dtype=torch.bfloat16)
    assert torch.equal(found.ids, top_logprobs(coarse, K).ids)


@EACH_IMPL
def test_edges(impl, device, looks):
    x = random_logits(4, V, device=device)
    x[0, 3], x[1, 4], x[2] = float("nan"), INF, -INF
    found = top_logprobs(x, K, impl=impl)
    assert found.logprob[:3].isnan().all() and found.logprob[3].isfinite().all()
    assert ((found.ids >= 0) & (found.ids < V)).all()
    masked = top_logprobs(x, K, mask=torch.tensor([0, 0, 0, 1]).to(device), impl=impl)
    assert (masked.ids[:3] == -100).all() and (masked.logprob[:3] == 0).all()
    assert top_logprobs(x[:0], K, impl=impl).ids.shape == (0, K)
    assert linear_top_logprobs(x[:0], x, 2, impl=impl).logprob.shape == (0, 2)


def test_pieces_of_rows_change_nothing(monkeypatch):
    x = random_logits(3, N, V)
    whole = top_logprobs(x, K)
    monkeypatch.setitem(support.PIECE_BYTES, "cpu", 4 * V * 2)
    for one, other in zip(whole, top_logprobs(x, K)):
        assert torch.equal(one, other)


class Largest(TorchDispatchMode):
    """The most entries of a tensor that an operation makes, within operators too."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from em_kernels.ops.registry import OPERATORS

        name = func.overloadpacket.__name__
        if func.namespace == "em_kernels" and name in OPERATORS:
            with self:
                return OPERATORS[name].run(*args)
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(out, torch.Tensor):
                self.entries = max(self.entries, out.numel())
        return result


@pytest.mark.parametrize("impl", ("reference", "cpu"))
def test_no_more_than_a_chunk_is_held(impl, monkeypatch):
    monkeypatch.setitem(support.PIECE_BYTES, "cpu", 1)
    rows, vocab, chunk = 256, 1000, 4
    hidden, weight = random_logits(rows, D), random_logits(vocab, D)
    with Largest() as seen:
        linear_top_logprobs(hidden, weight, K, chunk_tokens=chunk, impl=impl)
    assert vocab <= seen.entries <= 3 * chunk * vocab < rows * vocab // 16


def test_compiled_and_exported():
    hidden, weight = random_logits(N, D), random_logits(V, D)

    class Top(torch.nn.Module):
        def forward(self, hidden, weight):
            return linear_top_logprobs(hidden, weight, K), top_logprobs(hidden, 2)

    expected = Top()(hidden, weight)
    compiled = torch.compile(Top(), fullgraph=True, backend="aot_eager")(hidden, weight)
    exported = torch.export.export(Top(), (hidden, weight)).module()(hidden, weight)
    for made in (compiled, exported):
        for found, other in zip(made, expected, strict=True):
            assert torch.equal(found.ids, other.ids)
            assert same_bits(found.logprob, other.logprob)


BAD_K = {
    "none": (0, ValueError, "k must be 1 or more, got 0"),
    "more than there are": (V + 1, ValueError, f"k must be at most {V}.*got {V + 1}"),
    "a bool": (True, TypeError, "k must be an int.*got bool"),
    "a float": (2.0, TypeError, "k must be an int.*got float"),
}


@pytest.mark.parametrize("k, kind, text", BAD_K.values(), ids=BAD_K)
def test_a_bad_k_is_told(k, kind, text):
    x, weight = random_logits(N, V), random_logits(V, V)
    with pytest.raises(kind, match=text):
        top_logprobs(x, k)
    with pytest.raises(kind, match=text):
        linear_top_logprobs(x, weight, k)


def test_what_it_does_not_take_is_told():
    x = random_logits(N, V)
    with pytest.raises(ValueError, match="k must be at most 4"):
        top_logprobs(x, 5, valid_vocab=4)
    with pytest.raises(TypeError, match="unexpected keyword argument 'top_k'"):
        top_logprobs(x, K, top_k=3)
    with pytest.raises(ValueError, match="impl must be one of"):
        top_logprobs(x, K, impl="none")
